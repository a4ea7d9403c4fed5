"""The forms in HF PEFT's files that methods carry. Knows no method's name.

``original + a b == merge`` holds for whatever has a pair, and leaves of the file
come back as they went.
"""

import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import perturb
from contract_toolbox import METHODS, constructor, make

import jaxpeft as jp
from jaxpeft.interop.peft._config import DEFAULTS
from jaxpeft.parts import form_of
from jaxpeft.tree import change, structure


def variants(name):
    """The method at its defaults, and with each of its choices changed."""
    yield make(name)
    for option, kind in typing.get_type_hints(constructor(name)).items():
        if typing.get_origin(kind) is typing.Literal:
            for value in typing.get_args(kind):
                if value != dict(make(name).options)[option]:
                    yield make(name, **{option: value})


ALL = [adapter for name in METHODS for adapter in variants(name)]
WITH_FORM = [a for a in ALL if form_of(a) is not None]
ON_KERNELS = [a for a in ALL if a.where.leaf == "kernel"]
PAIRS = [a for a in ON_KERNELS if structure(a, a.where.rank).only_adds]


def one_site(adapter):
    rng = np.random.default_rng(0)
    params = {"up": {"kernel": jnp.asarray(rng.normal(size=(9, 12)), jnp.float32)}}
    with jax.disable_jit():  # a dozen operations once each: compiling is the cost
        adapted = jp.attach(params, adapter, ["up/kernel"], key=jax.random.key(1))
    return perturb(adapted, scale=0.3)


def test_there_are_forms():
    assert PAIRS and any(a.where.leaf == "any" for a in WITH_FORM)
    assert all(form_of(a) is not None for a in PAIRS)


@pytest.mark.parametrize("adapter", PAIRS, ids=repr)
def test_a_pair_is_the_change_of_the_kernel(adapter):
    adapted = one_site(adapter)
    node = adapted["up"]["kernel"]
    terms = change(adapter, node.base, node.frozen, node.trainable).terms
    a = jnp.concatenate([term.a for term in terms], 1)
    b = jnp.concatenate([term.b for term in terms], 0)
    original = jp.detach(adapted)["up"]["kernel"]
    with jax.disable_jit():
        merged = jp.merge(adapted)["up"]["kernel"]
    product = jnp.matmul(a, b, precision="highest")
    np.testing.assert_allclose(original + product, merged, rtol=0, atol=2e-5)
    assert np.max(np.abs(merged - original)) > 0.05  # control: something happened
    assert a.shape[1] == b.shape[0]


@pytest.mark.parametrize(
    "adapter",
    [a for a in WITH_FORM if form_of(a).to_leaves and not form_of(a).refusal],
    ids=repr,
)
def test_leaves_come_back(adapter):
    node = one_site(adapter)["up"]["kernel"]
    form = form_of(adapter)
    for kind in form.kinds:
        leaves = form.to_leaves(node.frozen, node.trainable, kind)
        again = form.from_leaves(leaves, kind)
        assert again.keys() == node.trainable.keys()
        for name, x in again.items():
            assert np.array_equal(x, node.trainable[name])


CONFIG = DEFAULTS["LORA"] | {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 5,
    "lora_dropout": 0.1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "gaussian"},
        {"kasa_config": {"beta": 0.1, "gamma": 0.2}},
        {"use_dora": True, "init_lora_weights": "pissa"},
        {"init_lora_weights": "loftq"},
    ],
    ids=str,
)
def test_a_config_is_one_methods(changes):
    config = CONFIG | changes
    for kind in ("linear", "conv1d", "embedding"):
        claims = {}
        for name in METHODS:
            form = form_of(constructor(name)())
            options = form and form.read and form.read(config, kind)
            if options is not None and options:
                claims[name] = options
        assert len(claims) <= 1, claims
        for name, options in claims.items():
            adapter = constructor(name)(**options)
            dropout = dict(adapter.options)["dropout"]
            assert (adapter.where.rank, adapter.where.alpha, dropout) == (3, 5.0, 0.1)
            written = dict(form_of(adapter).fields)
            if kind == "embedding":  # PEFT decomposes no table: save_peft drops it
                written.pop("init_lora_weights", None)
            assert written.items() <= config.items()
            assert not form_of(adapter).refusal
    assert claims or changes != {}


def test_variants_are_many():
    """A guard: the walk above must reach options, not only defaults."""
    assert len(ALL) > len(METHODS)
    assert len(list(itertools.groupby(ALL, lambda a: a.name))) == len(METHODS)
