"""Estimates: the program of a run, what is refused before it is compiled, what fits."""

import json

import jax
import pytest
from refusal_toolbox import COMPILES, assert_refused

import train
from jaxpeft import data, runs, training
from jaxpeft.cli import main

PARTS = {"attach": train.attach_all, "make_step": train.make_step}


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def llama_config(tiny, tiny_llama):
    """The tiny Llama on packed sums; with a folder, only its config is read."""

    def make(folder=tiny_llama, **changes):
        config, path = runs.load_config(tiny), str(tiny_llama / "sums.jsonl")
        with config.unlocked():
            config.model.name = str(folder)
            config.data = dict(
                name="texts",
                train=path,
                validation=path,
                prompt="q",
                completion="a",
                pack=True,
            )
            config.max_length, config.lengths = 28, (28,)
            config.targets, config.head = ("q_proj", "v_proj", "down_proj"), ()
            config.adapter = dict(name="lora", rank=4, alpha=16.0)
            config.train_for = config.evaluate_every = "1 step"
            config.save_every = "1 step"
            config.log.tensorboard = False
            for name, value in changes.items():
                holder, _, field = name.rpartition("__")
                setattr(config[holder] if holder else config, field, value)
        return config

    return make


@pytest.fixture(scope="module")
def bare(tiny_llama, tmp_path_factory):
    """A folder with the tiny Llama's config.json alone, which names a dtype."""
    folder = tmp_path_factory.mktemp("bare")
    content = json.loads((tiny_llama / "config.json").read_text())
    text = json.dumps(content | {"torch_dtype": "bfloat16"})
    (folder / "config.json").write_text(text)
    return folder


def toy_target(memory):
    chip = training.Chip("toy", 1e12, memory, 1e11, 1e10, "https://none")
    return training.Target("toy", "cpu", jax.devices()[:1], chip)


@pytest.fixture(scope="module")
def one(llama_config, bare):
    """The estimate of one step, of two micro-batches and scanned layers."""
    loops = {"model__scan_layers": True, "accumulate": 2, "batch_size": 16}
    config = llama_config(bare, **loops)
    with config.unlocked(), config.model.ignore_type():
        config.model.param_dtype = None
    return runs.estimate(config, target=toy_target(2**30), **PARTS)


class Seen(Exception):
    """A run has come to its first step."""


def measured(config, workdir, monkeypatch):
    """What the step that a run compiles needs, read when the run calls it."""
    found = []
    made = train.make_step

    def make_step(*arguments, **options):
        *others, step = made(*arguments, **options)

        def call(state, frozen, batch):
            compiled = step.lower(state, frozen, batch).compile()
            found.append(training.memory_report(compiled))
            raise Seen

        return *others, call

    monkeypatch.setattr(train, "make_step", make_step)
    with pytest.raises(Seen):
        train.run(config, workdir)
    return found[0]


@pytest.mark.parametrize("writes", [False, True])
def test_a_batch_is_as_the_data_make_it(writes, llama_config, tiny_config):
    config = llama_config() if writes else tiny_config()
    inputs = runs.read_inputs(config, training.make_mesh(devices=jax.devices()[:1]))
    _, batch = next(inputs.batches)
    inputs.batches.close()
    form = data.outline(config.data)
    expected = form.batch(8, max(config.lengths), types=not writes)
    kinds = lambda batch: {name: (x.shape, x.dtype) for name, x in batch.items()}
    assert kinds(expected) == kinds(batch)
    assert form.head == ("causal_lm" if writes else "classification")
    assert form.num_labels == (None if writes else 3)


@pytest.mark.slow
def test_it_is_what_the_run_of_a_classifier_needs(tiny_config, tmp_path, monkeypatch):
    quick = ["targets=query", "model.scan_layers=true", "mesh.data=8"]
    config = tiny_config("train_for=1 step", "evaluate_every=1 step", *quick)
    found = runs.estimate(config, **PARTS)
    assert found.notes == () and found.tokens == 8 * 16
    real = measured(config, tmp_path / "run", monkeypatch)
    assert found.peak == pytest.approx(real["total"], rel=0.05)
    assert found.temporaries == pytest.approx(real["temporaries"], rel=0.05)
    held = found.base + found.adapters + found.optimizer + found.batch
    assert held == pytest.approx(real["arguments"], rel=0.05)


@pytest.mark.slow
def test_it_is_what_a_sharded_run_needs(llama_config, bare, tmp_path, monkeypatch):
    sizes = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "accumulate": 2}
    found = runs.estimate(llama_config(bare, **sizes), **PARTS)
    assert found.mesh == {"data": 2, "fsdp": 2, "tensor": 2} and found.devices == 8
    real = measured(llama_config(**sizes), tmp_path / "run", monkeypatch)
    assert found.peak == pytest.approx(real["total"], rel=0.05)
    assert found.temporaries == pytest.approx(real["temporaries"], rel=0.05)
    assert {one.kind for one in found.collectives} >= {"all-reduce", "all-gather"}


def test_loops_are_multiplied_out(one):
    """Layers are one loop, micro-batches another: all products count."""
    tokens, width, hidden = 16 * 28, 32, 48
    linears = 2 * tokens * (width * (2 * width + width) + 3 * width * hidden)
    head = 2 * tokens * width * 26
    attention = 2 * 2 * 16 * 28**2 * width
    frozen = 2 * (2 * linears + head) + (1 + 2) * 2 * attention
    assert frozen < one.flops < 1.15 * frozen  # and pairs of rank 4


def test_refused_before_anything_is_compiled(llama_config, tiny_config, bare):
    def refused(match, config=None, **options):
        begun = len(COMPILES)
        with pytest.raises(ValueError, match=match):
            runs.estimate(config or llama_config(bare), **options, **PARTS)
        assert len(COMPILES) == begun

    refused(r"`target` 'v5:4x4'.*no such machine; nearest: v5e:4x4", target="v5:4x4")
    refused("nearest: v5e:1x1, v5e:2x2", target="v5e:3x3")
    refused("nearest: .*v5e", target="v5litepod-16")
    refused("no such machine", target="cpu:0")
    refused("`slices` is 2", target="cpu:8", slices=2)
    refused("`slices` must be", slices=0)
    refused("JAX has begun with 8 CPU", target="cpu:9")
    refused("computer has none", target="gpu")
    mesh = {"mesh__fsdp": 3}
    refused(r"`config.mesh`.*8 devices", llama_config(bare, **mesh))
    refused(r"`config.batch_size` 9 .* multiple of 8", llama_config(bare, batch_size=9))
    refused(
        r"`config.mesh.tensor` 4 .* 2 heads .*\[1, 2\]",
        llama_config(bare, mesh__tensor=4),
    )
    cut = llama_config(bare, mesh__sequence=8)
    refused("`config.mesh`.*sequence=8, which does not cut rows of 28 tokens", cut)
    refused("`config.model.name`|`config.model`", llama_config("./nowhere"))
    refused("`attention` is 'splash'", tiny_config("model.attention=splash"))


def test_a_tpu_needs_libtpu(llama_config, bare, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "jaxpeft\[tpu\]"'):
        runs.estimate(llama_config(bare), target="v5e:4x4", **PARTS)


def test_figures_of_all_chips():
    assert {chip.name for chip in training.CHIPS.values()} >= training.LAYOUTS.keys()
    for chip in training.CHIPS.values():
        assert min(chip[1:5]) > 0 and chip.source.startswith("https://")


def test_the_base_is_in_the_dtype_of_its_files(one):
    assert one.base == 2 * one.parameters and one.parameters > 10_000


def test_the_roofline(one):
    bounds = (one.flops / 1e12, one.traffic / 1e11)
    assert one.seconds == pytest.approx(
        {"compute": bounds[0], "memory": bounds[1], "links": 0.0}
    )
    assert one.step_seconds == max(bounds)
    useful = 4 * one.parameters * one.tokens
    assert one.mfu == pytest.approx(useful / max(bounds) / 1e12)
    assert one.fits and one.to_dict()["fits"]


def pretend(monkeypatch, one, tried):
    """Half for a remat policy, half for each two micro-batches, no compiler."""

    def pretended(config, **options):
        tried.append((config.model.remat, config.accumulate))
        size = one.peak / (1 + (config.model.remat is not None)) / config.accumulate
        return one._replace(peak=int(size), memory=int(one.peak / 3))

    for module in ("_estimate", "_estimate_report"):
        monkeypatch.setattr(f"jaxpeft.runs.{module}.estimate", pretended)


def test_what_would_fit_is_tried_in_order(
    llama_config, bare, one, tmp_path, monkeypatch
):
    config = llama_config(bare, batch_size=16)
    tried, lines = [], []
    pretend(monkeypatch, one, tried)
    found = runs.fit(config, target=toy_target(1e9), tell=lines.append, **PARTS)
    expected = [(None, 1), ("names", 1), ("unscaled", 1), ("full", 1), ("full", 2)]
    assert tried == expected and len(lines) == 5
    assert found[-1].estimate.fits and not found[-2].estimate.fits
    flags = "--config.model.remat=full --config.accumulate=2"
    assert runs.as_flags(found[-1].changes) == flags
    picture = runs.plot_memory(found, tmp_path / "memory.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert runs.record(config, found)["tries"][-1]["fits"]


def test_mesh_splits_come_last_and_keep_their_rows(
    llama_config, bare, one, monkeypatch
):
    config = llama_config(bare, batch_size=16, model__remat="full")
    eight = toy_target(1e9)._replace(devices=jax.devices()[:8])
    never = lambda config, **options: one._replace(memory=1)
    monkeypatch.setattr("jaxpeft.runs._estimate.estimate", never)
    found = [tried.changes for tried in runs.fit(config, target=eight, **PARTS)]
    splits = [
        {"accumulate": most, "mesh.data": 1, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
        for most, fsdp, tensor in ((2, 8, 1), (4, 4, 2), (8, 2, 4), (16, 1, 8))
    ]
    # And last what changes the numbers.
    coded = {"accumulate": 2, "model.quantise": "nf4"}
    assert found == [{}, {"accumulate": 2}, *splits, coded]
    with config.unlocked():
        config.lengths = (8192,)
    cuts = [
        {**split, "mesh.tensor": 1, "mesh.sequence": n}
        for n, split in ((2, splits[1]), (4, splits[2]), (8, splits[3]))
    ]
    tries = runs.fit(config, target=eight, **PARTS)
    assert [one.changes for one in tries] == [*found[:-1], *cuts, coded]


def test_a_step_that_is_too_large_says_by_how_much(llama_config, bare, one, capsys):
    config = llama_config(bare)
    for part, advice in ((1.1, "mesh.fsdp"), (3.0, "model.remat=full")):
        held = one.base + one.adapters + one.optimizer
        found = one._replace(memory=int(part * held), peak=int(4 * held))
        assert not found.fits
        assert advice in runs.too_large(config, found)
        assert "more than the" in runs.too_large(config, found)
        assert "--fit tries is enough" in runs.too_large(config, found, looked=True)
    runs.show(runs.Try({}, found))
    assert "peak of a device" in capsys.readouterr().out


def test_a_compilers_complaint_is_read():
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (335.82G) exceeds available HBM (15.75G)."
    )
    needs, has = training.out_of_memory(text, held=2**30)
    assert (needs / 2**30, has / 2**30) == pytest.approx((336.82, 15.75))
    assert training.out_of_memory("INTERNAL: something else") is None


def test_the_command(tiny, tmp_path, capsys):
    file = tmp_path / "found.json"
    argv = ["estimate", str(tiny), "--target=cpu:2", f"--json={file}"]
    argv += ["--config.targets=query", "--config.model.scan_layers=true"]
    argv += [f"--train={train.__file__}", f"--plot={tmp_path / 'memory.png'}"]
    assert main([*argv, "--config.adapter.rank=2"]) == 0
    assert "matmuls" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["config"]["adapter"]["rank"] == 2 and "jax" in found["versions"]
    (one,) = found["tries"]
    assert one["devices"] == 2 and one["temporaries"] > 0 and one["changes"] == {}
    assert (tmp_path / "memory.png").is_file()


def test_the_command_refuses(tiny, tmp_path, capsys):
    def refused(*argv, named):
        argv = ["estimate", *argv]
        assert_refused(main, argv, named, folder=tmp_path, capsys=capsys)

    program = f"--train={train.__file__}"
    refused(tiny, program, "--target=v5:4x4", named="--target")
    refused(tiny, "--train=none.py", "--target=cpu", named="--train")
    refused(tiny, program, "--slices=0", named="--slices")
    refused(tiny, program, "--config.nothing=1", named="config.nothing")
    refused(tiny, program, "--nothing", named="--nothing")


def test_a_dry_run_leaves_nothing(tiny, one, tmp_path, capsys, monkeypatch):
    argv = [f"--config={tiny}", f"--workdir={tmp_path / 'run'}"]
    tried = []
    pretend(monkeypatch, one._replace(peak=9 * 2**20), tried)
    assert train.main([*argv, "--dry-run", "--target=cpu:2"]) == 2
    shown = capsys.readouterr()
    assert "peak of a device" in shown.out and "6.00 MiB more" in shown.err
    argv += ["--config.model.remat=full", "--config.accumulate=2"]
    assert train.main([*argv, "--dry-run", "--target=cpu:2"]) == 0
    assert tried == [(None, 1), ("full", 2)] and not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        train.main([*argv, "--target=cpu:2"])
    assert "--dry-run" in capsys.readouterr().err
