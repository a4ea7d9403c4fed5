"""The console script on folders that transformers and HF PEFT wrote."""

import json
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import interop, models
from jaxpeft.cli import main

pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]

SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
}
ROOT = Path(__file__).parents[2]
IDS = np.random.default_rng(0).integers(3, 64, (2, 7))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with two tiny models and an adapter of PEFT's on each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these libraries tell each other
        import peft
        import torch
        import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hub")
    generator = torch.Generator().manual_seed(0)
    classes = {
        "bert": (transformers.BertForSequenceClassification, {"num_labels": 3}),
        "llama": (transformers.LlamaForCausalLM, {"num_key_value_heads": 2}),
    }
    settings = {
        "bert": {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
        "llama": {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]},
    }
    logits = {}
    for name, (kind, sizes) in classes.items():
        config = transformers.AutoConfig.for_model(name, **SIZES, **sizes)
        model = kind._from_config(config).eval()
        model.save_pretrained(root / name)
        config = peft.LoraConfig(r=3, lora_alpha=5, **settings[name])
        adapted = peft.get_peft_model(model, config).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = 0.3 * noise
        adapted.save_pretrained(root / f"{name}-peft")
        with torch.no_grad():
            logits[name] = adapted(torch.tensor(IDS)).logits.numpy()
    return SimpleNamespace(
        root=root, logits=logits, torch=torch, peft=peft, transformers=transformers
    )


@pytest.fixture
def run(capsys):
    """Calls the script; gives back its status and what it said."""

    def call(*argv):
        capsys.readouterr()
        try:
            status = main([str(x) for x in argv])
        except SystemExit as stopped:  # argparse
            status = stopped.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return call


def logits(adapted, model):
    run = jax.jit(lambda params: model.apply({"params": params}, IDS.astype(np.int32)))
    return np.asarray(run(jp.merge(adapted)))


def close(mine, theirs):
    assert np.abs(theirs).max() > 0.02
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_import_export_and_portable(hub, run, tmp_path, name):
    base, theirs = hub.root / name, hub.root / f"{name}-peft"
    told = run("import", theirs, "--base", base, "--out", tmp_path / "own")
    assert told.status == 0 and "jaxpeft's own adapter" in told.out
    assert f"reading the base {base}: " in told.err
    head = {"bert": "classification", "llama": "causal_lm"}[name]
    model, params = models.load(base, head=head)
    adapted = interop.load_adapter(tmp_path / "own", params)
    close(logits(adapted, model), hub.logits[name])

    told = run("export", tmp_path / "own", "--base", base, "--out", tmp_path / "back")
    assert told.status == 0 and "native" in told.out and "rank 3" in told.out
    before, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (theirs, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["task_type"] == {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}[name]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_merge_opens_in_transformers(hub, run, tmp_path, name):
    base, out = hub.root / name, tmp_path / "merged"
    told = run("merge", hub.root / f"{name}-peft", "--base", base, "--out", out)
    assert told.status == 0 and ": changed by " in told.err
    # The head too, where PEFT has saved it whole.
    count = {"bert": 5, "llama": 4}[name]
    assert f"{count} modules merged" in told.out and "in 1 file\n" in told.out
    kind = {"bert": "SequenceClassification", "llama": "CausalLM"}[name]
    kind = getattr(hub.transformers, f"AutoModelFor{kind}")
    model, said = kind.from_pretrained(out, output_loading_info=True)
    assert not any(said.values()), said
    with hub.torch.no_grad():
        merged = model.eval()(hub.torch.tensor(IDS)).logits.numpy()
        plain = kind.from_pretrained(base).eval()(hub.torch.tensor(IDS)).logits.numpy()
    close(merged, hub.logits[name])
    assert np.abs(plain - merged).max() > 0.02


def test_merge_in_another_dtype_and_in_pieces(hub, run, tmp_path):
    told = run(
        *("merge", hub.root / "llama-peft", "--base", hub.root / "llama"),
        *("--out", tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "4KB"),
    )
    assert told.status == 0 and "files" in told.out
    model = hub.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == hub.torch.bfloat16
    assert (tmp_path / "out/model.safetensors.index.json").is_file()


def test_convert_cuts_to_a_rank_and_says_so(hub, run, tmp_path):
    base, theirs = hub.root / "llama", hub.root / "llama-peft"
    told = run(
        *("convert", theirs, "--base", base, "--to", "portable", "--rank", 2),
        *("--out", tmp_path / "small", "--base-model", "a/name"),
    )
    assert told.status == 0 and "portable" in told.out and "rank 2" in told.out
    assert told.err.count("cut to rank 2") == 4
    config = json.loads((tmp_path / "small/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    assert config["base_model_name_or_path"] == "a/name"
    told = run(
        *("convert", theirs, "--base", base, "--to", "portable"),
        *("--out", tmp_path / "whole"),
    )
    assert told.status == 0
    plain = hub.transformers.AutoModelForCausalLM.from_pretrained(base)
    again = hub.peft.PeftModel.from_pretrained(plain, tmp_path / "whole").eval()
    with hub.torch.no_grad():
        close(again(hub.torch.tensor(IDS)).logits.numpy(), hub.logits["llama"])


def test_head_and_layout_follow_the_adapter(hub, run, tmp_path):
    """A stack of layers and a new head: both are read off the adapter's sites."""
    base = tmp_path / "body"
    base.mkdir()
    tensors = load_file(hub.root / "bert/model.safetensors")
    kept = {n: x for n, x in tensors.items() if "classifier" not in n}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((hub.root / "bert/config.json").read_text())
    config["architectures"] = ["BertModel"]
    (base / "config.json").write_text(json.dumps(config))
    model, params = models.load(
        base,
        head="classification",
        num_labels=5,
        scan_layers=True,
        key=jax.random.key(0),
    )
    key = jax.random.key(1)
    adapted = jp.attach(params, jp.lora(2), ["query"], key=key, axes=model.axes)
    adapted = jp.attach(adapted, jp.full(), ["classifier"], key=key)
    interop.save_adapter(adapted, tmp_path / "own", metadata={"why": "a test"})
    told = run("export", tmp_path / "own", "--base", base, "--out", tmp_path / "peft")
    assert told.status == 0, told.err
    written = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert written["base_model.model.classifier.weight"].shape == (5, 16)
    assert any("layer.1.attention.self.query.lora_A" in name for name in written)

    lost = {p: node for p, node in jp.extract(adapted).items() if "classifier" not in p}
    interop.save_adapter(jp.graft(params, lost), tmp_path / "headless")
    told = run(
        *("export", tmp_path / "headless", "--base", base, "--out", tmp_path / "x"),
        *("--head", "classification", "--num-labels", 5),
    )
    assert told.status == 2 and "classifier/kernel: neither " in told.err
    assert "drawn at random" in told.err and not (tmp_path / "x").exists()

    told = run("describe", tmp_path / "own")
    assert told.status == 0
    for part in ("lora(rank=2", "full()", "2 x 16 x 16 rank 2", '"why": "a test"'):
        assert part in told.out
    told = run("describe", tmp_path / "own", "--base", base)
    assert "found by" in told.out and "trainable " in told.out


def test_describe_a_model_and_an_adapter_of_peft(hub, run):
    told = run("describe", hub.root / "llama")
    assert told.status == 0 and "llama, head causal_lm" in told.out
    assert "q_proj/kernel" in told.out and "(2 layers)" in told.out
    count = sum(
        x.size for x in load_file(hub.root / "llama/model.safetensors").values()
    )
    assert f"{count:,} parameters" in told.out
    told = run("describe", hub.root / "llama-peft")
    assert told.status == 0
    for part in ("adapter of HF PEFT's", "r: 3", "lora_alpha: 5", '"CAUSAL_LM"'):
        assert part in told.out
    name = "model.layers.{i}.self_attn.q_proj.lora_A.weight"
    assert name in told.out and "3 x 16  (2 layers)" in told.out


@pytest.fixture(scope="module")
def owned(hub):
    """Adapters of our own: one of BERT's, one of a model with other names."""
    _, params = models.load(hub.root / "bert", head="classification")
    key = jax.random.key(0)
    adapted = jp.attach(params, jp.lora(2), ["query"], key=key)
    interop.save_adapter(adapted, hub.root / "own")
    adapted = jp.attach({"x": params["classifier"]}, jp.lora(2), ["x"], key=key)
    interop.save_adapter(adapted, hub.root / "other")
    changed = load_file(hub.root / "bert/model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    changed[name] = changed[name] + 1e-3
    (hub.root / "other-bert").mkdir()
    save_file(changed, hub.root / "other-bert/model.safetensors")
    config = (hub.root / "bert/config.json").read_text()
    (hub.root / "other-bert/config.json").write_text(config)
    names = {"ours": "own", "other": "other", "other-bert": "other-bert"}
    return {word: hub.root / name for word, name in names.items()}


@pytest.fixture
def wrong(hub, owned, tmp_path):
    """Folders in which something is the matter."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    config = (hub.root / "llama-peft/adapter_config.json").read_text()
    (tmp_path / "pickled/adapter_config.json").write_text(config)
    (tmp_path / "pickled/adapter_model.bin").write_bytes(b"")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/adapter_config.json").write_text("{")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/adapter_config.json").write_text(config)
    tensors = load_file(hub.root / "llama-peft/adapter_model.safetensors")
    first = next(iter(tensors))
    tensors[first] = np.full_like(tensors[first], np.nan)
    save_file(tensors, tmp_path / "broken/adapter_model.safetensors")
    names = ("full", "empty", "pickled", "odd", "broken", "out")
    made = {name: tmp_path / name for name in names}
    base = {n: hub.root / n for n in ("bert", "llama")}
    return owned | made | base | {"peft": hub.root / "llama-peft"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("import peft --base llama --out full", "nothing is overwritten"),
        ("merge peft --base llama --out full", "nothing is overwritten"),
        (
            "merge peft --base llama --out out --max-shard-size big",
            "--max-shard-size must be",
        ),
        ("merge broken --base llama --out out", "not finite"),
        ("import nowhere --base llama --out out", "'nowhere' is no folder"),
        ("describe empty", "neither an adapter nor a model"),
        ("describe odd", "damaged or no PEFT config"),
        ("import pickled --base llama --out out", "pickled code"),
        ("import peft --base ./nowhere --out out", "is no folder"),
        ("import peft --base bert --out out", "asks for the head 'causal_lm'"),
        ("import ours --base bert --out out", "is an adapter of jaxpeft's own already"),
        ("export other --base bert --out out", "does not fit; nothing was loaded"),
        ("export ours --base other-bert --out out", "--any-base"),
        ("import llama --base llama --out out", "holds a model, not an adapter"),
        ("export peft --base llama --out out", "is an adapter of HF PEFT's already"),
        ("export peft --base llama --out out --rank 2", "--rank is for form portable"),
        ("convert peft --base llama --out out --to own --untie", "--untie is for HF"),
        ("import peft --base llama --out out --any-base", "--any-base is for"),
        ("import peft --base llama --out out --head none", "does not fit; nothing"),
        ("describe peft --head none", "write --base too"),
        ("import peft --out out", "does not say which model it belongs to"),
        ("exprt peft", "invalid choice: 'exprt'"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(run, wrong, command, message):
    told = run(*(wrong.get(word, word) for word in command.split()))
    assert told.status == 2 and message in told.err
    assert "Traceback" not in told.err and told.out == ""
    assert not wrong["out"].exists()
    assert [p.name for p in wrong["full"].iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ModuleNotFoundError("No module named 'x'"), 2, "pip install 'jaxpeft[train]'"),
        (KeyboardInterrupt(), 130, "jaxpeft: stopped"),
        (
            PermissionError(13, "Permission denied", "a/b"),
            2,
            "Permission denied: 'a/b'",
        ),
    ],
    ids=["module", "stopped", "permission"],
)
def test_other_ends(run, hub, tmp_path, monkeypatch, error, status, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(interop, "load_peft", fail)
    told = run(
        *("import", hub.root / "llama-peft", "--base", hub.root / "llama"),
        *("--out", tmp_path / "out"),
    )
    assert told.status == status and message in told.err.splitlines()[-1]


@pytest.mark.parametrize(
    "command", ["", "describe", "merge", "export", "import", "convert", "predict"]
)
def test_help_has_an_example(run, command):
    told = run(*command.split(), "--help")
    assert told.status == 0
    (line,) = [x for x in told.out.splitlines() if x.startswith("  jaxpeft ")]
    # The example is itself a command that can be read.
    from jaxpeft.cli._main import parser

    assert parser().parse_args(line.split()[1:]).command == (command or "export")


def test_the_script():
    """As pip installs it, or as it would."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"jaxpeft": "jaxpeft.cli:main"}
    script = Path(sys.executable).with_name("jaxpeft")
    code = "import sys; from jaxpeft.cli import main; sys.exit(main())"
    command = [script] if script.exists() else [sys.executable, "-c", code]
    done = subprocess.run(
        [*command, "describe", "nowhere"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("jaxpeft: error: 'nowhere' is no")
