"""Adapters that the real HF PEFT wrote, kept here, against the kernels it merged.

Runs without PyTorch. ``golden/make.py`` made the files.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft.core import ModuleName
from jaxpeft.interop import load_peft, save_peft

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = sorted(p.name for p in GOLDEN.iterdir() if (p / "adapter_config.json").exists())
LINEAR = ("up", "mid", "down")
NAMES = [ModuleName("tokens", "tokens", "embedding")]
NAMES += [ModuleName(name, f"net/{name}", "linear") for name in LINEAR]


def tree_of(tensors):
    """The network's weights in our layout."""
    tree = {name: {"kernel": tensors[f"{name}.weight"].T} for name in LINEAR}
    for name in LINEAR:
        tree[name]["bias"] = tensors[f"{name}.bias"]
    whole = {"net": tree, "tokens": {"embedding": tensors["tokens.weight"]}}
    return jax.tree.map(jnp.asarray, whole)


@functools.cache
def base():
    return tree_of(load_file(GOLDEN / "base.safetensors"))


@functools.cache
def merged(case):
    found = load_file(GOLDEN / "merged.safetensors")
    own = {n.partition("/")[2]: x for n, x in found.items() if n.startswith(f"{case}/")}
    return tree_of(own)


def worst(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.max(np.abs(x - y))) for x, y in pairs)


def test_there_are_a_dozen():
    assert len(CASES) == 12


@pytest.mark.parametrize("case", CASES)
def test_their_adapters_merge_to_their_kernels(case, tmp_path):
    adapted = load_peft(GOLDEN / case, base(), names=NAMES)
    mine = jp.merge(adapted)
    assert worst(mine, merged(case)) < 1e-5  # measured 1e-6 with an SVD
    assert worst(base(), merged(case)) > 0.1  # control
    # Written anew, in whatever form, it is the same function.
    save_peft(adapted, tmp_path / "again", names=NAMES)
    again = load_peft(tmp_path / "again", base(), names=NAMES)
    assert worst(jp.merge(again), merged(case)) < 1e-5
