"""Reads compiled programs: FLOPs, copies, temporaries, collectives, memory traffic."""

from jaxpeft.hlo._counts import copies as copies
from jaxpeft.hlo._counts import made_of_shape as made_of_shape
from jaxpeft.hlo._counts import matmul_flops as matmul_flops
from jaxpeft.hlo._kernels import kernel_flops as kernel_flops
from jaxpeft.hlo._kernels import traced_flops as traced_flops
from jaxpeft.hlo._read import parse as parse
from jaxpeft.hlo._traffic import Array as Array
from jaxpeft.hlo._traffic import Collective as Collective
from jaxpeft.hlo._traffic import collectives as collectives
from jaxpeft.hlo._traffic import largest_arrays as largest_arrays
from jaxpeft.hlo._traffic import memory_traffic as memory_traffic
