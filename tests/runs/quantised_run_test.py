"""A run on a quantised base: trained, gone on with, refused on another base."""

import json

import jax
import numpy as np
import pytest

import train
from jaxpeft import data, interop, runs
from jaxpeft.tree import nodes

QUANTISED = "model.quantise=int8"


pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_it_trains_resumes_and_is_refused_elsewhere(tiny_config, tmp_path):
    short = ["train_for=2 steps", "evaluate_every=2 steps", "save_every=1 steps"]
    quick = [*short, "mesh.data=8", "log.tensorboard=false", "model.scan_layers=true"]
    config = tiny_config(QUANTISED, *quick)
    train.run(config, tmp_path)
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert results["steps"] == 2 and np.isfinite(results["after"]["loss"])
    task = data.task(config.data)
    mesh = train.training.make_mesh(**config.mesh)
    _, params = runs.load_base(config, task, mesh, jax.random.key(0))
    adapted = interop.load_adapter(tmp_path / "adapter", params)
    assert any(getattr(node.base, "kind", None) == "int8" for node in nodes(adapted))
    with pytest.raises(runs.WorkdirError, match="model.quantise: 'int8', now None"):
        train.run(tiny_config(*quick), tmp_path)
    # A checkpoint's own config is compared, too, whatever the folder says.
    with pytest.raises(ValueError, match="`config.model.quantise` must be one of int8"):
        runs.check_run(
            tiny_config("model.quantise=int3", *quick), tmp_path / "a", train.attach_all
        )
    with pytest.raises(
        ValueError, match="(?s)`config.model.quantise`.*fewer than one group"
    ):
        runs.check_run(
            tiny_config("model.quantise=nf4", *quick), tmp_path / "b", train.attach_all
        )
