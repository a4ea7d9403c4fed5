"""One row: a run of train.py in a process of its own, and its file of results."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from safetensors import safe_open

from jaxpeft.allocate import Allocation
from jaxpeft.compare._plan import Row
from jaxpeft.data import metric_mode
from jaxpeft.interop import adapter_info
from jaxpeft.runs import (
    DECIDED_FILE,
    FREE,
    config_to_json,
    read_metrics,
    stage_folders,
    versions,
    write_json,
)
from jaxpeft.tree import find_method

FORMAT = 1
# What makes two numbers of one comparison incomparable where it differs.
SAME = ("jaxpeft", "jax", "jaxlib")


def row_file(results: Path, row: Row) -> Path:
    """Where a row's results are kept."""
    return results / row.task / row.method / f"{row.at},seed={row.seed}.json"


def read_row(results: Path, row: Row) -> dict[str, Any] | None:
    """Reads a row's results.

    Args:
        results: the folder of all rows.
        row: which.

    Returns:
        What ``run_row`` wrote; ``None``: it has not been run.

    Raises:
        ValueError: the file is of another config, format or version: numbers from two
            of them do not belong in one table.

    """
    file = row_file(results, row)
    if not file.is_file():
        return None
    again = f"delete it to run the row again, or give another folder: {file}"
    try:
        found = json.loads(file.read_text())
        number, known = found["format"], found["versions"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{row.name} has a damaged file; {again}") from error
    if number != FORMAT:
        raise ValueError(
            f"{row.name} has results of format {number!r}, not {FORMAT}; {again}"
        )
    if _that_counts(found["config"]) != _that_counts(_plain(row)):
        raise ValueError(f"{row.name} has results of another config; {again}")
    own = versions()
    if other := {k: known.get(k) for k in SAME if known.get(k) != own[k]}:
        raise ValueError(
            f"{row.name} has results of {other}, and here is "
            f"{ {k: own[k] for k in other} }; {again}"
        )
    return found


def run_row(
    row: Row, *, train: Path, results: Path, folder: Path, command: str
) -> dict[str, Any]:
    """Trains one row with train.py, and writes down what it cost and how it validates.

    What it scores on test rows stays in the run's own folder until ``add_test``.

    Args:
        row: which. A run that was stopped goes on.
        train: the train.py.
        results: the folder of all rows' results.
        folder: where runs are kept.
        command: what repeats the row, for the file.

    Returns:
        ``validation`` (the scores of the best step), ``metric``, ``mode`` (whether
        "max" or "min" of it is the best), ``step``, ``steps``, ``trainable`` and
        ``stored`` numbers of the adapters (a head apart, in ``head``), of a run in
        stages what each of its ``stages`` took, ``cost`` (processor seconds and peak
        bytes of the process; of its last part where it was stopped), ``config``,
        ``versions``, ``command``.

    Raises:
        RuntimeError: the run failed; its own message is in it.
    """
    place = folder / row.task / row.method / f"{row.at},seed={row.seed}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(config_to_json(row.config))
    (place / "config.py").write_text(_config_file(row))
    run, log = place / "run", place / "log.txt"
    started = time.perf_counter()
    arguments = [sys.executable, str(train), "--config", str(place / "config.py")]
    with open(log, "w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [*arguments, "--workdir", str(run)], stdout=said, stderr=said
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()  # it saves, and the same command goes on from there
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    last = stage_folders(row.config, run)[-1]
    if process.returncode or not (last / "report.json").is_file():
        said = log.read_text(encoding="utf-8", errors="replace").strip()[-600:]
        raise RuntimeError(
            f"{row.name} ended with status {process.returncode}: {said or 'no output'}"
            f" (all of it: {log})"
        )
    found = {
        "format": FORMAT,
        "row": {"task": row.task, "method": row.method, "point": row.point}
        | {"seed": row.seed},
        **read_run(row, run),
        "cost": {
            "processor_seconds": round(used.ru_utime + used.ru_stime, 2),
            "seconds": round(time.perf_counter() - started, 2),
            "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        },
        "command": command,
        "versions": versions(),
        "config": _plain(row),
        "run": os.path.relpath(run, results),
    }
    write_json(row_file(results, row), found)
    return found


def read_run(row: Row, run: Path) -> dict[str, Any]:
    """Reads a complete run's folder, all but what it scored on test rows.

    A run in stages is scored as its last one. What it trains is what any of its stages
    does: each has leaves of its own, and the head, which is left out.

    Args:
        row: which.
        run: the folder.

    Returns:
        ``metric`` to ``head`` of what ``run_row`` returns, and ``stages``.
    """
    folders = stage_folders(row.config, run)
    told = [json.loads((one / "report.json").read_text())["results"] for one in folders]
    last = told[-1]
    events = read_metrics(folders[-1], "eval")
    best = [event for event in events if event["step"] == last["best_step"]][-1]
    told_of = ("event", "step", "time")
    names = row.config.stages or ("",)
    sizes = {n: read_sizes(folder) for n, folder in zip(names, folders, strict=True)}
    steps = [one["steps"] for one in told]
    found = {
        **{name: last[name] for name in ("metric", "mode")},
        "validation": {k: v for k, v in best.items() if k not in told_of},
        "step": last["best_step"],
        "steps": sum(steps),
        **sizes[names[-1]],
        "trainable": sum(one["trainable"] for one in sizes.values()),
    }
    if row.config.stages:
        found["stages"] = [
            {"name": name, "steps": count, "trainable": sizes[name]["trainable"]}
            for name, count in zip(names, steps, strict=True)
        ]
    return found


def mode(found: dict[str, Any]) -> str:
    """Whether "max" or "min" of the metric is the best; of a mixture it is said."""
    return found["mode"] if "mode" in found else metric_mode(found["metric"])


def add_test(results: Path, row: Row) -> dict[str, Any]:
    """Reads what a row that was chosen scored on the test rows, and writes it down.

    Args:
        results: the folder of all rows' results.
        row: which.

    Returns:
        The row's results, ``test`` among them: ``scores``, ``rows`` of each task that
        counts (of one task, how many), ``checksum`` (of the predictions), and where
        the metric is a share of right rows, or of a mixture the mean of such shares,
        ``right``: a bit for each of those rows, task by task, in hexadecimal digits.

    Raises:
        ValueError: the row has not been run, or its run's folder has gone.
    """
    found = read_row(results, row)
    if found is None:
        raise ValueError(f"{row.name} has not been run")
    if "test" in found:
        return found
    run = stage_folders(row.config, results / found["run"])[-1]
    if not (run / "report.json").is_file():
        raise ValueError(
            f"{row.name}: {run} has gone, and the test scores with it; delete "
            f"{row_file(results, row)} to run it again."
        )
    told = json.loads((run / "report.json").read_text())["results"]
    with np.load(run / "predictions.npz") as kept:
        arrays = {name: kept[name] for name in sorted(kept.files)}
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    parts = counted(arrays, row.config.data.get("only"))
    right = right_rows(parts, told["metric"], told["after"])
    rows = {name: len(labels) for name, (_, labels) in parts.items()}
    found["test"] = {
        "scores": told["after"],
        "rows": rows[""] if "" in rows else rows,
        "right": None if right is None else np.packbits(right).tobytes().hex(),
        "checksum": digest.hexdigest(),
    }
    write_json(row_file(results, row), found)
    return found


def counted(
    arrays: Mapping[str, np.ndarray], only: Sequence[str] | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Takes the tasks that count for a run's score out of its predictions.

    Args:
        arrays: of ``predictions.npz``.
        only: the tasks of a mixture that are trained on; ``None``: all.

    Returns:
        Outputs and labels by task; of a run on one task by "".
    """
    names = [name.rpartition("labels")[0] for name in arrays if name.endswith("labels")]
    both = lambda name: (arrays[f"{name}outputs"], arrays[f"{name}labels"])
    parts = {name.rstrip("/"): both(name) for name in names}
    return {k: v for k, v in parts.items() if not k or only is None or k in only}


def right_rows(
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]],
    metric: str,
    scores: Mapping[str, float],
) -> Bool[np.ndarray, " rows"] | None:
    """Returns which rows were right, where the score is a share of them.

    Args:
        parts: of ``counted``.
        metric: the metric that decides.
        scores: the run's, by which this is checked.

    Returns:
        A bit a row, task by task; ``None`` where the score is neither the share of
        right rows nor, of a mixture, the mean of its tasks' shares.
    """
    if metric != ("accuracy" if "" in parts else "mean"):
        return None
    each = []
    for name, (outputs, labels) in parts.items():
        if outputs.ndim != 2 or labels.ndim != 1:
            return None
        # In a mixture a row is asked about the classes of its own task alone.
        own = slice(labels.min(), labels.max() + 1) if name else slice(None)
        right = outputs[:, own].argmax(-1) == labels - (own.start or 0)
        if abs(right.mean() - scores.get(f"{name}/accuracy".strip("/"), -1)) > 1e-6:
            return None
        each.append(right)
    mean = np.mean([right.mean() for right in each])
    return np.concatenate(each) if abs(mean - scores[metric]) < 1e-6 else None


def unpacked(test: dict[str, Any]) -> np.ndarray | None:
    """Which rows were right, bool ``[rows]``, from what ``add_test`` returns.

    Of a mixture those of all its tasks, in the order of ``rows``.

    Example:
        >>> unpacked({"rows": 3, "right": "a0"})
        array([ True, False,  True])
    """
    if test["right"] is None:
        return None
    bytes_ = np.frombuffer(bytes.fromhex(test["right"]), np.uint8)
    return np.unpackbits(bytes_)[: sum(rows_by_task(test).values())].astype(bool)


def rows_by_task(test: dict[str, Any]) -> dict[str, int]:
    """How many rows of each task count; of a run on one task by "".

    Example:
        >>> rows_by_task({"rows": 3}), rows_by_task({"rows": {"one": 3, "two": 5}})
        ({'': 3}, {'one': 3, 'two': 5})
    """
    rows = test["rows"]
    return {"": rows} if isinstance(rows, int) else dict(rows)


def repeats(config: str | Path, row: Row) -> str:
    """The command that runs one row."""
    return shlex.join(["jaxpeft", "compare", str(config), "--only", row.name])


def _that_counts(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what changes no number: where it ran, and what it showed."""
    return {name: value for name, value in config.items() if name not in FREE}


def _plain(row: Row) -> Any:
    """A row's config as JSON has it."""
    return json.loads(config_to_json(row.config))


def _config_file(row: Row) -> str:
    """A config that train.py reads: the JSON beside it, and the method's module."""
    module = find_method(row.config.adapter.name).__module__
    return (
        f'"""{row.name}"""\n\n'
        "from pathlib import Path\n\n"
        f"import {module}  # noqa: F401\n"
        "from jaxpeft.runs import config_from_json\n\n\n"
        "def get_config():\n"
        '    text = Path(__file__).with_name("config.json").read_text()\n'
        "    return config_from_json(text)\n"
    )


def read_sizes(folder: Path) -> dict[str, int]:
    """Reads how many numbers a complete run trained, and how many are to be stored.

    Where components were chosen in training, those train that trained on, and those
    that went back to their start need not be stored. Parameters trained whole, a head,
    are the same for all methods and apart.

    Args:
        folder: the run's, or a stage's.

    Returns:
        ``trainable`` and ``stored`` of the adapters, and ``head``.
    """
    told = json.loads((folder / "report.json").read_text())["results"]
    file = folder / DECIDED_FILE
    decided = Allocation.load(file) if file.is_file() else None
    trained = told["trainable"] if decided is None else decided.facts["trained"]
    shares = {} if decided is None else _kept_shares(decided)
    info = adapter_info(folder / "adapter")
    methods = [entry["name"] for entry in info["methods"]]
    whole = [s["path"] for s in info["sites"] if methods[s["method"]] == "full"]
    head = tuple(f"{path}/" for path in whole)
    stored = in_head = 0
    with safe_open(folder / "adapter/adapter.safetensors", framework="np") as file:
        for name in file.keys():
            size = int(np.prod(file.get_slice(name).get_shape(), dtype=np.int64))
            if name.startswith(head):
                in_head += size
                continue
            owners = [path for path in shares if name.startswith(f"{path}/")]
            stored += round(size * (shares[owners[0]] if owners else 1.0))
    return {"trainable": trained - in_head, "stored": stored, "head": in_head}


def _kept_shares(decided: Allocation) -> dict[str, float]:
    """Of each site that was chosen from, the part of its arrays that is to be kept."""
    facts = decided.facts
    if facts["unselected"] != "revert":  # the others are a part of the function
        return {}
    shares = {path: float(any(kept)) for path, kept in facts["biases"].items()}
    for path, site in decided.sites:
        ranks = [rank for rank, _ in site.layers()]
        shares[path] = sum(ranks) / sum(facts["out_of"][path])
    return shares
