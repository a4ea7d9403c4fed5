"""The README.md beside what is saved: what a hub and a person read first."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from jaxpeft.tree import AdaptedKernel, nodes

CARD = "README.md"
# A card with this line is ours to write anew; one without is somebody's own.
MARK = "<!-- Written by jaxpeft; without this line it will not be replaced. -->"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def card(
    *,
    library: str,
    relation: str,
    base: str | None,
    made: str,
    tags: Sequence[str],
    metadata: Mapping[str, Any] | None,
    use: Sequence[str],
    more: Sequence[str] = (),
) -> str:
    """Returns the text of a model card.

    Args:
        library: which loads the folder: ``"peft"``, ``"transformers"``, ``"jaxpeft"``.
        relation: to the base, in the hub's words: ``"adapter"`` or ``"finetune"``.
        base: its name or folder. The hub is told of names alone that could be on it.
        made: how it was made, a sentence.
        tags: beside ``"jaxpeft"``.
        metadata: what ``train.py`` keeps of a run (``config``, ``step``, and scores
            under ``"test"`` or ``"validation"``), of which the card tells data, length
            and scores; else it is left out.
        use: lines of Python that load it.
        more: paragraphs behind how it was made.
    """
    lines = ["---", f"library_name: {library}"]
    if base is not None and _HUB_NAME.fullmatch(base) and not Path(base).exists():
        lines += [f"base_model: {json.dumps(base)}", f"base_model_relation: {relation}"]
    lines += [f"tags: {json.dumps(['jaxpeft', *tags])}", "---", "", MARK, "", made]
    if base is not None:
        lines[-1] += f" The base is `{base}`."
    for paragraph in (*more, *_told(metadata or {})):
        lines += ["", paragraph]
    return "\n".join([*lines, "", "```python", *use, "```", ""])


def adapter_card(sites: list[AdaptedKernel], metadata: Mapping[str, Any]) -> str:
    """The card of an adapter of our own; its metadata may be anything."""
    adapters = {repr(node.adapter): node.adapter.name for node in sites}
    model = _section(_section(metadata, "config"), "model")
    base = metadata.get("base") or model.get("name")
    known = base if isinstance(base, str) else None
    labels, head = metadata.get("labels"), None
    if metadata.get("regression"):
        head = "head='regression'"
    elif isinstance(labels, list | tuple) and labels:
        head = f"head='classification', num_labels={len(labels)}"
    elif metadata.get("questions"):
        head = "head='causal_lm'"
    given = f"{known or 'the base'!r}{f', {head}' if head else ''}"
    return card(
        library="jaxpeft",
        relation="adapter",
        base=known,
        made=f"An adapter made by jaxpeft with `{', '.join(adapters)}`.",
        tags=sorted(set(adapters.values())),
        metadata=metadata,
        use=(
            "from jaxpeft import interop, models",
            "",
            f"model, params = models.load({given})",
            "adapted = interop.load_adapter(this_folder, params, names=model.names)",
        ),
    )


def model_card(
    params: PyTree,
    config: Mapping[str, Any],
    base_model: str | None,
    metadata: Mapping[str, Any] | None,
) -> str:
    """The card of a whole model, with what was merged into it."""
    found = {repr(node.adapter): node.adapter.name for node in nodes(params)}
    names = ", ".join(f"`{name}`" for name in found)
    how = f" with adapters merged into it: {names}" if found else ""
    (kind,) = (config.get("architectures") or ["AutoModel"])[:1]
    return card(
        library="transformers",
        relation="finetune",
        base=base_model,
        made=f"A model written by jaxpeft{how}.",
        tags=sorted(set(found.values())),
        metadata=metadata,
        use=(
            f"from transformers import AutoTokenizer, {kind}",
            "",
            f"model = {kind}.from_pretrained(this_folder)",
            "tokenizer = AutoTokenizer.from_pretrained(this_folder)",
        ),
    )


def may_write(folder: Path) -> bool:
    """Whether the folder has no card, or one that was written here."""
    file = folder / CARD
    return not file.exists() or MARK in file.read_text(encoding="utf-8")


def _told(metadata: Mapping[str, Any]) -> list[str]:
    """Data, length and scores, where the metadata is that of a run."""
    found = []
    data = _section(_section(metadata, "config"), "data")
    if "name" in data:
        given = {k: v for k, v in data.items() if k != "name"}
        options = f" {json.dumps(given)}" if given else ""
        step = metadata.get("step")
        length = f", {step} steps" if isinstance(step, int) else ""
        found.append(f"Trained on the task `{data['name']}`{options}{length}.")
    for split in ("test", "validation"):
        scores = metadata.get(split)
        if isinstance(scores, Mapping):
            numbers = {k: v for k, v in scores.items() if isinstance(v, int | float)}
            said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            found += [f"On its {split} rows: {said}."] if said else []
    return found


def _section(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of somebody's metadata; empty where it is no such thing."""
    found = metadata.get(name)
    return found if isinstance(found, Mapping) else {}
