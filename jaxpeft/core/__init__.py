"""The idea: adapted trees, and the transform that runs them."""

from jaxpeft.core._adapt import adapt as adapt
from jaxpeft.core._adapter import Adapter as Adapter
from jaxpeft.core._adapter import Factors as Factors
from jaxpeft.core._adapter import method as method
from jaxpeft.core._attach import attach as attach
from jaxpeft.core._contract import UNSCALED as UNSCALED
from jaxpeft.core._describe import Description as Description
from jaxpeft.core._describe import describe as describe
from jaxpeft.core._evaluate import UnsupportedError as UnsupportedError
from jaxpeft.core._infer import infer_axes as infer_axes
from jaxpeft.core._names import ModuleName as ModuleName
from jaxpeft.core._node import AdaptedKernel as AdaptedKernel
from jaxpeft.core._node import Site as Site
from jaxpeft.core._peft import PeftForm as PeftForm
from jaxpeft.core._tree import combine as combine
from jaxpeft.core._tree import count as count
from jaxpeft.core._tree import detach as detach
from jaxpeft.core._tree import flat as flat
from jaxpeft.core._tree import inherit_specs as inherit_specs
from jaxpeft.core._tree import merge as merge
from jaxpeft.core._tree import mergeable as mergeable
from jaxpeft.core._tree import partition as partition
from jaxpeft.core._tree import penalty as penalty
from jaxpeft.core._tree import unflat as unflat
from jaxpeft.core._tree import with_dropout as with_dropout
