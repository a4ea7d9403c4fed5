"""The study of paradigms: prompts as tokens, the command, a kill, the report."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import data, dimension, interop, study
from jaxpeft.cli import main
from jaxpeft.data import Record

# Dies the hard way after the second batch of 5 shots.
KILLED = """
import os, signal, sys
from jaxpeft.cli import main
from jaxpeft.dimension import _collect
write, calls = _collect._write, []
def write_and_die(folder, state):
    write(folder, state)
    calls.append(state)
    if len(calls) == 7:  # four batches and the end of 0 shots, then two
        os.kill(os.getpid(), signal.SIGKILL)
_collect._write = write_and_die
main({arguments!r})
"""
LAYERS = 5
REPORT = {"estimator": "", "rows": [], "figures": [], "skipped": {}, "findings": {}}
REPORT |= {"remarks": []}
ROWS = 60
CLOSE = 2e-4  # of states up to 11; measured 2.4e-5


def write_records(path, count, seed):
    draws = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draws.randrange(100), draws.randrange(100)
        rows.append({"input": f"{a}>{b}?", "output": "yes" if a > b else "no"})
    path.write_text("\n".join(map(json.dumps, rows)))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records, and what train.py would leave of an adapter: step 2, and 4, the last."""
    folder = tmp_path_factory.mktemp("study")
    write_records(folder / "train.jsonl", 20, seed=0)
    rows = write_records(folder / "eval.jsonl", ROWS, seed=1)
    with (folder / "eval.jsonl").open("a") as file:  # asked twice
        file.write("\n" + json.dumps(rows[7]))
    _, params = study.tiny_model()
    adapted = jp.attach(params, jp.lora(2), ["q_proj"], key=jax.random.key(0))
    trainable, frozen = jp.partition(adapted)
    for step, name in ((2, "adapters/2"), (4, "adapter")):
        moved = jax.tree.map(lambda x, step=step: x + 0.1 * step, trainable)
        where = folder / "run" / name
        where.parent.mkdir(parents=True, exist_ok=True)
        interop.save_adapter(jp.combine(moved, frozen), where, metadata={"step": step})
    return folder


@pytest.fixture(scope="module")
def arguments(folder):
    given = ["--model", "tiny", "--task", str(folder / "train.jsonl")]
    given += ["--eval", str(folder / "eval.jsonl"), "--shots", "0,5"]
    run = folder / "run"
    given += ["--sft", f"few={run}", "--sft", f"few={run}@2"]
    given += ["--estimator", "twonn-linear,mle-5"]
    return lambda out, *more: ["dimension", *given, "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def collecting(folder):
    """The same without adapters, and no more than the states."""
    given = ["--model", "tiny", "--task", str(folder / "train.jsonl")]
    given += ["--eval", str(folder / "eval.jsonl"), "--shots", "0,5"]
    return lambda out: ["dimension", "collect", *given, "--out", str(out)]


@pytest.fixture(scope="module")
def whole(folder, arguments):
    out = folder / "whole"
    assert main(arguments(out)) == 0
    return out


def test_all_leaves_everything_behind(whole):
    names = ["icl-0", "icl-5", "sft-few", "sft-few@2"]
    assert sorted(p.name for p in (whole / "runs").iterdir()) == names
    for name in names:
        run = whole / "runs" / name
        states = dimension.LayerFiles(run / "states")
        assert (len(states), *states[0].shape) == (LAYERS, ROWS, 64)
        meta = json.loads((run / "meta.json").read_text())
        assert meta["rows"] == ROWS and meta["repeated_inputs"] == 1
        assert meta["dropped_demonstrations"] == 0 and "jax" in meta["versions"]
        found = json.loads((run / "id.json").read_text())
        for estimator in ("twonn-linear", "mle-5"):
            layers = found[estimator]["layers"]
            assert len(layers) == LAYERS
            assert layers[0]["degenerate"] and layers[0]["dim"] is None  # one token
            assert all(layer["dim"] > 0 for layer in layers[1:])
        scored = json.loads((run / "accuracy.json").read_text())
        table = scored["right_given"]
        assert sum(map(sum, (row.values() for row in table.values()))) == ROWS
        assert scored["accuracy"] == (table["no"]["no"] + table["yes"]["yes"]) / ROWS
    report = json.loads((whole / "figures/report.json").read_text())
    figures = ("summary", "shots", "dynamics_few", "agreement", "fit", "scale")
    assert set(report["figures"]) == {f"{n}.png" for n in (*figures, "differences")}
    for name in report["figures"]:
        picture = whole / "figures" / name
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.with_suffix(".csv").read_text().count("\n") > 2
    assert report["skipped"].keys() == {"areas"}
    order = [row["run"] for row in report["rows"]]
    assert order == ["icl-0", "icl-5", "sft-few@2", "sft-few"]
    # Each is another model, or another prompt.
    last = [np.load(whole / f"runs/{name}/states/layer_04.npy") for name in names]
    for i, j in itertools.combinations(range(4), 2):
        assert np.abs(last[i] - last[j]).max() > 1e-2
    dynamics = (whole / "figures/dynamics_few.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in dynamics[1:]} == {"0", "2", "4"}


def test_states_and_answers_by_hand(folder, whole):
    """A prompt by itself, without padding; the logits of two labels' first bytes."""
    model, params = study.tiny_model()
    records = data.prompt_files(folder / "train.jsonl", folder / "eval.jsonl")
    shown = data.draw_demonstrations(ROWS + 1, 20, 5)
    states = dimension.LayerFiles(whole / "runs/icl-5/states")
    row = 3
    demonstrations = [records.train[i] for i in shown[row]]
    text = data.write_prompt(records.evaluated[row], demonstrations)
    ids = np.array([[byte + 3 for byte in text.encode()]])
    run = jax.jit(lambda p: model.apply({"params": p}, ids, hidden_states=True))
    out, every = jax.device_get(run(params))
    for layer in range(LAYERS):
        np.testing.assert_allclose(states[layer][row], every[layer][0, -1], atol=CLOSE)
    expected = [out[0, -1, ord(label[0]) + 3] for label in ("no", "yes")]
    logits = states.beside("label_logits")
    np.testing.assert_allclose(logits[row], expected, atol=CLOSE)
    assert np.abs(states[4][row] - every[4][0, -2]).max() > 1e-2  # control
    assert np.abs(states[4][row + 1] - every[4][0, -1]).max() > 1e-2


def test_killed_and_restarted_gives_the_same(collecting, whole, tmp_path, capfd):
    out = tmp_path / "out"
    script = KILLED.format(arguments=collecting(out))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment)
    assert done.returncode == -signal.SIGKILL
    half = json.loads((out / "runs/icl-5/states/collected.json").read_text())
    assert half["batches"] == 2 and not half["complete"]
    before = (out / "runs/icl-0/states/layer_01.npy").stat().st_mtime_ns
    capfd.readouterr()
    assert main(collecting(out)) == 0
    assert "icl-0: complete" in capfd.readouterr().err
    assert (out / "runs/icl-0/states/layer_01.npy").stat().st_mtime_ns == before
    for name in ("icl-0", "icl-5"):
        ours, theirs = (where / "runs" / name for where in (out, whole))
        files = sorted(file.name for file in ours.glob("states/*.npy"))
        assert files == [*["label_logits.npy"], *[f"layer_0{i}.npy" for i in range(5)]]
        for file in files:
            same = (ours / "states" / file).read_bytes()
            assert same == (theirs / "states" / file).read_bytes(), file
        same = (ours / "accuracy.json").read_text()
        assert same == (theirs / "accuracy.json").read_text()
    # Dimensions, stopped in the middle of the layers, too.
    file, kept = out / "runs/icl-0/id.json", whole / "runs/icl-0/id.json"
    found = json.loads(kept.read_text())
    del found["mle-5"], found["twonn-linear"]["layers"][2:]
    file.write_text(json.dumps(found))
    study.estimate_runs(out, ["twonn-linear", "mle-5"], note=lambda text: None)
    assert file.read_text() == kept.read_text()


def test_a_complete_study_asks_no_model(arguments, whole, monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("asked again")

    monkeypatch.setattr(study, "tiny_model", never)
    monkeypatch.setattr(dimension, "id_profile", never)
    monkeypatch.setattr(study, "report", lambda *_, **__: REPORT)
    assert main(arguments(whole)) == 0
    assert "icl-0: 0 dimensions estimated" in capsys.readouterr().err


def test_other_settings_are_refused_by_name(folder, collecting, whole, capsys):
    def says(*more):
        assert main([*collecting(whole), *map(str, more)]) == 2
        return capsys.readouterr().err

    assert re.search(r"seed: 42, now 7", says("--seed", 7))
    assert "demos: 'official', now 'nested'" in says("--demos", "nested")
    assert "task.records" in says("--n-eval", 9)
    assert "another adapter_key" in says("--sft", f"few={folder}/run/adapters/2")


def test_report_of_one_run_says_what_it_skips(whole, tmp_path, capsys):
    one = tmp_path / "one"
    (one / "runs").mkdir(parents=True)
    (one / "runs/icl-0").symlink_to(whole / "runs/icl-0")
    estimator = ["--estimator", "twonn-linear"]
    out = ["--out", str(tmp_path / "figures")]
    assert main(["dimension", "report", "--runs", str(one), *out, *estimator]) == 0
    printed = capsys.readouterr()
    skipped = re.findall(r"no figure (\w+): (\S+ .*)", printed.err)
    assert {name for name, _ in skipped} == {
        "shots",
        "dynamics",
        "differences",
        "areas",
    }
    assert "needs two numbers of --shots" in dict(skipped)["shots"]
    assert set(re.findall(r"^  (\w+)", printed.out, re.M)) == {"not"}  # tested
    with pytest.raises(FileNotFoundError, match="no complete run"):
        study.report([tmp_path], tmp_path / "none")


def test_several_studies(whole, tmp_path):
    """Of another model: boxes, differences, and figures of each."""
    other = tmp_path / "other"
    (other / "runs").mkdir(parents=True)
    for name in ("icl-0", "icl-5"):
        (other / "runs" / name).mkdir()
        for file in (whole / "runs" / name).iterdir():
            (other / "runs" / name / file.name).symlink_to(file)
        meta = other / "runs" / name / "meta.json"
        text = meta.read_text().replace('"model": "tiny"', '"model": "other"')
        meta.unlink()
        meta.write_text(text)
    found = study.report([whole, other], tmp_path / "figures")
    assert {"areas.png", "differences.png", "summary_other-on-train.png"} < set(
        found["figures"]
    )
    assert found["skipped"] == {"dynamics_other-on-train": "needs --sft"}


def test_points(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(400, 2)) @ np.ones((2, 5))
    np.save(tmp_path / "x.npy", x)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",")
    printed = []
    for name in ("x.npy", "x.csv"):
        assert main(["dimension", "points", "--file", str(tmp_path / name)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    one = dimension.twonn(x, sd="subsample")
    assert f"{one.dim:.3f}    {one.sd:.3f}     400" in printed[0]


RECORDS = data.PromptSet(
    "toy",
    train=(Record("a?", "yes"), Record("b?", "no")),
    validation=(),
    evaluated=(Record("c?", "yes"), Record("d?", "no"), Record("c?", "yes")),
    labels=("no", "yes"),
    facts={},
)


def asked(records=RECORDS, **options):
    options = dict(vocab_size=384, max_length=99) | options
    return study.ask(records, study.tiny_tokenizer(), **options)


def text_of(found, row):
    first, last = found.encoded.offsets[row : row + 2]
    return bytes((found.encoded.ids[first:last] - 3).tolist()).decode()


def test_prompts_as_tokens():
    found = asked(shots=2, seed=0)
    assert text_of(found, 0) in (
        "a?\nyes\n\nb?\nno\n\nc?\n",
        "b?\nno\n\na?\nyes\n\nc?\n",
    )
    assert found.encoded.rows == 2 and found.facts["repeated_inputs"] == 1
    assert found.right.tolist() == [1, 0]
    n, y = ord("n") + 3, ord("y") + 3
    assert found.tokens.tolist() == [[n, y]] * 2
    assert asked(label_tokens="bare").tokens.tolist() == [[n, y]] * 2
    assert asked(label_tokens="none").tokens is None


def test_demonstrations_are_dropped_from_the_front():
    whole = asked(shots=2)
    short = asked(shots=2, max_length=12, overflow="drop_demos")
    for row in (0, 1):
        text = text_of(short, row)
        assert text_of(whole, row).endswith(text) and len(text) <= 12
    assert short.facts["prompts_with_fewer"] == 2
    assert short.facts["dropped_demonstrations"] == 2
    with pytest.raises(ValueError, match="prompt 0 of toy has 18 tokens.*drop_demos"):
        asked(shots=2, max_length=12)
    with pytest.raises(ValueError, match="3 tokens with 0 demonstrations"):
        asked(shots=2, max_length=2, overflow="drop_demos")


def test_labels_that_cannot_be_told_apart():
    same = RECORDS._replace(labels=("no", "yes", "yeah"))
    with pytest.raises(ValueError, match="'yes' and 'yeah' begin with the same token"):
        asked(same)
    with pytest.raises(ValueError, match="has no set of labels.*label_tokens='none'"):
        asked(RECORDS._replace(labels=None))
    with pytest.raises(ValueError, match="`label_tokens` must be one of"):
        asked(label_tokens="nude")
    with pytest.raises(ValueError, match="`overflow` must be one of"):
        asked(overflow="cut")


def test_what_the_command_refuses(folder, tmp_path, capsys):
    files = [
        "--task",
        str(folder / "train.jsonl"),
        "--eval",
        str(folder / "eval.jsonl"),
    ]

    def says(*more):
        given = ["dimension", "--model", "tiny", "--out", str(tmp_path / "out")]
        assert main([*given, *map(str, more)]) == 2
        return capsys.readouterr().err

    assert "needs --task" in says()
    assert "needs --eval FILE" in says(*files[:2])
    assert "goes with a --task that is a file" in says("--task", "trec", *files[2:])
    assert "Did you mean 'trec'" in says("--task", "treck")
    assert "write whole numbers" in says(*files, "--shots", "0;1")
    assert "--estimator has 'mle'" in says(*files, "--estimator", "mle")
    assert "holds no adapter" in says(*files, "--sft", tmp_path)
    assert "there are [2]" in says(*files, "--sft", f"{folder}/run@3")
    assert "--shots 30 of --demos" in says(*files, "--shots", "30")
    assert "--shots none needs --sft" in says(*files, "--shots", "none")
    # The second number, before anything is collected with the first.
    assert "--shots 21 of --demos" in says(*files, "--shots", "0,21")
    assert "--final must be one of" in says(*files, "--shots", "0", "--final", "x")
    assert not list((tmp_path / "out").glob("runs/*"))
    assert "--max-length" in says(*files, "--shots", "0", "--max-length", "3")


@pytest.mark.parametrize("longest", [1, 32, 33, 100, 1000, 4096])
def test_padded_lengths(longest):
    lengths = study._asked.padded_lengths(longest)
    assert lengths[-1] >= longest and list(lengths) == sorted(set(lengths))
    assert all(
        b <= max(1.34 * a, 48) for a, b in zip(lengths, lengths[1:], strict=False)
    )
    assert lengths[-1] < max(33, 1.5 * longest)
