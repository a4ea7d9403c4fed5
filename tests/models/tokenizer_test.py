"""A model's tokenizer: what is set where it lacks something, and where writing ends."""

import json

import gguf
import jax
import pytest
from decoder_toolbox import content
from gguf_test import write as write_gguf

from jaxpeft import interop, models
from jaxpeft.models import _tokenizer
from jaxpeft.models._load import HUB_FILES

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|end|>"]


def make(folder=None, single="$A", template=None, **names):
    """A byte-level tokenizer with the tokens of several kinds of chat."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers import models as parts
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*WORDS, *alphabet])}
    backend = Tokenizer(parts.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in WORDS])
    backend.add_tokens([AddedToken("\n\n", normalized=False)])  # as Gemma and phi-2
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>"} | names
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    fast.chat_template = template
    if folder is not None:
        fast.save_pretrained(folder)
    return fast


# --- where writing ends


@pytest.mark.parametrize(
    ("name", "template", "end"),
    [
        ("chatml", CHATML, "<|im_end|>"),
        ("nothing", None, None),
        ("a line end", "{% for m in messages %}{{ m['content'] }}\n{% endfor %}", None),
        (
            "lines, that are a token",
            "{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}",
            None,
        ),
        (
            "words that look like a token",
            "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}",
            None,
        ),
        (
            "words, then the end",
            "{% for m in messages %}{{ m['content'] }} OVER </s>{% endfor %}",
            "</s>",
        ),
        (
            "the next turn's beginning",
            "{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] }}"
            "{% endfor %}",
            None,
        ),
        (
            "a prompt for the next answer, asked for or not",
            "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{% endif %}"
            "{{ m['content'] }}\n{% endfor %}<|im_start|>",
            None,
        ),
        (
            "Phi-3: a text's end at the very end",
            "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>\n{% endfor %}"
            "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            "<|end|>",
        ),
        (
            "Llama 2: a space, and only after answers",
            "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] "
            "}} [/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}",
            "</s>",
        ),
        ("a refusal", "{{ raise_exception('no') }}", None),
        ("no answers", "{{ messages[0]['content'] }}<|end|>", None),
    ],
)
def test_what_ends_a_turn(name, template, end):
    tokenizer = make(template=template)
    found = models.turn_end(tokenizer)
    assert found == (None if end is None else WORDS.index(end)), name


def test_several_templates_by_name():
    tokenizer = make(template={"default": CHATML, "tool_use": "{{ messages }}"})
    assert models.turn_end(tokenizer) == WORDS.index("<|im_end|>")
    assert models.tokenizer_options(tokenizer)["chat_template"] is None
    tokenizer.chat_template = {"tool_use": CHATML}
    assert models.turn_end(tokenizer) is None


def test_every_place_that_names_an_end(tmp_path):
    tokenizer = make(tmp_path, template=CHATML)
    size = len(tokenizer)
    config = content("llama", vocab_size=size, eos_token_id=20)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert models.stop_tokens(tmp_path, tokenizer) == (2, 4, 20)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [20, 30, -1, size]}))
    assert models.stop_tokens(tmp_path, tokenizer) == (2, 4, 20, 30)
    file.write_text(json.dumps({"eos_token_id": 31}))
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"eos_token_id": [21, 22]})
    )
    assert models.stop_tokens(tmp_path, tokenizer) == (2, 4, 21, 22, 31)
    plain = make()
    assert models.stop_tokens(tmp_path, plain) == (2, 21, 22, 31)  # control


def test_a_loaded_model_knows_what_its_configs_say(tmp_path):
    config = content("llama", eos_token_id=20)
    model = models.from_config(config, head="causal_lm")
    assert model.stop_tokens == (20,)
    params = models.init(model, jax.random.key(0))
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)
    interop.save_hf(
        params, tmp_path / "a", names=model.names, config=config, stop=(20, 30)
    )
    loaded, params = models.load(tmp_path / "a", head="causal_lm")
    assert loaded.stop_tokens == (20, 30)
    go = lambda model, **more: models.generate(
        model, params, [[5, 9, 33]], max_new_tokens=8, **more
    )[0]
    whole = go(loaded, stop=())
    assert len(whole) == 8  # control: nothing is stopped at
    ended = loaded.clone(stop_tokens=(whole[4],))
    assert go(ended) == go(loaded, stop=[whole[4]]) == whole[: whole.index(whole[4])]
    for wrong in (64, -1):
        with pytest.raises(ValueError, match=rf"`stop` has \[{wrong}\].* 0 to 63"):
            go(loaded, stop=[wrong])
    encoder = models.from_config({"model_type": "bert", "eos_token_id": 2})
    assert not hasattr(encoder, "stop_tokens")


def test_gguf_files_name_the_end_of_a_turn(tmp_path, monkeypatch):
    plain = write_gguf(tmp_path / "plain.gguf")
    assert models.stop_tokens(plain, models.tokenizer(plain)) == (0,)
    add = gguf.GGUFWriter.add_eos_token_id

    def add_both(self, token):
        add(self, token)
        self.add_eot_token_id(7)

    monkeypatch.setattr(gguf.GGUFWriter, "add_eos_token_id", add_both)
    path = write_gguf(tmp_path / "chat.gguf")
    assert models.stop_tokens(path, models.tokenizer(path)) == (0, 7)
    model, _ = models.load(path, head="causal_lm")
    assert model.stop_tokens == (0, 7)


# --- what a base's tokenizer lacks


def test_padding_where_there_is_no_token_for_it(tmp_path, caplog):
    make(tmp_path / "bare")
    _tokenizer._say_once.cache_clear()
    for _ in range(2):
        assert models.tokenizer(tmp_path / "bare").pad_token == "</s>"
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'bare'}: the tokenizer has no padding token; short rows are "
        "filled up with '</s>', which the mask leaves out"
    ]
    caplog.clear()
    chosen = models.tokenizer(tmp_path / "bare", pad_token="<unk>", eos_token="<|end|>")
    assert (chosen.pad_token_id, chosen.eos_token_id) == (0, 6)
    make(tmp_path / "own", pad_token="<|end|>")
    assert models.tokenizer(tmp_path / "own").pad_token == "<|end|>"
    assert not caplog.records
    # Its classifiers would take the token before each text's last for the last.
    make(tmp_path / "closed", single="$A </s>", unk_token="<unk>")
    assert models.tokenizer(tmp_path / "closed").pad_token == "<unk>"
    make(tmp_path / "none", eos_token=None)
    assert models.tokenizer(tmp_path / "none").pad_token is None
    with pytest.raises(ValueError, match=r"`pad_token` '<pad>' is not .*vocabulary"):
        models.tokenizer(tmp_path / "bare", pad_token="<pad>")
    with pytest.raises(ValueError, match=r"`eos_token` '<\|endd\|>'.*'<\|end\|>'"):
        models.tokenizer(tmp_path / "bare", eos_token="<|endd|>")


def test_what_was_chosen_is_saved_and_made_again(tmp_path):
    make(tmp_path / "bare")
    chosen = models.tokenizer(
        tmp_path / "bare", pad_token="<unk>", chat_template="chatml"
    )
    again = models.tokenizer(tmp_path / "bare", **models.tokenizer_options(chosen))
    assert models.tokenizer_options(again) == models.tokenizer_options(chosen)
    chosen.save_pretrained(tmp_path / "saved")
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert models.tokenizer_options(theirs) == models.tokenizer_options(chosen)
    assert models.turn_end(theirs) == WORDS.index("<|im_end|>")


SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
]
MARKS = {  # as their makers publish them
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello"
    "<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye"
    "<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n"
    "<start_of_turn>model\nHi.<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"
    "<start_of_turn>model\n",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi."
    "<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHello</s>\n<|assistant|>\nHi.</s>\n"
    "<|user|>\nBye</s>\n<|assistant|>\n",
    "mistral": "[INST] Be brief.\n\nHello [/INST] Hi.</s>[INST] Bye [/INST]",
    "vicuna": "Be brief. USER: Hello ASSISTANT: Hi.</s>USER: Bye ASSISTANT:",
    "alpaca": "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi.</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
}


@pytest.mark.parametrize("name", MARKS)
def test_templates_by_name(name, tmp_path, caplog):
    make(tmp_path)
    tokenizer = models.tokenizer(tmp_path, chat_template=name)
    render = lambda: tokenizer.apply_chat_template(
        SAID, tokenize=False, add_generation_prompt=True
    )
    ends = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
    # Of a token that there is none of no model learns that a turn ends with it.
    lacks = name in ends
    assert render() == MARKS[name].replace(ends.get(name, "</s>"), "</s>")
    assert ("has no token" in caplog.text) == lacks
    wanted = {"chatml": "<|im_end|>", "phi3": "<|end|>"}.get(name, "</s>")
    assert models.turn_end(tokenizer) == WORDS.index(wanted)
    # What is said before goes on unchanged, as training on each answer needs it.
    whole = tokenizer.apply_chat_template(SAID, tokenize=True, return_dict=False)
    for n in (2, 3):
        part = tokenizer.apply_chat_template(
            SAID[:n], tokenize=True, return_dict=False, add_generation_prompt=n == 2
        )
        assert whole[: len(part)] == part
    # A model that was trained behind a first token gets it here, too.
    make(tmp_path / "opened", single="<s> $A")
    tokenizer = models.tokenizer(tmp_path / "opened", chat_template=name)
    assert render().startswith("<s>") and render().count("<s>") == 1


def test_templates_of_one_s_own(tmp_path):
    make(tmp_path)
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    for given in (str(file), CHATML):
        assert models.tokenizer(tmp_path, chat_template=given).chat_template == CHATML
    for given, message in (
        ("chatlm", "Did you mean 'chatml'"),
        ("{% for m in messages %}", "fails: "),
        ("{{ raise_exception('not this') }}", "fails: not this"),
        ("{{ messages[0]['content'] }}", "loses what is said"),
        ("{{ 'assistant b' }}", "loses what is said"),
    ):
        with pytest.raises(ValueError, match=message):
            models.tokenizer(tmp_path, chat_template=given)
    make(tmp_path / "endless", eos_token=None)
    with pytest.raises(ValueError, match="no end token; give `eos_token`"):
        models.tokenizer(tmp_path / "endless", chat_template="alpaca")


@pytest.mark.slow
def test_chatml_is_what_smollm2_has():
    tokenizer = models.tokenizer("smollm2")
    render = lambda: tokenizer.apply_chat_template(
        SAID, tokenize=False, add_generation_prompt=True
    )
    assert render() == MARKS["chatml"]
    assert models.stop_tokens("smollm2", tokenizer) == (2,)


# --- what is fetched of a repository on the hub

TAKEN = [
    *("config.json", "generation_config.json", "model.safetensors"),
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    "model.safetensors-00002-of-00002.safetensors",
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "spm.model", "vocab.txt", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja"),
    *("additional_chat_templates/tool_use.jinja", "chat_templates/rag.jinja"),
    *("tekken.json", "chat_template.json"),
]
LEFT = [
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "flax_model.msgpack"),
    *("tf_model.h5", "onnx/model.onnx", "onnx/model.safetensors", "model.onnx"),
    *("model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"),
    *("consolidated.safetensors", "consolidated.00.pth", "model-q4_k_m.gguf"),
    *("model.gguf", "rust_model.ot", "training_args.bin", "optimizer.pt"),
    *("modeling_mine.py", "README.md", "openvino/openvino_model.bin", ".gitattributes"),
]


def test_what_is_fetched_by_a_hub_name(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    kept = filter_repo_objects([*TAKEN, *LEFT], allow_patterns=list(HUB_FILES))
    assert sorted(kept) == sorted(TAKEN)
    # It is this list that the hub's client is given.
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **how: asked.update({name: how}) or str(tmp_path),
    )
    make(tmp_path)
    assert models.tokenizer("owner/name").eos_token == "</s>"
    assert asked == {"owner/name": {"allow_patterns": list(HUB_FILES)}}


def test_what_was_fetched_goes_along_into_a_merge(tmp_path):
    model = models.from_config(content("llama"), head="causal_lm")
    params = models.init(model, jax.random.key(0))
    base = tmp_path / "base"
    for name in [n for n in TAKEN if not n.startswith("model")]:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}")
    (base / "config.json").write_text(json.dumps(model.hf_config))
    interop.save_hf(
        params,
        tmp_path / "merged",
        names=model.names,
        config=model.hf_config,
        source=base,
    )
    files = tmp_path.glob("merged/**/*")
    found = {str(f.relative_to(tmp_path / "merged")) for f in files if f.is_file()}
    unsplit = {n for n in TAKEN if not n.startswith("model")}
    unsplit |= {"model.safetensors", "README.md"}
    assert found == unsplit
