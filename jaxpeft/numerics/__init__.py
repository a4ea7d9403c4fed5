"""Linear algebra and a loss that other rooms rely on; it knows nothing of adapters."""

from jaxpeft.numerics._bottom import Triplets as Triplets
from jaxpeft.numerics._bottom import bottom_triplets as bottom_triplets
from jaxpeft.numerics._factored import factored_square_norms as factored_square_norms
from jaxpeft.numerics._factored import live_features as live_features
from jaxpeft.numerics._factored import magnitude_ratio as magnitude_ratio
from jaxpeft.numerics._factored import square_norms as square_norms
from jaxpeft.numerics._fingerprint import (
    PROJECTION_TOLERANCE as PROJECTION_TOLERANCE,
)
from jaxpeft.numerics._fingerprint import checksum as checksum
from jaxpeft.numerics._fingerprint import projection as projection
from jaxpeft.numerics._gates import balance_and_z as balance_and_z
from jaxpeft.numerics._gates import gated as gated
from jaxpeft.numerics._gates import gated_copies as gated_copies
from jaxpeft.numerics._gates import kept_experts as kept_experts
from jaxpeft.numerics._gates import router_logits as router_logits
from jaxpeft.numerics._gates import routing_sums as routing_sums
from jaxpeft.numerics._gates import softmax_gates as softmax_gates
from jaxpeft.numerics._graph import Graph as Graph
from jaxpeft.numerics._graph import group_graph as group_graph
from jaxpeft.numerics._graph import shrink_norm as shrink_norm
from jaxpeft.numerics._join import JOINS as JOINS
from jaxpeft.numerics._join import MAJORITIES as MAJORITIES
from jaxpeft.numerics._join import cut_product as cut_product
from jaxpeft.numerics._join import join_products as join_products
from jaxpeft.numerics._join import joined_rank as joined_rank
from jaxpeft.numerics._moments import Moments as Moments
from jaxpeft.numerics._moments import Spectrum as Spectrum
from jaxpeft.numerics._moments import gather_moments as gather_moments
from jaxpeft.numerics._moments import input_moments as input_moments
from jaxpeft.numerics._moments import spectrum as spectrum
from jaxpeft.numerics._nodes import NodeScores as NodeScores
from jaxpeft.numerics._nodes import Ranking as Ranking
from jaxpeft.numerics._nodes import important_nodes as important_nodes
from jaxpeft.numerics._nodes import node_scores as node_scores
from jaxpeft.numerics._nodes import rank_correlation as rank_correlation
from jaxpeft.numerics._nodes import rank_nodes as rank_nodes
from jaxpeft.numerics._nodes import select_nodes as select_nodes
from jaxpeft.numerics._norm import frobenius_norm as frobenius_norm
from jaxpeft.numerics._norm import gram_distance as gram_distance
from jaxpeft.numerics._norm import outer_gram_distance as outer_gram_distance
from jaxpeft.numerics._norm import safe_sqrt as safe_sqrt
from jaxpeft.numerics._shown import where_shown as where_shown
from jaxpeft.numerics._start import bottom_factors as bottom_factors
from jaxpeft.numerics._start import qr_factors as qr_factors
from jaxpeft.numerics._start import top_factors as top_factors
from jaxpeft.numerics._stream import Leading as Leading
from jaxpeft.numerics._stream import centre as centre
from jaxpeft.numerics._stream import join_leading as join_leading
from jaxpeft.numerics._stream import leading_rows as leading_rows
from jaxpeft.numerics._stream import row_cosines as row_cosines
from jaxpeft.numerics._svd import SVD as SVD
from jaxpeft.numerics._svd import svd as svd
from jaxpeft.numerics._tokens import token_cross_entropy as token_cross_entropy
from jaxpeft.numerics._zero import ZERO_STARTS as ZERO_STARTS
from jaxpeft.numerics._zero import zero_factors as zero_factors
