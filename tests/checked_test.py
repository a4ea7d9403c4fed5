"""Every hint of the library is checked under test, with shapes and without."""

import beartype
import jax.numpy as jnp
import jaxtyping
import pytest
from jaxtyping import Array, Float

from jaxpeft import numerics, training

checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)


@checked
def plain(text: str, rows: list[int] | None = None) -> int:
    return text if rows is None else len(rows)


@checked
def inner(pair: tuple[Float[Array, " n"], Float[Array, " n"]]) -> bool:
    return True


@pytest.mark.parametrize("arguments", [(1,), ("a", ["b"]), ("a",)])
def test_hints_without_shapes(arguments):
    assert plain("a", [1]) == 1
    with pytest.raises(jaxtyping.TypeCheckError):
        plain(*arguments)


def test_shapes_are_compared_with_each_other():
    assert inner((jnp.ones(2), jnp.ones(2)))
    with pytest.raises(jaxtyping.TypeCheckError):
        inner((jnp.ones(2), jnp.ones(3)))


def test_the_librarys_own():
    with pytest.raises(jaxtyping.TypeCheckError):
        training.make_mesh(data="two")
    with pytest.raises(jaxtyping.TypeCheckError):
        numerics.svd(jnp.ones(3))
