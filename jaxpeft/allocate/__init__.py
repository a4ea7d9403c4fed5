"""Where adapters sit, and how much rank each gets: functions over adapted trees."""

from jaxpeft.allocate._eva import Moments as Moments
from jaxpeft.allocate._eva import Spectrum as Spectrum
from jaxpeft.allocate._eva import eva as eva
from jaxpeft.allocate._eva import eva_start as eva_start
from jaxpeft.allocate._eva import gather_moments as gather_moments
from jaxpeft.allocate._eva import input_moments as input_moments
from jaxpeft.allocate._eva import spectrum as spectrum
from jaxpeft.allocate._finalise import finalise as finalise
from jaxpeft.allocate._finalise import kept_ranks as kept_ranks
from jaxpeft.allocate._gelora import Block as Block
from jaxpeft.allocate._gelora import gelora as gelora
from jaxpeft.allocate._ggm import GraphState as GraphState
from jaxpeft.allocate._ggm import ggm as ggm
from jaxpeft.allocate._importance import ImportanceState as ImportanceState
from jaxpeft.allocate._importance import budgets as budgets
from jaxpeft.allocate._importance import importance as importance
from jaxpeft.allocate._importance import most_important as most_important
from jaxpeft.allocate._importance import scores as scores
from jaxpeft.allocate._peft_patterns import from_peft as from_peft
from jaxpeft.allocate._peft_patterns import to_peft as to_peft
from jaxpeft.allocate._uniform import uniform as uniform
from jaxpeft.core import Allocation as Allocation
from jaxpeft.core import Allocator as Allocator
from jaxpeft.core import KernelShape as KernelShape
from jaxpeft.core import SiteRank as SiteRank
from jaxpeft.core import kernel_shapes as kernel_shapes
