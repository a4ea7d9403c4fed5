"""The console script ``jaxpeft``."""

from jaxpeft.cli._main import main as main
