"""What a model says of rows, against one forward pass a row by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import jaxpeft as jp
from jaxpeft import data, models, serving, training

SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 384,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
TEXTS = ["what fun", "oh", "a much longer text than all of the others here", "no", "hm"]


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def tokenizer():
    made = transformers.ByT5Tokenizer()
    made.chat_template = CHAT
    return made


def adapted(model, targets, seed=0):
    params = models.init(model, jax.random.key(seed))
    tree = jp.attach(params, jp.lora(2), targets, key=jax.random.key(1))
    trainable, frozen = jp.partition(tree)
    draw = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jp.combine(jax.tree.map(draw, trainable), frozen)


@pytest.fixture(scope="module")
def encoder():
    config = {"model_type": "bert", "type_vocab_size": 2, **SIZES}
    model = models.from_config(config, head="classification", num_labels=5)
    return model, adapted(model, ["query", "value"])


@pytest.fixture(scope="module")
def decoder():
    model = models.from_config({"model_type": "llama", **SIZES}, head="causal_lm")
    return model, adapted(model, ["q_proj", "down_proj"])


def by_hand(model, params, ids, **more):
    run = jp.adapt(lambda p: model.apply({"params": p}, jnp.asarray([ids]), **more))
    return np.asarray(run(params))[0]


def shares(logits):
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


LABELS = ("e", "d", "c", "b", "a")
ASKED = data.Question("moods", "class", ("text",), LABELS)


def test_classes_in_the_order_of_the_rows(encoder, tokenizer):
    model, params = encoder
    seen = []
    found = serving.predict(
        *(model, params, tokenizer, TEXTS, ASKED),
        batch_size=2,
        max_length=20,
        lengths=(6, 12, 20),
        advance=lambda *counts: seen.append(counts),
    )
    for text, row in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, truncation=True, max_length=20)["input_ids"]
        wanted = shares(by_hand(model, params, ids))
        got = [row["probabilities"][name] for name in LABELS]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
        assert row["label"] == LABELS[int(np.argmax(wanted))]
        assert json.loads(json.dumps(row)) == row
    assert seen == [(2, 5), (4, 5), (5, 5)]
    plain = serving.predict(
        *(model, jp.detach(params), tokenizer, TEXTS, ASKED), max_length=20
    )
    assert plain[0] != found[0]  # a control: the adapter says something


def test_a_pair_and_a_task_of_a_mixture(encoder, tokenizer):
    """Rows go through the code that made the training rows, of each part of it."""
    model, params = encoder
    rows = [
        {"one": a, "two": b, "n": 0} for a, b in zip(TEXTS, TEXTS[1:], strict=False)
    ]
    part = data.make_task(
        "pairs",
        {"train": rows, "validation": rows},
        text=("one", "two"),
        label="n",
        labels=("x", "y"),
    )
    other = data.make_task(
        "other",
        {"train": rows, "validation": rows},
        text="one",
        label="n",
        labels=("p", "q", "r"),
    )
    mixed = data.mix({"other": other, "pairs": part})
    asked = data.questions(mixed)[1]
    assert asked == data.Question.from_json(
        json.loads(json.dumps(data.task_metadata(mixed)["questions"][1]))
    )
    found = serving.predict(model, params, tokenizer, rows, asked, max_length=24)
    splits = data.tokenize(mixed, tokenizer, vocab_size=384, max_length=24)
    encoded = splits["validation/pairs"]
    for i, row in enumerate(found):
        ids = encoded.ids[encoded.offsets[i] : encoded.offsets[i + 1]]
        wanted = shares(by_hand(model, params, ids)[3:])
        got = list(row["probabilities"].values())
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
        assert list(row["probabilities"]) == ["x", "y"]


def test_texts_are_what_generate_writes(decoder, tokenizer):
    model, params = decoder
    options = dict(max_new_tokens=5, batch_size=2, stop=())
    for form in ("text", "completion", "chat"):
        asked = data.Question("t", form, ("x",))
        found = serving.predict(*(model, params, tokenizer, TEXTS, asked), **options)
        for text, row in zip(TEXTS, found, strict=True):
            if form == "chat":
                text = f"<user>{text}<a>"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            (new,) = models.generate(model, params, [ids], max_new_tokens=5)
            assert row == {"text": tokenizer.decode(new, skip_special_tokens=True)}
    # What ends a text is what generate is told: texts, and by default the model's ids.
    asked = data.Question("t", "completion", ("x",))
    (whole,) = serving.predict(*(model, params, tokenizer, TEXTS[:1], asked), **options)
    begun = models.opened(tokenizer, TEXTS[0])
    (new,) = models.generate(model, params, [begun], max_new_tokens=5)
    ended = model.clone(stop_tokens=(int(new[0]),))
    options["stop"] = [tokenizer.decode(new[:1])]
    for one, more in ((model, options), (ended, options | {"stop": None})):
        found = serving.predict(one, params, tokenizer, TEXTS[:1], asked, **more)
        assert found == [{"text": ""}] != [whole]
    options["stop"], asked = (), data.Question("t", "chat", ("x",))
    found = serving.predict(*(model, params, tokenizer, TEXTS, asked), **options)
    # A line fills the template that the run's prompts were made with.
    template = data.Question("t", "completion", ("<user>{q}<a>",))
    for rows in (TEXTS, [{"q": text} for text in TEXTS]):
        assert found == serving.predict(
            *(model, params, tokenizer, rows, template), **options
        )
    # Messages whose answer is there are asked for it, not for what would follow.
    answered = [
        [{"role": "user", "content": "oh"}, {"role": "assistant", "content": "x"}]
    ]
    rows = [{"x": messages} for messages in answered]
    again = serving.predict(*(model, params, tokenizer, rows, asked), **options)
    assert again == found[1:2]


def test_choices_are_those_that_a_held_out_split_scores(decoder, tokenizer, tmp_path):
    model, params = decoder
    rows = [
        {"q": text[:30], "c": ["yes", "perhaps not", "no"], "a": "B"} for text in TEXTS
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    options = dict(prompt="{q}\nAnswer:", choices="c", answer="a")
    task = data.tasks.choices(
        train=file,
        validation=file,
        **options,
        answers=("A", "B", "C"),
        metrics=("accuracy_per_token", "accuracy"),
    )
    (asked,) = data.questions(task)
    assert data.Question.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    found = serving.predict(model, params, tokenizer, rows, asked, max_length=64)
    for row, said in zip(task.splits["validation"], found, strict=True):
        likely = []
        for choice in row["choices"]:
            before = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            after = tokenizer(choice, add_special_tokens=False)["input_ids"]
            logits = by_hand(model, params, before + after)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            first = len(before) - 1
            likely.append([logs[first + i, token] for i, token in enumerate(after)])
        sums = [sum(x) for x in likely]
        np.testing.assert_allclose(said["log_likelihoods"], sums, rtol=0, atol=1e-4)
        assert said["tokens"] == [len(x) for x in likely]
        best = int(np.argmax([np.mean(x) for x in likely]))
        assert (said["choice"], said["text"]) == (best, rows[0]["c"][best])
    # The longest choice is the likeliest by the mean alone, not by the sum.
    total = asked._replace(per_token=False)
    sums = serving.predict(model, params, tokenizer, rows, total, max_length=64)
    assert [x["choice"] for x in sums] != [x["choice"] for x in found]


def test_parameters_on_a_mesh(encoder, tokenizer):
    model, params = encoder
    mesh = training.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    specs = training.param_specs(jp.detach(params), mesh, axes=model.axes)
    placed = training.place(params, mesh, specs)
    options = dict(batch_size=4, max_length=20)
    one, other = (
        serving.predict(model, tree, tokenizer, TEXTS, ASKED, **options)
        for tree in (params, placed)
    )
    for mine, theirs in zip(one, other, strict=True):
        assert mine["label"] == theirs["label"]
        assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "change", "options", "message"),
    [
        ([], {}, {}, "`rows` is empty"),
        ([{"text": "a"}, {"txt": "b"}], {}, {}, "row 1 has no column 'text'.*'txt'"),
        ([{"text": "a"}, {"text": None}], {}, {}, "row 1 has no value in column"),
        (["a"], {"columns": ("a", "b")}, {}, "mappings with the columns a, b; row 0"),
        (["a"], {"labels": LABELS[:2]}, {}, "classes 0 to 1 of a head of 2.*has 5"),
        (["a"], {"labels": LABELS[:2], "width": 5, "first": 4}, {}, "classes 4 to 5"),
        (["a"], {"form": "number"}, {}, "needs head='regression'"),
        (["a"], {"form": "chat"}, {}, "needs head='causal_lm'"),
        (["a"], {}, {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        (["a"], {}, {"max_length": 1}, "`max_length` 1 must lie between 2"),
    ],
)
def test_what_cannot_be_asked(encoder, tokenizer, rows, change, options, message):
    model, params = encoder
    asked = ASKED._replace(**change)
    with pytest.raises(ValueError, match=message):
        serving.predict(model, params, tokenizer, rows, asked, **options)


def test_what_cannot_be_gone_on_with(decoder, tokenizer):
    model, params = decoder
    asked = data.Question("t", "completion", ("x",))
    for rows, message in (
        (["a", "b" * 70], "row 1 has 70 tokens; with `max_new_tokens` 5 .* for 59"),
        ([""], "row 0: column 'x' has no text to go on with"),
        ([{"y": "a"}], "row 0 has no column 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            serving.predict(*(model, params, tokenizer, rows, asked), max_new_tokens=5)
    chat = asked._replace(form="chat")
    for given, message in (
        ("hi", "must be a list of messages"),
        ([{"role": "assistant", "content": "x"}], "no message to answer"),
        ([7], "row 0, message 0 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            serving.predict(model, params, tokenizer, [{"x": given}], chat)
    bare = transformers.ByT5Tokenizer()
    with pytest.raises(ValueError, match="no chat template"):
        serving.predict(model, params, bare, ["hi"], chat)


@pytest.mark.parametrize(
    "given",
    [
        {"name": "a"},
        {"name": "a", "form": "sonnet", "columns": ["x"]},
        {"name": "a", "form": "choice", "columns": ["x"]},
        {"name": "a", "form": "text", "columns": ["x"], "new": 1},
        "text",
    ],
)
def test_a_damaged_question(given):
    with pytest.raises(ValueError, match="`question`"):
        data.Question.from_json(given)
