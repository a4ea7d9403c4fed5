"""From an adapted tree to an adapter folder that HF PEFT loads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from jaxpeft.interop._card import CARD, card
from jaxpeft.interop._folder import check_free, new_folder
from jaxpeft.interop._labels import LABELS, head_fields, is_head
from jaxpeft.interop._modules import Module, Table
from jaxpeft.interop._tensors import is_finite, on_host, write_tensors
from jaxpeft.interop.peft._config import (
    CONFIG,
    DEFAULTS,
    HEADS,
    PLAIN_FIELDS,
    PREFIX,
    TASKS,
    TENSORS,
)
from jaxpeft.interop.peft._rules import NO_TARGETS, is_saved_whole
from jaxpeft.interop.peft._sites import AdaptedModule, choose_form, collect, is_whole
from jaxpeft.interop.peft._tensors import native, plain
from jaxpeft.models import ModuleName
from jaxpeft.tree import AdaptedKernel, grouped, leaves_with_path, nodes

FORMS = ("auto", "native", "portable")
SAID_OF = {
    "native": "in PEFT's own form of it",
    "converted": "written as plain LoRA, with what is trained in full beside it",
    "portable": "written as plain LoRA on the untouched base: one rank, the scale "
    "inside",
}
# transformers' classes of PEFT's tasks.
TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


class SavedPeft(NamedTuple):
    """What ``save_peft`` wrote.

    Attributes:
        folder: where.
        form: ``"native"``, ``"converted"`` (plain LoRA with more beside it) or
            ``"portable"``.
        rank: the most frequent rank in the file (of plain pairs, the only one).
        sites: names of the adapted modules, as in the file.
        saved: names of the modules that were written whole.
        errors: where ``rank`` cut a site, the Frobenius norm of what was cut over
            that of the whole change; empty where nothing was.
    """

    folder: Path
    form: str
    rank: int | None
    sites: tuple[str, ...]
    saved: tuple[str, ...]
    errors: dict[str, float]


def save_peft(
    adapted: PyTree,
    folder: str | Path,
    *,
    names: Sequence[ModuleName],
    form: str = "auto",
    rank: int | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    labels: Sequence[str] | None = None,
    axes: Mapping[str, str] | None = None,
    untie: bool = False,
    tokenizer: Any = None,
    metadata: Mapping[str, Any] | None = None,
) -> SavedPeft:
    """Writes the adapters of a tree as a folder that HF PEFT loads.

    ``adapter_config.json``, ``adapter_model.safetensors`` and a short card. Stacks
    are written layer by layer, kernels with more axes as matrices, padding of unequal
    ranks is cut. Everything is checked before anything is written, and all that does
    not fit is listed at once.

    Args:
        adapted: a tree made by ``attach``.
        folder: a new or an empty folder.
        names: what the modules are called in the checkpoint: ``model.names`` of our
            models, or rows of your own.
        form: ``"native"``: each method's own form in PEFT, to train on there.
            ``"portable"``: plain LoRA on the untouched base, for any loader: one
            rank, the scale inside the factors, nothing else in the file. ``"auto"``:
            native where the file alone makes the function; plain LoRA where a reader
            would have to decompose its own base again, with modules trained in full
            beside it.
        rank: rank of plain LoRA; by default the largest that a site needs. Sites that
            need more are cut, and ``errors`` says by how much.
        base_model: name or path of the base for readers of the file.
        task_type: ``"CAUSAL_LM"``, ``"SEQ_CLS"``, ... PEFT wraps the model by it. For
            classification PEFT wants the head in the file, so it is written, trained
            or not.
        labels: names of the classes, in the order of the head. PEFT's config has no
            field for them, and a reader calls them as its base does: the card says
            what to load the base with, and ``labels.json`` keeps them for
            ``head_info``.
        axes: roles of the axes of kernels beyond two that are saved whole, as in
            ``attach``; ``model.axes``.
        untie: write an adapter on a table that is embedding and output head in one
            as PEFT's of the embedding: it then acts on the look-up alone, which is
            not the tree's function. Without it, LoRA and full training of such a
            table are written for both (``ensure_weight_tying``), other methods are
            refused. What ``load_peft`` read of one of the two needs no such choice.
        tokenizer: a tokenizer of transformers, to be written beside it: with the chat
            template and the padding token that it was trained with.
        metadata: of our own file (``adapter_info(folder)["metadata"]``): the card tells
            data and scores of a run.

    Returns:
        What was written. With several processes all must call this; the first one
        writes.

    Raises:
        ValueError: the tree has no adapters, a site is in no row of ``names``, a
            method has no such form, a leaf is not finite, the methods of several
            sites do not go into one PEFT config, or ``labels`` are not one for each
            class.
        FileExistsError: the folder has files in it.

    Example:
        >>> import tempfile, jax, jaxpeft as jp
        >>> from jaxpeft.models import ModuleName
        >>> params = {"q": {"kernel": jax.numpy.ones((4, 6))}}
        >>> adapted = jp.attach(params, jp.lora(2), ["q"], key=jax.random.key(0))
        >>> names = [ModuleName("attention.q_proj", "q", "linear")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_peft(adapted, folder, names=names)
        >>> saved.form, saved.rank, saved.sites
        ('native', 2, ('attention.q_proj',))

    References:
        The format is that of huggingface/peft 0.21.
    """
    folder = Path(folder)
    check_free(folder)
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}.")
    if task_type is not None and task_type not in TASKS:
        raise ValueError(
            f"`task_type` must be one of {', '.join(TASKS)}, got {task_type!r}."
        )
    if not nodes(adapted):
        raise ValueError(
            "`adapted` has no adapters; save a tree that jaxpeft.attach made, before "
            "merge or detach."
        )
    table = Table(names, dict(leaves_with_path(adapted)), axes)
    problems: list[str] = []
    found = collect(table, untie, problems)
    sites, biases = found.sites, found.biases
    whole = found.whole + _head(table, task_type, found.whole)
    biases = [m for m in biases if m not in whole]
    written = choose_form(form, sites, table.rows, problems)
    _check(written, rank, whole + biases, problems)
    _raise(problems)

    errors: dict[str, float] = {}
    if written == "native":
        tensors, config = native(sites, found.modules, problems)
    else:
        tensors, config, errors = plain(sites, rank, found.modules, problems)
    saved = _saved_modules(table, whole, found.modules, tensors, problems)
    if found.tying:
        config["ensure_weight_tying"] = True
    if biases:
        config["bias"] = "all"
        _add_biases(table, whole, sites, tensors, config, problems)
    adapted_modules = [site.module for site in sites]
    config = PLAIN_FIELDS.get(config["peft_type"], {}) | config
    config |= {
        "peft_version": "0.21.2",  # whose format it is
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "target_modules": config["target_modules"] or NO_TARGETS,
        "modules_to_save": saved or None,
        "inference_mode": True,
        "fan_in_fan_out": any(m.kind == "conv1d" for m in adapted_modules),
    }
    _check_saved(config, adapted_modules, problems)
    _raise(problems)
    called = head_fields(labels, _width(table))
    adapters = {repr(site.node.adapter): site.node.adapter.name for site in sites}

    with new_folder(folder) as new:
        if new is not None:
            write_tensors(new / TENSORS, tensors, {"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
            (new / CONFIG).write_text(text + "\n", encoding="utf-8")
            kinds = {getattr(s.node.base, "kind", None) for s in sites} - {None}
            names = ", ".join(adapters) or "full()"
            kind = TASK_CLASSES.get(task_type, "AutoModel")
            text = card(
                library="peft",
                relation="adapter",
                base=base_model,
                made=f"An adapter made by jaxpeft with `{names}`, {SAID_OF[written]}.",
                tags=sorted(set(adapters.values())),
                metadata=metadata,
                more=_more(errors, called, sorted(kinds)),
                use=_loading(base_model, kind, called),
            )
            (new / CARD).write_text(text, encoding="utf-8")
            if called:
                text = json.dumps(called, indent=2, ensure_ascii=False)
                (new / LABELS).write_text(text + "\n", encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
    modules = tuple(module.name for module in adapted_modules)
    return SavedPeft(
        folder, written, _rank(config, sites), modules, tuple(saved), errors
    )


def _rank(config: dict[str, Any], sites: list[AdaptedModule]) -> int | None:
    field = sites[0].form.rank if sites else "r"
    return config.get(field, config.get("r")) if sites else None


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            "the tree has no such form in PEFT's files; nothing was written:\n  "
            + grouped(problems)
        )


def _check(written: str, rank: int | None, extra: list[Module], problems) -> None:
    if written == "portable" and extra:
        problems.append(
            f"{[m.name for m in extra]} are written whole (trained in full, or the "
            "head that `task_type` asks for) and have no place beside portable LoRA: "
            "form='auto' writes them"
        )
    if rank is not None and written == "native":
        problems.append(
            "`rank` is for plain LoRA; write form='portable' with it, or leave it out"
        )
    if rank is not None and rank < 1:
        problems.append(f"`rank` must be at least 1, got {rank}")


def _head(table: Table, task_type: str | None, whole: list[Module]) -> list[Module]:
    """Modules of the head that PEFT looks for in the file, trained or not."""
    heads = HEADS.get(task_type or "", ())
    have = {module.name for module in whole}
    return [
        m
        for m in table.modules
        if m.name not in have
        and any(m.name == h or m.name.startswith(h + ".") for h in heads)
    ]


def _tensor(table: Table, module: Module, part: str, problems) -> np.ndarray:
    """A module's own leaf, trained or not, as the checkpoint has it."""
    leaf = table.leaves[module.leaves[part]]
    if isinstance(leaf, AdaptedKernel):
        (leaf,) = leaf.trainable.values()
    tensor = on_host(table.tensor(module, part, on_host(leaf)))
    if not is_finite(tensor):
        problems.append(f"{module.name!r}: {part} is not finite")
    return tensor


def _saved_modules(table, whole, modules, tensors, problems) -> list[str]:
    """Adds whole modules to the tensors; returns names for modules_to_save."""
    for module in whole:
        for part, path in module.leaves.items():
            leaf = table.leaves[path]
            if isinstance(leaf, AdaptedKernel) and not is_whole(leaf):
                problems.append(
                    f"{module.name!r} is saved whole and its {part} has an adapter, "
                    "which PEFT cannot do; merge instead"
                )
                continue
            tensors[f"{PREFIX}{module.name}.{part}"] = _tensor(
                table, module, part, problems
            )
    return _roots([m.name for m in whole], [m.name for m in modules])


def _add_biases(table, whole, sites, tensors, config, problems) -> None:
    """Adds every bias: PEFT saves all of them or none."""
    if "bias" not in DEFAULTS[config["peft_type"]]:
        problems.append(
            f"PEFT's {config['peft_type']} has no trained biases beside it; merge, or "
            "leave them as they were"
        )
    adapted = [site.module.name for site in sites]
    for module in table.modules:
        if "bias" not in module.leaves or module in whole:
            continue
        end = "base_layer.bias" if module.name in adapted else "bias"
        tensors[f"{PREFIX}{module.name}.{end}"] = _tensor(
            table, module, "bias", problems
        )


def _roots(saved: list[str], every: list[str]) -> list[str]:
    """The outermost modules of which everything is saved."""
    names = set(saved)
    roots: dict[str, None] = {}
    for name in saved:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            root = ".".join(parts[:i])
            inside = [n for n in every if n == root or n.startswith(root + ".")]
            if set(inside) <= names:
                roots[root] = None
                break
    return list(roots)


def _check_saved(config, adapted: list[Module], problems: list[str]) -> None:
    """PEFT puts no adapter into a module that is saved whole."""
    for module in adapted:
        if is_saved_whole(config, module.name):
            problems.append(
                f"{module.name!r} has an adapter and lies in a module that PEFT saves "
                f"whole ({config['modules_to_save']}); train it in full or leave it out"
            )


def _width(table: Table) -> int | None:
    """The number of outputs of a classifier's head; ``None``: there is none."""
    for module in reversed(table.modules):
        if is_head(module.name) and "weight" in module.leaves:
            return table.tensor_shape(module, "weight")[0]
    return None


def _more(
    errors: dict[str, float], called: Mapping[str, Any], quantised: Sequence[str]
) -> list[str]:
    more = []
    if quantised:
        more.append(f"Trained on a base quantised as {', '.join(quantised)}.")
    if errors:
        cut = [f"- `{name}`: {error:.2e}" for name, error in errors.items()]
        said = "Cut to this rank, relative to each whole change:"
        more.append("\n".join([said, "", *cut]))
    if called:
        said = "PEFT's config does not name the outputs; the base must be loaded with "
        more.append(f"{said}them:")
    return more


def _loading(base_model: str | None, kind: str, called: Mapping[str, Any]) -> list[str]:
    """How to load the base, so that it has this head, under its own names."""
    given = dict(called)
    if given:
        kind = TASK_CLASSES["SEQ_CLS"]
    if "id2label" in given:  # JSON has no numbers for keys; transformers wants them
        given["id2label"] = {int(i): x for i, x in given["id2label"].items()}
    return [
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f"base = {kind}.from_pretrained(",
        f"    {base_model or 'the base'!r},",
        *(f"    {name}={value!r}," for name, value in given.items()),
        ")",
        "model = PeftModel.from_pretrained(base, this_folder)",
    ]
