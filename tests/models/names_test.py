"""What our modules are called in transformers, and the config it opens."""

import json

import pytest
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


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("head", [None, "classification", "regression"])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_names_are_those_of_the_class_that_the_config_names(
    tiny, model_type, head, scan_layers
):
    import torch
    import transformers

    options = {"num_labels": 3} if head == "classification" else {}
    model = models.from_config(
        tiny(model_type, pad_token_id=1), head=head, scan_layers=scan_layers, **options
    )
    content = json.loads(json.dumps(model.hf_config))
    config = transformers.AutoConfig.for_model(**content)
    (architecture,) = config.architectures
    with torch.device("meta"):
        theirs = getattr(transformers, architecture)(config)
    shapes = {name: tuple(x.shape) for name, x in theirs.named_parameters()}
    unused = {"pooler.dense.weight", "pooler.dense.bias"} if head is None else set()
    wanted = {name: shape for name, shape in shapes.items() if name not in unused}
    assert named_shapes(model) == wanted
    again = models.from_config(content, head=head, scan_layers=scan_layers)
    assert again.hf_config == content
