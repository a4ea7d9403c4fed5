"""train.py on a mixture of tasks: methods with routers, in one go and in stages."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from kill_toolbox import DIES, adapter_of, assert_same_run

import train
from jaxpeft import compare, data, models
from jaxpeft.runs import read_metrics, run_stages, step_flops

DOMAINS = ("one", "two", "three")
ROOT = Path(__file__).parents[2]
RUN = """
import pickle, sys, ml_collections, train
with open(sys.argv[1], "rb") as file:
    train.run(ml_collections.ConfigDict(pickle.load(file)).lock(), sys.argv[2])
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks on the same words: which third, odd or even, long or short."""
    folder = tmp_path_factory.mktemp("tasks")
    random = np.random.default_rng(0)
    found = {}
    for name, labels in zip(DOMAINS, ("abc", "xy", "xy"), strict=True):
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(120):
                first, length = random.integers(0, 60), random.integers(3, 12)
                kind = {"one": first // 20, "two": first % 2, "three": length > 7}[name]
                text = " ".join(
                    f"w{w}" for w in [first, *random.integers(0, 60, length)]
                )
                row = {"text": text, "label": labels[int(kind)]}
                print(json.dumps(row), file=file)
        found[name] = dict(
            name="files",
            train=str(folder / f"{name}.jsonl"),
            text="text",
            label="label",
            labels=tuple(labels),
        )
    return found


@pytest.fixture
def config(tiny_config, tasks):
    config = tiny_config()
    with config.unlocked():
        config.data = dict(name="mixture", tasks=tasks, only=("one", "two"))
        config.head, config.log.tensorboard = ("classifier",), False
        config.train_for = config.evaluate_every = config.save_every = "8 steps"
        config.batch_size, config.accumulate = 16, 2
    return config


@pytest.mark.slow
def test_stages_train_one_expert_after_the_other(config, tmp_path, monkeypatch):
    with config.unlocked():
        config.adapter = dict(name="modula_res", rank=2, rank_universal=2)
        config.stages = ("universal", "domain:one", "domain:two", "router")
        still = dict(optimizer=dict(head_learning_rate=0.0))
        config.stage_changes = dict(universal={}, domain=dict(train_for="4 steps"))
        config.stage_changes.router = still
    results = train.run(config, tmp_path)
    names = ["01_universal", "02_domain_one", "03_domain_two", "04_router"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert list(results["stages"]) == names and results["steps"] == 8
    assert results["stages"]["02_domain_one"]["steps"] == 4

    read = lambda name: safetensors.numpy.load_file(
        next((tmp_path / name / "adapter").glob("*.safetensors"))
    )
    leaves = {name: read(name) for name in names}
    changed = [
        {k for k in old.keys() & new.keys() if not np.array_equal(old[k], new[k])}
        for old, new in zip(
            map(leaves.get, names[:-1]), map(leaves.get, names[1:]), strict=True
        )
    ]
    assert [{".".join(k.split("/")[-1:]) for k in x} for x in changed[:2]] == [
        {"value"},
        {"value"},
    ]
    new = leaves[names[1]].keys() - leaves[names[0]].keys()
    assert {k.split("/")[-1] for k in new} == {"a.one", "b.one", "router.one"}
    # The router's stage moves routers and nothing else.
    moved = {k.split("/")[-1] for k in changed[2]}
    assert moved == {"router.one", "router.two"}
    # A domain's stage moves the columns of its own classes in the head, no others.
    heads = [
        next(v for k, v in leaves[n].items() if "classifier/kernel" in k) for n in names
    ]
    differs = [
        np.any(a != b, axis=0).tolist() for a, b in zip(heads, heads[1:], strict=False)
    ]
    assert differs == [
        [True] * 3 + [False] * 4,  # of task "one"; alphabetic: one, three, two
        [False] * 5 + [True] * 2,
        [False] * 7,
    ]
    routing = results["routing"]
    assert routing["tasks"] == ["one", "three", "two"]
    assert set(map(tuple, routing["experts"])) == {("one", "two")}
    assert (tmp_path / "04_router/routing.png").stat().st_size > 5000

    check_as_row(config, results, tmp_path)

    # What is complete is not run again; a stage added at the end is.
    runs = []
    monkeypatch.setattr(
        train, "_run", lambda config, *_: runs.append(config.stage) or results
    )
    with config.unlocked():
        config.stages += ("domain:three",)
        config.stage_changes.domain.train_for = "4 steps"
    train.run(config, tmp_path)
    assert runs == ["domain:three"]


def check_as_row(config, results, folder):
    """A comparison reads its size from all stages, its scores from the last one."""
    row = compare.Row("mixed", "res", {}, 0, config)
    found = compare.read_run(row, folder)
    assert found["steps"] == 8 + 4 + 4 + 8
    assert (found["metric"], found["mode"]) == ("mean", "max")
    stages = {stage["name"]: stage["trainable"] for stage in found["stages"]}
    # Two layers of four kernels 32 x 32, all of rank 2, and two columns of a router.
    one = 2 * 4 * 2 * (32 + 32)
    experts = {name: one for name in config.stages[:3]}
    assert stages == experts | {"router": 2 * 4 * 32 * 2}
    assert found["trainable"] == sum(stages.values())
    assert found["head"] == 7 * (32 + 1)
    assert found["trainable"] <= found["stored"] < found["trainable"] * 1.1
    (best,) = [
        event
        for event in read_metrics(folder / "04_router", "eval")
        if event["step"] == results["best_step"]
    ]
    assert found["validation"]["mean"] == best["mean"]
    # Rows of "three", which is not trained on, do not count.
    arrays = np.load(folder / "04_router/predictions.npz")
    parts = compare.counted(arrays, config.data.only)
    assert list(parts) == ["one", "two"]
    right = compare.right_rows(parts, "mean", results["after"])
    assert len(right) == sum(len(labels) for _, labels in parts.values())
    wrong = results["after"] | {"one/accuracy": 0.123}
    assert compare.right_rows(parts, "mean", wrong) is None


def test_the_step_of_each_stage(config):
    """From shapes alone: a router's step runs all experts, a domain's one."""
    with config.unlocked():
        config.adapter = dict(name="modula_flan", rank=2, rank_universal=2)
        config.stages = ("universal", "domain:one", "domain:two", "router")
        config.stage_changes = dict(universal={}, domain={}, router={})
    how = dict(attach=train.attach_all, make_step=train.make_step)
    universal, one, two, router = (step_flops(config, stage=i, **how) for i in range(4))
    assert universal == one == two < router


@pytest.mark.slow
def test_a_router_is_penalised_and_reported(config, tmp_path):
    with config.unlocked():
        config.adapter = dict(name="mosld", rank=2, experts=3, balance_coef=0.5)
    results = train.run(config, tmp_path / "run")
    steps = read_metrics(tmp_path / "run", "train")
    sites = 8  # query, key, value and output of two layers, each at 1 or more
    assert all(0.5 * sites * 0.99 < e["penalty"] < 0.5 * sites * 3 for e in steps)
    assert all(e["total"] == pytest.approx(e["loss"] + e["penalty"]) for e in steps)
    routing = results["routing"]
    assert len(routing["routers"]) == sites and len(routing["tokens"]) == 3
    assert np.allclose(np.sum(routing["gates"], -1), 1, atol=1e-4)
    # Every real token counts once: no padding, no row that only fills up a batch.
    tokenizer = models.tokenizer(config.model.name)
    limits = dict(vocab_size=64, max_length=config.max_length)
    encoded = data.tokenize(data.task(config.data), tokenizer, **limits)
    for name, tokens in zip(routing["tasks"], routing["tokens"], strict=True):
        held_out = encoded[f"validation/{name}"]
        assert held_out.rows % config.eval_batch_size
        assert set(tokens) == {len(held_out.ids)}
    scores = results["after"]
    assert {"mean", "one/accuracy", "three/accuracy", "two/loss"} <= scores.keys()
    assert scores["mean"] == (scores["one/accuracy"] + scores["two/accuracy"]) / 2


@pytest.mark.slow
def test_a_stage_that_is_killed_is_as_if_nothing_had_been(config, tmp_path):
    first, second = "01_universal", "02_domain_one"
    with config.unlocked():
        config.adapter = dict(name="modula_flan", rank=2, rank_universal=2, dropout=0.1)
        config.stages = ("universal", "domain:one")
        config.stage_changes = dict(universal={}, domain={})
        config.train_for = config.evaluate_every = "6 steps"
        config.save_every = "2 steps"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.run(config, whole)
    shutil.copytree(whole / first, killed / first)
    (tmp_path / "config").write_bytes(pickle.dumps(config.to_dict()))
    program = DIES.format(step=5, folder=second) + RUN
    died = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "config", killed],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (killed / second / "adapter").exists()
    train.run(config, killed)
    starts = [e["step"] for e in read_metrics(killed / second, "start")]
    assert starts in ([0, 2], [0, 4])  # the checkpoint being written may be lost
    assert (killed / first / "metrics.jsonl").read_bytes() == (
        whole / first / "metrics.jsonl"
    ).read_bytes()
    assert_same_run(killed / second, whole / second, "mean")
    # A control: the stage left nothing of its own domain where it was.
    resumed, before = (adapter_of(whole / name) for name in (second, first))
    assert {n.rpartition("/")[2] for n in resumed.keys() - before.keys()} >= {"b.one"}
    assert all(np.any(v) for n, v in resumed.items() if n.endswith("b.one"))


def test_what_is_no_stage_is_refused(config, tmp_path):
    with config.unlocked():
        config.adapter = dict(name="modula_flan", rank=2)
        config.stages = ("universal", "domain")
        config.stage_changes = dict(universal={}, domain={})
    with pytest.raises(ValueError, match="`config.stages` has 'domain'; write"):
        train.run(config, tmp_path)
    with config.unlocked():
        config.stages = ("universal",)
        config.stage_changes.universal = dict(train_four="1 step")
    with pytest.raises(
        ValueError, match="`config.stage_changes.universal`.*train_four"
    ):
        train.run(config, tmp_path)
    with config.unlocked():
        config.stages, config.data.name = ("universal", "domain:one"), "files"
        config.stage_changes = dict(universal={}, domain={})
    with pytest.raises(ValueError, match="`config.data.name` is 'files'; write 'mixtu"):
        train.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_home_folder_is_meant_as_by_any_run(config, tmp_path, monkeypatch):
    with config.unlocked():
        config.stages, config.stage_changes = ("universal",), dict(universal={})
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []

    class Enough(Exception):
        pass

    def run(config, workdir):
        seen.append(workdir)
        raise Enough

    with pytest.raises(Enough):
        run_stages(config, "~/stages", run)
    assert seen == [tmp_path / "stages/01_universal"]
