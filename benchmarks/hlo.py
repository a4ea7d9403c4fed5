"""Counts of matmul FLOPs, copies and temporaries in optimised HLO."""

from jaxpeft.testing import copies as copies
from jaxpeft.testing import made_of_shape as made_of_shape
from jaxpeft.testing import matmul_flops as matmul_flops
from jaxpeft.testing import parse as parse
