"""Chats whose turns end with another token than texts do."""

import pytest

from jaxpeft import data

WORDS = ["[UNK]", "[EOS]", "[TURN]", "after", "user", "assistant"]
WORDS += [f"w{i}" for i in range(20)]
CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]
TEMPLATE = (
    "{% for m in messages %}"
    "{{ m['role'] }} {{ m['content'] }} [TURN] after {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def encode(template, rows=({"m": CHAT},)):
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]", "[EOS]", "[TURN]"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="[EOS]", pad_token="[EOS]"
    )
    tokenizer.chat_template = template
    task = data.make_text_task("toy", {"train": rows, "validation": rows}, messages="m")
    return data.tokenize(task, tokenizer, vocab_size=len(WORDS), max_length=40)["train"]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TEMPLATE, ["w3 [TURN]", "w5 w6 [TURN]"]),
        (TEMPLATE.replace("[TURN]", "[EOS]"), ["w3 [EOS]", "w5 w6 [EOS]"]),
        # Phi-3's way: both, of which the first is the turn's.
        (
            TEMPLATE.replace("[TURN]", "[TURN] [EOS]"),
            ["w3 [TURN]", "w5 w6 [TURN]"],
        ),
        (TEMPLATE.replace("[TURN]", ""), ["w3 after", "w5 w6 after"]),
    ],
)
def test_a_turn_is_learnt_up_to_its_end(template, ends):
    encoded = encode(template)
    learnt = [WORDS[i] for i in encoded.ids[encoded.learn]]
    assert " ".join(learnt) == " ".join(ends)
    without = "[" not in " ".join(ends)
    assert encoded.facts.get("chats_without_end", 0) == int(without)


def test_a_batch_hides_its_padding_and_not_the_end_token():
    """Padding is the end token here; what is learnt goes by the place, not the id."""
    encoded = encode(
        TEMPLATE.replace("[TURN]", "[EOS]"), ({"m": CHAT}, {"m": CHAT[:2]})
    )
    (batch,) = data.evaluation_batches(encoded, 2, lengths=(40,))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    lengths = encoded.lengths
    assert mask.sum(1).tolist() == lengths.tolist() and len(set(lengths)) == 2
    assert ((ids == 1) & (mask == 1)).sum() == 6  # ends that are seen
    learnt = batch["target_weights"] > 0
    assert (batch["targets"][learnt] == 1).sum() == 3  # and three that are learnt
    assert not learnt[mask == 0].any()
