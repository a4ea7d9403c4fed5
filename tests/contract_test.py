"""The contract suite of ``jaxpeft.testing``, for every method of ``adapters``."""

import pytest
from contract_toolbox import METHODS, accepts, constructor

from jaxpeft.testing._contract import *  # noqa: F403 (its tests and fixtures)

pytestmark = pytest.mark.parametrize("name", METHODS)


def test_a_method_cites_its_paper(name):
    assert "arXiv" in constructor(name).__doc__ or not accepts(name, "rank")
