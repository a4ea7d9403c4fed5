"""Splits by the hash of the text: no text twice, no order, no leak."""

import json
import random
import re
import sys
import unicodedata

import numpy as np
import pytest

from jaxpeft import data


def rows_of(count):
    return [{"text": f"row {i}", "label": i % 2} for i in range(count)]


def test_a_key_looks_past_case_spaces_and_punctuation():
    same = ["It's  good!", "it's good", "IT S GOOD", "“It's” (good)", "Ｉｔ's good"]
    assert len({data.text_key([text]) for text in same}) == 1
    other = ["its good", "it is good", ":)", ":(", "", "x"]
    assert len({data.text_key([text]) for text in [same[0], *other]}) == 7
    assert data.text_key(["a b", "c"]) != data.text_key(["a", "b c"])


def test_duplicates_go_and_the_order_does_not_matter():
    rows = [*rows_of(300), *rows_of(200), {"text": "Row 7!", "label": 1}]
    kept, counts = data.deduplicate(rows, text=["text"], label="label")
    assert counts == {"read": 501, "repeated": 201, "contradictory": 0, "kept": 300}
    # The one whose text sorts first stays.
    assert {row["text"] for row in kept} == {
        "Row 7!",
        *(f"row {i}" for i in range(300) if i != 7),
    }
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert data.deduplicate(shuffled, text=["text"], label="label")[0] == kept
    assert kept != sorted(kept, key=lambda row: row["text"])


def test_contradictory_classes_go_and_numbers_are_averaged():
    rows = [*rows_of(10), {"text": "ROW 3", "label": 0}, {"text": "row 3", "label": 1}]
    kept, counts = data.deduplicate(rows, text=["text"], label="label")
    assert counts == {"read": 12, "repeated": 2, "contradictory": 1, "kept": 9}
    assert not any(row["text"].lower() == "row 3" for row in kept)

    for turned in (rows, rows[::-1]):
        kept, counts = data.deduplicate(
            turned, text=["text"], label="label", regression=True
        )
        assert counts == {"read": 12, "repeated": 2, "contradictory": 1, "kept": 10}
        # Each distinct value counts once: a copy is no second vote.
        assert {"text": "ROW 3", "label": 0.5} in kept


def test_splits_are_disjoint_cover_all_and_ignore_the_order():
    rows = [*rows_of(2000), *({"text": f"ROW {i}", "label": 0} for i in range(500))]
    splits = data.split_rows(rows, text=["text"])
    keys = {
        split: {data.text_key([row["text"]]) for row in part}
        for split, part in splits.items()
    }
    assert sum(map(len, splits.values())) == 2500
    assert sum(map(len, keys.values())) == len(set().union(*keys.values())) == 2000
    shares = {split: len(part) / 2500 for split, part in splits.items()}
    assert shares == pytest.approx(
        {"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.03
    )
    turned = data.split_rows(rows[::-1], text=["text"])
    assert {split: part[::-1] for split, part in turned.items()} == splits
    # A row that comes later moves none of the others.
    more = data.split_rows([*rows, {"text": "new", "label": 0}], text=["text"])
    for split, part in splits.items():
        assert more[split][: len(part)] == part


def test_shares_must_sum_to_one():
    with pytest.raises(ValueError, match="`shares` must be positive and sum to 1"):
        data.split_rows(rows_of(3), text=["text"], shares={"train": 0.8, "test": 0.1})
    with pytest.raises(ValueError, match="`shares` must be positive"):
        data.split_rows(rows_of(3), text=["text"], shares={"train": 1.5, "test": -0.5})


# What one person writes and another, in the languages of the world.
SPELLINGS = {
    "Russian": ("Привет, мир номер {}", "ПРИВЕТ  МИР — номер {}!"),
    "Greek, whose last s is another": ("ο δρόμος {}", "Ο ΔΡΌΜΟΣ {}."),
    "German": ("die große Straße {}", "DIE GROSSE STRASSE {}!"),
    "accents apart": ("un café crème {}", "un cafe\u0301 cre\u0300me {}"),
    "Hindi": ("यह हिन्दी है {}", "यह  हिन्दी है। {}"),
    "Thai": ("ภาษาไทย สวัสดี {}", "ภาษาไทยสวัสดี! {}"),
    "Arabic with points": ("كتب الولد {}", "كَتَبَ الْوَلَدُ {}"),
    "Arabic, stretched": ("سلام {}", "ســلام {}"),
    "Hebrew with points": ("שלום {}", "שָׁלוֹם {}"),
    "Persian, joined without": ("می\u200cخواهم {}", "میخواهم {}"),
    "Chinese": ("你好，世界{}", "你好 世界{}！"),
    "Japanese, narrow": ("ﾄﾞﾗｺﾞﾝ {}", "ドラゴン。{}"),
    "Korean apart": ("안녕 {}", unicodedata.normalize("NFD", "안녕 {}")),
    "wide Latin": ("Hello World {}", "Ｈｅｌｌｏ，Ｗｏｒｌｄ {}"),
    "emoji": ("so good 😀❤ {}", "So good 😀 ❤\ufe0f {}"),
    "a soft hyphen": ("cooperate {}", "co\u00adoperate {}"),
}
DIFFERENT = [
    ("की", "का"),  # the vowels are marks
    ("हिन्दी", "हन्द"),
    ("กา", "กี"),
    ("ไม่", "ไม้"),  # tones
    ("café", "cafe"),
    ("ὁδός", "ὀδός"),
    ("й", "и"),
    ("great 😀", "great 😡"),
    ("😀", "😡"),
    ("は", "ば"),
    ("五", "六"),
    ("１", "２"),
]


@pytest.mark.parametrize("language", SPELLINGS)
def test_two_spellings_of_one_text_have_one_key(language):
    one, other = (text.format(7) for text in SPELLINGS[language])
    assert one != other
    key = data.text_key([one])
    assert key == data.text_key([other])
    assert key == data.text_key([key])
    assert key != data.text_key([one.replace("7", "8")])
    assert key.startswith(one[0].casefold()[:1]) or not one[0].isascii()


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_texts_have_different_keys(one, other):
    assert data.text_key([one]) != data.text_key([other])


def test_a_key_is_the_same_in_every_form_of_unicode():
    """Of every character, between two letters, as Unicode itself writes it anew."""
    tried = 0
    for code in range(0x80, sys.maxunicode + 1):
        character = chr(code)
        forms = {unicodedata.normalize(form, character) for form in ("NFD", "NFKD")}
        if forms == {character} or 0xAC10 <= code < 0xF900:
            continue  # nothing to write anew; Hangul that goes as its first ones do
        key = data.text_key([f"x{character}y"])
        for other in forms:
            assert data.text_key([f"x{other}y"]) == key, (hex(code), other)
        assert data.text_key([key]) == key, hex(code)
        tried += 1
    assert tried > 4000


def test_keys_of_ascii_are_what_they_have_always_been():
    """Published splits hang on them: words in lower case, a space between."""
    draw = random.Random(0)
    characters = [chr(code) for code in range(128)] + list("abc  ") * 20
    for _ in range(2000):
        text = "".join(draw.choices(characters, k=draw.randrange(12)))
        words = re.findall(r"[a-z0-9_]+", text.lower()) or text.lower().split()
        assert data.text_key([text]) == " ".join(words)


FORMS = {
    "classes": dict(name="files", text="q", label="y", labels=["0", "1"]),
    "pairs": dict(name="files", text=["q", "c"], label="y", labels=["0", "1"]),
    "text": dict(name="texts", text="q"),
    "completion": dict(name="texts", prompt="q", completion="a"),
    "chat": dict(name="texts", messages="m"),
    "choices": dict(name="choices", prompt="{q}\n?", choices=["a", "b"], answer="y"),
}


@pytest.mark.parametrize("form", FORMS)
def test_no_kind_of_task_has_a_text_on_both_sides(form, tmp_path):
    rows = []
    for number in range(40):
        for language, pair in SPELLINGS.items():
            for place, text in enumerate(pair):
                q = text.format(number)
                chat = [
                    {"role": "system", "content": language},
                    {"role": "user", "content": q},
                    {"role": "assistant", "content": f"answer {place}"},
                ]
                row = {"id": f"{language} {number}", "q": q, "m": chat, "c": language}
                rows.append(row | {"a": f"w{place}", "b": "x", "y": place})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = dict(FORMS[form])
    task = data.task(options | {"train": path})
    assert sum(map(len, task.splits.values())) == len(rows)
    if form == "choices":  # whose rows have the prompt alone
        ids = {row["q"] + "\n?": row["id"] for row in rows}
        of = lambda row: ids[row["prompt"]]
    else:
        of = lambda row: row["id"]
    sides = [{of(row) for row in task.splits[s]} for s in ("train", "validation")]
    assert not sides[0] & sides[1]
    assert min(map(len, sides)) > 20
    assert "also_in_train" not in task.facts
    # Two files that were cut by the row leak, and it is said how much.
    halves = [tmp_path / "even.jsonl", tmp_path / "odd.jsonl"]
    for half, part in zip(halves, (rows[::2], rows[1::2]), strict=True):
        half.write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    task = data.task(options | {"train": halves[0], "test": halves[1]})
    assert task.facts["also_in_train"] == {"test": len(rows) // 2}
    assert f"even: of the {len(rows) // 2} rows of test" in data.notes(task)[0]


def test_rows_that_held_out_splits_share_with_training_are_counted():
    train = [{"t": "Yes!"}, {"t": "no"}, {"t": "yes"}]
    splits = {"train": train, "validation": [{"t": "YES"}, {"t": "so"}], "test": train}
    assert data.also_in_train(splits, ["t"]) == {"validation": 1, "test": 3}
    assert data.also_in_train({"train": train}, ["t"]) == {}
    with pytest.raises(ValueError, match="Split 'test', row 1 has no column 't'"):
        data.also_in_train(splits | {"test": [{"t": "a"}, {"x": "b"}]}, ["t"])


def test_a_chat_is_cut_in_every_form_that_is_learnt_from():
    """Messages in a list, an array, or TFDS's columns of a list are one chat."""
    said = [("user", "Is {}?"), ("assistant", "Yes.")]
    chats = [[dict(role=r, content=t.format(i)) for r, t in said] for i in range(20)]
    forms = [
        list,
        tuple,
        lambda chat: np.array(chat, object),
        lambda chat: {
            key: np.array([one[key] for one in chat], object)
            for key in ("role", "content")
        },
    ]
    cuts = []
    for form in forms:
        rows = [{"i": i, "m": form(chat)} for i, chat in enumerate(chats)]
        splits = data.split_rows(rows, text=["m"])
        cuts.append({name: [r["i"] for r in part] for name, part in splits.items()})
    assert all(cut == cuts[0] for cut in cuts) and all(cuts[0].values())


def test_a_cut_names_the_row_it_cannot_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row, message in (
        (
            {"m": [{"role": "user"}]},
            "row 1, message 0, of the role 'user', has no 'content'",
        ),
        ({"m": ["hello"]}, "row 1, message 0 must be .*role.*; got 'hello'"),
        ({"m": None}, "row 1 has no value in column 'm'"),
        ({"m": 3}, "row 1: column 'm' must be text; got int 3"),
    ):
        good = {"m": [{"role": "user", "content": "a"}]}
        path.write_text("\n".join(map(json.dumps, [good, row])))
        with pytest.raises(ValueError, match=message):
            data.task(dict(name="texts", train=path, messages="m"))


def test_no_prompt_asks_what_was_shown():
    """Rows of our own cut, out of a training split that says things twice."""
    rows = [
        {"t": text.format(i % 50), "y": i % 2}
        for i in range(400)
        for text in SPELLINGS["Russian"]
    ]
    validation = [{"t": "held out", "y": 0}]
    splits = {"train": rows, "validation": validation}
    for more in ({}, {"test": [{"t": "tested", "y": 1}]}):
        task = data.make_task(
            "toy", splits | more, text="t", label="y", labels=["a", "b"]
        )
        found = data.prompt_set(
            task, train=10, validation=3, evaluated=100, template="{t}?"
        )
        keys = [
            {data.text_key([record.input]) for record in part}
            for part in (found.train, found.evaluated, found.validation)
        ]
        assert len(found.evaluated) == 100 and not keys[0] & keys[1]
        assert not keys[2] & keys[1]
