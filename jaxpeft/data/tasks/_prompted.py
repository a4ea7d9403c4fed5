"""A task's prompts with their answers, to fine-tune a language model on."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.data._prompts import prompt_set
from jaxpeft.data._task import near_misses
from jaxpeft.data._texts import TextTask, make_text_task

LOSSES = ("text", "completion")


def prompted(
    task: str,
    *,
    options: Mapping[str, Any] | None = None,
    train: int = 1000,
    validation: int = 200,
    test: int = 500,
    seed: int = 42,
    template: str | None = None,
    words: Sequence[str] | None = None,
    loss: str = "text",
    pack: bool = False,
    bad_rows: str = "raise",
) -> TextTask:
    r"""Returns the prompts of a task with classes or choices, and their answers.

    What `jaxpeft dimension` asks a model zero-shot; this is for the supervised half of
    the study of learning paradigms.

    Args:
      task: the name of another task: "prompted/trec".
      options: that task's own arguments.
      train: training records, as in `jaxpeft.data.prompt_set`, with the following.
      validation: records to watch training with.
      test: records out of those that are asked.
      seed: of the shuffling.
      template: how a row reads.
      words: what the classes are called.
      loss: "text", all of prompt and answer is learnt, as the study has it; or
        "completion", the answer alone.
      pack: whether several training records share a sequence.
      bad_rows: of that task, "raise" or "skip".

    Returns:
      The task, named "prompted/" and the other's name.

    Raises:
      ValueError: `loss` is unknown; and as `jaxpeft.data.prompt_set`.

    Example:
      >>> prompted("trec").splits["train"][0]  # doctest: +SKIP
      {'text': 'What is ...?\nIs the answer ...?\nthing'}

    References:
      Janapati and Ji, A comparative study of learning paradigms in large language
      models via intrinsic dimension, arXiv 2412.06245.
    """
    from jaxpeft.data._lookup import task as find  # which looks names up in here

    if loss not in LOSSES:
        raise ValueError(f"`loss` {loss!r} is unknown.{near_misses(loss, LOSSES)}")
    found = prompt_set(
        find({"name": task, "bad_rows": bad_rows, **(options or {})}),
        train=train,
        validation=validation,
        evaluated=test,
        seed=seed,
        template=template,
        words=words,
    )
    splits = {
        "train": found.train,
        "validation": found.validation,
        "test": found.evaluated,
    }
    if loss == "text":
        rows = {n: [{"text": r.combined} for r in x] for n, x in splits.items()}
        columns = {"text": "text"}
    else:
        rows = {
            n: [{"prompt": f"{r.input}\n", "completion": r.output} for r in x]
            for n, x in splits.items()
        }
        columns = {"prompt": "prompt", "completion": "completion"}
    return make_text_task(
        f"prompted/{found.name}",
        rows,
        **columns,
        metrics=("perplexity", "token_accuracy"),
        pack=pack,
        facts={"records": found.key, **found.facts},
    )
