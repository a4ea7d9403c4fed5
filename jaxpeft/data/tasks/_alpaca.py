"""Instructions with an answer, as files in Alpaca's form have them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpeft.data._bad_rows import good_splits
from jaxpeft.data._labels import text_of
from jaxpeft.data._lines import bare_name
from jaxpeft.data._task import check_bad_rows
from jaxpeft.data._texts import TextTask, make_text_task
from jaxpeft.data.tasks._files import read_splits, settle

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PROMPT_WITH_INPUT = (
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def alpaca(
    *,
    train: str | Path,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    chat: bool = False,
    metrics: Sequence[str] | None = None,
    pack: bool = False,
    bad_rows: str = "raise",
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
) -> TextTask:
    """Returns a writing task over files of "instruction", "input" and "output".

    The input may be empty or absent; then its section of the prompt is, too.

    Args:
      train: file of the training rows, as `files` reads them.
      validation: file of the validation rows; None cuts a tenth off `train`, as in
        `texts`.
      test: file of the test rows; None: no test split.
      chat: False puts instruction and input under headings, "### Instruction:" and so
        on, without the sentence that Alpaca's authors put before them; True makes them
        one message of a user, for the tokenizer's chat template.
      metrics: as for `texts`.
      pack: as for `texts`.
      bad_rows: "raise" or "skip", as for `jaxpeft.data.make_text_task`.
      delimiter: as in `files`, with the following.
      quoting: whether marks quote in .csv and .tsv files.
      encoding: of the files.

    Returns:
      The task.

    Raises:
      ValueError: as `texts`.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
      >>> row = '{"instruction": "Add.", "input": "2, 2", "output": "4"}'
      >>> _ = path.write_text(row)
      >>> task = alpaca(train=path, validation=path)
      >>> task.splits["train"][0]["prompt"].splitlines()[:4]
      ['### Instruction:', 'Add.', '', '### Input:']

    References:
      Taori et al., Stanford Alpaca: an instruction-following LLaMA model, 2023; its
      form of rows.
    """
    check_bad_rows(bad_rows)
    paths = {"train": train, "validation": validation, "test": test}
    paths = {split: path for split, path in paths.items() if path is not None}
    reading = dict(delimiter=delimiter, quoting=quoting, encoding=encoding)
    name = bare_name(train).stem

    def one(row: Mapping[str, Any], where: str, _: Counter[str]) -> dict[str, Any]:
        given = row.get("input")
        texts = {"instruction": text_of(row, "instruction", where)}
        texts["input"] = "" if given is None else text_of(row, "input", where)
        answer = text_of(row, "output", where)
        if chat:
            said = "\n\n".join(text for text in texts.values() if text.strip())
            user = {"role": "user", "content": said}
            return {"messages": [user, {"role": "assistant", "content": answer}]}
        template = PROMPT_WITH_INPUT if texts["input"].strip() else PROMPT
        return {"prompt": template.format(**texts), "completion": answer}

    splits, bad = good_splits(name, read_splits(paths, **reading), one, bad_rows)
    columns = ["messages"] if chat else ["prompt", "completion"]
    splits, shared = settle(splits, columns[:1], train, bad_rows)
    return make_text_task(
        name,
        splits,
        **{column: column for column in columns},
        metrics=metrics,
        pack=pack,
        bad_rows=bad_rows,
        facts={
            "files": {split: str(path) for split, path in paths.items()},
            **shared,
            **bad,
        },
    )
