"""Mixtures of experts over adapted trees: stages, domains, gates and their losses."""

from jaxpeft.mixtures._domains import add_domain as add_domain
from jaxpeft.mixtures._domains import domain_names as domain_names
from jaxpeft.mixtures._domains import remove_domain as remove_domain
from jaxpeft.mixtures._domains import rename_domain as rename_domain
from jaxpeft.mixtures._files import export_domain as export_domain
from jaxpeft.mixtures._files import import_domain as import_domain
from jaxpeft.mixtures._gates import BASE as BASE
from jaxpeft.mixtures._gates import auxiliary as auxiliary
from jaxpeft.mixtures._gates import fix_gates as fix_gates
from jaxpeft.mixtures._gates import with_gates as with_gates
from jaxpeft.mixtures._gates import with_mask as with_mask
from jaxpeft.mixtures._routing import RoutingReport as RoutingReport
from jaxpeft.mixtures._routing import plot_routing as plot_routing
from jaxpeft.mixtures._routing import routing_report as routing_report
from jaxpeft.mixtures._stages import fold_universal as fold_universal
from jaxpeft.mixtures._stages import stage as stage
from jaxpeft.mixtures._stages import stage_sizes as stage_sizes
