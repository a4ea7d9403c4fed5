"""Tells pytest which method the contract suite is for, in each of its processes."""

from jaxpeft.testing import _named, _net, _settings


def pytest_addoption(parser):
    """The method, and options of it, as ``python -m jaxpeft.testing`` hands them on."""
    group = parser.getgroup("jaxpeft")
    group.addoption("--contract-method", metavar="PACKAGE:METHOD")
    group.addoption(
        "--contract-option", action="append", default=[], metavar="NAME=VALUE"
    )


def pytest_configure(config):
    """Imports the method: its name is known from then on, in this process."""
    _settings.use_strict_settings()
    constructor = _named.load(config.getoption("--contract-method"))
    given = config.getoption("--contract-option")
    _net.GIVEN.update(_named.read_options(constructor, given))


def pytest_generate_tests(metafunc):
    """Every test of the suite is given the method's name."""
    constructor = _named.load(metafunc.config.getoption("--contract-method"))
    metafunc.parametrize("name", [constructor.__name__])
