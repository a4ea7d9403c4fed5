"""Flax models that load Hugging Face checkpoints."""

from jaxpeft.models._bert import Bert as Bert
from jaxpeft.models._bert import mean_pool as mean_pool
from jaxpeft.models._build import abstract as abstract
from jaxpeft.models._build import from_config as from_config
from jaxpeft.models._build import init as init
from jaxpeft.models._cache import init_cache as init_cache
from jaxpeft.models._config import BertConfig as BertConfig
from jaxpeft.models._deberta import Deberta as Deberta
from jaxpeft.models._deberta_config import DebertaConfig as DebertaConfig
from jaxpeft.models._decoder import Decoder as Decoder
from jaxpeft.models._decoder_config import DecoderConfig as DecoderConfig
from jaxpeft.models._generate import generate as generate
from jaxpeft.models._load import load as load
from jaxpeft.models._outline import outline as outline
from jaxpeft.models._packaged import packaged as packaged
from jaxpeft.models._prompts import joint as joint
from jaxpeft.models._prompts import opened as opened
from jaxpeft.models._states import pooled_states as pooled_states
from jaxpeft.models._states import prompt_states as prompt_states
from jaxpeft.models._tokenizer import stop_tokens as stop_tokens
from jaxpeft.models._tokenizer import tokenizer as tokenizer
from jaxpeft.models._tokenizer import tokenizer_options as tokenizer_options
from jaxpeft.models._tokenizer import turn_end as turn_end
from jaxpeft.models._wheels import fetch_wheel as fetch_wheel
