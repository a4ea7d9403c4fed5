"""The console script ``jaxpeft``."""

from jaxpeft.cli._main import COMMANDS as COMMANDS
from jaxpeft.cli._main import main as main
from jaxpeft.cli._main import parser as parser
