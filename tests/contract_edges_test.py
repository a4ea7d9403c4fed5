"""The contract suite goes on: files, unequal ranks, dropout, dtypes, bad input."""

import pytest
from contract_toolbox import METHODS

from jaxpeft.testing._edges import *  # noqa: F403 (its tests and fixtures)

pytestmark = pytest.mark.parametrize("name", METHODS)
