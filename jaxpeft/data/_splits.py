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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def text_key(texts: Iterable[str]) -> str:
    """Returns what two rows share when they say the same.

    Case, punctuation, white space and Unicode's compatible forms (NFKC) are taken
    out; text without any word keeps its punctuation.

    Args:
      texts: the row's text, one string a column.

    Returns:
      The normalised text.

    Example:
      >>> text_key(["Who wrote `` Hamlet '' ?"]) == text_key(["who wrote Hamlet?"])
      True
    """
    folded = [unicodedata.normalize("NFKC", text).casefold() for text in texts]
    return "\n".join(
        " ".join(re.findall(r"\w+", text) or text.split()) for text in folded
    )


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
        groups.setdefault(text_key(row[column] for column in text), []).append(row)
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
      rows: dicts with str in the text columns.
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
    if abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) <= 0:
        raise ValueError(
            f"`shares` must be positive and sum to 1; got {dict(shares)}. "
            f"For example shares={SHARES}."
        )
    names = list(shares)
    bounds = list(itertools.accumulate(shares.values()))[:-1]  # the last has no end
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in names}
    for row in rows:
        # 52 bits, which a float holds exactly.
        position = int(_hash(text_key(row[c] for c in text))[:13], 16) / 2**52
        splits[names[bisect.bisect_right(bounds, position)]].append(dict(row))
    return splits


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
