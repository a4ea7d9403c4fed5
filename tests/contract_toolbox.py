"""The net of the contract suite, and its methods, for tests beside the suite."""

from jaxpeft import adapters
from jaxpeft.testing._net import AXES as AXES
from jaxpeft.testing._net import KERNELS as KERNELS
from jaxpeft.testing._net import RANK as RANK
from jaxpeft.testing._net import D as D
from jaxpeft.testing._net import accepts as accepts
from jaxpeft.testing._net import at_init as at_init
from jaxpeft.testing._net import constructor as constructor
from jaxpeft.testing._net import make as make
from jaxpeft.testing._net import make_params as make_params
from jaxpeft.testing._net import moved as moved
from jaxpeft.testing._net import net as net
from jaxpeft.testing._net import nodes as nodes
from jaxpeft.testing._net import replaces_kernel as replaces_kernel
from jaxpeft.testing._net import same_bits as same_bits

PUBLIC = [n for n in dir(adapters) if not n.startswith("_")]
METHODS = sorted(n for n in PUBLIC if callable(getattr(adapters, n)))
