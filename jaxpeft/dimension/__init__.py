"""Intrinsic dimension: points in, a number out."""

from jaxpeft.dimension._collect import LayerFiles as LayerFiles
from jaxpeft.dimension._collect import collect as collect
from jaxpeft.dimension._collect import pool as pool
from jaxpeft.dimension._duplicates import Cloud as Cloud
from jaxpeft.dimension._duplicates import DegenerateError as DegenerateError
from jaxpeft.dimension._duplicates import DuplicateWarning as DuplicateWarning
from jaxpeft.dimension._duplicates import cloud as cloud
from jaxpeft.dimension._estimate import IdEstimate as IdEstimate
from jaxpeft.dimension._estimate import mle as mle
from jaxpeft.dimension._estimate import twonn as twonn
from jaxpeft.dimension._fit import mle_fit as mle_fit
from jaxpeft.dimension._fit import twonn_fit as twonn_fit
from jaxpeft.dimension._fit import twonn_points as twonn_points
from jaxpeft.dimension._neighbours import neighbours as neighbours
from jaxpeft.dimension._profile import difference_map as difference_map
from jaxpeft.dimension._profile import difference_sd as difference_sd
from jaxpeft.dimension._profile import id_difference as id_difference
from jaxpeft.dimension._profile import id_profile as id_profile
from jaxpeft.dimension._profile import normalized_auc as normalized_auc
