"""Hidden states of many texts, pooled on the device and kept in one file a layer."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxpeft.numerics import where_shown

POOLS = ("mean", "last", "first")
_STATE = "collected.json"


def pool(
    hidden: Float[Array, "*layers batch tokens d"],
    attention_mask: Shaped[Array | np.ndarray, "batch tokens"],
    how: str = "mean",
) -> Float[Array, "*layers batch d"]:
    r"""Returns one vector a text, in float32.

    .. math:: \text{mean} = \sum_t m_t h_t / \sum_t m_t

    Args:
        hidden: hidden states, of one layer or of several.
        attention_mask: 1 at tokens, 0 at padding, on either side. What padding holds
            does not matter, whatever it is.
        how: ``"mean"``; ``"last"``, the last real token; or ``"first"``, the first.

    Returns:
        The vectors.

    Raises:
        ValueError: ``how`` is unknown.

    Example:
        >>> hidden = jnp.array([[[2.0], [4.0], [9.0]]])
        >>> mask = jnp.array([[1, 1, 0]])
        >>> [pool(hidden, mask, how).item() for how in ("mean", "last", "first")]
        [3.0, 4.0, 2.0]
    """
    if how not in POOLS:
        raise ValueError(f"`how` must be one of {POOLS}, got {how!r}")
    real = jnp.asarray(attention_mask).astype(bool)
    if how == "mean":
        weights = real.astype(jnp.float32)
    else:
        places = jnp.arange(real.shape[1])[None]
        last = jnp.max(jnp.where(real, places, -1), axis=1, keepdims=True)
        at = last if how == "last" else jnp.argmax(real, axis=1, keepdims=True)
        weights = ((places == at) & real).astype(jnp.float32)
    lead = (1,) * (hidden.ndim - 3)
    shown = real.reshape(*lead, *real.shape, 1)
    hidden = where_shown(shown, hidden.astype(jnp.float32))
    total = jnp.einsum(
        "...btd,bt->...bd", hidden, weights, precision=jax.lax.Precision.HIGHEST
    )
    counts = jnp.maximum(jnp.sum(weights, axis=1), 1)
    return total / counts.reshape(*lead, -1, 1)


class LayerFiles:
    """States in a folder: reads one layer's file after the other.

    Attributes:
        folder: where they are.
        rows: texts.
        layers: files, L + 1 for a model of L blocks.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        state = _read(self.folder)
        if state is None or not state["complete"]:
            raise FileNotFoundError(
                f"`folder` {str(folder)!r} holds no complete states; let "
                "dimension.collect finish there (it resumes)"
            )
        self.rows, self.layers = state["rows"], state["layers"]

    def __len__(self) -> int:
        """The number of layers."""
        return self.layers

    def __getitem__(self, layer: int) -> Float[np.ndarray, "rows d"]:
        """One layer's states, mapped from its file."""
        if not 0 <= layer < self.layers:
            raise IndexError(f"`layer` {layer} is not among {self.layers}")
        return np.load(_file(self.folder, layer), mmap_mode="r")[: self.rows]

    def __iter__(self) -> Iterator[Float[np.ndarray, "rows d"]]:
        """Layer by layer."""
        return (self[i] for i in range(self.layers))

    def beside(self, name: str) -> Shaped[np.ndarray, "rows ..."]:
        """What ``step`` gave beside the states, by its name there."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")


def collect(
    step: Callable[[Any], Any],
    batches: Iterable[Any],
    folder: str | Path,
    *,
    rows: int,
    valid: Callable[[Any], Any] | None = None,
    places: Callable[[Any], Any] | None = None,
    note: Any = None,
    progress: bool = True,
) -> LayerFiles:
    """Runs texts through a model and keeps their pooled states on disk.

    One forward pass a batch; of the device's memory one batch's is used, of the host's
    one batch's states. A run that was stopped goes on after the last batch written. A
    batch that fails stops the run: none is left out.

    Args:
        step: ``batch -> [layers, batch, d]``, best jitted: ``models.pooled_states`` of
            our models, or for any other one ``pool`` inside ``jaxpeft.capture``, its
            sites stacked. Or a pair of that and ``{name: [batch, ...]}``, what else
            is to be kept of each text, in files of its own, ``name.npy``.
        batches: what ``step`` is given, the same in the same order when resumed.
        folder: where to write ``layer_00.npy``, ..., float32 [rows, d].
        rows: how many texts there are in all batches.
        valid: ``batch -> [batch]`` of booleans, False at rows that only fill up a
            batch; ``None``: all count.
        places: ``batch -> [batch]`` of numbers, the row of the files that each text
            goes into; ``None``: one after the other, in the order of the batches.
        note: JSON-able: the model, the task, the pooling. A resumed run's must be
            equal.
        progress: whether to say on stderr how far it is, every few seconds.

    Returns:
        The layers, for ``id_profile``.

    Raises:
        ValueError: states are not finite or of another shape than before, there are
            more or fewer texts than ``rows``, or the folder has another run's.

    Example:
        >>> import tempfile
        >>> step = lambda batch: np.stack([batch, 2 * batch])
        >>> batches = [np.ones((2, 3), np.float32), np.zeros((1, 3), np.float32)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     states = collect(step, batches, folder, rows=3, progress=False)
        ...     print(len(states), states[1].sum())
        2 12.0
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note = json.loads(json.dumps(note))
    fresh = {"note": note, "rows": rows, "done": 0, "batches": 0, "complete": False}
    state = _read(folder) or fresh
    if (state["note"], state["rows"]) != (note, rows):
        raise ValueError(
            f"`folder` {str(folder)!r} holds states of another run: "
            f"{state['rows']} rows, {state['note']}; give another folder"
        )
    if state["complete"]:
        return LayerFiles(folder)
    files, started, said = {}, time.monotonic(), time.monotonic()
    for number, batch in enumerate(batches):
        if number < state["batches"]:
            continue
        found = jax.device_get(step(batch))
        states, beside = found if isinstance(found, tuple) else (found, {})
        states = np.asarray(states, np.float32)
        kept = np.ones(states.shape[1], bool)
        if valid is not None:
            kept = np.asarray(valid(batch), bool)
        states = states[:, kept]
        if not np.all(np.isfinite(states)):
            bad = sorted(set(np.argwhere(~np.isfinite(states))[:, 0].tolist()))
            raise ValueError(f"states of batch {number} are not finite at layers {bad}")
        first, last = state["done"], state["done"] + states.shape[1]
        if last > rows:
            raise ValueError(f"`batches` hold more than the {rows} `rows`")
        into: Any = slice(first, last)
        if places is not None:
            into = np.asarray(places(batch))[kept]
        each = {f"layer_{i:02d}": layer for i, layer in enumerate(states)}
        each |= {name: np.asarray(x)[kept] for name, x in beside.items()}
        begun = state["batches"] > 0  # else what is there is of a run that was killed
        files = files or {n: _open(folder, n, rows, x, begun) for n, x in each.items()}
        shapes = {name: file.shape[1:] for name, file in files.items()}
        if shapes != {name: x.shape[1:] for name, x in each.items()}:
            raise ValueError(
                f"batch {number} gives states {states.shape}; the files hold "
                f"{len(files) - len(beside)} layers of {shapes['layer_00'][0]} features"
            )
        for name, x in each.items():
            files[name][into] = x
            files[name].flush()
        state |= {"done": last, "batches": number + 1, "layers": len(states)}
        _write(folder, state)
        now = time.monotonic()
        if progress and now - said > 5:
            said = now
            print(
                f"states: {last}/{rows} texts, {now - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    if state["done"] != rows:
        raise ValueError(f"`batches` hold {state['done']} texts, and `rows` is {rows}")
    _write(folder, state | {"complete": True})
    return LayerFiles(folder)


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:02d}.npy"


def _open(folder: Path, name: str, rows: int, like: np.ndarray, begun: bool):
    path, shape = folder / f"{name}.npy", (rows, *like.shape[1:])
    given = ("r+",) if begun else ("w+", like.dtype, shape)
    file = np.lib.format.open_memmap(path, *given)
    if file.shape != shape:
        raise ValueError(
            f"{path} has shape {file.shape}, not {shape}; give another folder"
        )
    return file


def _read(folder: Path) -> dict[str, Any] | None:
    file = folder / _STATE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _write(folder: Path, state: dict[str, Any]) -> None:
    new = folder / f"{_STATE}.new"
    new.write_text(json.dumps(state) + "\n", encoding="utf-8")
    new.replace(folder / _STATE)
