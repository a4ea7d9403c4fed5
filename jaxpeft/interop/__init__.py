"""Formats in and out: jaxpeft's own adapters, HF PEFT's, and whole checkpoints."""

from jaxpeft.interop._format import adapter_folder as adapter_folder
from jaxpeft.interop._format import adapter_info as adapter_info
from jaxpeft.interop._labels import HeadInfo as HeadInfo
from jaxpeft.interop._labels import head_info as head_info
from jaxpeft.interop._load import load_adapter as load_adapter
from jaxpeft.interop._load_peft import load_peft as load_peft
from jaxpeft.interop._save import save_adapter as save_adapter
from jaxpeft.interop._save_hf import SavedModel as SavedModel
from jaxpeft.interop._save_hf import save_hf as save_hf
from jaxpeft.interop._save_peft import SavedPeft as SavedPeft
from jaxpeft.interop._save_peft import save_peft as save_peft
from jaxpeft.interop._tensors import write_tensors as write_tensors
from jaxpeft.interop._untie import untie as untie
