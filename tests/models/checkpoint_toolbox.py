"""Tiny checkpoints by hand: names and shapes as transformers writes them."""

import numpy as np
from flax.traverse_util import flatten_dict

D, F, V, P, L = 16, 24, 64, 20, 2


def layer_names(i):
    e = f"encoder.layer.{i}"
    for name in ("query", "key", "value"):
        yield f"{e}.attention.self.{name}.weight", (D, D)
        yield f"{e}.attention.self.{name}.bias", (D,)
    for name, shape in (
        ("attention.output.dense", (D, D)),
        ("intermediate.dense", (F, D)),
        ("output.dense", (D, F)),
    ):
        yield f"{e}.{name}.weight", shape
        yield f"{e}.{name}.bias", shape[:1]
    for name in ("attention.output", "output"):
        yield f"{e}.{name}.LayerNorm.weight", (D,)
        yield f"{e}.{name}.LayerNorm.bias", (D,)


def body():
    """Names and shapes as transformers writes them, by hand."""
    yield "embeddings.word_embeddings.weight", (V, D)
    yield "embeddings.position_embeddings.weight", (P, D)
    yield "embeddings.token_type_embeddings.weight", (2, D)
    yield "embeddings.LayerNorm.weight", (D,)
    yield "embeddings.LayerNorm.bias", (D,)
    for i in range(L):
        yield from layer_names(i)


POOLER = {"pooler.dense.weight": (D, D), "pooler.dense.bias": (D,)}
CLASSIFIER = {"classifier.weight": (3, D), "classifier.bias": (3,)}


def tensors(prefix="bert.", pooler=True, classifier=True, dtype=np.float32, **extra):
    rng = np.random.default_rng(0)
    names = dict(body()) | (POOLER if pooler else {})
    names = {prefix + name: shape for name, shape in names.items()}
    names |= CLASSIFIER if classifier else {}
    names |= {name.replace("__", "."): shape for name, shape in extra.items()}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in names.items()}


def flat(params):
    return flatten_dict(params, sep="/")


def assert_same(params, other):
    ours, theirs = flat(params), flat(other)
    assert list(ours) == list(theirs)
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
