"""``adapt``: the transform that runs functions on adapted trees, and its rules."""

from jaxpeft.transform._adapt import adapt as adapt
from jaxpeft.transform._capture import capture as capture
from jaxpeft.transform._evaluate import UnsupportedError as UnsupportedError
from jaxpeft.transform._infer import infer_axes as infer_axes
from jaxpeft.transform.rules._contraction import UNSCALED as UNSCALED
from jaxpeft.transform.rules._rows import WAYS as WAYS
from jaxpeft.transform.rules._rows import is_slotted as is_slotted
from jaxpeft.transform.rules._rows import is_taken as is_taken
from jaxpeft.transform.rules._rows import set_index as set_index
from jaxpeft.transform.rules._rows import slotted as slotted
from jaxpeft.transform.rules._rows import take_rows as take_rows
