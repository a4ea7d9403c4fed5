"""``jaxpeft dimension``: learning paradigms compared by intrinsic dimension."""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpeft.cli._console import note, stage
from jaxpeft.cli._folders import find, find_adapter
from jaxpeft.cli._open import open_adapter
from jaxpeft.cli._ranks import named_options
from jaxpeft.cli._types import ending, whole

NAME = "dimension"
SUMMARY = "compare in-context learning and fine-tuning by intrinsic dimension"
DESCRIPTION = """\
Asks a model the questions of a task zero-shot, with k demonstrations, and fine-tuned,
keeps the hidden states of each prompt's last token, estimates their intrinsic
dimension layer by layer, and draws it beside the accuracy. The same command again goes
on where it was stopped. In steps, or all of them:

  collect   states and accuracies into --out
  estimate  dimensions, of the studies in --runs
  report    figures, tables, and what they say to the paper's findings, into --out
  all       the three; figures go into figures/ below --out
  points    the dimension of points in a file, .npy or .csv, without any model

The model "tiny" is random and needs no download: a study of it with --n-eval 300
--shots 0,1,2 takes a minute or two, and shows nothing but how it is done.
"""
EXAMPLE = (
    "jaxpeft dimension --model smollm2 --task trec --n-eval 1000 --shots 0,1,5\n"
    "    --sft 1k=runs/paradigms --sft 1k=runs/paradigms@62,124 --out runs/study"
)
SDS = ("subsample", "analytic")
STEPS = ("all", "collect", "estimate", "report", "points")
_NEEDS = {
    "all": ("model", "task", "out"),
    "collect": ("model", "task", "out"),
    "estimate": ("runs",),
    "report": ("runs", "out"),
    "points": ("file",),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("step", nargs="?", default="all", choices=STEPS, help="(default: all)")
    add("--model", help='a decoder: a folder, a packaged model, a hub name, or "tiny"')
    add("--task", help="a task with classes or choices, or a file of input, output")
    add("--eval", metavar="FILE", help="with a file as --task: the questions asked")
    add(
        "--task-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the task; may be given again",
    )
    add("--template", help='how a row reads: "{text}\\nGood or bad?"')
    add("--words", metavar="A,B", help="what the classes, or all outputs, are called")
    add("--out", metavar="DIR", help="the study's folder; of report: the figures'")
    add("--runs", action="append", metavar="DIR", help="a study; may be given again")
    add(
        "--shots",
        default="0,1,2,5,10",
        metavar="K,K",
        help="demonstrations (default: 0,1,2,5,10; none: fine-tuned alone)",
    )
    add(
        "--sft",
        action="append",
        default=[],
        metavar="[NAME=]RUN[@STEP,STEP]",
        help="a run of train.py, some of the steps it kept, or an adapter's folder, "
        "HF PEFT's too; may be given again",
    )
    add("--n-train", type=whole(1), default=1000, metavar="N", help="(default: 1000)")
    add("--n-eval", type=whole(1), default=5000, metavar="N", help="(default: 5000)")
    add(
        "--seed",
        type=whole(0),
        default=42,
        help="of rows and demonstrations (default: 42)",
    )
    add("--demos", default="official", help="official, nested or disjoint draws")
    add(
        "--controls",
        metavar="NAME,NAME",
        help="fixed, shuffled: each number of --shots again, with the same "
        "demonstrations for all questions, or with their answers exchanged",
    )
    add(
        "--train-records",
        action="store_true",
        help="ask the training records, too, zero-shot and of each --sft",
    )
    add("--overflow", default="error", help="of long prompts: error or drop_demos")
    add("--label-tokens", default="in_context", help="in_context, bare or none")
    add("--final", default="post_norm", help="the last state: post_norm or pre_norm")
    add(
        "--max-length", type=whole(1), metavar="T", help="tokens (default: the model's)"
    )
    add("--batch-size", type=whole(1), default=16, metavar="B", help="(default: 16)")
    add(
        "--estimator",
        metavar="NAME,NAME",
        help="twonn-linear, twonn-ml, mle-K, gride-N1-N2; figures are of the first "
        "(default: twonn-linear,mle-25,mle-50)",
    )
    add("--sd", choices=SDS, help="of dimensions (default: subsample)")
    add(
        "--layer",
        type=whole(-(2**31)),
        help="of figures of a single one (default: the middle)",
    )
    add(
        "--file",
        type=ending(".npy", ".csv"),
        help="of points: .npy or .csv, a row each",
    )


def run(given: argparse.Namespace) -> None:
    """Runs the command."""
    for name in _NEEDS[given.step]:
        if not getattr(given, name):
            raise ValueError(f"`jaxpeft dimension {given.step}` needs --{name}.")
    if given.runs and given.step not in ("estimate", "report"):
        raise ValueError(
            f"`jaxpeft dimension {given.step}` takes no --runs: its study is --out. "
            "Several are for the steps estimate and report."
        )
    if given.sd and given.step in ("collect", "report"):
        raise ValueError(
            f"`jaxpeft dimension {given.step}` takes no --sd: it is of estimate."
        )
    if given.step == "report" and "," in (given.estimator or ""):
        raise ValueError(
            f"--estimator {given.estimator!r}: figures are of one; write "
            f"--estimator {given.estimator.partition(',')[0]}."
        )
    given.sd = given.sd or SDS[0]
    from jaxpeft import study

    estimators = list(study.ESTIMATORS)
    if given.estimator is not None:
        estimators = given.estimator.split(",")
    for name in estimators:
        study.find_estimator(name)  # objects before anything is read
    if given.step == "points":
        return _points(given, estimators)
    studies = given.runs or [given.out]
    if given.step in ("all", "collect"):
        studies = [given.out]
        _collect(given)
    if given.step in ("all", "estimate"):
        for folder in studies:
            study.estimate_runs(folder, estimators, sd=given.sd, note=note)
    if given.step in ("all", "report"):
        out = Path(given.out) / ("figures" if given.step == "all" else "")
        found = study.report(studies, out, estimator=estimators[0], layer=given.layer)
        _print(found, out)


def _collect(given: argparse.Namespace) -> None:
    from jaxpeft import models, study

    runs = []
    if given.shots != "none":
        runs = [study.Run(f"icl-{k}", k) for k in _numbers("--shots", given.shots)]
    for entry in given.sft:
        name, equals, rest = entry.partition("=")
        folder, _, steps = (rest if equals else entry).partition("@")
        name = name if equals else Path(folder).name
        if not name:
            raise ValueError(f"--sft {entry!r} has no name; write --sft NAME=RUN.")
        numbers = _numbers("--sft", steps) if steps else ()
        runs += study.adapter_runs(name, folder, numbers)
    if not runs:
        raise ValueError("--shots none needs --sft.")
    controls = [] if given.controls is None else given.controls.split(",")
    if other := [name for name in controls if name not in study.CONTROLS]:
        raise ValueError(f"--controls {other[0]!r}: there are {study.CONTROLS}.")
    shown = [run for run in runs if run.shots]
    if controls and not shown:
        raise ValueError("--controls need demonstrations: --shots 5.")
    more = [run.controlled(name) for name in controls for run in shown]
    if given.train_records:
        more += [run.controlled("train") for run in runs if not run.shots]
    runs += more
    for run in runs:
        _check_held_out(given, run)
    with stage(f"reading {given.task}"):
        records = _records(given)
    tiny = given.model == study.TINY
    if not tiny:
        models.outline(given.model, head="causal_lm")  # objects before any weight
    words = [] if given.label_tokens == "none" else records.labels or []
    tokenizer = study.tiny_tokenizer(words) if tiny else models.tokenizer(given.model)
    study.collect_runs(
        given.out,
        runs,
        records,
        tokenizer,
        lambda adapter: _load(given, adapter),
        model=given.model,
        demos=given.demos,
        seed=given.seed,
        overflow=given.overflow,
        label_tokens=given.label_tokens,
        final=given.final,
        max_length=given.max_length,
        batch_size=given.batch_size,
        note=note,
    )


def _check_held_out(given: argparse.Namespace, run) -> None:
    """Refuses to ask an adapter what it was trained on."""
    if run.adapter is None:
        return
    trained = find_adapter(run.adapter)[2].run.get("data") or {}
    if trained.get("name") != f"prompted/{given.task}":
        return
    seed, train = trained.get("seed", 42), trained.get("train", 1000)
    if seed != given.seed or train > given.n_train:
        raise ValueError(
            f"--sft {run.name}: it was trained on {train} records of seed {seed}; with "
            f"--n-train {given.n_train} --seed {given.seed} some of them may be asked. "
            f"Write --n-train {max(train, given.n_train)} --seed {seed}."
        )


def _records(given: argparse.Namespace):
    from jaxpeft import data

    template = given.template and given.template.replace("\\n", "\n")
    words = given.words and [word.strip() for word in given.words.split(",")]
    options = named_options("--task-option", given.task_option)
    if not data.is_file_name(given.task):
        if given.eval:
            raise ValueError("--eval goes with a --task that is a file.")
        return data.prompt_set(
            data.task({"name": given.task, **options}),
            train=given.n_train,
            evaluated=given.n_eval,
            seed=given.seed,
            template=template,
            words=words,
        )
    reading = {"delimiter", "quoting", "encoding"}
    if given.template or set(options) - reading or not given.eval:
        raise ValueError(
            "a --task that is a file needs --eval FILE, and takes neither --template "
            "nor a --task-option but delimiter, quoting and encoding: its inputs are "
            "prompts as they stand."
        )
    found = data.prompt_files(given.task, given.eval, labels=words, **options)
    return found._replace(
        train=found.train[: given.n_train], evaluated=found.evaluated[: given.n_eval]
    )


def _load(given: argparse.Namespace, adapter: str | None):
    import jax.numpy as jnp

    from jaxpeft import models, study
    from jaxpeft.cli._open import _read

    asked = argparse.Namespace(
        base=given.model,
        head="causal_lm",
        num_labels=None,
        any_base=False,
        ignore=[],
        adapter=adapter,
    )
    if given.model == study.TINY:
        model, params = study.tiny_model()
        if adapter is None:
            return model, params
        return model, _read(asked, *find(adapter), model, params)
    if adapter is None:
        with stage(f"reading {given.model}"):
            return models.load(
                given.model, head="causal_lm", scan_layers=True, dtype="float32"
            )
    opened = open_adapter(asked)
    return opened.model.clone(dtype=jnp.float32), opened.adapted


def _points(given: argparse.Namespace, estimators: Sequence[str]) -> None:
    import numpy as np

    from jaxpeft import dimension, study

    file = Path(given.file)
    if file.suffix == ".npy":
        x = np.load(file)
    else:
        x = np.loadtxt(file, delimiter=",", ndmin=2)
    if given.estimator is None:  # those that the points are enough for
        half = len(np.unique(x, axis=0)) // 2 - 10  # copies are merged in halves, too
        estimators = ["twonn-linear", *[f"mle-{k}" for k in (25, 50) if k < half]]
    functions = {name: study.find_estimator(name, sd=given.sd) for name in estimators}
    points = dimension.Points(x, max(map(study.neighbours_needed, estimators)))
    print(
        f"{'estimator':14}{'dimension':>10}{'sd':>9}{'points':>8}{'merged':>8}{'fit':>8}"
    )
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dimension.PoorFitWarning)  # said below
        for name, function in functions.items():
            found.append(one := function(points))
            print(
                f"{name:14}{one.dim:10.3f}{one.sd:9.3f}{one.n_used:8}"
                f"{one.n_exact + one.n_near:8}{one.fit:8.3f}{' poor' * one.poor}"
            )
    for text in study.remarks(found):
        note(text)


def _print(found: dict[str, Any], out: Path) -> None:
    estimator = found["estimator"]
    print(
        f"{'run':16}{'rows':>6}{'accuracy':>10}{'area':>9}{'sd':>8}{'poor':>6}   "
        f"{estimator}"
    )
    for row in found["rows"]:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        spread = row.get(f"sd {estimator}")
        print(
            f"{row['run']:16}{row['rows']:6}{accuracy:>10}"
            f"{row[f'area {estimator}']:9.3f}"
            f"{'' if spread is None else format(spread, '.3f'):>8}"
            f"{row[f'poor fits {estimator}']:6}   {row['study']}"
        )
    for text in found["remarks"]:
        print(text)
    for study, told in found["findings"].items():
        print(f"\nThe paper (arXiv 2412.06245) and {study}:")
        for one in told:
            print(f"  {one['verdict']:11}{one['statement']} ({one['numbers']})")
    for name, why in found["skipped"].items():
        note(f"no figure {name}: {why}")
    note(f"{out}: {', '.join(found['figures'])}, table.csv, report.json")


def _numbers(flag: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{flag} {text!r}: write whole numbers with commas, 0,1,5.")
    found = [int(part) for part in parts]
    if len(set(found)) < len(found):
        raise ValueError(f"{flag} {text!r} has a number twice.")
    return found
