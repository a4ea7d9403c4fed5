"""The methods. One file a method; a line here is its registration."""

from jaxpeft.adapters._full import full as full
from jaxpeft.adapters._kasa import kasa as kasa
from jaxpeft.adapters._lora import lora as lora
