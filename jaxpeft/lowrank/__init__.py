"""Trees as sums of thin products: weighed, scaled, cut."""

from jaxpeft.lowrank._products import is_plain as is_plain
from jaxpeft.lowrank._products import layer_products as layer_products
from jaxpeft.lowrank._products import not_low_rank as not_low_rank
from jaxpeft.lowrank._weighted import scaled as scaled
from jaxpeft.lowrank._weighted import weighted as weighted
