"""One row: a run of train.py in a process of its own, and its file of results."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from jaxpeft.compare._plan import Row
from jaxpeft.interop import adapter_info
from jaxpeft.runs import config_to_json, read_metrics, versions, write_json
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
    if found["config"] != _plain(row):
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
        ``validation`` (the scores of the best step), ``metric``, ``step``, ``steps``,
        ``trainable`` and ``stored`` numbers of the adapters (a head apart, in
        ``head``), ``cost`` (processor seconds and peak bytes of the process; of its
        last part where it was stopped), ``config``, ``versions``, ``command``.

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
    report = run / "report.json"
    if process.returncode or not report.is_file():
        last = log.read_text(encoding="utf-8", errors="replace").strip()[-600:]
        raise RuntimeError(
            f"{row.name} ended with status {process.returncode}: {last or 'no output'}"
            f" (all of it: {log})"
        )
    told = json.loads(report.read_text())["results"]
    best = [e for e in read_metrics(run, "eval") if e["step"] == told["best_step"]][-1]
    told_of = ("event", "step", "time")
    found = {
        "format": FORMAT,
        "row": {"task": row.task, "method": row.method, "point": row.point}
        | {"seed": row.seed},
        "metric": told["metric"],
        "validation": {k: v for k, v in best.items() if k not in told_of},
        "step": told["best_step"],
        "steps": told["steps"],
        **_sizes(run / "adapter", told["trainable"]),
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


def add_test(results: Path, row: Row) -> dict[str, Any]:
    """Reads what a row that was chosen scored on the test rows, and writes it down.

    Args:
        results: the folder of all rows' results.
        row: which.

    Returns:
        The row's results, ``test`` among them: ``scores``, ``rows``, ``checksum`` (of
        the predictions), and where the metric is a share of right rows ``right``: a bit
        for each row, in hexadecimal digits.

    Raises:
        ValueError: the row has not been run, or its run's folder has gone.
    """
    found = read_row(results, row)
    if found is None:
        raise ValueError(f"{row.name} has not been run")
    if "test" in found:
        return found
    run = results / found["run"]
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
    score = told["after"][told["metric"]]
    right = right_rows(arrays, told["metric"], score)
    found["test"] = {
        "scores": told["after"],
        "rows": len(next(iter(arrays.values()))),
        "right": None if right is None else np.packbits(right).tobytes().hex(),
        "checksum": digest.hexdigest(),
    }
    write_json(row_file(results, row), found)
    return found


def right_rows(arrays, metric: str, score: float) -> np.ndarray | None:
    """Which rows were right; ``None`` where the score is not the share of them."""
    if metric != "accuracy" or set(arrays) != {"outputs", "labels"}:
        return None
    outputs, labels = arrays["outputs"], arrays["labels"]
    if outputs.ndim != 2 or labels.ndim != 1:
        return None
    right = outputs.argmax(-1) == labels
    return right if abs(right.mean() - score) < 1e-6 else None


def unpacked(test: dict[str, Any]) -> np.ndarray | None:
    """Which rows were right, bool ``[rows]``, from what ``add_test`` returns.

    Example:
        >>> unpacked({"rows": 3, "right": "a0"})
        array([ True, False,  True])
    """
    if test["right"] is None:
        return None
    bytes_ = np.frombuffer(bytes.fromhex(test["right"]), np.uint8)
    return np.unpackbits(bytes_)[: test["rows"]].astype(bool)


def repeats(config: str | Path, row: Row) -> str:
    """The command that runs one row."""
    return shlex.join(["jaxpeft", "compare", str(config), "--only", row.name])


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


def _sizes(adapter: Path, trainable: int) -> dict[str, int]:
    """What a saved adapter trains and holds; parameters trained whole are apart.

    A head that is trained whole has no adapter, and is the same for all methods.
    """
    info = adapter_info(adapter)
    methods = [entry["name"] for entry in info["methods"]]
    whole = [s["path"] for s in info["sites"] if methods[s["method"]] == "full"]
    head = tuple(f"{path}/" for path in whole)
    stored = in_head = 0
    with safe_open(adapter / "adapter.safetensors", framework="np") as file:
        for name in file.keys():
            size = int(np.prod(file.get_slice(name).get_shape(), dtype=np.int64))
            in_head += size * name.startswith(head)
            stored += size * (not name.startswith(head))
    return {"trainable": trainable - in_head, "stored": stored, "head": in_head}
