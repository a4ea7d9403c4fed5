"""SIGTERM in the middle of an evaluation: saved, stopped, and gone on from exactly."""

import os
import signal

import pytest
from kill_toolbox import assert_same_run, curve

import train
from jaxpeft import runs
from jaxpeft.runs import _inputs

FEW = ("targets=('query',)", "train_for=4 steps", "evaluate_every=2 steps")


@pytest.fixture
def run(tiny_config):
    return lambda folder: train.run(tiny_config(*FEW), folder)


def told(monkeypatch, *evaluations):
    """Sends SIGTERM after the first batch of so many evaluations, counted from 1."""
    plain, count = _inputs.run_split, [0]

    def run_split(*arguments, advance, **options):
        count[0] += 1
        batches = []

        def advance_and_tell(rows):
            batches.append(rows)
            if count[0] in evaluations and len(batches) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            advance(rows)

        found = plain(*arguments, advance=advance_and_tell, **options)
        assert len(batches) > 1 and count[0] not in evaluations
        return found

    monkeypatch.setattr(_inputs, "run_split", run_split)


def test_an_evaluation_is_broken_off_and_done_when_the_run_goes_on(
    run, tmp_path, monkeypatch
):
    run(tmp_path / "whole")
    folder = tmp_path / "run"
    # Evaluations: before training, after steps 2 and 4. That of step 2 is broken off,
    # and again when it is made up for.
    told(monkeypatch, 2, 3)
    with pytest.raises(runs.Stopped, match="after step 2, which is saved") as stopped:
        run(folder)
    assert stopped.value.code == 0
    assert [s for s, _ in curve(folder, "eval", "accuracy")] == [0]
    with pytest.raises(runs.Stopped, match="in an evaluation"):
        run(folder)
    run(folder)
    assert_same_run(folder, tmp_path / "whole")
    scores = [runs.read_metrics(f, "after") for f in (folder, tmp_path / "whole")]
    assert scores[0][0]["best_step"] == scores[1][0]["best_step"]
