"""Small wrong inputs of train.py, most of them made from the config's own fields."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import pytest
from refusal_toolbox import COMPILES, assert_refused

from jaxpeft import adapters, allocate, runs, training
from jaxpeft.allocate import Allocation, SiteRank

ROOT = Path(__file__).parents[2]
QUICKSTART = runs.load_config(ROOT / "configs/quickstart.py")
FIELDS = runs.flat_config(QUICKSTART)
HUGE = "1" + "0" * 30

# Of each type of a field, texts that none of them can have.
NEVER = {
    bool: ("maybe", "2"),
    int: ("x", "1.5", "nan", "-1", HUGE),
    float: ("x", "nan", "-inf", "1e400", "-1"),
    str: ("no such thing", "\n"),
    tuple: ("-1", "(1,(2,))", "no such site"),
    type(None): ("nan", "{}"),
}
# Fields of which such a text is a fine value.
FREE = {
    ("mesh.data", "-1"),  # all devices that are left
    *(("log.compilation_cache", text) for text in NEVER[str]),
}
CHANGED = """
import importlib.util

def get_config():
    spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config().unlock()
    {change}
    return config.lock()
"""


def overrides():
    """``(argument, name)``: every field with a typo, and with what it cannot be."""
    for name, value in FIELDS.items():
        if name == "data.name":
            value = "trec"
        yield f"--config.{name}x=1", f"{name}x"
        yield f"--config.{name}", name
        for text in NEVER[type(value)]:
            if (name, text) not in FREE:
                yield f"--config.{name}={text}", name
    for section in sorted({n.partition(".")[0] for n in FIELDS if "." in n}):
        yield f"--config.{section}=1", section


OVERRIDES = list(overrides())


def numbers_of(function):
    """Names of the arguments that may be a float, by their annotations."""
    for name, parameter in inspect.signature(function).parameters.items():
        kinds = str(parameter.annotation)
        if parameter.annotation is float or "float" in kinds and "tuple" not in kinds:
            yield name


def changes():
    """``(statement, name)``: what no flag can say."""
    for method, function in inspect.getmembers(adapters, inspect.isfunction):
        for name in numbers_of(function):
            yield f"config.adapter = dict(name={method!r}, {name}=float('nan'))", name
        parameters = inspect.signature(function).parameters
        if "rank" in parameters:
            for rank in (0, -1, 2.5, "'8'", True):
                yield f"config.adapter = dict(name={method!r}, rank={rank})", "rank"
            # One object to all sites, or a number of experts for every model's layers.
            some = [x for x in parameters.values() if isinstance(x.default, tuple)]
            if function().shared is None and "experts" not in {x.name for x in some}:
                yield f"config.adapter = dict(name={method!r}, rank=10**9)", "rank"
        yield f"config.adapter = dict(name={method!r}, rnak=8)", "rnak"
    for name in numbers_of(training.adamw):
        for value in ("float('inf')", "-1.0", "'fast'"):
            yield f"config.optimizer.{name} = {value}", name
    for name in ("ggm", "importance"):
        assert hasattr(allocate, name)
        yield f"config.ranks.during = dict(name={name!r}, tarlet=1)", "tarlet"
    for key in (*FIELDS, *QUICKSTART):
        if key in ("data", "adapter"):
            continue
        holder, _, last = ("config." + key).rpartition(".")
        if not key.startswith(("data.", "adapter.", "optimizer.", "mesh.")):
            yield f"del {holder}[{last!r}]", key
        if f"{key}.name" not in FIELDS:
            yield f"{holder}.unlock()[{last!r}] = object", key
    yield from (
        ("config.ranks.during = dict(name='no_such')", "no_such"),
        ("config.ranks.during = dict(target_rank=2)", "ranks.during"),
        (
            "config.ranks.during = dict(name='importance', target_rank=float('inf'))",
            "rank",
        ),
        ("config.ranks.before = dict(name='uniform', rnak=2)", "rnak"),
        ("config.ranks.before = dict(name='uniform', rank='x')", "rank"),
        ("config.ranks.before = dict(rank=2)", "ranks.before"),
        ("config.ranks.before = 'missing.json'", "missing.json"),
        ("config.ranks.before = 'rows.jsonl'", "rows.jsonl"),
        ("config.ranks.before = 'no_such'", "no_such"),
        (
            "config.adapter = dict(name='lora', rank=2); config.targets = ('query',); "
            "config.ranks.before = 'wide.json'",
            ": `config.ranks.before` gives rank 99 to site",
        ),
        ("config.tokenizer.pad_token = 'zzz'", ": `config.tokenizer`: `pad_token`"),
        ("config.rank_pattern = (('no_such', 4),)", "no_such"),
        ("config.rank_pattern = (('query', -4),)", "rank"),
        ("config.alpha_pattern = (('query', 'x'),)", "alpha"),
        ("config.targets = ('queyr',)", "queyr"),
        ("config.targets = '['", "["),
        ("config.targets = ()", "targets"),
        ("config.exclude = ('kye',)", "kye"),
        ("config.head = ('clasifier',)", "clasifier"),
        ("config.head = ('query',)", "query"),
        ("config.stage = 'universal'", "stage"),
        ("config.stages = ('universal',)", "stages"),
        ("config.stage_changes = dict(a=1); config.stages = ('b',)", "stages"),
        ("config.model.dtype = 'int8'", "dtype"),
        ("config.model.dtype = 'float61'", "dtype"),
        ("config.model.remat = 'ful'", "remat"),
        ("config.batch_size = 7", "batch_size"),
        ("config.eval_batch_size = 7", "eval_batch_size"),
        ("config.batch_size = 8000", "batch_size"),
        ("config.accumulate = 3", "batch_size"),
        ("config.lengths = (16, 8)", "lengths"),
        ("config.lengths = (16, 800)", "lengths"),
        ("config.lengths = (4,)", "lengths"),
        ("config.max_length = 1", "max_length"),
        ("config.mesh = dict(data=3, fsdp=1, tensor=1)", "mesh"),
        ("config.mesh = dict(data=-1, fsdp=-1, tensor=1)", "mesh"),
        ("config.mesh = dict(dta=-1)", "dta"),
        ("config.mesh.sequence = 2", ": `config.mesh`: `mesh` has sequence=2, but the"),
        ("config.optimizer.warmup_steps = 1", "warmup_steps"),
        ("config.optimizer.warmup_ratio = 1.0", "warmup_ratio"),
        ("config.optimizer.schedule = 'linaer'", "linaer"),
        ("config.train_for = '0 steps'", "train_for"),
        ("config.train_for = 'nan epochs'", "train_for"),
        ("config.save_every = '2 steps, keep'", "save_every"),
        ("config.data.metrics = ('acuracy',)", "acuracy"),
        ("config.data.labels = ('a', 'b')", "'c'"),
        ("config.data.labels = ('a',)", "labels"),
        ("config.data.text = 'txet'", "txet"),
        ("config.data = dict(name='no/such')", "no"),
        ("config.data = dict(name='trec', nmae=1)", "nmae"),
        ("config.data = dict(train='rows.jsonl')", "name"),
        ("config.extra = 1", "extra"),
    )


CHANGES = list(changes())


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with a copy of the tiny run's things, in which programs stand."""
    place = tmp_path_factory.mktemp("place") / "place"
    shutil.copytree(tiny.parent, place, ignore=shutil.ignore_patterns("cache"))
    text = (place / "tiny.py").read_text().replace(str(tiny.parent), str(place))
    # Compiled programs go where the config says; that is elsewhere here.
    text = text.replace(str(place / "cache"), str(tiny.parent / "cache"))
    (place / "tiny.py").write_text(text)
    (place / "mine").mkdir()
    (place / "mine/thesis.tex").write_text("")
    (place / "empty.jsonl").write_text("")
    (place / "broken.jsonl").write_text('{"text": "w1", "label"')
    (place / "column.jsonl").write_text('{"txet": "w1", "label": "a"}\n')
    sites = [f"encoder/layer_{i}/attention/query/kernel" for i in range(2)]
    Allocation.of({site: SiteRank(99, 99.0) for site in sites}).save(
        place / "wide.json"
    )
    for name in ("none", "garbage", "other", "cut", "weightless", "wordless"):
        shutil.copytree(place / "model", place / name)
    (place / "none/config.json").unlink()
    (place / "garbage/config.json").write_text("{")
    shape = json.loads((place / "model/config.json").read_text())
    (place / "other/config.json").write_text(json.dumps(shape | {"model_type": "x"}))
    weights = (place / "model/model.safetensors").read_bytes()
    (place / "cut/model.safetensors").write_bytes(weights[:-100])
    (place / "weightless/model.safetensors").unlink()
    (place / "wordless/tokenizer.json").unlink()
    return place


@pytest.fixture
def refused(place, capsys):
    import train

    def refused(*argv, named, **options):
        shutil.rmtree(place / "run", ignore_errors=True)  # of a test that failed
        assert_refused(
            train.main,
            argv,
            [named],
            folder=place,
            capsys=capsys,
            **options,
        )

    return refused


def test_there_are_enough_of_them():
    assert len(OVERRIDES) > 150 and len(CHANGES) > 250
    assert {name for _, name in OVERRIDES} >= {*FIELDS}


@pytest.mark.parametrize(("argument", "name"), OVERRIDES, ids=[a for a, _ in OVERRIDES])
def test_a_wrong_field_on_the_command_line(refused, argument, name):
    refused("--config=tiny.py", "--workdir=run", argument, named=name.split(".")[-1])


@pytest.mark.parametrize(("change", "name"), CHANGES, ids=[c for c, _ in CHANGES])
def test_a_wrong_value_in_a_config(refused, place, change, name):
    text = CHANGED.format(tiny=str(place / "tiny.py"), change=change)
    (place / "changed.py").write_text(text)
    refused("--config=changed.py", "--workdir=run", named=name.split(".")[-1])


FILES = {
    "syntax": ("def get_config(:\n    pass\n", "line 1"),
    "import": ("import no_such_module\n", "no_such_module"),
    "none": ("config = 1\n", "get_config"),
    "raises": ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
    "other": ("def get_config():\n    return {}\n", "dict"),
    "number": ("get_config = 3\n", "get_config"),
    "needs": ("def get_config(task):\n    return task\n", "task"),
    "empty": ("", "get_config"),
    "exits": ("import sys\nsys.exit(0)\n", "line 2: SystemExit"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_wrong_config_file(refused, place, kind):
    text, named = FILES[kind]
    (place / "file.py").write_text(text)
    refused("--config=file.py", "--workdir=run", named=named)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--config=missing.py"], "missing.py"),
        (["--config=."], "'.'"),
        (["--config=mine/thesis.tex"], "get_config"),
        (["--config=tiny.py:task=1"], "task"),
        (["--cofnig=tiny.py"], "--cofnig"),
        (["--config"], "--config"),
        (["tiny.py"], "tiny.py"),
        (["--config=tiny.py", "--workdir="], "--workdir"),
        (["--config=tiny.py", "--workdir=mine"], "thesis.tex"),
        (["--config=tiny.py", "--workdir=rows.jsonl"], "rows.jsonl"),
        (["--config=tiny.py", "--workdir=rows.jsonl/run"], "rows.jsonl"),
        (["--config=tiny.py", "--workdir=gs://bucket/run"], "gs://bucket/run"),
        (["--config=tiny.py", "--workdir=a[1]"], "["),
        (["--config=tiny.py", "--workdir=" + "n" * 300], "nnn"),
        (["--config=tiny.py", "--distributed=1"], "--distributed"),
    ],
)
def test_wrong_arguments(refused, argv, named):
    refused(*argv, named=named)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("none", "config.json"),
        ("garbage", "config.json"),
        ("other", "model_type"),
        ("cut", "model.safetensors"),
        ("weightless", "safetensors"),
        ("wordless", "wordless"),
        ("mine", "config.json"),
        ("rows.jsonl", "rows.jsonl"),
        ("./nowhere", "./nowhere"),
    ],
)
def test_a_wrong_model(refused, name, named):
    where = f"--config.model.name={name}"
    refused("--config=tiny.py", "--workdir=run", where, named=named, compiles=True)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("missing.jsonl", "missing.jsonl"),
        ("empty.jsonl", "train"),
        ("broken.jsonl", "broken.jsonl"),
        ("column.jsonl", "text"),
        ("model", "model"),
        ("tiny.py", "tiny.py"),
    ],
)
def test_wrong_rows(refused, name, named):
    where = f"--config.data.train={name}"
    refused("--config=tiny.py", "--workdir=run", where, named=named)


def test_a_corrected_command_is_not_locked_out(place, refused):
    """Each of two mistakes leaves no run of another config behind."""
    import train

    run = ("--config=tiny.py", "--workdir=fresh")
    refused(*run, "--config.model.remat=ful", named="remat")
    refused(*run, "--config.data.train=empty.jsonl", named="train")
    config = runs.load_config(place / "tiny.py")
    runs.check_run(config, place / "fresh", train.attach_all)  # nothing in its way


def test_a_run_that_fails_before_it_has_written_leaves_nothing(tmp_path):
    config = ml_collections.ConfigDict({"seed": 0})
    (tmp_path / "there").mkdir()
    for name in ("a/b/run", "there"):
        with pytest.raises(OSError, match="No space left"):
            with runs.open_workdir(tmp_path / name, config):
                raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(OSError, match="No space left"):
        with runs.open_workdir(tmp_path / "run", config) as folder:
            (folder / "metrics.jsonl").write_text("")
            raise OSError(28, "No space left on device")
    assert (tmp_path / "run/config.json").exists()  # it had begun


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "a/b")])
def test_a_full_disk_is_one_message(place, capsys, monkeypatch, error):
    import train

    def full(*_, **__):
        raise error

    monkeypatch.setattr(runs, "open_workdir", full)
    argv = ("--config=tiny.py", "--workdir=run")
    named = ["No space left on device: 'a/b'"]
    assert_refused(train.main, argv, named, folder=place, capsys=capsys, compiles=True)


def test_traceback_shows_where(place, capsys, monkeypatch):
    import train

    monkeypatch.chdir(place)
    argv = ["--config=tiny.py", "--workdir=run", "--config.model.remat=ful"]
    assert train.main([*argv, "--traceback"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "check_known" in shown
    assert shown.splitlines()[-1].startswith("train.py: error: ")


def test_a_fault_of_the_program_is_no_refusal(place, monkeypatch):
    """A control: what is not meant for the user keeps its traceback."""
    import train

    monkeypatch.chdir(place)
    monkeypatch.setattr(train, "run", lambda *_: {}["a key"])
    with pytest.raises(KeyError):
        train.main(["--config=tiny.py", "--workdir=run"])


def test_the_count_of_compilations_counts():
    before = len(COMPILES)
    jax.jit(lambda x: x * 3 + 17)(jax.numpy.ones(7))
    assert len(COMPILES) > before


@pytest.mark.slow
@pytest.mark.parametrize("change", ["seed=-1", "adapter.rnak=2", "targets=queyr"])
def test_as_a_program(place, change):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--config=tiny.py", f"--config.{change}"],
        capture_output=True,
        text=True,
        cwd=place,
    )
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len([x for x in lines if "error:" in x]) == 1, done.stderr
    assert "Traceback" not in done.stderr and not (place / "runs").exists()
