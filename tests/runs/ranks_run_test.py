"""Ranks before training: the command, against transformers, and in a run."""

import jax
import numpy as np
import pytest

import jaxpeft as jp
import train
from jaxpeft import allocate, data, dimension, interop, models, numerics, runs
from jaxpeft.cli import main

ROUGH = pytest.mark.filterwarnings("ignore:`profile` has dimensions estimated")
SITES = ("query", "key", "value", "attention/output/dense")


@pytest.fixture(scope="module")
def ranks(tiny):
    """Runs the command on the small model and rows."""
    options = ["train=" + str(tiny.parent / "rows.jsonl"), "labels=('a','b','c')"]
    task = [f"--task-option={o}" for o in [*options, "text=text", "label=label"]]
    model = ["--model", str(tiny.parent / "model"), "--max-length", "16"]
    return lambda *more: main(
        ["ranks", *model, "--task", "files", *task, *map(str, more)]
    )


@pytest.fixture(scope="module")
def seen(tiny):
    """Hidden states that transformers gives for the training rows, and their mask."""
    import torch
    import transformers

    task = data.task(runs.load_config(tiny).data)
    folder = str(tiny.parent / "model")
    tokenizer = models.tokenizer(folder)
    encoded = data.tokenize(
        task, tokenizer, vocab_size=64, max_length=16, splits=["train"]
    )["train"]
    (batch,) = data.evaluation_batches(encoded, encoded.rows, lengths=[16])
    net = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    inputs = {n: torch.tensor(batch[n]) for n in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = net.eval()(**inputs, output_hidden_states=True).hidden_states
    return np.stack([x.numpy() for x in states]), batch["attention_mask"]


@ROUGH
def test_gelora_on_what_transformers_gives(ranks, seen, tmp_path, capsys):
    out, picture = tmp_path / "a.json", tmp_path / "a.png"
    assert ranks("--method", "gelora", "--out", out, "--map", picture) == 0
    printed = capsys.readouterr()
    found = allocate.Allocation.load(out)
    assert str(found) in printed.out and "parameters at 8 sites" in printed.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    hidden, mask = seen
    pooled = (hidden * mask[None, :, :, None]).sum(2) / mask.sum(1)[None, :, None]
    dims = [x.dim for x in dimension.id_profile(pooled)]
    got = [[row["dim in"], row["dim out"]] for row in found.facts["layers"]]
    np.testing.assert_allclose(got, [dims[:2], dims[1:]], rtol=1e-3)
    padded = [x.dim for x in dimension.id_profile(hidden.mean(2))]  # control
    assert not np.allclose(padded, dims, rtol=4e-3)
    assert found.facts["rows"] == len(mask) and found.facts["options"] == {}
    assert [p for p in found if p.endswith(tuple(f"{n}/kernel" for n in SITES))] == [
        *found
    ]
    # Another size of batches: the same, to the last rank.
    other = tmp_path / "b.json"
    assert ranks("--method", "gelora", "--out", other, "--batch-size", 17) == 0
    assert allocate.Allocation.load(other) == found


def test_eva_on_what_transformers_gives(ranks, seen, tmp_path):
    budget = 64 * 24  # of rank 3 everywhere
    files = [tmp_path / f"{name}.json" for name in ("eva", "uniform", "stacked")]
    more = ["--budget", budget, "--option", "rho=2.5", "--method", "eva"]
    assert ranks("--out", files[0], *more) == 0
    found = allocate.Allocation.load(files[0])
    assert found.facts["parameters"] == budget
    # Queries, keys and values of block 0 read state 0, those of block 1 state 1; the
    # other inputs transformers does not show, so ranks there are taken as they are.
    hidden, mask = seen
    assert found.facts["tokens"] == np.sum(mask)
    kept, left = [], []
    for layer in (0, 1):
        x = hidden[layer][mask == 1].astype(np.float64)
        values = np.linalg.svd(x - np.mean(x, 0)[None], compute_uv=False) ** 2
        shares = values / np.sum(values)
        for name in SITES[:3]:
            rank = found[f"encoder/layer_{layer}/attention/{name}/kernel"].rank
            kept += list(shares[:rank])
            left += list(shares[rank:8] if rank < 8 else [])
    # What is kept explains more than what is left, but for ties of q, k and v.
    assert min(kept) >= max(left) - 1e-6
    assert sum(found.ranks().values()) == 24 and len(set(found.ranks().values())) > 1
    assert ranks("--out", files[1], "--method", "uniform", "--budget", budget) == 0
    assert set(allocate.Allocation.load(files[1]).ranks().values()) == {3}
    stacked = ["--scan-layers", "--option", "r_min=0"]
    assert ranks("--out", files[2], *more, *stacked) == 0
    _, _, rows = allocate.Allocation.load(files[2]).grid()
    assert sorted(map(tuple, rows)) == sorted(map(tuple, found.grid()[2]))


def test_eva_of_few_directions(ranks, tmp_path, monkeypatch):
    """The incremental one agrees; it stops where nothing turns any more."""
    monkeypatch.setattr(numerics._stream, "CHUNK", 16)  # eigh on two cores is slow
    found = []
    given = ["--method", "eva", "--rank", "2", "--targets", "query"]
    incremental = ["--option", "svd=incremental", "--option", "keep=30"]
    tau = lambda value: [*incremental, "--option", f"tau={value}"]
    for i, more in enumerate(([], tau(None), tau(0.1))):
        out = tmp_path / f"{i}.json"
        assert ranks("--out", out, *given, *more) == 0
        found.append(allocate.Allocation.load(out))
    whole, few, early = found
    assert few == whole and few.facts["tokens"] == whole.facts["tokens"]
    assert early.facts["tokens"] < whole.facts["tokens"]
    assert [f.facts["svd"] for f in found] == ["covariance"] + ["incremental"] * 2


def test_what_is_refused(ranks, tmp_path, capsys):
    out = tmp_path / "a.json"

    def says(*more):
        assert ranks("--out", out, *more) == 2
        return capsys.readouterr().err

    assert "nearest: ['gelora']" in says("--method", "galore")
    assert "gelora takes no such argument" in says(
        *("--method", "gelora", "--option", "rond=ceil")
    )
    assert "write --option NAME=VALUE" in says("--method", "eva", "--option", "rho")
    assert "--budget 5 is below" in says("--method", "uniform", "--budget", "5")
    with pytest.warns(allocate.FewTextsWarning, match="from 0 distinct"):
        assert "no dimension at state 0" in says(
            *("--method", "gelora", "--samples", "2")
        )
    assert "no folder" in says("--method", "eva", "--map", tmp_path / "no/map.png")
    assert "matched none" in says("--method", "eva", "--targets", "quarry")
    eva = lambda *options: says(
        "--method", "eva", *(x for o in options for x in ("--option", o))
    )
    assert "of svd='incremental'" in eva("keep=9")
    assert "svd` must be one of" in eva("svd=exact")
    assert "tokens` must be one of" in eva("tokens=all")
    assert "is for tasks of writing" in eva("tokens=label_mask")
    assert "is of init_from_eva=True" in eva("whiten=True")
    assert not out.exists()
    out.write_text("mine")
    assert "nothing is overwritten" in says("--method", "uniform")
    new = ["--method", "eva", "--out", str(tmp_path / "b.json")]
    assert main(["ranks", "--model", "minilm", "--task", "treck", *new]) == 2
    assert "Did you mean 'trec'" in capsys.readouterr().err


@pytest.mark.slow
@ROUGH
def test_a_run_starts_with_them(tiny_config, tmp_path, monkeypatch):
    """From a section, kept for a resumed run; and from the file that it left."""
    config = tiny_config("train_for=1 step", "evaluate_every=1 step")
    with config.unlocked():
        config.log.tensorboard = False
        config.ranks.before = dict(name="gelora", r_max=3, samples=150)
    folder = tmp_path / "run"
    results = train.run(config, folder)
    kept = allocate.Allocation.load(folder / "allocation.json")
    assert results["allocation"]["ranks"] == kept.ranks()
    assert results["allocation"]["facts"]["rows"] == 150
    assert max(kept.ranks().values()) <= 3 < config.adapter.rank
    # alpha / rank is the adapter's; its sites are those of the allocation.
    scale = config.adapter.alpha / config.adapter.rank
    assert {s.alpha / s.rank for s in kept.values()} == {scale}
    sites = interop.adapter_info(folder / "adapter")["sites"]
    ranks = {s["path"]: s["ranks"] for s in sites if s["path"] in kept}
    assert ranks == {path: [rank] for path, rank in kept.ranks().items()}

    # A resumed run reads them, and another takes the file that this one left.
    def never(*args, **options):
        raise AssertionError("estimated again")

    monkeypatch.setattr(runs._ranks, "estimate_allocation", never)
    model, params = models.load(config.model.name)
    here = dict(adapter=jp.lora(), targets=config.targets)
    start = lambda setting, folder: runs.starting_allocation(
        setting, folder, model, params, never, **here
    )
    assert start("eva", folder) == kept
    (tmp_path / "new").mkdir()
    assert start(str(folder / "allocation.json"), tmp_path / "new") == kept
    assert allocate.Allocation.load(tmp_path / "new/allocation.json") == kept
    with pytest.raises(AssertionError, match="estimated again"):
        start("eva", tmp_path)
    with config.unlocked():
        config.ranks.before = None
        config.ranks.before = str(folder / "allocation.json")
    with config.unlocked():
        config.targets = ("query",)
    with pytest.raises(ValueError, match="6 are in the file alone"):
        train.run(config, tmp_path / "other-sites")
    with config.unlocked():
        config.start = str(folder / "adapter")
    with pytest.raises(ValueError, match="`config.start` has its ranks already"):
        train.run(config, tmp_path / "two-starts")


def orthonormal(tree, found):
    """Whether every site's ``a`` has orthonormal columns, as directions have."""
    leaves = jp.tree.flat(tree)
    each = [
        np.asarray(leaves[f"{path}/a"]) for path, rank in found.ranks().items() if rank
    ]
    return each and all(
        np.allclose(a.T @ a, np.eye(a.shape[1]), atol=1e-5) for a in each
    )


@pytest.mark.slow
def test_adapters_start_at_their_inputs(ranks, tiny_config, tmp_path):
    """From the command's two files, from a section, and read again by a later start."""
    out, config = tmp_path / "a.json", tiny_config("train_for=1 step")
    never = lambda *draw: pytest.fail("estimated again")
    more = ["--option", "init_from_eva=True", "--option", "whiten=True", "--rank", "2"]
    assert ranks("--method", "eva", "--out", out, *more) == 0
    assert out.with_suffix(".npz").exists()
    found = allocate.Allocation.load(out)
    model, params = models.load(config.model.name)
    for folder in (tmp_path / "one", tmp_path / "two"):  # from `out`; from the folder
        folder.mkdir(exist_ok=True)
        again = runs.starting_allocation(
            str(out),
            tmp_path / "one",
            model,
            params,
            never,
            adapter=jp.lora(),
            targets=config.targets,
        )
        assert again == found and again.facts["options"]["init_from_eva"]
        out.unlink(missing_ok=True)
    adapted = jp.attach(params, jp.lora(), found, key=jax.random.key(0))
    whitened = runs.start_at_inputs(adapted, found, tmp_path / "one/allocation.npz")
    assert not orthonormal(whitened, found)
    with pytest.raises(ValueError, match="'b' is not 0; attach jaxpeft.lora"):
        runs.start_at_inputs(
            jp.attach(params, jp.pissa(), found, key=jax.random.key(0)),
            *(found, tmp_path / "one/allocation.npz"),
        )
    (tmp_path / "one/allocation.npz").unlink()
    with pytest.raises(ValueError, match="which is not there"):
        runs.starting_allocation(
            str(tmp_path / "one/allocation.json"),
            tmp_path / "two",
            model,
            params,
            never,
            adapter=jp.lora(),
            targets=config.targets,
        )
    with config.unlocked():
        config.log.tensorboard = False
        config.adapter = None
        config.adapter = dict(name="lora", rank=2, alpha=4)
        config.ranks.before = dict(name="eva", rank=2, samples=64, init_from_eva=True)
    train.run(config, tmp_path / "run")
    found = allocate.Allocation.load(tmp_path / "run/allocation.json")
    # In one step, with b = 0, no a has moved.
    head = dict(head="classification", num_labels=3, key=jax.random.key(0))
    _, params = models.load(config.model.name, **head)
    saved = interop.load_adapter(tmp_path / "run/adapter", params)
    assert orthonormal(saved, found)
    assert not orthonormal(adapted, found)  # control


@pytest.mark.slow
@ROUGH
@pytest.mark.filterwarnings("ignore:.*points are equal to an earlier one")
def test_packed_texts_are_seen_one_by_one(tiny_llama, tmp_path):
    """Of a writing task, whose training rows several texts share."""
    out, task = tmp_path / "a.json", "reasoning_gym/chain_sum"
    assert data.task(task).pack and not data.unpacked(data.task(task)).pack
    given = ["--model", str(tiny_llama), "--task", task, "--samples", "64"]
    more = ["--method", "gelora", "--scan-layers", "--max-length", "64"]
    assert main(["ranks", *given, *more, "--out", str(out)]) == 0
    found = allocate.Allocation.load(out)
    assert found.facts["rows"] == 64 and len(found) == 4
    assert all(len(site.rank) == 2 for site in found.values())


def test_biases_may_be_among_what_is_chosen(tiny_config, tmp_path):
    """They are nodes beside the components', and draw nothing."""
    config = tiny_config()
    with config.unlocked():
        config.adapter = None
        config.adapter = dict(name="pc", rank=8)
        config.ranks.during = dict(
            name="ggm",
            n_select=12,
            n_important=6,
            initial_steps=1,
            collect_steps=5,
            biases=("query", "value"),
        )
    runs.check_run(config, tmp_path / "run", train.attach_all)
    with config.unlocked():
        config.ranks.during.biases = ("quary",)
    with pytest.raises(ValueError, match="`config.ranks.during.biases`: .*'quary'"):
        runs.check_run(config, tmp_path / "run", train.attach_all)
