"""Choices' log-likelihoods, in padded batches, against transformers' one by one."""

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import data, models, training

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(60))]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,
    "tie_word_embeddings": True,
}


def make_tokenizer():
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"},
        unk_token="[UNK]",
        model_max_length=32,
    )


def make_rows(count=30):
    random = np.random.default_rng(0)
    text = lambda low, high: " ".join(
        f"w{i}" for i in random.integers(0, 60, random.integers(low, high))
    )
    rows = []
    for i in range(count):
        choices = [f" w{place} {text(0, 5)}" for place in range(random.integers(2, 5))]
        answer = int(random.integers(0, len(choices)))
        # Of choices that the tokenizer cannot tell apart the first counts.
        if i == 7:
            choices, answer = [" x", " y", " z"], 0
        rows.append({"q": text(1, 12), "c": choices, "a": answer})
    return rows


@pytest.mark.interop
def test_it_is_what_transformers_says(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer, rows = make_tokenizer(), make_rows()
    task = data.make_text_task(
        "toy",
        {"train": rows, "validation": rows},
        prompt="q",
        choices="c",
        answer="a",
    )
    model, params = models.load(tmp_path, head="causal_lm")
    held = data.tokenize(
        task, tokenizer, vocab_size=len(WORDS), max_length=20, splits=["validation"]
    )["validation"]

    mesh = training.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    adapted = jp.attach(params, jp.lora(rank=2), ["q_proj"], key=jax.random.key(0))
    specs = training.param_specs(params, mesh, axes=model.axes)
    trainable, frozen = jp.partition(training.place(adapted, mesh, specs))
    optimizer = training.adamw(trainable, total_steps=1, learning_rate=0.1)
    state = training.init_state(trainable, optimizer, key=jax.random.key(0), mesh=mesh)
    forward, loss = training.objective(model, mesh=mesh)
    step = training.eval_step(forward, loss, state, frozen, mesh=mesh)
    options = dict(mesh=mesh, rows=16)
    batches = lambda: data.evaluation_batches(held, 16, lengths=(8, 20))
    found = training.run_split(step, trainable, frozen, batches(), **options)
    scores = training.evaluate(
        step,
        trainable,
        frozen,
        batches(),
        score=lambda outputs, labels: data.score(task, outputs, labels),
        **options,
    )

    sums, hits, mean_hits, right = {}, [], [], []
    for number, row in enumerate(rows):
        prompt = tokenizer(row["q"])["input_ids"]
        values, counts = [], []
        for choice in row["c"]:
            ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = theirs(torch.tensor([prompt + ids])).logits[0]
            chosen = torch.log_softmax(logits, -1)[
                torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1), ids
            ]
            sums[number, len(values)] = -float(chosen.sum())
            values.append(float(chosen.sum()))
            counts.append(len(ids))
        hits.append(np.argmax(values) == row["a"])
        mean_hits.append(np.argmax(np.divide(values, counts)) == row["a"])
        right.append((values[row["a"]], counts[row["a"]]))
    assert len(found.outputs) == len(sums)
    wanted = np.array([sums[number, place] for _, number, place, *_ in found.labels])
    # Measured: 6e-7 relative. The next best choice is much farther off.
    np.testing.assert_allclose(found.outputs[:, 0], wanted, rtol=1e-5)
    assert scores["accuracy"] == np.mean(hits)
    assert scores["accuracy_per_token"] == np.mean(mean_hits)
    assert scores["accuracy"] != scores["accuracy_per_token"]
    total, tokens = np.sum(right, 0)
    assert scores["loss"] == pytest.approx(-total / tokens, rel=1e-5)
    # The control: all choices together have another loss.
    assert abs(wanted.sum() / found.labels[:, 0].sum() - scores["loss"]) > 0.01
    same = found.labels[:, 1] == 7
    assert len(set(found.outputs[same, 0].tolist())) == 1 and same.sum() == 3
