"""Formats in and out: jaxpeft's own adapters, HF PEFT's, and whole checkpoints."""

from jaxpeft.interop._format import CONFIG as CONFIG
from jaxpeft.interop._format import DIGEST as DIGEST
from jaxpeft.interop._format import PEFT_CONFIG as PEFT_CONFIG
from jaxpeft.interop._format import adapter_info as adapter_info
from jaxpeft.interop._hub import adapter_folder as adapter_folder
from jaxpeft.interop._hub import check_hub_name as check_hub_name
from jaxpeft.interop._hub import push as push
from jaxpeft.interop._labels import HeadInfo as HeadInfo
from jaxpeft.interop._labels import checked as checked
from jaxpeft.interop._labels import head_info as head_info
from jaxpeft.interop._load import load_adapter as load_adapter
from jaxpeft.interop._save import save_adapter as save_adapter
from jaxpeft.interop._save_hf import SavedModel as SavedModel
from jaxpeft.interop._save_hf import save_hf as save_hf
from jaxpeft.interop._stream import shard_bytes as shard_bytes
from jaxpeft.interop._tensors import TensorFile as TensorFile
from jaxpeft.interop._tensors import on_host as on_host
from jaxpeft.interop._tensors import write_tensors as write_tensors
from jaxpeft.interop._untie import untie as untie
from jaxpeft.interop._untie import untied_for as untied_for
from jaxpeft.interop.peft._allocation import (
    allocation_from_peft as allocation_from_peft,
)
from jaxpeft.interop.peft._allocation import allocation_to_peft as allocation_to_peft
from jaxpeft.interop.peft._config import PREFIX as PREFIX
from jaxpeft.interop.peft._config import TENSORS as TENSORS
from jaxpeft.interop.peft._load import load_peft as load_peft
from jaxpeft.interop.peft._save import SavedPeft as SavedPeft
from jaxpeft.interop.peft._save import save_peft as save_peft
