"""Checkpoints: all of a run but the base, whole or not at all, through Orbax."""

import contextlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from jaxpeft.console import optional
from jaxpeft.training._contents import (
    Restored,
    base_of,
    differences,
    leaves_of,
    manifest,
    restored,
    shapes_of,
)
from jaxpeft.training._folder import as_folder
from jaxpeft.training._room import check_writable, told_of_room
from jaxpeft.training._sealed import (
    CheckpointError,
    Damaged,
    checksums,
    from_all_processes,
    of_this_process,
    put_aside,
    read_sealed,
    reading,
    seal,
    seal_again,
)
from jaxpeft.training._state import TrainState, check_finite


class Checkpointer:
    """The checkpoints of one run: the last two, and the best one.

    A checkpoint holds the adapters (trained leaves and fixed ones, so that no SVD is
    taken again), the optimiser, the step, the key, the state of the data, the scores
    and the config; never the base, of which it keeps a checksum. It is written in the
    background to a temporary folder and renamed when complete, and older ones are
    deleted after that: a process killed at any moment leaves the last complete one.

    All that it holds has checksums. A checkpoint that a disk or a copy has damaged is
    stepped over, with a warning, and put aside as ``damaged-<step>``.
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
                last two are kept.
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
        self._bytes = 0  # of one, at most
        self._metas: dict[int, dict[str, Any] | None] = {}  # of each step
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=True,
                cleanup_tmp_directories=True,
                preservation_policy=SimpleNamespace(should_preserve=self._stays),
            ),
        )
        # When to stop is the run's to ask, by numbers that Orbax does not know.
        self._manager.reached_preemption = lambda step: False

    @property
    def latest(self) -> int | None:
        """The step of the last complete checkpoint, ``None`` if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the best score (of equals, the latest)."""
        return (self._by_score(self._manager.all_steps()) or [None])[0]

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
            CheckpointError: there is a checkpoint of a later step.
            NoRoomError: this one, or the one before it, did not fit on the disk.
        """
        check_finite(state)
        if scores is not None and self._metric not in (None, *scores):
            raise ValueError(
                f"`scores` {sorted(scores)} lack {self._metric!r}, by which the best "
                "checkpoint is kept"
            )
        step = int(state.step)
        scores = {name: float(value) for name, value in (scores or {}).items()}
        if step in self._manager.all_steps():
            there = self._scores_of(step)
            if scores and there != scores:
                raise ValueError(
                    f"step {step} is already saved, with scores {there}; it cannot be "
                    f"saved again with {scores}. Pass `scores` at the first save of a "
                    "step"
                )
            return False
        with self.told_of_room():
            check_writable(self.folder)
        leaves = leaves_of(state, frozen, jax.random.key_data(state.key))
        meta = {
            "step": step,
            "config": self._config,
            "leaves": manifest(leaves),
            "values": checksums(leaves),
            "base": self._base_checksums(frozen),
            "key": str(jax.random.key_impl(state.key)),
            "data_state": from_all_processes(data_state),
            "extra": extra,
            "scores": scores,
        }
        meta = self._metas[step] = json.loads(json.dumps(meta))  # as it will be read
        meta["kept"] = self._kept([*self._manager.all_steps(), step])
        self._bytes = sum(x.nbytes for x in leaves.values()) + len(json.dumps(meta))
        args = self._ocp.args
        with self.told_of_room():
            written = self._manager.save(
                step,
                args=args.Composite(
                    state=args.StandardSave(leaves), meta=args.JsonSave(seal(meta))
                ),
            )
        if not written:  # Orbax writes nothing before the last one
            raise CheckpointError(
                f"`state` is of step {step}, and {self.folder} has a checkpoint of "
                f"step {self.latest}: restore that one, or use another folder"
            )
        return True

    def complete(
        self, step: int, *, extra: Any, scores: Mapping[str, float] | None
    ) -> None:
        """Puts scores into a checkpoint that was saved before there were any.

        All at once: a process killed at any moment leaves it with them or without.

        Args:
            step: its number. All processes call this.
            extra: takes the place of what it has.
            scores: as for ``save``.

        Raises:
            CheckpointError: it is damaged.
            NoRoomError: there is no room to write it.
        """
        self.wait()
        if (meta := self._meta_of(step)) is None:
            raise CheckpointError(f"`step` {step}: no such checkpoint is whole")
        meta |= json.loads(json.dumps({"extra": extra, "scores": scores or {}}))
        meta["kept"] = self._kept(self._manager.all_steps())
        if jax.process_index() == 0:
            with self.told_of_room():
                seal_again(self.folder / str(step), meta)
        from_all_processes(None)  # nobody reads it before

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
            Everything needed to go on bit for bit. A checkpoint that is damaged is
            warned of by name and put aside, and the next one, or the next best, takes
            its place.

        Raises:
            CheckpointError: there is no such checkpoint; or its config, leaves or base
                differ from the run's (all differences are listed); or it is damaged,
                of ``"last"`` and ``"best"`` where all are (all are named).
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        if step in ("last", "best"):
            lost = self._lost(steps)  # it might be either: it is told in any case
            order = steps if step == "last" else self._by_score(steps)
            wanted = [*lost, *(s for s in order if s not in lost)]
        else:
            wanted = [step] if step in steps else []
        if not wanted:
            raise CheckpointError(
                f"`step` {step!r}: there is no such checkpoint in {self.folder}; there "
                f"are {steps[::-1] or 'none'}"
            )
        faults: dict[int, str] = {}
        for number in wanted:
            try:
                found = self._read(number, state, frozen)
            except Damaged as fault:
                faults[number] = str(fault)
                continue
            if faults:
                self._put_aside(faults, number)
            return found
        raise CheckpointError(
            f"`step` {step!r}: no such checkpoint in {self.folder} is whole:"
            + "".join(f"\n  {n}: {fault}" for n, fault in faults.items())
            + "\nPut a copy of one of them back, or delete the folder to start anew."
        )

    def _read(self, number: int, state: TrainState, frozen: Any) -> Restored:
        """Reads one; raises ``Damaged`` on all processes where any finds it so."""
        folder = self.folder / str(number)
        with reading():
            meta = read_sealed(folder)
        like = shapes_of(state, frozen)
        lines = differences(
            meta,
            config=self._config,
            free=self._free,
            leaves=like,
            key=state.key,
            base=lambda: self._base_checksums(frozen),
        )
        if lines:
            raise CheckpointError(
                f"checkpoint {folder} is of another run:\n  "
                + "\n  ".join(lines)
                + "\nUse another folder, or put these back."
            )
        # Not the manager's own: it ends at a barrier, which a process that cannot
        # read its part does not reach.
        handler = self._ocp.StandardCheckpointHandler()
        with reading():
            found = handler.restore(
                folder / "state", args=self._ocp.args.StandardRestore(like)
            )
        values = meta["values"] or {}  # none before they were sealed
        now = checksums({n: found[n] for n in values})
        if changed := [n for n, value in now.items() if value != values[n]]:
            raise Damaged(f"values have changed: {', '.join(changed[:5])}")
        data_state = of_this_process(meta["data_state"])
        return restored(found, meta, state, frozen, data_state=data_state)

    def _put_aside(self, faults: Mapping[int, str], instead: int) -> None:
        """Says which checkpoints were stepped over, and takes them out of the way."""
        if jax.process_index() == 0:
            for number, fault in faults.items():
                where = put_aside(self.folder / str(number))
                warnings.warn(
                    f"checkpoint {number} in {str(self.folder)!r} is damaged "
                    f"({fault}); it is stepped over and {where}. Checkpoint {instead} "
                    "is used.",
                    stacklevel=3,
                )
        from_all_processes(None)  # nobody looks before it is done
        self._manager.reload()
        self._metas.clear()

    def wait(self) -> None:
        """Returns when everything saved so far is complete on disk.

        Raises:
            NoRoomError: it did not fit.
        """
        with self.told_of_room():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads.

        Raises:
            NoRoomError: what was saved last did not fit.
        """
        with self.told_of_room():
            self._manager.close()

    def told_of_room(self) -> contextlib.AbstractContextManager[None]:
        """A context for whatever else is written beside the checkpoints.

        Raises:
            NoRoomError: the disk is full or read-only; it says how much room a
                checkpoint takes, how much is missing, and what is kept.
        """
        numbers = lambda: (p.name for p in self.folder.iterdir() if p.name.isdigit())
        whole = lambda: sorted(map(int, numbers()))
        return told_of_room(self.folder, lambda: self._bytes, whole)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _by_score(self, steps: Sequence[int]) -> list[int]:
        """Steps that have a score, the best first, of equals the latest."""
        scores = {s: self._scores_of(s).get(self._metric) for s in steps}

        def rank(step: int) -> tuple[float, int]:
            score = scores[step]
            return (-math.inf if math.isnan(score) else self._sign * score, step)

        scored = [s for s in steps if scores[s] is not None]
        return sorted(scored, key=rank, reverse=True)

    def _kept(self, steps: Sequence[int]) -> list[int]:
        """Steps that stay: the best, and the last two, as one may come to harm."""
        return sorted({*sorted(steps)[-2:], *self._by_score(steps)[:1]})

    def _stays(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """The same, as Orbax asks for it."""
        kept = self._kept([each.step for each in checkpoints])
        return [each.step in kept for each in checkpoints]

    def _lost(self, steps: Sequence[int]) -> list[int]:
        """Steps that cannot be read, but for what a kill has left of a deletion."""
        read = [s for s in steps if self._meta_of(s) is not None]
        newest = max(read, default=-1)
        kept = self._metas[newest]["kept"] if read else []
        return [s for s in steps if s not in read and (s > newest or s in kept)]

    def _meta_of(self, step: int) -> dict[str, Any] | None:
        if step not in self._metas:
            try:
                self._metas[step] = read_sealed(self.folder / str(step))
            except Damaged:
                self._metas[step] = None
        return self._metas[step]

    def _scores_of(self, step: int) -> dict[str, float]:
        meta = self._meta_of(step)
        return {} if meta is None else meta["scores"]

    def _base_checksums(self, frozen: Any) -> dict[str, int]:
        if self._checksums is None:
            self._checksums = checksums(base_of(frozen))
        return self._checksums
