"""What the tests of the contract suite are given: an input, and a net's parameters."""

from jaxpeft.console import optional
from jaxpeft.testing._compare import numbers
from jaxpeft.testing._net import D, make_params

with optional("Contract tests"):
    import pytest


@pytest.fixture
def x():
    """The input of the net, ``[8, D]``."""
    return numbers(8, D, seed=9)


@pytest.fixture
def params():
    """The parameters of the net, drawn anew for each test."""
    return make_params()
