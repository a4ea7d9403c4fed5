"""Parameter-efficient fine-tuning as functional transforms on parameter trees."""

from jaxpeft.adapters import *  # noqa: F403 (every method, as registered there)
from jaxpeft.lowrank import scaled as scaled
from jaxpeft.lowrank import weighted as weighted
from jaxpeft.numerics import Quantised as Quantised
from jaxpeft.transform import UnsupportedError as UnsupportedError
from jaxpeft.transform import adapt as adapt
from jaxpeft.transform import capture as capture
from jaxpeft.transform import infer_axes as infer_axes
from jaxpeft.transform import rule as rule
from jaxpeft.tree import attach as attach
from jaxpeft.tree import combine as combine
from jaxpeft.tree import count as count
from jaxpeft.tree import describe as describe
from jaxpeft.tree import detach as detach
from jaxpeft.tree import extract as extract
from jaxpeft.tree import graft as graft
from jaxpeft.tree import merge as merge
from jaxpeft.tree import mergeable as mergeable
from jaxpeft.tree import partition as partition
from jaxpeft.tree import penalty as penalty
from jaxpeft.tree import quantise as quantise
from jaxpeft.tree import with_call as with_call
from jaxpeft.tree import with_dropout as with_dropout
from jaxpeft.tree import with_numbers as with_numbers

__version__ = "0.1.0"
