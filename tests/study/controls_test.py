"""A study's controls: the same demonstrations, exchanged answers, training records."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxpeft import dimension, study
from jaxpeft.cli import main
from jaxpeft.data import PromptSet, Record
from jaxpeft.study import Result, ask, findings

pytestmark = pytest.mark.usefixtures("quick_compiles")

TRAIN = tuple(Record(f"q{i}?", "yes" if i % 3 else "no") for i in range(20))
ASKED = tuple(Record(f"a{i}?", "yes" if i % 2 else "no") for i in range(30))
RECORDS = PromptSet("some", TRAIN, (), ASKED, ("no", "yes"), {})


def prompts(**options):
    """The texts that a model would read."""
    tokenizer = study.tiny_tokenizer(RECORDS.labels)
    given = dict(vocab_size=384, max_length=4096) | options
    found = ask(RECORDS, tokenizer, **given).encoded
    rows = np.split(found.ids, found.offsets[1:-1])
    return [tokenizer.decode(row.tolist()) for row in rows]


def test_the_same_demonstrations_for_all():
    texts = prompts(shots=4, control="fixed")
    heads = {text.rpartition("\n\n")[0] for text in texts}
    assert len(texts) == len(ASKED) and len(heads) == 1
    assert heads == {prompts(shots=4)[0].rpartition("\n\n")[0]}  # the first one's own
    tails = [text.rpartition("\n\n")[2].strip() for text in texts]
    assert tails == [record.input for record in ASKED]


def test_exchanged_answers():
    own, other = prompts(shots=4), prompts(shots=4, control="shuffled")
    shown = {}
    for a, b in zip(own, other, strict=True):
        first, second = a.split("\n\n")[:-1], b.split("\n\n")[:-1]
        assert [x.split("\n")[0] for x in first] == [x.split("\n")[0] for x in second]
        shown |= dict(x.split("\n") for x in second)
    right = {record.input: record.output for record in TRAIN}
    assert shown.keys() == right.keys()  # each record was shown, with one answer
    assert sorted(shown.values()) == sorted(right.values())  # of another record
    assert shown != right


def test_training_records_are_asked_by_themselves():
    assert [t.strip() for t in prompts(of_train=True)] == [r.input for r in TRAIN]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(shots=3, control="fix"), "`control` must be one of"),
        (dict(control="fixed"), "a control needs demonstrations"),
        (dict(shots=3, of_train=True), "asked without any"),
    ],
)
def test_what_ask_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        prompts(**options)


def result(name, area, **meta):
    draws = np.random.default_rng(len(name))
    meta = dict(shots=0, step=None, paradigm="icl", control=None, of_train=None) | meta
    layers = [
        dimension.IdEstimate(area, 0.1, 100, 0, 0, False, "twonn-linear", tuple(halves))
        for halves in area + 0.1 * draws.normal(size=(4, 10))
    ]
    return Result(name, Path(), meta, None, None, {"twonn-linear": layers})


def told(*runs):
    found = findings({run.name: run for run in runs}, "twonn-linear")
    return {one.statement: one.verdict for one in found}


def test_what_controls_say():
    fixed = "Control: with the same demonstrations for all it rises, too"
    shuffled = "Control: with answers exchanged it is lower than with the own"
    control = dict(paradigm="control", shots=5)
    runs = (
        result("icl-0", 5.0),
        result("icl-5", 9.0, shots=5),
        result("icl-5~fixed", 4.0, control="fixed", **control),
        result("icl-5~shuffled", 7.0, control="shuffled", **control),
    )
    assert (told(*runs)[fixed], told(*runs)[shuffled]) == ("disagrees", "agrees")
    assert (told(*runs[:2])[fixed], told(*runs[:2])[shuffled]) == ("not tested",) * 2


@pytest.mark.parametrize(
    ("areas", "verdict"),
    [
        ((8.0, 7.0, 6.0), "agrees"),
        ((6.0, 7.0, 8.0), "disagrees"),  # still rising
        ((4.0, 3.0, 3.5), "disagrees"),  # never above the start
        ((5.0, 5.01, 4.0), "not tested"),  # a rise that is within the noise
    ],
)
def test_an_early_rise_and_a_fall(areas, verdict):
    steps = [
        result(f"sft-a@{k}", area, step=k, paradigm="sft")
        for k, area in zip((10, 20, 30), areas, strict=True)
    ]
    say = "SFT: the dimension rises early in training, then falls"
    assert told(result("icl-0", 5.0), *steps)[say] == verdict
    assert told(*steps)[say] == "not tested"


def test_training_records_are_compared_with_themselves():
    say = "SFT: the same on training records"
    train = dict(of_train=True, paradigm="control")
    runs = (
        result("icl-0", 9.0),
        result("sft-a", 5.0, paradigm="sft", step=30),
        result("icl-0~train", 5.0, **train),
        result("sft-a~train", 9.0, step=30, **train),
    )
    assert told(*runs)[say] == "agrees" and told(*runs[:3])[say] == "not tested"


def test_the_command(tmp_path, capsys):
    for name, records in (("train", TRAIN), ("eval", ASKED)):
        rows = [json.dumps(record._asdict()) for record in records]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    given = ["dimension", "--model", "tiny", "--task", str(tmp_path / "train.jsonl")]
    given += ["--eval", str(tmp_path / "eval.jsonl"), "--shots", "0,2"]
    given += ["--estimator", "twonn-linear", "--sd", "analytic"]
    given += ["--out", str(tmp_path / "study")]
    wrong = (["--controls", "fixt"], ["--shots", "0", "--controls", "fixed"])
    for more in wrong:
        assert main([*given, *more]) != 0
    assert "fixed" in capsys.readouterr().err
    more = ["--controls", "fixed,shuffled", "--train-records"]
    assert main([*given, *more]) == 0
    report = json.loads((tmp_path / "study/figures/report.json").read_text())
    assert {row["run"]: row["rows"] for row in report["rows"]} == {
        "icl-0": 30,
        "icl-0~train": 20,
        "icl-2": 30,
        "icl-2~fixed": 30,
        "icl-2~shuffled": 30,
    }
