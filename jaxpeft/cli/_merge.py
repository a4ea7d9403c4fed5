"""``jaxpeft merge``: base and adapter as one checkpoint."""

import argparse

from jaxpeft.cli._console import note, stage
from jaxpeft.cli._open import (
    add_adapter,
    add_base,
    add_labels,
    add_push,
    changed_options,
    checked_push,
    new_folder,
    open_adapter,
    open_tokenizer,
)

NAME = "merge"
SUMMARY = "fold an adapter into its base, as a folder that transformers opens"
DESCRIPTION = """\
Folds an adapter into its base and writes a Hugging Face folder: config.json,
safetensors, the tokenizer's files. Folded in float32, rounded once to the base's dtype.
Classes are called what the adapter calls them; where it does not say and its head is
another than the base's, LABEL_0 and so on, or what --labels says.
"""
EXAMPLE = "jaxpeft merge runs/quickstart --out merged"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_adapter(parser)
    add_base(parser)
    add_labels(parser)
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="a new or an empty folder"
    )
    add_push(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: the base's)",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest file of weights, such as 500MB (default: %(default)s)",
    )


def run(given: argparse.Namespace) -> None:
    """Runs the command."""
    out = new_folder(given.out)
    push = checked_push(given)
    from jaxpeft import interop, models
    from jaxpeft.interop import shard_bytes

    shard_bytes(given.max_shard_size)  # objects before anything is read

    opened = open_adapter(given)
    model, config, folder = opened.model, opened.model.hf_config, opened.folder
    tokenizer, stop = open_tokenizer(folder, given.adapter), ()
    if tokenizer is not None and isinstance(model, models.Decoder):
        # transformers' classifiers find the end of a row by this id.
        config = config | {"pad_token_id": tokenizer.pad_token_id}
        if model.head == "causal_lm":
            stop = models.stop_tokens(folder, tokenizer)
    if tokenizer is not None and folder.is_dir():
        # Where nothing was changed, the base's own files say it best.
        tokenizer = tokenizer if changed_options(folder, tokenizer) else None
    with stage(f"merging into {given.out}"):
        saved = interop.save_hf(
            opened.adapted,
            out,
            names=model.names,
            config=config,
            source=folder if folder.is_dir() else None,
            tokenizer=tokenizer,
            stop=stop,
            labels=opened.wanted.labels,
            dtype=given.dtype,
            max_shard_size=given.max_shard_size,
            axes=model.axes,
            base_model=opened.base,
            metadata=opened.wanted.metadata,
        )
    for name, (most, share) in list(saved.drift.items())[:3]:
        note(f"{name}: changed by {share:.2%} of its norm, one weight by {most:.3g}")
    files = f"{len(saved.files)} file{'s' * (len(saved.files) > 1)}"
    print(f"{out}: {len(saved.drift)} modules merged, {saved.size:,} bytes in {files}")
    push()
