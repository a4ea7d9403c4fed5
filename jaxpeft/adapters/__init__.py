"""The methods. One file a method; a line here is its registration."""

from jaxpeft.adapters._adalora import adalora as adalora
from jaxpeft.adapters._bitfit import bitfit as bitfit
from jaxpeft.adapters._bora import bora as bora
from jaxpeft.adapters._dora import dora as dora
from jaxpeft.adapters._full import full as full
from jaxpeft.adapters._hydralora import hydralora as hydralora
from jaxpeft.adapters._ia3 import ia3 as ia3
from jaxpeft.adapters._kasa import kasa as kasa
from jaxpeft.adapters._lora import lora as lora
from jaxpeft.adapters._lora import rslora as rslora
from jaxpeft.adapters._lora_xs import lora_xs as lora_xs
from jaxpeft.adapters._milora import milora as milora
from jaxpeft.adapters._modula_flan import modula_flan as modula_flan
from jaxpeft.adapters._modula_res import modula_res as modula_res
from jaxpeft.adapters._mola import mola as mola
from jaxpeft.adapters._molora import molora as molora
from jaxpeft.adapters._mosld import mosld as mosld
from jaxpeft.adapters._olora import olora as olora
from jaxpeft.adapters._pc import pc as pc
from jaxpeft.adapters._pissa import pissa as pissa
from jaxpeft.adapters._vera import vera as vera
