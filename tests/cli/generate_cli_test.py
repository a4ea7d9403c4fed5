"""``jaxpeft generate`` on a tiny random Llama with a tokenizer of its own."""

import io
import shutil

import jax
import pytest

import jaxpeft as jp
from jaxpeft import data, interop, models
from jaxpeft.cli import main

WORDS = ["<end>", "<unk>", *(f"w{i}" for i in range(62))]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as parts
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base") / "llama"
    model = models.from_config(CONFIG, head="causal_lm")
    params = models.init(model, jax.random.key(0))
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)
    interop.save_hf(params, folder, names=model.names, config=model.hf_config)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(parts.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>"
    )
    fast.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} w2{% endfor %}"
        "{% if add_generation_prompt %} w3{% endif %}"
    )
    fast.save_pretrained(folder)
    return folder


def said(capsys, *argv):
    capsys.readouterr()
    status = main(["generate", *map(str, argv), "--max-new-tokens", "5"])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


def test_with_and_without_an_adapter(base, capsys, tmp_path, monkeypatch):
    status, [plain], _ = said(capsys, "w7 w9", "--base", base)
    assert status == 0 and len(plain.split()) <= 5
    model, params = models.load(base, head="causal_lm")
    ids = [[WORDS.index("w7"), WORDS.index("w9")]]
    new = models.generate(model, params, ids, max_new_tokens=5, stop=[0])[0]
    assert plain.split() == [WORDS[i] for i in new]

    adapted = jp.attach(
        params, jp.lora(2), ["q_proj", "down_proj"], key=jax.random.key(1)
    )
    trainable, frozen = jp.partition(adapted)
    moved = jp.combine(jax.tree.map(lambda x: x + 1.0, trainable), frozen)
    interop.save_adapter(moved, tmp_path / "own")
    adapter = ("--adapter", tmp_path / "own")
    monkeypatch.setattr("sys.stdin", io.StringIO("w7 w9\nw8\n"))
    status, lines, err = said(capsys, "--base", base, *adapter)
    assert status == 0 and len(lines) == 2 and "generating for 2 prompts" in err
    expected = models.generate(model, moved, ids, max_new_tokens=5, stop=[0])[0]
    assert lines[0].split() == [WORDS[i] for i in expected] != plain.split()

    _, [chat], _ = said(capsys, "w7", "--base", base, "--chat")
    _, [whole], _ = said(capsys, "w1 w7 w2 w3", "--base", base)
    assert chat == whole
    draws = {
        said(capsys, "w7", "--base", base, "--temperature", 5, "--seed", s)[1][0]
        for s in (0, 0, 1)
    }
    assert len(draws) == 2


@pytest.mark.parametrize("single", ["$A <end>", "w5 $A <end>", "w5 w6 $A"])
def test_a_prompt_is_opened_and_not_ended(base, capsys, tmp_path, single):
    """What the tokenizer puts behind a text would say that there is no more."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    folder = shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = [w for w in ("<end>", "w5", "w6") if w in single]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(w, WORDS.index(w)) for w in special]
    )
    tokenizer.save_pretrained(folder)
    front = [WORDS.index(w) for w in single.partition("$")[0].split()]
    ids = [WORDS.index("w7"), WORDS.index("w9")]
    model, params = models.load(folder, head="causal_lm")
    new = models.generate(model, params, [front + ids], max_new_tokens=5, stop=[0])[0]
    _, [line], _ = said(capsys, "w7 w9", "--base", folder)
    assert line.split() == [WORDS[i] for i in new]
    # What training reads as a prompt is the same.
    reread = AutoTokenizer.from_pretrained(folder)
    assert models.opened(reread, "w7 w9") == front + ids
    reread.pad_token = "<end>"
    rows = [{"q": "w7 w9", "a": " w3"}]
    task = data.make_text_task(
        "toy", {"train": rows, "validation": rows}, prompt="q", completion="a"
    )
    encoded = data.tokenize(task, reread, vocab_size=64, max_length=32)["train"]
    assert encoded.ids[~encoded.learn].tolist() == front + ids
    if "<end>" in single:  # control: the tokenizer's own reading ends the prompt
        assert reread("w7 w9")["input_ids"] == [*front, *ids, 0]


def test_bad_input(base, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "there is no PROMPT" in said(capsys, "--base", base)[2]
    status, _, err = said(capsys, "w7", "--base", base, "--top-k", 3)
    assert status == 2 and "--top-k and --top-p change nothing at temperature 0" in err


def test_every_prompt_has_its_own_adapter(base, capsys, tmp_path):
    model, params = models.load(base, head="causal_lm")
    trees = {}
    for i, (name, targets) in enumerate(
        {"one": ["q_proj", "down_proj"], "two": ["v_proj"]}.items()
    ):
        key = jax.random.key(i)
        adapted = jp.attach(params, jp.lora(2 + i), targets, key=key)
        trainable, frozen = jp.partition(adapted)
        moved = jax.tree.map(lambda x: x + 1.0 + i, trainable)  # noqa: B023
        trees[name] = jp.combine(moved, frozen)
    interop.save_adapter(trees["one"], tmp_path / "one")
    interop.save_peft(trees["two"], tmp_path / "two", names=model.names)
    both = [f"--adapter={name}={tmp_path / name}" for name in trees]
    prompt = "w7 w9"
    rows = ["--rows", "two,__base__,one"]
    status, lines, _ = said(capsys, *[prompt] * 3, "--base", base, *both, *rows)
    ids = [[WORDS.index(word) for word in prompt.split()]]
    assert status == 0
    for line, tree in zip(lines, (trees["two"], params, trees["one"]), strict=True):
        new = models.generate(model, tree, ids, max_new_tokens=5, stop=[0])[0]
        assert line.split() == [WORDS[i] for i in new]
    assert len(set(lines)) == 3

    # Over a base that is not read as it is stored, as a run has it.
    low = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    adapted = jp.attach(low, jp.lora(2), ["q_proj"], key=jax.random.key(0))
    told = {"config": {"model": {"name": str(base), "dtype": "bfloat16"}}}
    interop.save_adapter(adapted, tmp_path / "low", metadata=told)
    alone = said(capsys, prompt, f"--adapter={tmp_path / 'low'}")
    among = said(capsys, prompt, f"--adapter=low={tmp_path / 'low'}", "--rows", "low")
    assert alone[:2] == among[:2] and among[0] == 0, among

    for more, message in (
        (both, "several adapters need names"),
        ([*both, "--rows", "one,two"], "2 names for 1 prompts"),
        ([*both, "--rows", "three"], "--rows has 'three'"),
        ([both[0], both[0], "--rows", "one"], "needs a name of its own"),
        ([f"--adapter={tmp_path / 'one'}", "--rows", "one"], "write --adapter NAME="),
        (["--rows", "one"], "add --adapter NAME=FOLDER"),
        (["--ignore", "r"], "--ignore says how an adapter goes onto the base"),
    ):
        status, _, err = said(capsys, prompt, "--base", base, *more)
        assert status != 0 and message in " ".join(err.split()), err


def test_a_base_that_is_gone_is_said_of_the_adapters_that_name_it(
    base, tmp_path, capsys
):
    _, params = models.load(base, head="causal_lm")
    adapted = jp.attach(params, jp.lora(2), ["q_proj"], key=jax.random.key(0))
    interop.save_adapter(adapted, tmp_path / "own", metadata={"base": "./gone"})
    for more in ([f"a={tmp_path / 'own'}", "--rows", "a"], [tmp_path / "own"]):
        status, _, err = said(capsys, "w7", "--adapter", *more)
        assert status == 2 and f"the base that '{more[0]}' names, './gone', is" in err
        assert "there: './gone' is no folder" in err
