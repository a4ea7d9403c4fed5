"""Fixed splits: no text twice, none in two splits, the same whatever the order.

What a row's text hashes to decides everything: which split it is in and where. So
a split does not move when a file is sorted anew or a row is added to it, and two
spellings of one sentence cannot stand on both sides of the line.
"""

import bisect
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxpeft.data._bad_rows import GoodRows
from jaxpeft.data._messages import is_chat, messages_of
from jaxpeft.data._task import Rows, check_bad_rows
from jaxpeft.data._templates import read_text

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


class _Characters(dict):
    """For `str.translate`: what becomes of a character in a key, each asked once."""

    def __missing__(self, code: int) -> int | str | None:
        character = chr(code)
        kind = unicodedata.category(character)
        if kind == "Cf" or character in _IGNORED or _is_point(character):
            found = None
        elif kind[0] in "LMN" or character == "_":
            found = code
        elif kind in ("So", "Cn", "Co", "Cs") and code > 0x25FF and code != 0xFFFD:
            found = f" {character} "  # emoji, a word each; those newer than Python: Cn
        else:  # punctuation, spaces, controls, signs as in "$5", "a + b", "20°"
            found = " "
        self[code] = found
        return found


def _is_point(character: str) -> bool:
    """Whether it is a vowel point of Hebrew or Arabic, which most writing leaves out.

    These have combining classes of their own; Indic vowel signs, which nobody leaves
    out, and the tone marks of Thai have others.
    """
    return 10 <= unicodedata.combining(character) <= 35


# What Unicode calls ignorable by default, less those of the category Cf: fillers and
# variation selectors; and U+0640, which stretches Arabic words.
_IGNORED = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u0640")
_IGNORED |= frozenset(map(chr, [0x3164, 0xFFA0, *range(0xFE00, 0xFE10)]))
_IGNORED |= frozenset(map(chr, range(0xE0100, 0xE01F0)))
_CHARACTERS = _Characters()
# An accent on nothing, as in "it´s", or on what was taken out.
_ACCENTS = re.compile("(?<!\\S)[\u0300-\u036f\u20d0-\u20ff\u3099\u309a]+")
# A space between two letters of scripts that write none between words: Thai, Lao,
# Tibetan, Burmese, Khmer, kana, Han.
_ALONE = "[\u0e00-\u109f\u1780-\u17ff\u3005\u3040-\u9fff\U00020000-\U0003ffff]"
_UNSPACED = re.compile(f"(?<={_ALONE}) (?={_ALONE})")


def text_key(texts: Iterable[str]) -> str:
    r"""Returns what two rows share when they say the same.

    Case and Unicode's compatible forms are folded (NFKC and full case folding, over
    again until nothing changes); punctuation, white space, signs and what is not seen
    are taken out, and so are the vowel points of Arabic and Hebrew. Letters, all other
    marks on them, digits and emoji stay. Between two words one space stays, but
    for scripts that write none. Text without any word keeps its punctuation.

    Args:
      texts: the row's text, one string a column.

    Returns:
      The normalised text.

    Example:
      >>> text_key(["Who wrote `` Hamlet '' ?"]) == text_key(["who wrote Hamlet?"])
      True
      >>> text_key(["ПРИВЕТ, мир!", "😀"])
      'привет мир\n😀'

    References:
      The Unicode Standard, section 3.13, D146 (NFKC_Casefold).
    """
    return "\n".join(map(_key, texts))


def _key(text: str) -> str:
    if text.isascii():
        folded = text.lower()
    else:
        folded = unicodedata.normalize("NFD", text)
        for _ in range(2):  # what folding case makes may have a compatible form again
            folded = unicodedata.normalize("NFKC", folded.casefold())
    words = _ACCENTS.sub(" ", folded.translate(_CHARACTERS)).split()
    if folded.isascii() or not words:
        return " ".join(words or folded.split())
    # What is dropped may have stood between two parts of one character.
    return unicodedata.normalize("NFKC", _UNSPACED.sub("", " ".join(words)))


def row_key(row: Mapping[str, Any], columns: Sequence[str], where: str) -> str:
    """Returns the key of a row: `text_key` of what its columns say.

    The one key that splits are cut by and compared by, for every kind of task.

    Args:
      row: with str, UTF-8 bytes or a chat in the columns. Of a chat, a list of
        messages, the contents count that are read before the assistant's last answer,
        as of a prompt and its completion the prompt.
      columns: those that count, or templates over columns.
      where: names the row in errors.
    """
    texts = []
    for column in columns:
        if is_chat(row.get(column)):
            texts += _read_of_chat(messages_of(row, column, where))
        else:
            texts.append(read_text(row, column, where))
    return text_key(texts)


def _read_of_chat(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    said = [i for i, one in enumerate(messages) if one["role"] == "assistant"]
    # A chat that the assistant begins has nothing before: all of it counts.
    read = messages[: said[-1]] if said and said[-1] else messages
    return [message.get("content", "") for message in read]


def also_in_train(
    splits: Mapping[str, Rows],
    columns: Sequence[str],
    bad_rows: str = "raise",
) -> dict[str, int]:
    """Returns how many rows of each other split say what a training row says.

    Args:
      splits: rows by split, "train" among them.
      columns: those whose text is compared, by `text_key`: what is read, not the label
        or the completion.
      bad_rows: "raise" or "skip", which counts a row without text nowhere.

    Returns:
      The counts, 0 where the split has no such row.

    Raises:
      ValueError: a row has no text in a column, and is not to be skipped; or
        `bad_rows` is none of the two.

    Example:
      >>> train, test = [{"t": "Yes!"}, {"t": "no"}], [{"t": "yes"}, {"t": "so"}]
      >>> also_in_train({"train": train, "test": test}, ["t"])
      {'test': 1}
    """
    check_bad_rows(bad_rows)

    def keys(split: str) -> Iterator[int]:
        good = GoodRows(splits[split], f"Split {split!r}", bad_rows)
        one = lambda row, where, _: hash(row_key(row, columns, where))
        return (key for _, key in good.read(range(len(good.rows)), one))

    others = [split for split in splits if split != "train"]
    seen = set(keys("train")) if others else set()
    return {split: sum(key in seen for key in keys(split)) for split in others}


def deduplicate(
    rows: Iterable[Mapping[str, Any]],
    *,
    text: Sequence[str],
    label: str,
    regression: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Returns the rows with each text once, and how many were taken out.

    Of rows with one `text_key`, the one whose text sorts first stays. Where their
    labels disagree, regression takes the mean; classes have no such middle, and a
    majority would count copies, so that text is dropped.

    Args:
      rows: dicts with str in the text columns.
      text: the text columns.
      label: the label column.
      regression: whether the label is a number.

    Returns:
      The rows in the order of their text's hash, and counts: "read", "repeated" (taken
      out), "contradictory" (texts with several labels: averaged for regression, else
      dropped), "kept".

    Example:
      >>> rows = [{"t": "Yes!", "y": 1}, {"t": "yes", "y": 1}, {"t": "no", "y": 0}]
      >>> kept, counts = deduplicate(rows, text=["t"], label="y")
      >>> sorted(row["t"] for row in kept), counts["repeated"]
      (['Yes!', 'no'], 1)
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row_key(row, text, "a row"), []).append(row)
    kept = []
    contradictory = 0
    for key in sorted(groups, key=_hash):
        group = groups[key]
        chosen = dict(min(group, key=lambda row: [row[column] for column in text]))
        values = sorted({row[label] for row in group})
        if len(values) > 1:
            contradictory += 1
            if not regression:
                continue
            chosen[label] = sum(values) / len(values)
        kept.append(chosen)
    read = sum(map(len, groups.values()))
    return kept, {
        "read": read,
        "repeated": read - len(groups),
        "contradictory": contradictory,
        "kept": len(kept),
    }


def split_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    text: Sequence[str],
    shares: Mapping[str, float] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows cut into splits by the hash of their text.

    Equal texts land in one split. The sizes follow `shares` as a random draw would:
    within a few per cent, not exactly.

    Args:
      rows: dicts with str, or lists of messages, in the text columns.
      text: the text columns.
      shares: share of each split, summing to 1; None is 80% train, 10% validation,
        10% test.

    Returns:
      The rows by split, each in the order given.

    Raises:
      ValueError: if the shares do not sum to 1 or one is not positive.

    Example:
      >>> splits = split_rows([{"t": str(i)} for i in range(1000)], text=["t"])
      >>> [len(rows) for rows in splits.values()]
      [820, 85, 95]
    """
    shares = SHARES if shares is None else shares
    splits, _ = cut_rows(GoodRows(list(rows), "`rows`", "raise"), text, shares)
    return {split: [dict(row) for row in part] for split, part in splits.items()}


def cut_rows(
    good: GoodRows,
    columns: Sequence[str],
    shares: Mapping[str, float],
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Returns the rows themselves, no copies, by split; `split_rows` says how.

    Args:
      good: rows with what `row_key` takes in the columns.
      columns: those whose text is hashed.
      shares: share of each split.

    Returns:
      The rows by split, and what there is to say of bad ones.
    """
    if abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) <= 0:
        raise ValueError(
            f"`shares` must be positive and sum to 1; got {dict(shares)}. "
            f"For example shares={SHARES}."
        )
    names = list(shares)
    bounds = list(itertools.accumulate(shares.values()))[:-1]  # the last has no end
    splits: dict[str, list[Any]] = {split: [] for split in names}
    one = lambda row, where, _: row_key(row, columns, where)
    for number, key in good.read(range(len(good.rows)), one):
        position = int(_hash(key)[:13], 16) / 2**52  # 52 bits, which a float holds
        splits[names[bisect.bisect_right(bounds, position)]].append(good.rows[number])
    return splits, good.facts()


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
