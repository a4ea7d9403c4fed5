"""The contract suite: what every method must do, for methods of any package.

``python -m jaxpeft.testing my_package:my_method`` runs it for one of yours. The rest
are the few helpers that its tests are made of.
"""

from jaxpeft.hlo import copies as copies
from jaxpeft.hlo import made_of_shape as made_of_shape
from jaxpeft.hlo import matmul_flops as matmul_flops
from jaxpeft.hlo import parse as parse
from jaxpeft.testing._compare import CLOSE as CLOSE
from jaxpeft.testing._compare import FAR as FAR
from jaxpeft.testing._compare import cotangent as cotangent
from jaxpeft.testing._compare import distance as distance
from jaxpeft.testing._compare import kernel_shapes as kernel_shapes
from jaxpeft.testing._compare import numbers as numbers
from jaxpeft.testing._compare import perturb as perturb
from jaxpeft.testing._compare import run_with_gradients as run_with_gradients
from jaxpeft.testing._settings import use_strict_settings as use_strict_settings
