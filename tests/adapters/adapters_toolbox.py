"""What the tests of the methods share."""

import jaxtyping
import pytest

from jaxpeft.tree import number_leaves, working_dtype


@pytest.fixture
def as_a_user():
    """Turns the annotation checks of the test run off: users do not have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def cost(adapter):
    """A method's penalty of leaves, with its numbers among the frozen ones."""

    def of_leaves(frozen, trainable):
        dtype = working_dtype(next(iter(trainable.values())).dtype)
        return adapter.penalty.of_leaves(
            number_leaves(adapter, dtype) | dict(frozen), trainable
        )

    return of_leaves
