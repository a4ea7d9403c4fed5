"""Writing tasks of reasoning-gym: generators that make as many rows as are wanted."""

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Any

from jaxpeft.console import optional
from jaxpeft.data._task import near_misses
from jaxpeft.data._texts import TextTask, make_text_task

# Rows of one seed. A generator makes its row i from the sum of its seed and i: with
# seeds 0 and 1 all rows but one would be the same.
_STRIDE = 2**24


def reasoning_gym(
    generator: str,
    *,
    train: int = 5000,
    validation: int = 500,
    test: int = 500,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    prompt: str = "{question}\nAnswer:",
    completion: str = " {answer}",
    pack: bool = True,
) -> TextTask:
    r"""Returns the questions of one of reasoning-gym's generators, and their answers.

    There are about a hundred: "chain_sum", "gcd", "leg_counting", "gsm_symbolic" ...
    In a config, `name="reasoning_gym/chain_sum"` says which. Every row has a seed of
    its own; the test rows come first, then validation, then train, so that for most
    generators test and validation rows stay what they are whatever `train` is.

    A question that came up before is dropped, so that no test question is among those
    of validation or training, letter for letter; `facts` counts them. Where there are
    few different questions, splits are therefore smaller than what was asked for.

    Deciding is the exact match with the generator's own answer; the scores that some
    generators give to other right answers, or to nearly right ones, are not used.

    Args:
      generator: its name in reasoning-gym.
      train: training rows to draw, at least 1; so for
      validation: validation rows, and
      test: test rows, of which there may be none: 0.
      seed: of all rows, from 0 to 255. Another seed has no row's seed in common.
      options: the generator's own arguments, as {"max_terms": 3}.
      prompt: what is read; {question} stands for the question, without white space
        around it.
      completion: what is to be written; {answer} stands for the answer.
      pack: whether several training rows share a sequence.

    Returns:
      The task, with splits train, validation and, unless it is 0, test; its rows have
      the columns prompt and completion. It is named "reasoning_gym/" and the
      generator.

    Raises:
      ImportError: reasoning-gym is not installed.
      ValueError: if the generator or an option is unknown, naming near misses, or the
        generator refuses an option, has no answers to write, or has too few questions;
        a number of rows, a seed or a template that does not do.

    Example:
      >>> options = {"max_terms": 2, "max_digits": 1}
      >>> task = reasoning_gym(
      ...     "chain_sum", train=9, validation=3, test=3, options=options
      ... )
      >>> task.splits["test"][0]["prompt"].splitlines()[-1]
      'Answer:'

    References:
      Stojanovski et al., Reasoning Gym, arXiv 2505.24760; Apache-2.0.
    """
    with optional("Tasks of reasoning-gym"):
        import reasoning_gym as gym
        from reasoning_gym.factory import DATASETS
    sizes = {"test": test, "validation": validation, "train": train}
    templates = {"prompt": (prompt, "question"), "completion": (completion, "answer")}
    _check(sizes, seed, templates)
    if generator not in DATASETS:
        near = near_misses(generator, sorted(DATASETS))
        raise ValueError(f"`generator` {generator!r} is not in reasoning-gym.{near}")
    given = dict(options or {})
    known = [field.name for field in dataclasses.fields(DATASETS[generator][1])]
    known = [name for name in known if name not in ("seed", "size")]
    for option in given:
        if option not in known:
            near = near_misses(option, known)
            raise ValueError(f"`options` of {generator!r} have {option!r}.{near}")
    try:
        rows = gym.create_dataset(
            generator, seed=seed * _STRIDE, size=sum(sizes.values()), **given
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"`options` {given} are refused by reasoning-gym's {generator!r}: {error}"
        ) from error
    splits, counts = _splits(generator, rows, sizes, prompt, completion)
    return make_text_task(
        f"reasoning_gym/{generator}",
        splits,
        prompt="prompt",
        completion="completion",
        metrics=("exact_match", "token_accuracy", "perplexity"),
        pack=pack,
        facts={
            "reasoning_gym": importlib.metadata.version("reasoning-gym"),
            "generator": generator,
            "options": given,
            "seed": seed,
            "drawn": {split: size for split, size in sizes.items() if size},
            "repeated": counts,
        },
    )


def _splits(
    generator: str,
    rows: Iterable[Mapping[str, Any]],
    sizes: Mapping[str, int],
    prompt: str,
    completion: str,
) -> tuple[dict[str, list[dict[str, str]]], dict[str, int]]:
    """Returns the rows of each split, each question once in all, and how many fell."""
    splits: dict[str, list[dict[str, str]]] = {}
    counts: dict[str, int] = {}
    seen: set[str] = set()
    stream = iter(rows)
    for split, size in sizes.items():
        kept = []
        for _ in range(size):
            row = next(stream)
            question, answer = row["question"].strip(), row["answer"]
            if not isinstance(answer, str):
                raise ValueError(
                    f"`generator` {generator!r} has no answers to write: a program of "
                    "reasoning-gym judges what is answered. Take another one."
                )
            if question in seen:
                continue
            seen.add(question)
            texts = {"prompt": prompt.replace("{question}", question)}
            kept.append({**texts, "completion": completion.replace("{answer}", answer)})
        if size and not kept:
            raise ValueError(
                f"`generator` {generator!r} has too few questions: it drew "
                f"{len(seen)} different ones, all used up before split {split!r}. Ask "
                "for fewer rows of the other splits, or widen its `options`."
            )
        if size:
            splits[split], counts[split] = kept, size - len(kept)
    order = [split for split in ("train", "validation", "test") if split in splits]
    return {split: splits[split] for split in order}, counts


def _check(
    sizes: Mapping[str, int], seed: int, templates: Mapping[str, tuple[str, str]]
) -> None:
    for split, size in sizes.items():
        least = 0 if split == "test" else 1
        if not least <= size:
            raise ValueError(f"`{split}` must be at least {least} rows; got {size}.")
    if sum(sizes.values()) > _STRIDE:
        raise ValueError(
            f"`train`, `validation` and `test` are {sum(sizes.values())} rows in all; "
            f"a seed has {_STRIDE}."
        )
    if not 0 <= seed < 256:
        raise ValueError(f"`seed` must be a whole number from 0 to 255; got {seed!r}.")
    for name, (template, field) in templates.items():
        if template.count(f"{{{field}}}") != 1:
            raise ValueError(
                f"`{name}` must have {{{field}}} in it, once; got {template!r}."
            )
