"""The tokenizer of a folder, which must be that of the model in it."""

import json
from pathlib import Path
from typing import Any

from jaxpeft.console import optional
from jaxpeft.models._build import vocabulary_size

WHOLE = "tokenizer.json"  # everything in one file


def folder_tokenizer(folder: Path) -> Any:
    """Returns what transformers makes of the tokenizer's files of a folder.

    Where they are missing it makes a tokenizer of the few special tokens that a class
    has by default; that is refused, and so is one of another model. Vocabularies are
    often some rows smaller than the embedding, which is padded to a round number, but
    never half of it. A token added beside the vocabulary (Gemma's picture) may lie
    beyond it.

    Args:
      folder: with the tokenizer's files, and a ``config.json`` where there is one.

    Raises:
      ValueError: some of its files are missing, or its vocabulary does not fit the
        model's.
    """
    with optional("Tokenizers"):
        from transformers import AutoTokenizer  # slow to import

    try:
        made = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # what is missing shows in a dozen kinds
        raise ValueError(
            f"transformers makes no tokenizer of {_names(folder)} in {folder}: {error} "
            f"{_COPY}"
        ) from error
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = vocabulary_size(config)
    added = set(made.added_tokens_decoder)
    last = max(set(made.get_vocab().values()) - added, default=-1)
    if rows is not None and not last < rows <= 2 * len(made):
        raise ValueError(
            f"the tokenizer of {folder} has {len(made)} tokens, up to {last}, and the "
            f"model's embedding {rows} rows.{_missing(folder, made)} {_COPY}"
        )
    return made


_COPY = "Copy the tokenizer's files from where the model comes from."


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _missing(folder: Path, tokenizer: Any) -> str:
    """What the folder lacks of the files of a class."""
    files = set(type(tokenizer).vocab_files_names.values()) - {WHOLE}
    lacks = [name for name in (WHOLE, *sorted(files)) if not (folder / name).is_file()]
    if WHOLE not in lacks or (files and lacks == [WHOLE]):
        return " It is another model's."
    return (
        f" {type(tokenizer).__name__} needs {WHOLE}"
        + (f", or {sorted(files)}" if files else "")
        + f"; the folder lacks {lacks}."
    )
