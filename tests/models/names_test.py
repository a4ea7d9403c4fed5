"""What our modules are called in transformers, and the config it opens."""

import json

import pytest
from decoder_toolbox import CASES, content
from flax.traverse_util import flatten_dict

from jaxpeft import models

pytestmark = pytest.mark.interop

LEAVES = {
    "linear": (("kernel", "weight", True), ("bias", "bias", False)),
    "conv1d": (("kernel", "weight", False), ("bias", "bias", False)),
    "embedding": (("embedding", "weight", False),),
    "norm": (("scale", "weight", False), ("bias", "bias", False)),
}


def named_shapes(model):
    """Their tensors and shapes, from our tree and names alone."""
    ours = {
        path: leaf.shape
        for path, leaf in flatten_dict(models.abstract(model), sep="/").items()
    }
    used, theirs = set(), {}
    for row in model.names:
        stacked = "{i}" in row.theirs and "{i}" not in row.ours
        layers = model.config.num_hidden_layers if "{i}" in row.theirs else 1
        for leaf, tensor, turned in LEAVES[row.kind]:
            for i in range(layers):
                path = f"{row.ours.format(i=i)}/{leaf}"
                if path not in ours:
                    continue
                used.add(path)
                shape = ours[path][1:] if stacked else ours[path]
                name = f"{row.theirs.format(i=i)}.{tensor}"
                theirs[name] = shape[::-1] if turned else shape
    assert used == set(ours)
    return theirs


def assert_names_are_theirs(model):
    """Every parameter of the class the config names, and nothing else."""
    import torch
    import transformers

    raw = json.loads(json.dumps(model.hf_config))
    config = transformers.AutoConfig.for_model(**raw)
    (architecture,) = config.architectures
    with torch.device("meta"):
        theirs = getattr(transformers, architecture)(config)
    wanted = {name: tuple(x.shape) for name, x in theirs.named_parameters()}
    ours = named_shapes(model)
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}  # a bare BERT's
    assert ours.items() <= wanted.items() and set(wanted) - set(ours) <= pooler
    options = {"head": model.head, "scan_layers": model.scan_layers}
    assert models.from_config(raw, **options).hf_config == raw


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("head", [None, "classification", "regression"])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_encoders(tiny, model_type, head, scan_layers):
    options = {"num_labels": 3} if head == "classification" else {}
    config = tiny(model_type, pad_token_id=1)
    assert_names_are_theirs(
        models.from_config(config, head=head, scan_layers=scan_layers, **options)
    )


@pytest.mark.parametrize("case", CASES)
def test_decoders(case):
    for head in (None, "causal_lm", "classification"):
        for scan_layers in (False, True):
            assert_names_are_theirs(
                models.from_config(content(case), head=head, scan_layers=scan_layers)
            )
