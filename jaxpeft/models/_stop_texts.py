"""Texts that end what is written, found by an automaton that reads tokens.

Tokens do not end where texts do: "END" may come as one token, as two, or inside of
``"ENDING"``. So the texts are looked for letter by letter, as Aho and Corasick do, and
for every state and token the state behind that token is in a table: one look-up a step.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

HIT = 1  # the state in which a text has appeared; no token leads out of it


def split_stops(
    stop: Sequence[int | str], tokenizer: Any
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns the ids and the texts among what ends a row.

    Args:
        stop: ids and texts.
        tokenizer: needed where there are texts.

    Returns:
        ``(ids, texts)``. A text that is a token of the vocabulary is among the ids, and
        where that token is special not among the texts: it never is written in pieces.

    Raises:
        ValueError: a text is empty, or there is no tokenizer.
    """
    ids, texts = [], []
    for one in stop:
        if not isinstance(one, str):
            ids.append(int(one))
            continue
        if not one:
            raise ValueError("`stop` has an empty text, which is everywhere.")
        if tokenizer is None:
            raise ValueError(
                f"`stop` has the text {one!r}; give the model's `tokenizer`, too."
            )
        token = tokenizer.get_vocab().get(one)
        if token is not None:
            ids.append(token)
        if token not in tokenizer.all_special_ids:
            texts.append(one)
    return tuple(dict.fromkeys(ids)), tuple(dict.fromkeys(texts))


class StopTexts:
    """Where texts appear in a row of tokens.

    Attributes:
        table: int32 ``[states, v]``: the state behind each token. A row begins in state
            0, and is in ``HIT`` once a text has appeared.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any, size: int) -> None:
        """Makes the table.

        Args:
            texts: at least one, none of them empty.
            tokenizer: says what each token is written as.
            size: of the model's vocabulary, v.
        """
        self._texts = tuple(text.encode() for text in texts)
        self._pieces = _pieces(tokenizer, len(tokenizer))
        padded = [*self._pieces, *[b""] * (size - len(self._pieces))][:size]
        self.table = _by_token(_by_letter(self._texts), padded)

    def cut(self, row: Sequence[int]) -> list[int]:
        """Returns a row up to the text that appeared first, in tokens."""
        written = [self._pieces[i] if i < len(self._pieces) else b"" for i in row]
        whole = b"".join(written)
        places = [(whole.find(text), len(text)) for text in self._texts]
        found = [(start + size, start) for start, size in places if start >= 0]
        if not found:
            return list(row)
        room, kept = min(found)[1], 0
        while kept < len(row) and len(written[kept]) <= room:
            room -= len(written[kept])
            kept += 1
        return [*row[:kept], *(self._spell(written[kept][:room]) if room else ())]

    @functools.cached_property  # a step for every token there is, not once a row
    def _ids(self) -> dict[bytes, int]:
        # The last of those that read alike: SentencePiece has bytes before its words.
        return {piece: i for i, piece in enumerate(self._pieces)}

    def _spell(self, text: bytes) -> list[int]:
        """The fewest tokens that are written as a text; none where there are none."""
        ids = self._ids
        best: list[list[int] | None] = [[]]
        for end in range(1, len(text) + 1):
            ways = [
                [*before, ids[text[start:end]]]
                for start, before in enumerate(best)
                if before is not None and text[start:end] in ids
            ]
            best.append(min(ways, key=len, default=None))
        return best[-1] or []


def _by_letter(texts: Sequence[bytes]) -> np.ndarray:
    """``[states, 256]``: the state behind each letter (Aho and Corasick, 1975)."""
    # A state is what of a text has been seen, the longest that may still become one.
    starts = {text[:n] for text in texts for n in range(len(text))}
    order = [b"", None, *sorted(starts - {b""})]  # None: HIT
    number = {start: i for i, start in enumerate(order)}
    behind = np.full((len(order), 256), HIT, np.int32)
    for state, seen in enumerate(order):
        for letter in range(256) if seen is not None else ():
            now = seen + bytes([letter])
            if not now.endswith(texts):
                ends = (now[i:] for i in range(len(now) + 1))
                behind[state, letter] = number[next(e for e in ends if e in starts)]
    return behind


def _by_token(behind: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
    """``[states, v]`` out of ``[states, 256]``; states padded to a power of two."""
    states = max(16, 1 << (len(behind) - 1).bit_length())
    table = np.full((states, len(pieces)), HIT, np.int32)
    table[: len(behind)] = np.arange(len(behind))[:, None]
    lengths = np.array([len(piece) for piece in pieces])
    starts, letters = (
        np.cumsum(lengths) - lengths,
        np.frombuffer(b"".join(pieces), "u1"),
    )
    for i in range(lengths.max(initial=0)):
        (longer,) = np.nonzero(lengths > i)
        read = letters[starts[longer] + i]
        table[: len(behind), longer] = behind[table[: len(behind), longer], read]
    return table


@functools.lru_cache(maxsize=4)
def _pieces(tokenizer: Any, size: int) -> tuple[bytes, ...]:
    """What each token adds to a text that it stands in, letter by letter."""
    front = tokenizer("a", add_special_tokens=False)["input_ids"]
    rows = [front, *([*front, i] for i in range(size))]
    begun, *texts = tokenizer.batch_decode(
        rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    names = tokenizer.convert_ids_to_tokens(range(size))
    return tuple(
        _raw(name) if "\ufffd" in text else text.removeprefix(begun).encode()
        for name, text in zip(names, texts, strict=True)
    )


def _raw(name: str | None) -> bytes:
    """The letters of a token that is no whole character, by its name."""
    if name and (found := re.fullmatch("<0x([0-9A-F]{2})>", name)):  # SentencePiece
        return bytes([int(found[1], 16)])
    letters = [_byte_alphabet().get(sign) for sign in name or ""]
    return b"" if None in letters else bytes(letters)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """How GPT-2's vocabulary writes bytes: printable ones as they are, others above."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (i for i in range(256) if i not in printable)
    signs = {chr(i): i for i in printable}
    return signs | {chr(256 + n): i for n, i in enumerate(others)}
