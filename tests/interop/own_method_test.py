"""A method of another package: attached, trained, saved, loaded, weighed, in slots."""

import importlib
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapt_toolbox import distance, numbers

import jaxpeft as jp
from jaxpeft import interop, serving, training
from jaxpeft.tree import _adapter

# MiSS (arXiv 2409.15371): the features of the input are added up in r groups, and one
# trained matrix reads the sums. Which group a feature is in is a frozen leaf: so it is
# padded with zeros where the layers of a stack have other ranks.
SOURCE = '''
import jax
import jax.numpy as jnp
from jaxpeft.tree import Adapter, Factors, Term, Where, method


@method
def miss(rank: int = 4, dropout: float = 0.0) -> Adapter:
    """Matrix shard sharing."""

    def init(key, kernel, rank, alpha):
        groups = jnp.arange(kernel.shape[0]) % rank
        a = jax.nn.one_hot(groups, rank, dtype=kernel.dtype)
        return {"a": a}, {"d": jnp.zeros((rank, kernel.shape[1]), kernel.dtype)}

    def factors(kernel, frozen, trainable, call):
        return Factors((Term(frozen["a"], trainable["d"], drop=dropout),))

    return Adapter(init, factors, where=Where(rank=rank))
'''
# As long as all layers have one rank, this is as good.
NAIVE = SOURCE.replace(
    'frozen["a"], ',
    """jax.nn.one_hot(
            jnp.arange(kernel.shape[0]) % trainable["d"].shape[0],
            trainable["d"].shape[0],
            dtype=trainable["d"].dtype,
        ), """,
)
PARAMS = {
    "q": {"kernel": numbers(6, 5, seed=1)},
    "k": {"kernel": numbers(6, 4, seed=2)},
}
X = numbers(3, 6, seed=3)


def net(params, x):
    return jnp.tanh(x @ params["q"]["kernel"]).sum() + x @ params["k"]["kernel"]


@pytest.fixture
def miss(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_adapter, "_METHODS", dict(_adapter._METHODS))
    yield importlib.import_module("theirs").miss
    del sys.modules["theirs"]


def trained(adapter):
    adapted = jp.attach(PARAMS, adapter, ["q", "k"], key=jax.random.key(0))
    trainable, frozen = jp.partition(adapted)
    optimizer = training.adamw(
        trainable, total_steps=3, learning_rate=0.1, weight_decay=0.1
    ).transform
    forward, state = jp.adapt(net), optimizer.init(trainable)
    loss = lambda t: jnp.sum(forward(jp.combine(t, frozen), X) ** 2)
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(
                jax.grad(loss)(trainable), state, trainable
            )
        trainable = optax.apply_updates(trainable, updates)
    return jp.combine(trainable, frozen)


def test_it_is_trained_saved_loaded_and_merged(miss, tmp_path):
    adapted = trained(miss(rank=2))
    y = jp.adapt(net)(adapted, X)
    assert distance(y, net(PARAMS, X)) > 1e-2
    assert distance(y, net(jp.merge(adapted), X)) < 1e-6
    interop.save_adapter(adapted, tmp_path / "saved")
    again = interop.load_adapter(tmp_path / "saved", PARAMS)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    assert np.array_equal(jp.adapt(net)(again, X), y)
    assert "miss" in str(jp.describe(adapted))


def test_what_is_not_imported_is_an_error_that_says_how(miss, tmp_path, monkeypatch):
    interop.save_adapter(trained(miss()), tmp_path / "saved")
    monkeypatch.delitem(_adapter._METHODS, "miss")
    with pytest.raises(ValueError, match="unknown method 'miss'.*import it first"):
        interop.load_adapter(tmp_path / "saved", PARAMS)


def test_it_is_scaled_weighed_and_put_into_slots(miss):
    adapted = trained(miss(rank=2))
    whole = lambda tree: jp.merge(tree)["q"]["kernel"] - PARAMS["q"]["kernel"]
    one = jp.weighted([adapted], [1.0], into=jp.lora())
    assert distance(whole(one), whole(adapted)) < 1e-5
    half = jp.scaled(one, 0.5)
    assert distance(whole(half), 0.5 * whole(adapted)) < 1e-5
    room = serving.slots(PARAMS, ["q", "k"], capacity=2, rank=4)
    room = serving.load(room, "theirs", adapted)
    tree = serving.with_rows(room.tree, serving.rows(room, ["theirs", "__base__"]))
    use = lambda params, x: x @ params["q"]["kernel"]
    got = jp.adapt(use)(tree, X[:2])
    assert distance(got[0], jp.adapt(use)(adapted, X[:1])[0]) < 1e-5
    assert distance(got[1], use(PARAMS, X[1:2])[0]) < 1e-6


def test_two_methods_of_one_name_are_refused(miss, tmp_path):
    again = textwrap.dedent(SOURCE)
    (tmp_path / "others.py").write_text(again)
    with pytest.raises(ValueError, match="a method named 'miss' is known.*theirs.miss"):
        importlib.import_module("others")
    importlib.reload(sys.modules["theirs"])  # as in a notebook: the same one, again


def contract_suite(folder, source, *options):
    (folder / "theirs.py").write_text(source)
    root = pathlib.Path(jp.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "jaxpeft.testing", "theirs:miss", *options],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_it_passes_the_contract_suite(tmp_path):
    done = contract_suite(tmp_path, SOURCE, "-q", "--option", "rank=2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    # All of it: as many tests as each method of our own has in tests/contract*_test.py.
    assert f"\n{len(suite())} passed in" in done.stdout, done.stdout[-300:]
    assert "warning" not in done.stdout


def suite():
    """The tests of the suite, by name; one of them runs for two dtypes."""
    files = [importlib.import_module(f"jaxpeft.testing.{n}") for n in FILES]
    found = [n for file in files for n in vars(file) if n.startswith("test_")]
    assert len(found) == len(set(found)) > 20
    return [*found, "test_dtypes_are_kept"]


FILES = "_contract", "_edges", "_beside"


def test_one_that_breaks_the_contract_fails_it(tmp_path):
    assert NAIVE != SOURCE
    done = contract_suite(tmp_path, NAIVE, "-q", "-k", "padding or dead_pattern")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr
    assert "d: padding learns" in done.stdout and "1 failed, 1 passed" in done.stdout
