"""What every test of a method has."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compiles):
    """Every file here is of tiny programs, each run a few times."""
