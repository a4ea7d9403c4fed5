"""Rules: what an equation does to a kernel on its way. Importing enters them."""

from jaxpeft.transform._rule import RULES as RULES
from jaxpeft.transform.rules import _contraction as _contraction
from jaxpeft.transform.rules import _control as _control
from jaxpeft.transform.rules import _convolution as _convolution
from jaxpeft.transform.rules import _moves as _moves
