"""``adapt``: the transform that runs functions on adapted trees, and its rules."""

from jaxpeft.transform._adapt import adapt as adapt
from jaxpeft.transform._capture import capture as capture
from jaxpeft.transform._infer import Axes as Axes
from jaxpeft.transform._infer import infer_axes as infer_axes
from jaxpeft.transform._moved import Kernel as Kernel
from jaxpeft.transform._moved import NoRule as NoRule
from jaxpeft.transform._refused import UnsupportedError as UnsupportedError
from jaxpeft.transform._rule import Equation as Equation
from jaxpeft.transform._rule import rule as rule
from jaxpeft.transform.rules._contraction import UNSCALED as UNSCALED
from jaxpeft.transform.rules._contraction import contract as contract
from jaxpeft.transform.rules._contraction import look_up as look_up
from jaxpeft.transform.rules._rows import in_slots as in_slots
