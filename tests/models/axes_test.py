"""What a model says of its weights is what a look at its program finds."""

import jax.numpy as jnp
import pytest
from decoder_toolbox import CASES, content

import jaxpeft as jp
from jaxpeft import models


def assert_uses_are_the_programs(model):
    params, ids = models.abstract(model), jnp.zeros((2, 5), jnp.int32)
    apply = lambda params, ids: model.apply({"params": params}, ids)
    found = jp.infer_axes(apply, params, ids).uses
    weights = ("kernel", "embedding")
    found = {p: use for p, use in found.items() if p.rpartition("/")[2] in weights}
    said = model.axes.uses
    assert found == {path: said[path] for path in found}


@pytest.mark.parametrize("i, case", [*enumerate(CASES)])
def test_decoders(i, case):
    options = {"head": "causal_lm", "scan_layers": i % 2 == 0}
    assert_uses_are_the_programs(models.from_config(content(case), **options))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2"])
def test_encoders(tiny, model_type, scan_layers):
    assert_uses_are_the_programs(
        models.from_config(
            tiny(model_type, pad_token_id=1),
            head="classification",
            num_labels=3,
            scan_layers=scan_layers,
        )
    )
