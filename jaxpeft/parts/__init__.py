"""What methods are made of: options, residual pairs, experts and gates."""

from jaxpeft.parts._domain_mixture import UNIVERSAL as UNIVERSAL
from jaxpeft.parts._domain_mixture import check_domain as check_domain
from jaxpeft.parts._domain_mixture import domain_mixture as domain_mixture
from jaxpeft.parts._domain_mixture import domain_of as domain_of
from jaxpeft.parts._domain_mixture import stage_names as stage_names
from jaxpeft.parts._mixture import mixture as mixture
from jaxpeft.parts._options import SCALINGS as SCALINGS
from jaxpeft.parts._options import check_options as check_options
from jaxpeft.parts._options import check_site_rank as check_site_rank
from jaxpeft.parts._options import scale_leaf as scale_leaf
from jaxpeft.parts._peft import LORA_KINDS as LORA_KINDS
from jaxpeft.parts._peft import PeftForm as PeftForm
from jaxpeft.parts._peft import joined as joined
from jaxpeft.parts._peft import lora_form as lora_form
from jaxpeft.parts._peft import low_rank_pair as low_rank_pair
from jaxpeft.parts._peft import read_lora as read_lora
from jaxpeft.parts._peft_rules import NO_TARGETS as NO_TARGETS
from jaxpeft.parts._peft_rules import by_pattern as by_pattern
from jaxpeft.parts._peft_rules import fitting_pattern as fitting_pattern
from jaxpeft.parts._peft_rules import is_saved_whole as is_saved_whole
from jaxpeft.parts._peft_rules import is_target as is_target
from jaxpeft.parts._peft_rules import listed as listed
from jaxpeft.parts._peft_rules import target_entries as target_entries
from jaxpeft.parts._peft_rules import with_tied as with_tied
from jaxpeft.parts._residual import residual_pair as residual_pair
from jaxpeft.parts._whole import whole_leaf as whole_leaf
