"""Checkpoints: all of a run but the base, whole or not at all, through Orbax."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxpeft.console import optional
from jaxpeft.training._config_json import config_differences, with_new_names
from jaxpeft.training._folder import as_folder
from jaxpeft.training._state import TrainState, check_finite
from jaxpeft.tree import flat, grouped, is_node, unflat


class CheckpointError(ValueError):
    """A checkpoint cannot be used for what it was asked for."""


class Restored(NamedTuple):
    """What ``Checkpointer.restore`` returns.

    Attributes:
        state: the state, on the shardings of the one that was given.
        frozen: the frozen tree with the adapters' fixed leaves of the checkpoint.
        data_state: this process's ``data_state``, as it was saved.
        extra: ``extra``, as it was saved.
        scores: the scores at that step.
        step: the number of updates done.
    """

    state: TrainState
    frozen: Any
    data_state: Any
    extra: Any
    scores: dict[str, float]
    step: int


class Checkpointer:
    """The checkpoints of one run: the last one, and the best one.

    A checkpoint holds the adapters (trained leaves and fixed ones, so that no SVD is
    taken again), the optimiser, the step, the key, the state of the data, and the
    config; never the base, of which it keeps a checksum. It is written in the
    background to a temporary folder and renamed when complete, and older ones are
    deleted after that: a process killed at any moment leaves the last complete one.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        config: Mapping[str, Any],
        metric: str | None = None,
        mode: str | None = None,
        free: Sequence[str] = (),
    ):
        """Opens a folder of checkpoints; makes it if needed.

        Args:
            folder: where they lie, ``folder/<step>/``. Left-overs of an interrupted
                save are removed.
            config: what the run was asked for, JSON-able.
            metric: the score that says which checkpoint is best; ``None``: only the
                last one is kept.
            mode: ``"max"`` if a larger score is better, ``"min"`` if a smaller one
                (``data.metric_mode``); needed with ``metric``.
            free: fields of ``config`` (``"mesh"``, ``"log.every"``) that may differ
                between a checkpoint and the run that resumes from it.

        Raises:
            ValueError: ``mode`` is unknown, or there is none for the metric.
            WorkdirError: checkpoints would not be found again in such a folder.
        """
        with optional("Checkpoints"):
            import orbax.checkpoint as ocp
            from orbax.checkpoint.checkpoint_managers import (
                AnyPreservationPolicy,
                BestN,
                LatestN,
            )

        if mode not in ("max", "min") and (metric, mode) != (None, None):
            raise ValueError(
                f"`mode` must be 'max' or 'min', got {mode!r}; write "
                "mode=data.metric_mode(metric)"
            )
        self.folder = as_folder(folder, "folder")
        self._config = json.loads(json.dumps(config))
        self._metric, self._sign = metric, -1.0 if mode == "min" else 1.0
        self._free = tuple(free)
        self._checksums: dict[str, int] | None = None
        self._ocp = ocp
        policies: list[Any] = [LatestN(1)]
        if metric is not None:
            policies.append(
                BestN(
                    get_metric_fn=self._rank,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=True,
                cleanup_tmp_directories=True,
                best_fn=self._rank,  # without one, no scores are written
                preservation_policy=AnyPreservationPolicy(policies),
            ),
        )

    @property
    def latest(self) -> int | None:
        """The step of the last complete checkpoint, ``None`` if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the best score (of equals, the latest)."""
        steps = {s: self._manager.metrics(s) for s in self._manager.all_steps()}
        scored = [s for s, m in steps.items() if m and self._metric in m]
        return max(scored, key=lambda s: (self._rank(steps[s]), s), default=None)

    def save(
        self,
        state: TrainState,
        frozen: Any,
        *,
        data_state: Any = None,
        extra: Any = None,
        scores: Mapping[str, float] | None = None,
    ) -> bool:
        """Saves in the background; the state may be donated right after the call.

        What is saved is the state at the call: Orbax has copied it off the device, or
        holds its buffers, which are then not given away, when the call returns.

        Args:
            state: the state. All processes call this at the same step.
            frozen: the frozen tree; its fixed adapter leaves are saved.
            data_state: this process's place in the data, JSON-able.
            extra: what else the run wants back, JSON-able.
            scores: scores of this state; they must hold ``metric``.

        Returns:
            Whether anything was written: ``False`` if this step is there already.

        Raises:
            NonFiniteError: an update so far was not finite. Nothing is written; the
                last checkpoint stays.
            ValueError: ``scores`` lack the metric, or the step is there already with
                other scores.
        """
        check_finite(state)
        if scores is not None and self._metric not in (None, *scores):
            raise ValueError(
                f"`scores` {sorted(scores)} lack {self._metric!r}, by which the best "
                "checkpoint is kept"
            )
        step = int(state.step)
        metrics = {name: float(value) for name, value in (scores or {}).items()}
        if step in self._manager.all_steps():
            there = self._manager.metrics(step)
            if metrics and there != metrics:
                raise ValueError(
                    f"step {step} is already saved, with scores {there}; it cannot be "
                    f"saved again with {metrics}. Pass `scores` at the first save of a "
                    "step"
                )
            return False
        leaves = _leaves(state, frozen, jax.random.key_data(state.key))
        meta = {
            "config": self._config,
            "leaves": _manifest(leaves),
            "base": self._base_checksums(frozen),
            "key": str(jax.random.key_impl(state.key)),
            "data_state": _from_all_processes(data_state),
            "extra": extra,
        }
        args = self._ocp.args
        self._manager.save(
            step,
            args=args.Composite(
                state=args.StandardSave(leaves), meta=args.JsonSave(meta)
            ),
            metrics=metrics,
        )
        return True

    def restore(
        self, state: TrainState, frozen: Any, *, step: int | str = "last"
    ) -> Restored:
        """Reads a checkpoint into the run's own shardings.

        Args:
            state: a state of the run, as ``init_state`` made it: its leaves say what
                must be there, and where each is put. Any mesh will do.
            frozen: the frozen tree of the run.
            step: ``"last"``, ``"best"``, or the number of one.

        Returns:
            Everything needed to go on bit for bit.

        Raises:
            CheckpointError: there is no such checkpoint; or its config, leaves or base
                differ from the run's (all differences are listed).
        """
        self.wait()
        number = {"last": self.latest, "best": self.best}.get(step, step)
        steps = sorted(self._manager.all_steps())
        if number not in steps:
            raise CheckpointError(
                f"`step` {step!r}: there is no such checkpoint in {self.folder}; there "
                f"are {steps or 'none'}"
            )
        args = self._ocp.args
        meta = self._manager.restore(
            number, args=args.Composite(meta=args.JsonRestore())
        ).meta
        key_shape = jax.eval_shape(jax.random.key_data, state.key)
        key_data = jax.ShapeDtypeStruct(
            key_shape.shape, key_shape.dtype, sharding=state.key.sharding
        )
        like = _leaves(state, frozen, key_data)
        self._compare(meta, like, state, frozen, number)
        abstract = {
            n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for n, x in like.items()
        }
        found = self._manager.restore(
            number, args=args.Composite(state=args.StandardRestore(abstract))
        ).state
        key = jax.random.wrap_key_data(found.pop("key"), impl=meta["key"])
        names = ("trainable", "opt_state", "allocation", "fixed")
        parts = {n: _below(n, found) for n in names}
        new_state = TrainState(
            trainable=unflat(state.trainable, parts["trainable"]),
            opt_state=unflat(state.opt_state, parts["opt_state"]),
            step=found["step"],
            key=jax.device_put(key, state.key.sharding),
            bad_step=jax.device_put(np.int32(-1), state.bad_step.sharding),
            allocation=unflat(state.allocation, parts["allocation"]),
        )
        kept = {n: x for n, x in flat(frozen).items() if n not in parts["fixed"]}
        return Restored(
            state=new_state,
            frozen=unflat(frozen, {**kept, **parts["fixed"]}),
            data_state=_of_this_process(meta["data_state"]),
            extra=meta["extra"],
            scores=self._manager.metrics(number) or {},
            step=number,
        )

    def wait(self) -> None:
        """Returns when everything saved so far is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _rank(self, metrics: Mapping[str, float]) -> float:
        score = metrics.get(self._metric, math.nan)
        return -math.inf if math.isnan(score) else self._sign * score

    def _base_checksums(self, frozen: Any) -> dict[str, int]:
        if self._checksums is None:
            self._checksums = {n: int(_checksum(x)) for n, x in _base(frozen).items()}
        return self._checksums

    def _compare(self, meta, like, state, frozen, number: int) -> None:
        """Lists everything in which a checkpoint is not this run's."""
        before = with_new_names(ConfigDict(meta["config"]))
        own = ConfigDict(self._config)
        lines = config_differences(before, own, free=self._free)
        lines = [f"config field {line}" for line in lines]
        leaves = _differences("leaf", meta["leaves"], _manifest(like))
        impl = str(jax.random.key_impl(state.key))
        if meta["key"] != impl:
            lines.append(f"key implementation {meta['key']!r}, now {impl!r}")
        if not lines and not leaves:  # these cost a pass over the base: last
            now = set(self._base_checksums(frozen).items())
            changed = dict(now ^ set(meta["base"].items()))
            leaves = [f"base leaf {n}: its values differ" for n in sorted(changed)]
        lines += [grouped(leaves)] if leaves else []
        if lines:
            raise CheckpointError(
                f"checkpoint {self.folder / str(number)} is of another run:\n  "
                + "\n  ".join(lines)
                + "\nUse another folder, or put these back."
            )


def _leaves(state: TrainState, frozen: Any, key_data: Any) -> dict[str, Any]:
    """Everything a checkpoint holds, by name."""
    named = {f"trainable/{n}": x for n, x in flat(state.trainable).items()}
    named |= {f"opt_state/{n}": x for n, x in flat(state.opt_state).items()}
    named |= {f"allocation/{n}": x for n, x in flat(state.allocation).items()}
    named |= {f"fixed/{n}": x for n, x in _fixed(frozen).items()}
    return {**named, "step": state.step, "key": key_data}


def _below(prefix: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    start = prefix + "/"
    return {n.removeprefix(start): x for n, x in leaves.items() if n.startswith(start)}


def _fixed(frozen: Any) -> dict[str, Any]:
    """The adapters' own frozen leaves."""
    own = lambda x: x.replace(base=None, call=None) if is_node(x) else None
    return flat(jax.tree.map(own, frozen, is_leaf=is_node))


def _base(frozen: Any) -> dict[str, Any]:
    """The frozen tree without the adapters' own leaves."""
    return flat(
        jax.tree.map(lambda x: x.base if is_node(x) else x, frozen, is_leaf=is_node)
    )


def _manifest(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {n: f"{x.dtype}{list(x.shape)}" for n, x in leaves.items()}


def _differences(
    what: str, old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[str]:
    show = lambda table, name: table.get(name, "absent")
    return [
        f"{what} {n}: {show(old, n)}, now {show(new, n)}"
        for n in sorted({*old, *new})
        if old.get(n) != new.get(n)
    ]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """A number that changes with any bit or any move of an entry; the same anywhere.

    Integer arithmetic modulo 2^32: no order of summation, no mesh, changes it.
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = min(jnp.finfo(x.dtype).bits, 32)
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    mixed = x.astype(jnp.uint32)
    for axis in range(x.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = mixed * jnp.uint32(31) + along
    # The last step of MurmurHash3: without it the top bits of a sum are all that the
    # signs change, and an even number of changes cancels.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)


def _from_all_processes(value: Any) -> list[Any]:
    """Each process's JSON-able value, in the order of the processes."""
    text = json.dumps(value)
    if jax.process_count() == 1:
        return [json.loads(text)]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes().decode())
        for row, size in zip(rows, sizes, strict=True)
    ]


def _of_this_process(values: list[Any]) -> Any:
    if len(values) == jax.process_count():
        return values[jax.process_index()]
    if all(value == values[0] for value in values):
        return values[0]
    raise CheckpointError(
        f"the checkpoint has the data states of {len(values)} processes, which differ, "
        f"and cannot be shared out to {jax.process_count()}: resume on {len(values)}"
    )
