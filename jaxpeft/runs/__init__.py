"""What a run is besides its step: config, folder, ranks, stages, progress, report."""

from jaxpeft.console import optional as _optional

with _optional("Runs"):
    import ml_collections as _ml_collections  # noqa: F401

from jaxpeft.console import INTERRUPTED as INTERRUPTED
from jaxpeft.console import NOT_FINITE as NOT_FINITE
from jaxpeft.console import REFUSED as REFUSED
from jaxpeft.console import ended as ended
from jaxpeft.runs._check import check_run as check_run
from jaxpeft.runs._check import load_base as load_base
from jaxpeft.runs._check import load_start as load_start
from jaxpeft.runs._check import outline as outline
from jaxpeft.runs._check import rehearse as rehearse
from jaxpeft.runs._command import Command as Command
from jaxpeft.runs._command import obey as obey
from jaxpeft.runs._command import parse_command as parse_command
from jaxpeft.runs._config import call as call
from jaxpeft.runs._config import call_named as call_named
from jaxpeft.runs._config import count_steps as count_steps
from jaxpeft.runs._config import load_config as load_config
from jaxpeft.runs._config import make_adapter as make_adapter
from jaxpeft.runs._config import said_of as said_of
from jaxpeft.runs._fields import FIELDS as FIELDS
from jaxpeft.runs._fields import check_fields as check_fields
from jaxpeft.runs._inputs import Inputs as Inputs
from jaxpeft.runs._inputs import read_inputs as read_inputs
from jaxpeft.runs._inputs import score_split as score_split
from jaxpeft.runs._metrics import MetricsWriter as MetricsWriter
from jaxpeft.runs._metrics import Stopwatch as Stopwatch
from jaxpeft.runs._metrics import compile_seconds as compile_seconds
from jaxpeft.runs._metrics import memory as memory
from jaxpeft.runs._metrics import read_metrics as read_metrics
from jaxpeft.runs._metrics import stop_if_not_finite as stop_if_not_finite
from jaxpeft.runs._progress import Progress as Progress
from jaxpeft.runs._progress import clock as clock
from jaxpeft.runs._progress import progress as progress
from jaxpeft.runs._ranks import allocation_function as allocation_function
from jaxpeft.runs._ranks import check_estimate as check_estimate
from jaxpeft.runs._ranks import estimate_allocation as estimate_allocation
from jaxpeft.runs._ranks import read_allocation as read_allocation
from jaxpeft.runs._ranks import start_at_inputs as start_at_inputs
from jaxpeft.runs._ranks import starting_allocation as starting_allocation
from jaxpeft.runs._report import plot_curves as plot_curves
from jaxpeft.runs._report import print_table as print_table
from jaxpeft.runs._report import report as report
from jaxpeft.runs._report import versions as versions
from jaxpeft.runs._run_ranks import attach_biases as attach_biases
from jaxpeft.runs._run_ranks import decide_ranks as decide_ranks
from jaxpeft.runs._run_ranks import ranks_before as ranks_before
from jaxpeft.runs._run_ranks import ranks_during as ranks_during
from jaxpeft.runs._run_ranks import ranks_report as ranks_report
from jaxpeft.runs._stages import enter_stage as enter_stage
from jaxpeft.runs._stages import run_stages as run_stages
from jaxpeft.runs._stages import save_routing as save_routing
from jaxpeft.runs._stop import Stopped as Stopped
from jaxpeft.runs._stop import stop_asked as stop_asked
from jaxpeft.runs._stop import stops_at_sigterm as stops_at_sigterm
from jaxpeft.runs._workdir import check_workdir as check_workdir
from jaxpeft.runs._workdir import open_workdir as open_workdir
from jaxpeft.training import WorkdirError as WorkdirError
from jaxpeft.training import config_differences as config_differences
from jaxpeft.training import config_from_json as config_from_json
from jaxpeft.training import config_to_json as config_to_json
from jaxpeft.training import flat_config as flat_config
