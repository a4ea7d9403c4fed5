"""Parameter-efficient fine-tuning as functional transforms on parameter trees."""

from jaxpeft.adapters import *  # noqa: F403 (every method, as registered there)
from jaxpeft.core import adapt as adapt
from jaxpeft.core import attach as attach
from jaxpeft.core import capture as capture
from jaxpeft.core import combine as combine
from jaxpeft.core import count as count
from jaxpeft.core import describe as describe
from jaxpeft.core import detach as detach
from jaxpeft.core import extract as extract
from jaxpeft.core import graft as graft
from jaxpeft.core import infer_axes as infer_axes
from jaxpeft.core import merge as merge
from jaxpeft.core import mergeable as mergeable
from jaxpeft.core import partition as partition
from jaxpeft.core import penalty as penalty
from jaxpeft.core import scaled as scaled
from jaxpeft.core import weighted as weighted
from jaxpeft.core import with_dropout as with_dropout

__version__ = "0.1.0"
