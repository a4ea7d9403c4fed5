"""Learning paradigms compared by the intrinsic dimension of what a model thinks."""

from jaxpeft.console import optional as _optional

with _optional("Studies"):
    import ml_collections as _ml_collections  # noqa: F401

from jaxpeft.study._asked import CONTROLS as CONTROLS
from jaxpeft.study._asked import Asked as Asked
from jaxpeft.study._asked import ask as ask
from jaxpeft.study._collect import Run as Run
from jaxpeft.study._collect import adapter_runs as adapter_runs
from jaxpeft.study._collect import collect_runs as collect_runs
from jaxpeft.study._collect import collect_states as collect_states
from jaxpeft.study._collect import score as score
from jaxpeft.study._estimate import ESTIMATORS as ESTIMATORS
from jaxpeft.study._estimate import Result as Result
from jaxpeft.study._estimate import complete_runs as complete_runs
from jaxpeft.study._estimate import estimate_runs as estimate_runs
from jaxpeft.study._estimate import find_estimator as find_estimator
from jaxpeft.study._estimate import neighbours_needed as neighbours_needed
from jaxpeft.study._estimate import read_runs as read_runs
from jaxpeft.study._estimate import remarks as remarks
from jaxpeft.study._findings import Finding as Finding
from jaxpeft.study._findings import findings as findings
from jaxpeft.study._report import report as report
from jaxpeft.study._tiny import TINY as TINY
from jaxpeft.study._tiny import tiny_model as tiny_model
from jaxpeft.study._tiny import tiny_tokenizer as tiny_tokenizer
