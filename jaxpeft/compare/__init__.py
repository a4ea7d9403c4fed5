"""Methods side by side: tasks, seeds and a grid, chosen on validation rows alone."""

from jaxpeft.console import optional as _optional

with _optional("Comparisons"):
    import ml_collections as _ml_collections  # noqa: F401
    import safetensors as _safetensors  # noqa: F401

from jaxpeft.compare._plan import Comparison as Comparison
from jaxpeft.compare._plan import Row as Row
from jaxpeft.compare._plan import read_comparison as read_comparison
from jaxpeft.compare._rows import add_test as add_test
from jaxpeft.compare._rows import counted as counted
from jaxpeft.compare._rows import read_row as read_row
from jaxpeft.compare._rows import read_run as read_run
from jaxpeft.compare._rows import read_sizes as read_sizes
from jaxpeft.compare._rows import right_rows as right_rows
from jaxpeft.compare._rows import run_row as run_row
from jaxpeft.compare._rows import unpacked as unpacked
from jaxpeft.compare._run import check_out as check_out
from jaxpeft.compare._run import choose as choose
from jaxpeft.compare._run import compare as compare
from jaxpeft.compare._table import difference as difference
from jaxpeft.compare._table import plot as plot
from jaxpeft.compare._table import show as show
from jaxpeft.compare._table import table as table
