"""What the paper found, beside what a study of one's own found."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxpeft.dimension import difference_sd, dims_of, id_difference, normalized_auc
from jaxpeft.study._estimate import Result, without_steps

VERDICTS = ("agrees", "disagrees", "not tested")
FEW = 10  # demonstrations beyond which the paper's curves are flat or fall


class Finding(NamedTuple):
    """A statement of the paper, and what one's own numbers say to it.

    Attributes:
        statement: the paper's; beginning with "Control": of this library's controls.
        verdict: "agrees", "disagrees" or "not tested".
        numbers: on which that rests; or why there is none.
    """

    statement: str
    verdict: str
    numbers: str


def findings(runs: Mapping[str, Result], estimator: str) -> list[Finding]:
    """Returns what the runs of one study say to the paper's statements.

    A difference counts where it is more than twice its standard deviation: of areas
    over halves of the rows, the same ones on both sides; of accuracies as of
    independent rows. Else the statement is not tested. Two have no such bound, and
    their numbers say so: that later layers move most, and the best number of
    demonstrations.

    Args:
        runs: by name.
        estimator: whose profiles to look at.

    Returns:
        A finding for each statement.

    References:
        Janapati and Ji, A comparative study of learning paradigms in large language
        models via intrinsic dimension, arXiv 2412.06245.
    """
    shots = {r.meta["shots"]: r for r in runs.values() if r.meta["paradigm"] == "icl"}
    ends = without_steps(runs).values()
    final = [run for run in ends if run.meta["paradigm"] == "sft"]
    profile = lambda run: run.profiles[estimator]
    found = []

    say = "SFT: the dimension rises with training"
    if 0 in shots and final:
        found += [_higher(say, run, shots[0], estimator) for run in final]
    else:
        found.append(Finding(say, "not tested", "needs --shots 0 and --sft"))
    say = "SFT: later layers move most"
    for run in final if 0 in shots else ():
        moved = np.abs(dims_of(profile(run)) - dims_of(profile(shots[0])))[1:]
        first, last = (float(np.mean(x)) for x in np.array_split(moved, 2))
        numbers = f"{run.name}: {first:.2f} in the first half, {last:.2f} in the last"
        numbers += "; no spread"
        found.append(Finding(say, _verdict(last > first), numbers))
    if not (0 in shots and final):
        found.append(Finding(say, "not tested", "needs --shots 0 and --sft"))
    say = "SFT: the same on training records"
    asked = {name: r for name, r in runs.items() if r.meta.get("of_train")}
    pairs = [
        (asked.get(f"{run.name}~train"), asked.get("icl-0~train")) for run in final
    ]
    if pairs and all(map(all, pairs)):
        found += [_higher(say, *pair, estimator) for pair in pairs]
    else:
        found.append(Finding(say, "not tested", "needs --sft and --train-records"))
    found += _in_training(runs, shots, estimator)
    found += _in_context(shots, estimator)
    found += _controlled(runs, shots, estimator)
    some = [run for k, run in shots.items() if k >= 5]
    say = "ICL with 5 demonstrations or more has a higher dimension than SFT"
    if some and final:
        found += [_higher(say, a, b, estimator) for a in some for b in final]
    else:
        found.append(Finding(say, "not tested", "needs --shots 5 and --sft"))
    say = "SFT has a higher accuracy than ICL"
    known = [r for r in shots.values() if r.accuracy is not None]
    if known and final and final[-1].accuracy is not None:
        best = max(known, key=lambda run: run.accuracy)
        found += [_righter(say, run, best) for run in final]
    else:
        found.append(Finding(say, "not tested", "needs --shots, --sft and labels"))
    return found


def _in_training(
    runs: Mapping[str, Result], shots: Mapping[int, Result], estimator: str
) -> list[Finding]:
    """Whether the dimension first rises in training and then falls."""
    say = "SFT: the dimension rises early in training, then falls"
    steps: dict[str, list[Result]] = {}
    for name, run in runs.items():
        if run.meta["paradigm"] == "sft" and run.meta["step"]:
            steps.setdefault(name.partition("@")[0], []).append(run)
    found = []
    for every in steps.values():
        every = sorted(every, key=lambda run: run.meta["step"])
        if 0 not in shots or len(every) < 3:
            continue
        area = lambda run: normalized_auc(run.profiles[estimator])
        top = max(every, key=area)
        if top is every[-1]:
            rise = _higher(say, top, shots[0], estimator)
            numbers = f"highest at the last step; {rise.numbers}"
            found.append(Finding(say, "disagrees", numbers))
            continue
        up = _higher(say, top, shots[0], estimator)
        down = _higher(say, top, every[-1], estimator)
        verdicts = {up.verdict, down.verdict}
        verdict = next(
            v for v in ("disagrees", "not tested", "agrees") if v in verdicts
        )
        found.append(Finding(say, verdict, f"{up.numbers}; {down.numbers}"))
    needs = "needs --shots 0 and three steps of one --sft RUN@STEP,STEP,STEP"
    return found or [Finding(say, "not tested", needs)]


def _controlled(
    runs: Mapping[str, Result], shots: Mapping[int, Result], estimator: str
) -> list[Finding]:
    """What of the rise in context is left without a spread or a task to learn."""
    of = lambda control: [
        (run.meta["shots"], run)
        for run in runs.values()
        if run.meta.get("control") == control
    ]
    # Each time the run that the statement has above the other.
    fixed = [(run, shots[0]) for _, run in of("fixed") if 0 in shots]
    shuffled = [(shots[k], run) for k, run in of("shuffled") if k in shots]
    found = []
    for control, say, pairs in (
        ("fixed", "with the same demonstrations for all it rises, too", fixed),
        ("shuffled", "with answers exchanged it is lower than with the own", shuffled),
    ):
        say = f"Control: {say}"
        untested = Finding(say, "not tested", f"needs --controls {control}")
        found += [_higher(say, *pair, estimator) for pair in pairs] or [untested]
    return found


def _in_context(shots: Mapping[int, Result], estimator: str) -> list[Finding]:
    found, ks = [], sorted(shots)
    say = "ICL: the dimension rises up to about 5 to 10 demonstrations"
    few = [k for k in ks if 5 <= k <= FEW]
    if 0 in shots and few:
        found.append(_higher(say, shots[few[-1]], shots[0], estimator))
    else:
        found.append(Finding(say, "not tested", "needs --shots 0 and 5 to 10"))
    say = "ICL: with more it is flat, or falls"
    more = [k for k in ks if k > FEW]
    if few and more:
        up = _higher(say, shots[more[-1]], shots[few[-1]], estimator)
        turned = {"agrees": "disagrees", "disagrees": "agrees"}
        found.append(up._replace(verdict=turned.get(up.verdict, up.verdict)))
    else:
        found.append(Finding(say, "not tested", "needs --shots of more than 10"))
    say = "ICL: the dimension is highest with as many as the accuracy is"
    if len(ks) > 2 and all(shots[k].accuracy is not None for k in ks):
        area = max(ks, key=lambda k: normalized_auc(shots[k].profiles[estimator]))
        right = max(ks, key=lambda k: shots[k].accuracy)
        numbers = f"{area} and {right} demonstrations; no spread"
        found.append(Finding(say, _verdict(area == right), numbers))
    else:
        found.append(Finding(say, "not tested", "needs three --shots, and labels"))
    return found


def _higher(say: str, p: Result, q: Result, estimator: str) -> Finding:
    """Whether the area of p is above that of q."""
    first, second = p.profiles[estimator], q.profiles[estimator]
    more = id_difference(first, second)
    if not all(layer.halves for layer in (*first[1:], *second[1:])):
        numbers = f"{p.name} above {q.name} by {more:.2f}; no spread: --sd subsample"
        return Finding(say, "not tested", numbers)
    spread = difference_sd(first, second)
    numbers = f"{p.name} above {q.name} by {more:.2f} (sd {spread:.2f})"
    if abs(more) <= 2 * spread:
        return Finding(say, "not tested", f"{numbers}: too close to tell")
    return Finding(say, _verdict(more > 0), numbers)


def _righter(say: str, p: Result, q: Result) -> Finding:
    """Whether the accuracy of p is above that of q."""
    numbers = f"{p.name} {p.accuracy:.3f}, {q.name} {q.accuracy:.3f}"
    more, spread = p.accuracy - q.accuracy, np.hypot(p.accuracy_sd, q.accuracy_sd)
    if abs(more) <= 2 * spread:
        return Finding(say, "not tested", f"{numbers}: too close to tell")
    return Finding(say, _verdict(more > 0), numbers)


def _verdict(holds: bool | np.bool_) -> str:
    return "agrees" if holds else "disagrees"
