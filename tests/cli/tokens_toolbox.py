"""Tiny random Llamas whose tokenizers lack or have what a chat needs."""

import json

import jax

from jaxpeft import interop, models

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# An answer ends with <turn>, which is in no config, only here.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w4 {{ m['content'] }} "
    "{% else %}w5 {{ m['content'] }} <turn> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w5 {% endif %}"
)


def write_base(folder, *, ends=None, head="causal_lm", closed=False, **names):
    """Writes a model, and a tokenizer of words w0, w1, ...; returns (model, params).

    Args:
        folder: where.
        ends: other names of words, by id.
        head: of the model.
        closed: whether the tokenizer ends each text.
        **names: of the tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors
    from tokenizers import models as parts
    from transformers import PreTrainedTokenizerFast

    labels = {"num_labels": 3} if head == "classification" else {}
    model = models.from_config(CONFIG, head=head, **labels)
    params = models.init(model, jax.random.key(7))
    params = jax.tree.map(lambda x: 30 * x if x.ndim > 1 else x, params)
    interop.save_hf(params, folder, names=model.names, config=model.hf_config)
    words = [f"w{i}" for i in range(64)]
    for i, word in ({0: "<unk>", 1: "</s>"} | (ends or {})).items():
        words[i] = word
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(parts.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "</s>", *(ends or {}).values()]
    tokenizer.add_special_tokens([AddedToken(x, normalized=False) for x in special])
    if closed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    names = {"unk_token": "<unk>", "eos_token": "</s>"} | names
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = names.get("chat_template")
    fast.save_pretrained(folder)
    return model, params


def set_json(file, **values):
    """Changes values in a file of JSON, or writes one."""
    old = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(old | values))
