"""``jaxpeft predict`` and heads of other widths, on folders that others wrote."""

import argparse
import gzip
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

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
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "max_position_embeddings": 20,
}
NLI = ("contradiction", "entailment", "neutral")
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(60))]
ROWS = [("w1 w2 w3", "w9"), ("w5", "w3 w4 w5"), ("w7 w7", "w8")]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A classifier of three classes, and PEFT's adapters with heads of 5 and of 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import tokenizers
        import torch
        import transformers

    root = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    kind = transformers.BertForSequenceClassification
    names = {"id2label": dict(enumerate(NLI))}
    names["label2id"] = {name: i for i, name in enumerate(NLI)}
    kind(transformers.BertConfig(**SIZES, **names)).save_pretrained(root / "base")
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=20,
    )
    tokenizer.save_pretrained(root / "base")
    logits = {}
    texts = tokenizer(*map(list, zip(*ROWS, strict=True)), padding=True)
    texts = {name: torch.tensor(x) for name, x in texts.items()}
    for width in (5, 1):
        model = kind.from_pretrained(
            root / "base", num_labels=width, ignore_mismatched_sizes=True
        ).eval()
        config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"])
        adapted = peft.get_peft_model(model, config).eval()
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.Generator().manual_seed(len(name))
                drawn = torch.randn(parameter.shape, generator=noise)
                parameter.data = 0.3 * drawn
        adapted.save_pretrained(root / f"peft-{width}")
        with torch.no_grad():
            logits[width] = adapted(**texts).logits.numpy()
    with torch.no_grad():
        logits["base"] = kind.from_pretrained(root / "base")(**texts).logits.numpy()
    lines = [json.dumps({"one": a, "two": b}) for a, b in ROWS]
    (root / "rows.jsonl").write_text("\n".join(lines))
    return SimpleNamespace(root=root, logits=logits)


@pytest.fixture
def run(capsys):
    def call(*argv):
        capsys.readouterr()
        status = main([str(x) for x in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return call


def shares(logits):
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def test_a_base_is_asked_under_its_own_names(hub, run):
    root = hub.root
    pair = ("--input", root / "rows.jsonl", "--text", "one", "two")
    told = run("predict", "--base", root / "base", *pair)
    assert told.status == 0, told.err
    found = [json.loads(line)["probabilities"] for line in told.out.splitlines()]
    assert all(tuple(row) == NLI for row in found)
    got = [list(row.values()) for row in found]
    np.testing.assert_allclose(got, shares(hub.logits["base"]), rtol=0, atol=1e-5)


def test_an_adapter_with_a_head_of_another_width(hub, run, tmp_path):
    """The base's file has three classes; PEFT's has five of its own, without names."""
    root = hub.root
    pair = ("--input", root / "rows.jsonl", "--text", "one", "two")
    ask = ("predict", "--adapter", root / "peft-5", *pair)  # it names its base
    told = run(*ask)
    assert told.status == 0, told.err
    found = [json.loads(line)["probabilities"] for line in told.out.splitlines()]
    assert tuple(found[0]) == tuple(f"LABEL_{i}" for i in range(5))
    got = [list(row.values()) for row in found]
    np.testing.assert_allclose(got, shares(hub.logits[5]), rtol=0, atol=1e-5)
    names = ("a", "b", "c", "d", "it's, e")
    told = run(*ask, "--labels", *names)
    assert tuple(json.loads(told.out.splitlines()[0])["probabilities"]) == names
    told = run("merge", root / "peft-5", "--labels", *names, "--out", tmp_path / "m")
    assert told.status == 0, told.err
    assert interop.head_info(tmp_path / "m").labels == names
    told = run(*ask, "--labels", "a", "b")
    assert told.status == 2 and "--labels has 2 names" in told.err
    # The base's head alone cannot be had in another width: it would be drawn.
    told = run("predict", "--base", root / "base", "--num-labels", 5, *pair)
    assert told.status == 2 and "drawn at random" in told.err


def test_one_output_is_a_number(hub, run, tmp_path):
    root = hub.root
    pair = ("--input", root / "rows.jsonl", "--text", "one", "two")
    told = run("predict", "--adapter", root / "peft-1", *pair)
    assert told.status == 0, told.err
    got = [json.loads(line)["score"] for line in told.out.splitlines()]
    np.testing.assert_allclose(got, hub.logits[1][:, 0], rtol=0, atol=1e-5)
    assert run("merge", root / "peft-1", "--out", tmp_path / "m").status == 0
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["problem_type"] == "regression" and len(config["id2label"]) == 1


def test_what_no_head_can_answer(hub, run, tmp_path):
    root = hub.root
    rows = ("--input", root / "rows.jsonl", "--text", "one")
    told = run("predict", "--base", root / "base", "--head", "none", *rows)
    assert told.status == 2 and "has no head" in told.err
    several = tmp_path / "several"
    model, params = models.load(root / "base", head="classification")
    config = model.hf_config | {"problem_type": "multi_label_classification"}
    interop.save_hf(params, several, names=model.names, config=config)
    told = run("predict", "--base", several, *rows)
    assert told.status == 2 and "a probability of its own" in told.err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.json", '[{"text": "a"}, {"text": "b"}]'),
        ("ROWS.JSONL", '{"text": "a"}\n{"text": "b"}\n'),
        ("rows.tab", "text\tn\na\t1\nb\t2\n"),
        ("rows.csv.gz", "text,n\na,1\nb,2\n"),
    ],
)
def test_rows_of_every_file_that_training_reads(name, text, tmp_path):
    """None of them is taken for lines of text."""
    from jaxpeft.cli._predict import _rows

    pack = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(pack(text.encode()))
    given = argparse.Namespace(input=str(tmp_path / name), input_format=None)
    assert [row["text"] for row in _rows(given)] == ["a", "b"]
    (tmp_path / name).write_bytes(pack(b""))
    with pytest.raises(ValueError, match="--input .* no rows|column names"):
        _rows(given)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("jsonl", '{"text": "fröh, lich"}\n\n{"text": "b"}\n'),
        ("csv", 'text,n\r\n"fröh, lich",1\r\nb,2\r\n'),
        ("tsv", "text\tn\nfröh, lich\t1\nb\t2\n"),
        ("lines", "fröh, lich\r\n\r\nb"),
    ],
)
def test_every_kind_of_rows_from_standard_input(kind, text):
    code = (
        "import argparse; from jaxpeft.cli._predict import _rows\n"
        f"given = argparse.Namespace(input='-', input_format={kind!r})\n"
        "print([x if isinstance(x, str) else x['text'] for x in _rows(given)])"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        input=text.encode(),
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().strip() == str(["fröh, lich", "b"])
    assert (b"1 blank line passed over" in done.stderr) == (kind == "lines")
