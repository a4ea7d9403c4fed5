"""What a method of your own may rely on: its numbers, its scale, what sites share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import numbers, pair

import jaxpeft as jp
from jaxpeft.tree import Adapter, Factors, Gate, Term, Where, alphas_of, method

PARAMS = {"query": {"kernel": numbers(8, 6, seed=1)}}
KEY = jax.random.key(0)


def attach(adapter, params=PARAMS, **more):
    return jp.attach(params, adapter, ["query"], key=KEY, **more)


def one_row(kernel):
    return jnp.ones((kernel.shape[0], 1)), jnp.ones((1, kernel.shape[1]))


@method(numbers=("width",), drawn=("width",))
def drawn_number(width: float = 0.5) -> Adapter:
    """A number that ``init`` reads and ``factors`` has as a leaf, if it is there."""

    def init(key, kernel, rank, alpha):
        a, b = one_row(kernel)
        return {}, {"a": width * a, "b": b}

    def factors(kernel, frozen, trainable, call):
        a, b = one_row(kernel)
        return Factors((Term(a, frozen["width"] * b if "width" in frozen else 0 * b),))

    return Adapter(init, factors)


def test_a_number_of_zero_is_structure_where_init_reads_it_too():
    for width in (0.0, 0.5, 0.25):
        node = attach(drawn_number(width))["query"]["kernel"]
        assert ("width" in node.frozen) == bool(width)
        assert np.all(node.trainable["a"] == width)
        assert np.all(jp.merge({"w": node})["w"] == node.base + width)
    assert drawn_number(0.5) == drawn_number(0.25) != drawn_number(0.0)


@method
def even_sizes(rank: int = 3, alpha: float = 2.0) -> Adapter:
    """Blocks of rows share what they add, so the rank must divide ``d_in``."""

    def init(key, kernel, rank, alpha):
        if kernel.shape[0] % rank or kernel.shape[1] % 2:
            raise ValueError(f"`rank` {rank} does not divide {kernel.shape[0]}")
        b = jnp.zeros((rank, kernel.shape[1]), kernel.dtype)
        return {"scale": jnp.asarray(alpha, kernel.dtype)}, {"b": b}

    def factors(kernel, frozen, trainable, call):
        rank = trainable["b"].shape[0]
        a = jnp.tile(jnp.eye(rank), (kernel.shape[0] // rank, 1))
        return Factors((Term(a, frozen["scale"] * trainable["b"]),))

    return Adapter(init, factors, where=Where(rank=rank, alpha=alpha))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_alpha_of_a_method_that_allows_few_sizes(rank):
    tree = attach(even_sizes(rank, alpha=0.3))
    assert alphas_of(tree["query"]["kernel"]) == (0.3,)
    tree = jp.with_numbers(tree, alpha=0.7)
    assert tree["query"]["kernel"].frozen["scale"] == np.float32(0.7)


@method
def scale_elsewhere(rank: int = 2, alpha: float = 2.0) -> Adapter:
    """A scale that no one can find: its leaf has another name."""
    plain = pair(rank, alpha)

    def init(key, kernel, rank, alpha):
        frozen, trainable = plain.init(key, kernel, rank, alpha)
        return {"size": frozen["scale"]}, trainable

    def factors(kernel, frozen, trainable, call):
        return plain.factors(kernel, {"scale": frozen["size"]}, trainable, call)

    return Adapter(init, factors, where=plain.where)


def test_an_alpha_that_no_leaf_follows_from_is_not_changed_in_silence():
    with pytest.raises(ValueError, match="no site has a number 'alpha'"):
        jp.with_numbers(attach(scale_elsewhere()), alpha=1.0)


@method
def shares_without_rank() -> Adapter:
    """All sites have one direction of the input in common."""

    def init(key, kernel, rank, alpha):
        return {}, {"b": jnp.zeros((kernel.shape[1],), kernel.dtype)}

    def factors(kernel, frozen, trainable, call):
        a = frozen["a"][: kernel.shape[0]]
        return Factors((Term(a, trainable["b"][None]),))

    def shared(key, d_in, d_out, rank, dtype):
        assert rank is None
        return {"a": jax.random.normal(key, (d_in, 1), dtype)}

    return Adapter(init, factors, shared=shared)


def test_sites_share_leaves_of_a_method_without_a_rank():
    tree = attach(shares_without_rank())
    assert tree["query"]["kernel"].frozen["a"].shape == (8, 1)


def test_what_sites_share_is_drawn_for_each_name():
    tree = attach(jp.vera(2), attach(jp.vera(2)), name="french")
    leaves = tree["query"]["kernel"].frozen
    assert not np.any(leaves["vera_a"] == leaves["french:vera_a"])


@method
def reports() -> Adapter:
    """A gate that reports, of parts that have no names."""

    def init(key, kernel, rank, alpha):
        a, b = one_row(kernel)
        return {}, {"a": a, "b": b}

    def factors(kernel, frozen, trainable, call):
        report = jax.tree_util.Partial(jnp.sum)
        gate = Gate(reads=trainable["a"], report=report)
        return Factors((Term(trainable["a"], trainable["b"], gate=gate),))

    return Adapter(init, factors)


def test_two_that_report_do_not_share_a_kernel():
    tree = attach(jp.lora(2), attach(reports()), name="french")
    with pytest.raises(ValueError, match="reported by site"):
        attach(reports(), tree, name="second")
