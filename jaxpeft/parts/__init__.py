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
from jaxpeft.parts._peft import form_of as form_of
from jaxpeft.parts._peft import has_native_form as has_native_form
from jaxpeft.parts._peft import lora_form as lora_form
from jaxpeft.parts._peft import peft_form as peft_form
from jaxpeft.parts._peft import read_lora as read_lora
from jaxpeft.parts._residual import residual_form as residual_form
from jaxpeft.parts._residual import residual_pair as residual_pair
from jaxpeft.parts._router import NUMBERS as NUMBERS
from jaxpeft.parts._router import Router as Router
from jaxpeft.parts._whole import whole_leaf as whole_leaf
