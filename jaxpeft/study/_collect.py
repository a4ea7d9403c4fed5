"""The runs of a study: hidden states of the same prompts under each paradigm."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxpeft import data, dimension, interop, models
from jaxpeft.data import DEMONSTRATIONS
from jaxpeft.interop import CONFIG, DIGEST
from jaxpeft.models import FINALS
from jaxpeft.runs import open_workdir, versions, write_json
from jaxpeft.study._asked import LABEL_TOKENS, OVERFLOWS, Asked, ask, padded_lengths

META, ACCURACY, STATES, RUNS = "meta.json", "accuracy.json", "states", "runs"
_ADAPTER_FILES = ("adapter*.json", "adapter*.safetensors", "adapter*.bin")


class Run(NamedTuple):
    """One paradigm: a model with or without adapter, and how it is asked.

    Attributes:
        name: of its folder, "icl-5", "sft-1k", "sft-1k@62".
        shots: demonstrations in each prompt.
        adapter: the folder of an adapter; ``None``: the model as it is.
        step: the updates that the adapter has had; ``None``: nobody says.
        control: what the demonstrations are robbed of, as in ``ask``; its name ends in
            ``"~fixed"`` or ``"~shuffled"``.
        of_train: the training records are asked; its name ends in ``"~train"``.
    """

    name: str
    shots: int = 0
    adapter: str | None = None
    step: int | None = None
    control: str | None = None
    of_train: bool = False

    @property
    def paradigm(self) -> str:
        """``"icl"``, ``"sft"``, or ``"control"``: beside the study's own runs."""
        if self.control or self.of_train:
            return "control"
        return "icl" if self.adapter is None else "sft"

    def controlled(self, control: str) -> "Run":
        """The run with other demonstrations (``CONTROLS``), or ``"train"``.

        Example:
            >>> Run("icl-5", 5).controlled("fixed").name
            'icl-5~fixed'
        """
        name = f"{self.name}~{control}"
        if control == "train":
            return self._replace(name=name, of_train=True)
        return self._replace(name=name, control=control)


def collect_runs(
    folder: str | Path,
    runs: Sequence[Run],
    records: data.PromptSet,
    tokenizer: Any,
    load: Callable[[str | None], tuple[Any, Any]],
    *,
    model: str,
    demos: str = "official",
    seed: int = 42,
    overflow: str = "error",
    label_tokens: str = "in_context",
    final: str = "post_norm",
    max_length: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
    note: Callable[[str], None] = print,
) -> None:
    """Asks a model every question under every paradigm, and keeps what it thought.

    Of each run, in ``runs/NAME``: ``states/layer_00.npy`` and so on, float32 [rows, d],
    the last prompt token's states, rows in the order of the task; ``meta.json``; and
    ``accuracy.json``, from the same forward pass. A run that is complete is not made
    again, one that was stopped goes on after its last batch. Anything that fails stops
    the study: no row is ever left out.

    Args:
        folder: the study's folder; made if needed. One process at a time.
        runs: what to collect.
        records: the task.
        tokenizer: of the model.
        load: ``folder of an adapter, or None -> (model, parameters)``, a decoder with
            ``head="causal_lm"``; called when a run needs it.
        model: what the model is called.
        demos: as in ``ask``, with the following.
        seed: of the demonstrations.
        overflow: of prompts that are too long.
        label_tokens: by which answers are told apart.
        final: the last state, as in ``models.prompt_states``.
        max_length: the most tokens of a prompt; ``None``: what the model allows.
        batch_size: prompts in a forward pass.
        progress: whether to say on stderr how far it is.
        note: is told of each run.

    Raises:
        training.WorkdirError: the folder is in use, or holds a study with other
            settings; the message lists them.
        ValueError: a run of that name is there with another adapter; and as ``ask``.
    """
    for option, value, allowed in (
        ("demos", demos, DEMONSTRATIONS),
        ("overflow", overflow, OVERFLOWS),
        ("label_tokens", label_tokens, LABEL_TOKENS),
        ("final", final, FINALS),
    ):
        if value not in allowed:  # before a model is read
            raise ValueError(f"`{option}` must be one of {allowed}, got {value!r}")
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(f"`runs` have a name twice: {[run.name for run in runs]}.")
    settings = {
        "model": model,
        "task": {"name": records.name, "records": records.key, **records.facts},
        "demos": demos,
        "seed": seed,
        "overflow": overflow,
        "label_tokens": label_tokens,
        "final": final,
        "max_length": max_length,
        "batch_size": batch_size,
    }
    with open_workdir(folder, ConfigDict(settings)) as root:
        waiting = []
        for run in runs:
            wanted = _identity(run)
            where = root / RUNS / run.name
            if (where / META).exists():
                _check_same(where, wanted)
            if (where / ACCURACY).exists():
                note(f"{run.name}: complete")
            else:
                waiting.append((run, where, wanted))
        if not waiting:
            return
        first = waiting[0][0].adapter
        loaded = {first: load(first)}  # one model at a time
        net = loaded[first][0]
        most = net.config.max_position_embeddings
        # All prompts of all runs, before anything is compiled.
        each = [
            ask(
                records,
                tokenizer,
                vocab_size=net.config.vocab_size,
                max_length=most if max_length is None else min(max_length, most),
                shots=run.shots,
                demos=demos,
                seed=seed,
                overflow=overflow,
                label_tokens=label_tokens,
                control=run.control,
                of_train=run.of_train,
            )
            for run, _, _ in waiting
        ]
        _prompt_states(net, final)  # objects, too
        for (run, where, wanted), asked in zip(waiting, each, strict=True):
            if run.adapter not in loaded:
                loaded.clear()
                net = params = None  # let go of it
                loaded[run.adapter] = load(run.adapter)
            net, params = loaded[run.adapter]
            where.mkdir(parents=True, exist_ok=True)
            note(
                f"{run.name}: {asked.facts['rows']} prompts, up to "
                f"{asked.facts['longest']} tokens"
            )
            meta = {**wanted, **settings, **asked.facts}
            write_json(where / META, meta | {"versions": versions()})
            del meta["adapter"]  # its path; what is in it counts
            states = collect_states(
                *(net, params, asked, where / STATES),
                final=final,
                batch_size=batch_size,
                note=meta,
                progress=progress,
            )
            write_json(where / ACCURACY, score(asked, states, records.labels))


def collect_states(
    model: Any,
    params: Any,
    asked: Asked,
    folder: str | Path,
    *,
    final: str = "post_norm",
    batch_size: int = 16,
    note: Any = None,
    progress: bool = True,
) -> dimension.LayerFiles:
    """Runs prompts through a model and keeps the last tokens' states, a file a layer.

    Args:
        model: a decoder with ``head="causal_lm"``.
        params: its parameters, adapted or not.
        asked: the prompts.
        folder: where to, as in ``dimension.collect``.
        final: as in ``models.prompt_states``.
        batch_size: prompts in a forward pass.
        note: as in ``dimension.collect``.
        progress: whether to say on stderr how far it is.

    Returns:
        The states; beside them ``label_logits``, where the prompts have labels.
    """
    batches = data.evaluation_batches(
        asked.encoded, batch_size, lengths=padded_lengths(asked.encoded.max_length)
    )
    run = _prompt_states(model, final)
    tokens = asked.tokens
    if tokens is None:  # the pass is the same; nothing is read out but one token
        tokens = np.zeros((asked.encoded.rows, 1), np.int32)

    def step(batch):
        states, logits = run(params, batch, tokens[batch["label"]])
        return states, {} if asked.tokens is None else {"label_logits": logits}

    return dimension.collect(
        step,
        batches,
        folder,
        rows=asked.encoded.rows,
        valid=lambda batch: batch["valid"],
        places=lambda batch: batch["label"],
        note=note,
        progress=progress,
    )


def score(
    asked: Asked, states: dimension.LayerFiles, labels: Sequence[str] | None
) -> dict[str, Any]:
    """Returns how many prompts were answered rightly, of all and by label.

    Args:
        asked: the prompts.
        states: of ``collect_states``.
        labels: the names of the labels.

    Returns:
        ``accuracy`` (``None`` where it was not asked for), its standard deviation as
        of independent rows, and counts by right and given label, JSON-able.
    """
    if asked.tokens is None:
        return {"accuracy": None, "rows": asked.encoded.rows}
    given = np.argmax(np.asarray(states.beside("label_logits")), axis=1)
    share = float(np.mean(given == asked.right))
    table = {
        name: {
            other: int(np.sum((asked.right == i) & (given == j)))
            for j, other in enumerate(labels)
        }
        for i, name in enumerate(labels)
    }
    spread = (share * (1 - share) / len(given)) ** 0.5
    return {"accuracy": share, "sd": spread, "rows": len(given), "right_given": table}


def adapter_runs(name: str, folder: str | Path, steps: Sequence[int] = ()) -> list[Run]:
    """Returns the runs of a fine-tuned adapter, or of the steps it was kept at.

    Args:
        name: what to call it.
        folder: of a run of ``train.py``, or of an adapter, jaxpeft's or HF PEFT's, or
            the name of one on the hub.
        steps: those that a run kept (``config.save_every``); none: the adapter
            that the run left in the end, the best one.

    Returns:
        A run for each.

    Raises:
        FileNotFoundError: there is no such adapter; the message says which there are.
        ValueError: the name is none for a folder.

    Example:
        >>> adapter_runs("1k", "runs/paradigms", [62, 124])  # doctest: +SKIP
    """
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"`name` {name!r} must be of letters, digits and . _ + -.")
    given, folder = folder, Path(folder)
    if steps:
        found = {s: folder / f"adapters/{s}" for s in steps}
        if absent := [s for s, path in found.items() if not path.is_dir()]:
            there = [p.name for p in folder.glob("adapters/*") if p.name.isdecimal()]
            there = sorted(map(int, there))
            raise FileNotFoundError(
                f"{str(folder)!r} kept no adapter of step {absent[0]}; there are "
                f"{there or 'none'}. config.save_every='50 steps, kept' keeps them."
            )
        return [Run(f"sft-{name}@{s}", 0, str(p), s) for s, p in found.items()]
    found = interop.adapter_folder(given)
    own = found / CONFIG
    read = json.loads(own.read_text(encoding="utf-8")) if own.exists() else {}
    step = (read.get("metadata") or {}).get("step")
    return [Run(f"sft-{name}", 0, str(found), step)]


def read_json(file: Path) -> Any:
    """Reads what ``runs.write_json`` wrote."""
    return json.loads(file.read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1)
def _prompt_states(model: Any, final: str):
    """Compiled once for all runs of a model, steps of an adapter among them."""
    return models.prompt_states(model, final=final)


def _identity(run: Run) -> dict[str, Any]:
    key = None
    if run.adapter is not None:
        digest = hashlib.sha256()
        for pattern in _ADAPTER_FILES:
            for file in sorted(Path(run.adapter).glob(pattern)):
                digest.update(_content(file))
        key = digest.hexdigest()[:16]
    return {
        "name": run.name,
        "paradigm": run.paradigm,
        "shots": run.shots,
        "adapter": run.adapter,
        "adapter_key": key,
        "step": run.step,
        # Studies of before have neither field.
        "control": run.control,
        "of_train": run.of_train or None,
    }


def _content(file: Path) -> bytes:
    """What is in a file of an adapter, without what each save of it names anew."""
    content = file.read_bytes()
    if file.name == CONFIG:
        read = json.loads(content)
        for own in ("id", DIGEST):  # the digest is of a file with the id in it
            read.pop(own, None)
        return json.dumps(read, sort_keys=True).encode()
    if file.suffix == ".safetensors":
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        return json.dumps(header, sort_keys=True).encode() + content[start:]
    return content


def _check_same(where: Path, wanted: Mapping[str, Any]) -> None:
    there = read_json(where / META)
    changed = [
        f"{name}: {there.get(name)!r}, now {value!r}"
        for name, value in wanted.items()
        if there.get(name) != value and name != "adapter"  # it may have moved
    ]
    if changed:
        raise ValueError(
            f"{str(where)!r} holds a run of that name with another {changed[0]}. Give "
            "the adapter another name, or the study another folder."
        )
