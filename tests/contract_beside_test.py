"""The contract suite goes on: beside an adapter of another name on one kernel."""

import pytest
from contract_toolbox import METHODS

from jaxpeft.testing._beside import *  # noqa: F403 (its tests and fixtures)

pytestmark = pytest.mark.parametrize("name", METHODS)
