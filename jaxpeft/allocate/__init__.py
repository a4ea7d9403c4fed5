"""Where adapters sit, and how much rank each gets: functions over adapted trees."""

from jaxpeft.allocate._finalise import finalise as finalise
from jaxpeft.allocate._finalise import kept_ranks as kept_ranks
from jaxpeft.allocate._gelora import Block as Block
from jaxpeft.allocate._gelora import gelora as gelora
from jaxpeft.allocate._importance import Allocator as Allocator
from jaxpeft.allocate._importance import ImportanceState as ImportanceState
from jaxpeft.allocate._importance import budgets as budgets
from jaxpeft.allocate._importance import importance as importance
from jaxpeft.allocate._importance import most_important as most_important
from jaxpeft.allocate._importance import scores as scores
from jaxpeft.allocate._uniform import uniform as uniform
from jaxpeft.core import Allocation as Allocation
from jaxpeft.core import KernelShape as KernelShape
from jaxpeft.core import SiteRank as SiteRank
from jaxpeft.core import kernel_shapes as kernel_shapes
