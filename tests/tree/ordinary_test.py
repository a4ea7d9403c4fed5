"""Adapted trees are ordinary trees for Orbax, Flax's serialisation and pickle."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from adapt_toolbox import numbers
from contract_toolbox import same_bits
from flax import serialization

import jaxpeft as jp
from jaxpeft.tree import Adapter, Factors

PARAMS = {"q": {"kernel": numbers(8, 6, seed=1), "bias": jnp.ones(6)}}


def tree(part):
    adapted = jp.attach(PARAMS, jp.kasa(rank=2), ["q"], key=jax.random.key(0))
    trainable, frozen = jp.partition(adapted)
    return {"trainable": trainable, "frozen": frozen, "adapted": adapted}[part]


every_part = pytest.mark.parametrize("part", ["trainable", "frozen", "adapted"])
zeros = lambda t: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), t)


@every_part
def test_orbax_saves_and_restores(part, tmp_path):
    saved = tree(part)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", saved)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "x", jax.eval_shape(lambda: saved))
    same_bits(again, saved)


@every_part
def test_flax_has_its_bytes(part):
    saved = tree(part)
    again = serialization.from_bytes(zeros(saved), serialization.to_bytes(saved))
    same_bits(again, saved)
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(again))


@every_part
def test_pickle_and_copies(part):
    saved = tree(part)
    for again in (pickle.loads(pickle.dumps(saved)), copy.deepcopy(saved)):
        same_bits(again, saved)
    if part == "adapted":
        assert again["q"]["kernel"].adapter is jp.kasa(rank=2)


def test_an_adapter_that_its_name_does_not_give_is_not_pickled():
    plain = Adapter(lambda *_: ({}, {}), lambda *_: Factors())
    changed = jp.lora(rank=2)._replace(report=dict)  # its name gives another one
    for adapter in (plain, changed):
        with pytest.raises(TypeError, match="cannot be pickled.*@jaxpeft.tree.method"):
            pickle.dumps(adapter)
        assert copy.deepcopy(adapter) is adapter
