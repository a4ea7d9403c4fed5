"""train.py on a base without padding token and chat template; what it writes on."""

import json
import shutil

import numpy as np
import pytest
from causal_toolbox import SHAPE

import train
from jaxpeft import interop
from jaxpeft.cli import main

# "sum 1 + 2" is asked as "+ 1 + 2", answered as "= 3 [EOS]".
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}+ "
    "{{ m['content'] }} {% else %}= {{ m['content'] }} [EOS] {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}= {% endif %}"
)


@pytest.fixture
def bare(tiny_llama, tmp_path):
    """The tiny Llama with a tokenizer as Llama's: no padding token, no template."""
    import transformers

    folder = tmp_path / "bare"
    more = {"pad_token_id": None, "architectures": ["LlamaForCausalLM"]}
    shutil.copytree(tiny_llama, folder)
    (folder / "config.json").write_text(json.dumps(SHAPE | more))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert again.pad_token is None and again.chat_template is None
    return folder


def small(config, folder, **task):
    config.model.name = str(folder)
    config.data = {"name": "texts", "metrics": ("token_accuracy",), **task}
    config.max_length, config.lengths = 28, (28,)
    config.targets, config.head = ("q_proj", "v_proj", "down_proj"), ()
    config.adapter = dict(name="lora", rank=8, alpha=16.0)
    config.optimizer.learning_rate = 2e-2
    config.batch_size, config.eval_batch_size = 8, 16
    config.train_for = config.evaluate_every = "30 steps"
    config.save_every = "30 steps"
    config.log.tensorboard = False


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_a_chat_of_a_base_model(bare, tiny_config, tmp_path, capsys):
    import transformers

    rows = [
        [
            {"role": "user", "content": f"{a} + {b}"},
            {"role": "assistant", "content": f"{a + b}"},
        ]
        for a in range(10)
        for b in range(10)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"m": row}) for row in rows))
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE)
    config, files = tiny_config(), {"train": str(path), "validation": str(path)}
    with config.unlocked():
        small(config, bare, messages="m", **files)
        config.tokenizer.chat_template = str(file)
    results = train.run(config, tmp_path / "run")
    assert results["after"]["token_accuracy"] > results["before"]["token_accuracy"]
    own, out = tmp_path / "run/adapter", tmp_path / "merged"
    assert interop.adapter_info(own)["metadata"]["tokenizer"] == {
        "pad_token": "[EOS]",
        "eos_token": "[EOS]",
        "chat_template": TEMPLATE,
    }
    file.unlink()  # the text has gone along
    question = ["1 + 2", "--chat", "--base", str(bare), "--adapter", str(own)]
    capsys.readouterr()
    assert main(["generate", *question, "--max-new-tokens", "4"]) == 0
    answer = capsys.readouterr().out.split()
    assert len(answer) < 4  # it stopped by itself
    assert main(["merge", str(own), "--base", str(bare), "--out", str(out)]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 2"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    new = theirs.generate(**asked, max_new_tokens=4, do_sample=False)
    new = new[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).split() == answer
    assert new[-1] == tokenizer.eos_token_id


def test_padding_changes_nothing(bare, tiny_llama, tiny_config, tmp_path):
    """Rows padded with the end token train as with a padding token of their own."""
    path = str(tiny_llama / "sums.jsonl")
    found = []
    for i, options in enumerate(({}, {"pad_token": "[PAD]"})):
        config = tiny_config()
        with config.unlocked():
            task = {"train": path, "validation": path, "prompt": "q", "completion": "a"}
            small(config, bare, **task)
            config.train_for = config.evaluate_every = "3 steps"
            config.save_every = "3 steps"
            config.tokenizer.update(options)
        found.append(train.run(config, tmp_path / f"run{i}")["after"])
    assert found[0] == found[1] and np.isfinite(found[0]["loss"])


def test_options_that_there_are_none_of(bare, tiny_config, tmp_path):
    path = str(bare / "sums.jsonl")
    for options, message in (
        ({"pad_tokn": "[EOS]"}, r"`config.tokenizer.pad_tokn`.*nearest: .*pad_token'"),
        ({"chat_template": "chatmI"}, "Did you mean 'chatml'"),
        ({"pad_token": "[PADD]"}, r"`pad_token` '\[PADD\]'.*nearest: \['\[PAD\]'"),
    ):
        config = tiny_config()
        with config.unlocked():
            task = {"train": path, "validation": path, "prompt": "q", "completion": "a"}
            small(config, bare, **task)
            config.tokenizer.update(options)
        with pytest.raises(ValueError, match=message):
            train.run(config, tmp_path / options.popitem()[0])
