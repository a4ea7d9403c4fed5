"""A small text classifier, all that a training step needs, and no more."""

import sys
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import training

sys.path.insert(0, str(Path(__file__).parents[2]))  # the update stands in train.py
from train import make_update

VOCABULARY, WIDTH, CLASSES = 32, 16, 3


class Classifier(nn.Module):
    """Two dense layers over the mean of embedded tokens; called like our models."""

    param_dtype: jnp.dtype = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, input_ids, attention_mask, token_type_ids=None, deterministic=True
    ):
        dense = lambda width, name: nn.Dense(
            width, name=name, param_dtype=self.param_dtype, dtype=self.param_dtype
        )
        x = nn.Embed(
            VOCABULARY,
            WIDTH,
            name="embed",
            param_dtype=self.param_dtype,
            dtype=self.param_dtype,
        )(input_ids)
        mask = attention_mask[:, :, None].astype(x.dtype)
        x = x + nn.tanh(dense(WIDTH, "query")(x))
        x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
        x = jnp.sum(x * mask, axis=1) / jnp.sum(mask, axis=1)
        x = nn.tanh(dense(2 * WIDTH, "up_proj")(x))
        return dense(CLASSES, "classifier")(x).astype(jnp.float32)


class Run(NamedTuple):
    """One run's pieces, as ``train.py`` has them."""

    model: nn.Module
    mesh: jax.sharding.Mesh
    forward: object
    optimizer: training.Optimizer
    state: training.TrainState
    frozen: object
    step: object

    def put(self, batch, **options):
        return training.put_batch(batch, self.mesh, **options)


def sgd(rate=1.0):
    """Plain descent: the update is the gradient, so that it can be read off."""
    return training.Optimizer(optax.sgd(rate), {"all": lambda _: jnp.float32(rate)})


@pytest.fixture
def make_batch():
    def make(rows=16, length=6, seed=0, **columns):
        rng = np.random.default_rng(seed)
        mask = np.arange(length) < rng.integers(1, length + 1, (rows, 1))
        return {
            "input_ids": rng.integers(0, VOCABULARY, (rows, length), np.int32),
            "attention_mask": mask.astype(np.int32),
            "label": rng.integers(0, CLASSES, rows).astype(np.int32),
            **columns,
        }

    return make


@pytest.fixture
def make_run():
    def make(
        adapter=None,
        *,
        mesh=(1, 1, 1),
        dtype=jnp.float32,
        dropout=0.0,
        optimizer=None,
        loss=training.cross_entropy,
        allocation=None,
        **options,
    ):
        mesh = training.make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)])
        model = Classifier(dtype, dropout)
        keys = jax.random.split(jax.random.key(0), 4)
        ids = jnp.zeros((1, 4), jnp.int32)
        params = model.init(keys[0], ids, ids)["params"]
        specs = training.param_specs(params, mesh)
        # As train.py does: the base lies on the mesh before anything is attached.
        params = jax.device_put(params, training.shardings(specs, mesh))
        adapted = jp.attach(
            params, adapter or jp.kasa(rank=2), ["query", "up_proj"], key=keys[1]
        )
        adapted = jp.attach(adapted, jp.full(), ["classifier"], key=keys[2])
        adapted = training.place(adapted, mesh, specs)
        trainable, frozen = jp.partition(adapted)
        if optimizer is None:
            optimizer = training.adamw(
                trainable, total_steps=50, learning_rate=1e-2, weight_decay=0.01
            )
        state = training.init_state(
            trainable, optimizer, key=keys[3], mesh=mesh, allocator=allocation
        )
        forward = training.model_forward(model, mesh=mesh, dropout=dropout > 0)
        options["allocator"] = allocation
        update = make_update(forward, loss, optimizer, mesh=mesh, **options)
        step = training.compile_step(update, state, frozen, mesh=mesh)
        return Run(model, mesh, forward, optimizer, state, frozen, step)

    return make


@pytest.fixture
def plain_descent():
    return sgd()


@pytest.fixture
def numpy_leaves():
    """``{path: numpy array}`` of a tree, copied: donation cannot change it."""

    def leaves(tree):
        arrays = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            arrays[jax.tree_util.keystr(path)] = np.array(leaf)
        return arrays

    return leaves
