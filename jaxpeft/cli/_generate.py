"""``jaxpeft generate``: text from a base, with or without an adapter."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from jaxpeft.cli._console import note, stage
from jaxpeft.cli._open import (
    add_base,
    check_template,
    need_tokenizer,
    open_adapter,
    open_adapters,
    open_alone,
)
from jaxpeft.cli._types import number, whole

NAME = "generate"
SUMMARY = "go on with a prompt, with or without an adapter"
DESCRIPTION = """\
Continues prompts: those on the command line, or else every line of standard input that
is not blank, as one batch. The answers go to standard output, one a line unless there
is only one. The likeliest token is taken, unless a temperature is given. An answer ends
where the model ends a text or a turn, or where one of --stop appears.
"""
EXAMPLE = 'jaxpeft generate "The capital of France is" --base smollm2 --chat'


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="a text to go on")
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="[NAME=]ADAPTER",
        help="an adapter's folder, or that of a run; with --rows several, each with a "
        "name",
    )
    parser.add_argument(
        "--rows",
        metavar="NAMES",
        help="the adapter of each prompt by name, with commas; __base__ for none",
    )
    add_base(parser)
    add = parser.add_argument
    add("--chat", action="store_true", help="put prompts into the chat template")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT_OR_TOKEN",
        help="end an answer before this text or token, too; may be given again",
    )
    add(
        "--max-new-tokens", type=whole(1), default=64, metavar="N", help="(default: 64)"
    )
    add("--temperature", type=number(0), default=0.0, metavar="T", help="(default: 0)")
    add("--top-k", type=whole(1), metavar="K", help="draw among the K likeliest tokens")
    add(
        "--top-p",
        type=number(0, 1, above=True),
        metavar="P",
        help="draw among the likeliest P of all",
    )
    add("--seed", type=whole(0), default=0, help="of the draws (default: 0)")


def run(given: argparse.Namespace) -> None:
    """Runs the command."""
    import jax

    from jaxpeft import models

    prompts = given.prompts or _lines(sys.stdin)
    if not any(prompts):
        raise ValueError("there is no PROMPT, and nothing on standard input.")
    folders, rows = {}, [None] * len(prompts)
    if given.rows is not None:
        folders, rows = _folders_by_name(given, len(prompts))
        folder, model, params = open_adapters(given, folders, rows)
    elif given.adapter is None:
        if given.head == "auto":
            given.head = "causal_lm"
        opened = open_alone(given)
        folder, model, params = opened.folder, opened.model, opened.adapted
    else:
        if len(given.adapter) > 1:
            raise ValueError(
                "several adapters need names, --adapter NAME=FOLDER, and --rows "
                "NAME,NAME,... to say which one each prompt is for."
            )
        (given.adapter,) = given.adapter
        opened = open_adapter(given)
        folders = {None: Path(given.adapter)}
        folder, model, params = opened.folder, opened.model, opened.adapted
    tokenizers = {name: need_tokenizer(folder, folders.get(name)) for name in {*rows}}
    ids = [
        _ids(tokenizers[name], prompt, chat=given.chat)
        for name, prompt in zip(rows, prompts, strict=True)
    ]
    ends = [models.stop_tokens(folder, each) for each in tokenizers.values()]
    with stage(f"generating for {len(prompts)} prompt{'s' * (len(prompts) > 1)}"):
        new = models.generate(
            model,
            params,
            ids,
            max_new_tokens=given.max_new_tokens,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            stop=[*dict.fromkeys(i for each in ends for i in each), *given.stop],
            tokenizer=tokenizers[rows[0]],
            key=jax.random.key(given.seed) if given.temperature else None,
        )
    for name, row in zip(rows, new, strict=True):
        text = tokenizers[name].decode(row, skip_special_tokens=True)
        print(text if len(new) == 1 else " ".join(text.splitlines()))


def _lines(stream: Iterable[str]) -> list[str]:
    """The lines that are not blank, without their ends, of Windows' kind as well."""
    lines = [line.rstrip("\r\n") for line in stream]
    kept = [line for line in lines if line.strip()]
    if kept and len(kept) < len(lines):
        note(f"{len(lines) - len(kept)} blank lines are left out")
    return kept


def _ids(tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """A prompt's tokens, in the chat template or as it stands."""
    from jaxpeft import models

    if not chat:
        return models.opened(tokenizer, prompt)
    check_template(tokenizer)
    message = {"role": "user", "content": prompt}
    return tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, return_dict=True
    )["input_ids"]


def _folders_by_name(
    given: argparse.Namespace, prompts: int
) -> tuple[dict[str, Path], list]:
    """The adapters' folders by name, and the name that each prompt goes to."""
    folders: dict[str, Path] = {}
    for entry in given.adapter or ():
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder) or name in folders:
            raise ValueError(
                f"--adapter {entry!r}: with --rows every adapter needs a name of its "
                "own; write --adapter NAME=FOLDER."
            )
        folders[name] = Path(folder)
    if not folders:
        raise ValueError("--rows names adapters; add --adapter NAME=FOLDER.")
    rows = given.rows.split(",")
    if len(rows) != prompts:
        raise ValueError(
            f"--rows has {len(rows)} names for {prompts} prompts; give one for each."
        )
    for name in rows:
        if name not in (*folders, "__base__"):
            raise ValueError(
                f"--rows has {name!r}; --adapter names {', '.join(folders)}, and "
                "__base__ is for none."
            )
    return folders, rows
