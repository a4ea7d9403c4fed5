"""What a model says of rows: classes, numbers, texts, or one of some choices."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from jaxpeft import data, models, training
from jaxpeft.data import (
    is_template,
    messages_of,
    pieces,
    read_choices,
    read_text,
    tools_of,
)
from jaxpeft.models import room
from jaxpeft.training import EvalOutput
from jaxpeft.tree import leaves_with_path

_HEADS = {"class": "classification", "number": "regression"}
_SPLIT = "input"  # what messages call the rows
_Advance = Callable[[int, int], None]


def predict(
    model: Any,
    params: PyTree,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any] | str],
    question: data.Question,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    lengths: Sequence[int] | None = None,
    max_new_tokens: int = 64,
    stop: Sequence[int | str] | None = None,
    advance: _Advance | None = None,
) -> list[dict[str, Any]]:
    """Returns what a model answers for every row.

    Rows are tokenised as in training, by the same code, and go through the model as
    the rows of a held-out split do: what is said of them is what the run's own
    evaluation has scored.

    Args:
        model: a module of ``jaxpeft.models`` with the head that the question is for:
            "classification" (form "class"), "regression" ("number"), "causal_lm".
        params: its parameters, plain or adapted, on any devices.
        tokenizer: the model's.
        rows: a mapping from column to value each; or a text each, where the question
            reads one column.
        question: what is asked: one of ``data.questions(task)``, or as a run has kept
            it, ``data.Question.from_json(info["metadata"]["questions"][0])``.
        batch_size: rows that go through the model at once.
        max_length: tokens at which texts of classes and numbers are cut, as in
            training; ``None``: what tokenizer and model allow. What a language model
            reads is never cut.
        lengths: as in ``data.batches``: token counts that rows are padded to.
        max_new_tokens: of a text that is written, the most tokens; the likeliest one
            is taken each time.
        stop: what ends a text, as in ``models.generate``; ``None``: the model's own
            ids (``model.stop_tokens``), the tokenizer's end token, and the one that
            its chat template ends a turn with (``models.turn_end``).
        advance: called after each batch with how many rows (of choices: choices) are
            done, and of how many.

    Returns:
        A dict a row, JSON-able, in the order of the rows:

        - class: ``"label"``, its ``"probability"``, and the ``"probabilities"`` of
          all classes by name (of a mixture's task, among its own classes).
        - number: ``"score"``.
        - text, completion, chat: ``"text"``, what the model goes on with.
        - choice: ``"choice"``, the place of the chosen one, from 0, its ``"text"``,
          and of all of them ``"log_likelihoods"``, sums over their ``"tokens"``.

    Raises:
        ValueError: there is no row, a row lacks a column or has another kind of value
            there (naming the row), the model has another head or other classes than
            the question, or a prompt is too long.

    Example:
        >>> import transformers
        >>> from jaxpeft import data, models, serving
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 384}
        >>> heads = {"num_attention_heads": 2, "intermediate_size": 24}
        >>> config = {"model_type": "bert", **sizes, **heads}
        >>> model = models.from_config(config, head="classification", num_labels=2)
        >>> params = models.init(model, jax.random.key(0))
        >>> asked = data.Question("moods", "class", ("text",), ("bad", "good"))
        >>> tokenizer = transformers.ByT5Tokenizer()
        >>> found = serving.predict(
        ...     model, params, tokenizer, ["what fun", "oh"], asked, max_length=16
        ... )
        >>> [sorted(row["probabilities"]) for row in found]
        [['bad', 'good'], ['bad', 'good']]
    """
    _check(model, question, batch_size)
    if not len(rows):
        raise ValueError("`rows` is empty: there is nothing to predict.")
    rows = [_as_row(row, question, i) for i, row in enumerate(rows)]
    if question.form in ("text", "completion", "chat"):
        options = dict(max_new_tokens=max_new_tokens, stop=stop)
        prompts = _prompts(model, tokenizer, rows, question, max_new_tokens)
        return _written(
            model, params, tokenizer, prompts, batch_size, advance, **options
        )
    if max_length is None:
        max_length = _longest(model, tokenizer)
    asked = _asked(rows, question)
    encoded = data.tokenize(
        asked,
        tokenizer,
        vocab_size=model.config.vocab_size,
        max_length=max_length,
        splits=[_SPLIT],
    )[_SPLIT]
    outputs = _outputs(model, params, encoded, batch_size, lengths, advance)
    if question.form == "choice":
        return list(_chosen(outputs, asked, question))
    if question.form == "number":
        return [{"score": _short(x)} for x in outputs.reshape(len(rows))]
    first = question.first
    width = len(question.labels) if question.labels else outputs.shape[1]
    names = question.labels or [f"LABEL_{i}" for i in range(width)]
    return list(_classified(outputs[:, first : first + width], names))


def _check(model: Any, question: data.Question, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    head = _HEADS.get(question.form, "causal_lm")
    if model.head != head:
        raise ValueError(
            f"`model` has head={model.head!r}; a question of the form "
            f"{question.form!r} needs head={head!r}. Load it with that."
        )
    if question.labels is None:
        return
    width = question.width or len(question.labels)
    last = question.first + len(question.labels)
    if width != model.num_labels or last > width:
        raise ValueError(
            f"`question` has classes {question.first} to {last - 1} of a head of "
            f"{width}: {', '.join(question.labels)}; the model's head has "
            f"{model.num_labels}."
        )


def _as_row(row: Any, question: data.Question, number: int) -> Mapping[str, Any]:
    """A row as columns; a text is the one that a question reads."""
    if isinstance(row, Mapping):
        return row
    columns = question.columns
    if question.form == "chat":
        columns = columns[:1]  # tools may be absent
    elif question.form in ("text", "completion") and is_template(columns[0]):
        columns = tuple({field for _, field in pieces(columns[0], "template") if field})
    if not isinstance(row, str) or len(columns) != 1:
        raise ValueError(
            f"`rows` must be mappings with the columns {', '.join(columns)}"
            f"{' or texts' if len(columns) == 1 else ''}; row {number} is {row!r}."
        )
    if question.form == "chat":
        return {columns[0]: [{"role": "user", "content": row}]}
    return {columns[0]: row}


def _where(question: data.Question, number: int) -> str:
    return f"Task {question.name!r}, split {_SPLIT!r}, row {number}"


def _longest(model: Any, tokenizer: Any) -> int:
    """The most tokens that both take."""
    config = model.config
    first = 1 + config.pad_token_id if config.model_type == "roberta" else 0
    return min(tokenizer.model_max_length, config.max_position_embeddings - first)


# --- classes, numbers and choices: one pass


def _asked(rows, question: data.Question) -> Any:
    """The rows as a split of a task, with answers that are made up and never read."""
    if question.form != "choice":
        number = question.form == "number"
        return data.Task(
            name=question.name,
            text=question.columns,
            label="",
            labels=None if number else ("any", "other"),
            metrics=(),
            splits={_SPLIT: [{**row, "": 0.0 if number else "any"} for row in rows]},
            facts={},
            bad_rows="named",
        )
    columns = question.columns
    if question.raw is not None:
        columns = ("prompt", "choices")
        rows = [
            read_choices(row, **question.raw, where=_where(question, i))
            for i, row in enumerate(rows)
        ]
    return data.TextTask(
        name=question.name,
        form="choice",
        columns=(*columns, ""),
        metrics=(),
        splits={_SPLIT: [{**row, "": 0} for row in rows]},
        pack=False,
        facts={},
        bad_rows="named",
    )


def _outputs(model, params, encoded, batch_size, lengths, advance) -> np.ndarray:
    """What the model's head gives, a row for each of ``encoded``, in its order."""
    mesh = _mesh_of(params)
    forward, _ = training.objective(model, mesh=mesh)

    @jax.jit
    def step(params, _, batch):
        outputs, _ = forward(params, batch, None)
        none = jnp.zeros((), jnp.float32)  # there is no loss without labels
        return EvalOutput(outputs, batch["label"], batch["weight"], none, none + 1, {})

    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        if advance is not None:
            advance(done, encoded.rows)

    # By number, since batches are of rows of like length.
    numbered = encoded._replace(labels=np.arange(encoded.rows, dtype=np.int32))
    batches = data.evaluation_batches(numbered, batch_size, lengths=lengths)
    found = training.run_split(
        *(step, params, None, batches), mesh=mesh, rows=batch_size, advance=count
    )
    outputs = np.empty_like(found.outputs)
    outputs[found.labels] = found.outputs
    finite = np.isfinite(outputs.reshape(len(outputs), -1)).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise ValueError(
            f"`params`: the model gives {outputs[row]} for the tokenised row {row} of "
            f"{encoded.name}, which is not finite."
        )
    return outputs


def _mesh_of(params: PyTree) -> Mesh:
    """The mesh that the parameters lie on, or one of the device that they lie on."""
    _, leaf = leaves_with_path(params)[0]
    where = jax.tree.leaves(leaf)[0].sharding
    if isinstance(where, NamedSharding):
        return where.mesh
    return training.make_mesh(devices=[next(iter(where.device_set))])


def _classified(logits: np.ndarray, names) -> Iterator[dict[str, Any]]:
    raised = logits.astype(np.float64)
    raised = np.exp(raised - raised.max(axis=1, keepdims=True))
    for row in raised / raised.sum(axis=1, keepdims=True):
        best = int(np.argmax(row))
        yield {
            "label": names[best],
            "probability": _short(row[best]),
            "probabilities": dict(zip(names, map(_short, row), strict=True)),
        }


def _chosen(outputs, asked, question) -> Iterator[dict[str, Any]]:
    """One choice a row, by the rule of its task's deciding metric."""
    losses, tokens = outputs[:, 0].astype(np.float64), outputs[:, 1]
    lead = question.raw["lead"] if question.raw is not None else ""
    start = 0
    for row in asked.splits[_SPLIT]:
        choices = row[asked.columns[1]]
        part = slice(start, start := start + len(choices))
        likely = -losses[part] / (tokens[part] if question.per_token else 1.0)
        best = int(np.argmax(likely))
        yield {
            "choice": best,
            "text": choices[best].removeprefix(lead),
            "log_likelihoods": [_short(-x) for x in losses[part]],
            "tokens": tokens[part].astype(int).tolist(),
        }


def _short(value: Any) -> float:
    """A number of float32 with no more digits than give it back."""
    return float(str(np.float32(value)))


# --- texts


def _prompts(model, tokenizer, rows, question, new: int) -> list[list[int]]:
    """Token ids of what each row asks to be gone on with, checked for room."""
    column = question.columns[0]
    found, most = [], room(model.config) - new
    for number, row in enumerate(rows):
        where = _where(question, number)
        if question.form == "chat":
            ids = _chat(tokenizer, row, question.columns, where)
        else:
            ids = models.opened(tokenizer, read_text(row, column, where))
        if not ids:
            raise ValueError(f"{where}: column {column!r} has no text to go on with.")
        if len(ids) > most:
            raise ValueError(
                f"{where} has {len(ids)} tokens; with `max_new_tokens` {new} the model "
                f"has room for {most}."
            )
        found.append(ids)
    return found


def _chat(tokenizer: Any, row: Any, columns: Sequence[str], where: str) -> list[int]:
    """Messages up to the answer that is asked for, in the tokenizer's chat template."""
    messages = messages_of(row, columns[0], where)
    tools = tools_of(row, columns[1], where) if columns[1:] else None
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]  # of a row with its answer, the answer
    if not messages:
        raise ValueError(f"{where} has no message to answer.")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"`tokenizer` has no chat template, and {where} is of messages. Write "
            "tokenizer.chat_template = ..., or give prompts."
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(
            f"{where}: the tokenizer's chat template refused it: {error}"
        ) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _written(
    model, params, tokenizer, prompts, batch_size, advance, *, max_new_tokens, stop
) -> list[dict[str, Any]]:
    if stop is None:
        ends = {tokenizer.eos_token_id, models.turn_end(tokenizer)} - {None}
        stop = sorted({*model.stop_tokens, *ends})
    found: list[dict[str, Any]] = [{}] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        # The last batch is filled up, so that it is no program of its own.
        filled = numbers + numbers[-1:] * (min(batch_size, len(order)) - len(numbers))
        new = models.generate(
            model,
            params,
            [prompts[i] for i in filled],
            max_new_tokens=max_new_tokens,
            stop=stop,
            tokenizer=tokenizer,
        )
        for number, ids in zip(numbers, new[: len(numbers)], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            found[number] = {"text": text}
        if advance is not None:
            advance(start + len(numbers), len(order))
    return found
