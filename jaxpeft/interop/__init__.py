"""Formats in and out: adapters on disk."""

from jaxpeft.interop._format import adapter_info as adapter_info
from jaxpeft.interop._load import load_adapter as load_adapter
from jaxpeft.interop._save import save_adapter as save_adapter
from jaxpeft.interop._tensors import write_tensors as write_tensors
