"""Small wrong inputs of every command, most of them made from its own flags."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from refusal_toolbox import assert_refused

import jaxpeft as jp
from jaxpeft import cli, interop, models

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/runs"))
from causal_toolbox import write_llama  # noqa: E402

TASK = "text='text' label='label' labels=('a','b')".split()
# What a command that does something is given; of others, what their parser requires.
FINE = {
    "describe": "own --base llama",
    "merge": "own --base llama --out out",
    "export": "own --base llama --out out",
    "import": "peft --base llama --out out",
    "convert": "peft --base llama --to portable --rank 2 --out out",
    "generate": "1 --base llama --head causal_lm --adapter own --max-new-tokens 2",
    "predict": "--base llama --head causal_lm --adapter own --input rows.jsonl "
    "--text text --max-new-tokens 2",
    "ranks": "--model llama --task files --task-option train='rows.jsonl' "
    + " ".join(f"--task-option {option}" for option in TASK)
    + " --method uniform --rank 2 --out out.json --targets q_proj",
    "dimension": "--model tiny --task train.jsonl --eval eval.jsonl --shots 0 "
    "--out study --n-eval 60",
}
PREDICT = "--base llama --head causal_lm --adapter own --input rows.jsonl --text text"
PREDICT = PREDICT.split()
OF_OTHERS = {"adapter": "own", "base": "llama", "out": "out", "task": "rows.jsonl"}
HUGE = "9" * 30
# Names of what has to be there, or be known.
KNOWN = {
    *("base", "model", "adapter", "task", "eval", "method", "ignore", "targets", "sft"),
    *("demos", "overflow", "label_tokens", "final", "estimator", "max_shard_size"),
    *("rows", "runs", "file", "option", "task_option", "map", "shots", "controls"),
}
FREE = {("dimension", "--layer=-1")}  # from the end
COMMANDS = {command.NAME: command for command in cli.COMMANDS}


def actions_of(name):
    top = cli.parser()
    (sub,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    return [a for a in sub.choices[name]._actions if a.dest != "help"]


def fine(name):
    if name in FINE:
        return FINE[name].split()
    words = []
    for action in actions_of(name):
        if action.required:
            value = OF_OTHERS.get(action.dest, "llama")
            words += [*action.option_strings[-1:], value]
    return words


def wrong_values(action):
    """Texts that a flag cannot have, whatever it is for."""
    if action.choices:
        return ["no such", ""]
    kind = number_of(action.type)
    if kind is not None:
        return ["x", "1e400", "nan", "inf", "-1", "", *[HUGE] * (kind is int)]
    return ["", "\n", *["no such"] * (action.dest in KNOWN)]


def number_of(read):
    """``int`` or ``float`` where a flag's type reads such numbers, else ``None``."""
    for text, kind in (("0.5", float), ("1", int)):
        try:
            if isinstance(read(text), kind):
                return kind
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            continue
    return None


def cases():
    """``(arguments, name)`` of every command."""
    for name in COMMANDS:
        words = fine(name)
        yield [name, *words, "--no-such-flag"], "--no-such-flag"
        for action in actions_of(name):
            if not action.option_strings:
                if action.dest == "adapter":
                    for other in ("nowhere", "rows.jsonl", "full", "broken"):
                        yield [name, other, *words[1:]], other
                continue
            flag = action.option_strings[-1]
            if action.nargs == 0:
                yield [name, *words, f"{flag}=1"], flag
                continue
            yield [name, *words, flag], flag
            if action.required:
                at = words.index(flag)
                yield [name, *words[:at], *words[at + 2 :]], flag
            for text in wrong_values(action):
                if (name, f"{flag}={text}") not in FREE:
                    yield [name, *words, f"{flag}={text}"], flag
            if action.dest == "out":
                yield [name, *words, f"{flag}=full"], "full"
            if action.dest == "base":
                for other in ("full", "garbage", "cut"):
                    yield [name, *words, f"{flag}={other}"], other


CASES = [(argv, name) for argv, name in cases()]
BY_HAND = [
    ([], "COMMAND"),
    (["exprt", "own"], "exprt"),
    (["--no-such"], "COMMAND"),
    (["describe", "peft", "--head", "none"], "--base"),
    (["describe", "llama", "--head", "classification", "--any-base"], "--base"),
    (["merge", "llama", "--base", "llama", "--out", "out"], "model"),
    (["merge", "own", "--base", "own", "--out", "out"], "own"),
    (["merge", *"own --base llama --out out --num-labels 3".split()], "at random"),
    (["export", *"peft --base llama --out out".split()], "import"),
    (["import", *"own --base llama --out out".split()], "export"),
    (["import", *"peft --base llama --out out --any-base".split()], "--any-base"),
    (["import", *"peft --base other --out out".split()], "do not fit"),
    (["convert", *"own --base llama --to own --rank 2 --out out".split()], "--rank"),
    (["convert", *"own --base llama --to own --untie --out out".split()], "--untie"),
    (["generate", "1", "--base", "llama", "--adapter", "nowhere"], "nowhere"),
    (["generate", "1", "--base", "llama", "--adapter", "rows.jsonl"], "rows.jsonl"),
    (["generate", "1", *"--base llama --adapter own --adapter own".split()], "--rows"),
    (["generate", "1", *"--base llama --adapter a=own --rows b".split()], "'b'"),
    (["generate", "1", *"--base llama --rows a".split()], "--adapter"),
    (["generate", "1", *"--base llama --adapter a=own --rows a,a".split()], "--rows"),
    (["generate", "", "--base", "llama"], "PROMPT"),
    (["generate", "1", *"--base llama --ignore r".split()], "--ignore"),
    (["predict", *"--base llama --any-base --input rows.jsonl".split()], "--any-base"),
    (["dimension"], "--model"),
    (["dimension", "collect", "--model", "tiny"], "--task"),
    (["dimension", "points"], "--file"),
    (["dimension", "points", "--file", "nowhere.npy"], "nowhere.npy"),
    (["dimension", "points", "--file", "rows.jsonl"], "rows.jsonl"),
    (["dimension", "estimate", "--runs", "nowhere"], "nowhere"),
    (["dimension", "no-step"], "no-step"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, two adapters on it, and broken things."""
    place = tmp_path_factory.mktemp("place")
    (place / "llama").mkdir()
    write_llama(place / "llama")
    model, params = models.load(place / "llama", head="causal_lm")
    key = jax.random.key(0)
    adapted = jp.attach(params, jp.lora(rank=2), ["q_proj"], key=key, axes=model.axes)
    interop.save_adapter(adapted, place / "own")
    interop.save_peft(
        adapted,
        place / "peft",
        names=model.names,
        axes=model.axes,
        base_model="llama",
        task_type="CAUSAL_LM",
    )
    for name in ("garbage", "cut", "other"):
        shutil.copytree(place / "llama", place / name)
    (place / "garbage/config.json").write_text("{")
    weights = (place / "llama/model.safetensors").read_bytes()
    (place / "cut/model.safetensors").write_bytes(weights[:-64])
    shutil.copytree(place / "own", place / "broken")
    (place / "broken/adapter.json").write_text("[]")
    (place / "full").mkdir()
    (place / "full/thesis.tex").write_text("")
    config = json.loads((place / "llama/config.json").read_text())
    (place / "other/config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    rows = [{"text": f"{i} + 1 =", "label": "ab"[i % 2]} for i in range(40)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split, one in (("train", 1), ("eval", 2)):
        rows = [
            {"input": f"{i} + {one} =", "output": " ab"[1:][i % 2]} for i in range(80)
        ]
        (place / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def test_every_command_is_among_them():
    assert len(CASES) > 300
    assert {argv[0] for argv, _ in CASES} == {*COMMANDS}
    for name in COMMANDS:
        asked = {word.partition("=")[0] for argv, _ in CASES for word in argv[-1:]}
        flags = {a.option_strings[-1] for a in actions_of(name) if a.option_strings}
        assert flags <= asked


@pytest.mark.parametrize(
    ("argv", "name"), CASES + BY_HAND, ids=[" ".join(a) for a, _ in CASES + BY_HAND]
)
def test_it_is_refused(place, capsys, monkeypatch, argv, name):
    monkeypatch.setattr(sys, "stdin", [])
    for left in ("out", "out.json", "out.npz", "study"):  # by a test that failed
        if (place / left).is_dir():
            shutil.rmtree(place / left)
        (place / left).unlink(missing_ok=True)
    value = argv[-1].partition("=")[2] if argv else ""
    said = [name, name.strip("-"), *[repr(value)[1:-1]] * bool(value.strip())]
    drawn = name == "at random"  # the head is drawn, and compared with what was read
    assert_refused(cli.main, argv, said, folder=place, capsys=capsys, compiles=drawn)


@pytest.mark.parametrize(
    ("more", "flag"),
    [
        (["--max-length", "9"], "--max-length"),
        (["--choices", "label", "--stop", "b"], "--stop"),
        (["--choices", "label", "--max-new-tokens", "2"], "--max-new-tokens"),
        (["--chat"], "--chat: the base's tokenizer has no chat template"),
    ],
)
def test_what_a_task_has_no_use_for(place, capsys, more, flag):
    argv = ["predict", *PREDICT, *more]  # what is asked depends on the model's head
    assert_refused(cli.main, argv, [flag], folder=place, capsys=capsys, compiles=True)


@pytest.mark.slow
def test_as_a_module(place):
    """``python -m jaxpeft`` is the script."""
    run = lambda *argv: subprocess.run(
        [sys.executable, "-m", "jaxpeft", *argv],
        capture_output=True,
        text=True,
        cwd=place,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
    )
    done = run("describe", "own")
    assert done.returncode == 0 and "lora(rank=2" in done.stdout
    done = run("describe", "nowhere")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "jaxpeft: error: 'nowhere' is no folder.\n"
    done = run("describe", "nowhere", "--traceback")
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "jaxpeft: error: 'nowhere' is no folder."
    assert run("--traceback", "describe", "nowhere").stderr == done.stderr
