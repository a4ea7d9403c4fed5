"""Adapters that the real HF PEFT wrote, kept here, against the kernels it merged.

Runs without PyTorch. ``golden/make.py`` made the files.
"""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft.interop import load_peft, save_hf, save_peft
from jaxpeft.models import ModuleName

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


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["peft"] = sys.modules["transformers"] = None
sys.path.insert(0, {tests!r})
import peft_golden_test as test
from jaxpeft.interop import load_peft, save_hf, save_peft
adapted = load_peft(test.GOLDEN / "dora", test.base(), names=test.NAMES)
save_peft(adapted, {folder!r} + "/peft", names=test.NAMES)
save_hf(adapted, {folder!r} + "/hf", names=test.NAMES, config=dict(model_type="x"))
"""


def test_no_pytorch_is_needed(tmp_path):
    here = str(pathlib.Path(__file__).parent)
    code = WITHOUT_TORCH.format(tests=here, folder=str(tmp_path))
    root = str(pathlib.Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    written = tree_of(load_file(tmp_path / "hf" / "model.safetensors"))
    assert worst(written, merged("dora")) < 1e-5


# --- rotary pairs side by side

SIZE = 10  # one head of all features of `up`; two of five would be odd
MIXED = [row._replace(interleaved=SIZE) if "up" in row.ours else row for row in NAMES]
# Feature 2j of ours is j of theirs, 2j + 1 is j + 5.
PLACES = np.arange(SIZE).reshape(2, SIZE // 2).T.reshape(-1)


def interleaved(tree):
    """The same weights with the output features of `up` in the other order."""
    up = tree["net"]["up"]
    up = {"kernel": up["kernel"][:, PLACES], "bias": up["bias"][PLACES]}
    return tree | {"net": tree["net"] | {"up": up}}


@pytest.mark.parametrize("case", ["lora", "dora", "pissa", "ia3", "kasa"])
def test_interleaved_heads(case, tmp_path):
    params = interleaved(base())
    adapted = load_peft(GOLDEN / case, params, names=MIXED)
    assert worst(jp.merge(adapted), interleaved(merged(case))) < 1e-5
    wrong = load_peft(GOLDEN / case, params, names=NAMES)
    assert worst(jp.merge(wrong), interleaved(merged(case))) > 0.1  # control
    for form in ("native", "auto"):
        save_peft(adapted, tmp_path / form, names=MIXED, form=form)
        again = load_peft(tmp_path / form, base(), names=NAMES)
        assert worst(jp.merge(again), merged(case)) < 1e-5
    save_hf(adapted, tmp_path / "hf", names=MIXED, config={"model_type": "mine"})
    written = tree_of(load_file(tmp_path / "hf" / "model.safetensors"))
    assert worst(written, merged(case)) < 1e-5


def test_interleaved_heads_of_what_is_saved_whole_or_shared(tmp_path):
    params, key = interleaved(base()), jax.random.key(0)
    tree = jp.attach(params, jp.full(), ["up"], key=key)
    tree = jp.attach(tree, jp.lora(2), ["mid"], key=key)
    save_peft(tree, tmp_path / "a", names=MIXED)
    again = load_peft(tmp_path / "a", base(), names=NAMES)
    assert worst(jp.merge(again), base()) == 0
    assert worst(jp.merge(load_peft(tmp_path / "a", params, names=MIXED)), params) == 0
    vera = load_peft(GOLDEN / "vera", base(), names=NAMES)
    node = vera["net"]["up"]["kernel"]
    mixed = jp.attach(params, jp.vera(3), ["up"], key=key)
    leaves = node.trainable | {"lam_b": node.trainable["lam_b"]}
    mixed["net"]["up"]["kernel"] = mixed["net"]["up"]["kernel"].replace(
        trainable=leaves
    )
    with pytest.raises(ValueError, match="cannot follow the order of one site's heads"):
        save_peft(mixed, tmp_path / "b", names=MIXED)
    save_peft(mixed, tmp_path / "b", names=MIXED, form="portable")
    plain = jp.merge(load_peft(tmp_path / "b", base(), names=NAMES))
    assert worst(interleaved(plain), jp.merge(mixed)) < 1e-5
    with pytest.raises(ValueError, match="interleaved=4, which is no even head size"):
        odd = [row._replace(interleaved=4) for row in MIXED]
        save_peft(tree, tmp_path / "c", names=odd)
