"""What the tests of the methods share."""

import jaxtyping
import pytest


@pytest.fixture
def as_a_user():
    """Turns the annotation checks of the test run off: users do not have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
