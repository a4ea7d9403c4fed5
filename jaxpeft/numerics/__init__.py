"""Linear algebra that other rooms rely on; it knows nothing of adapters."""

from jaxpeft.numerics._bottom import Triplets as Triplets
from jaxpeft.numerics._bottom import bottom_triplets as bottom_triplets
from jaxpeft.numerics._norm import frobenius_norm as frobenius_norm
from jaxpeft.numerics._norm import gram_distance as gram_distance
from jaxpeft.numerics._norm import outer_gram_distance as outer_gram_distance
from jaxpeft.numerics._norm import safe_sqrt as safe_sqrt
from jaxpeft.numerics._start import bottom_factors as bottom_factors
from jaxpeft.numerics._start import qr_factors as qr_factors
from jaxpeft.numerics._start import top_factors as top_factors
from jaxpeft.numerics._svd import SVD as SVD
from jaxpeft.numerics._svd import svd as svd
