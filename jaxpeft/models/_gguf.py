"""GGUF files: their tensors under Hugging Face's names, and their config.

A GGUF file holds one model, most of it in blocks of quantised numbers; the ``gguf``
package turns those into float32. Llama's queries and keys lie in it with their rows
in pairs; here they come back half-split, as Hugging Face has them.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.console import optional
from jaxpeft.models._decoder_families import TRAITS
from jaxpeft.models._rope import Rope, frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # checked against transformers' reader

_ROPE = "rope_freqs.weight"  # a divisor for each of a head's rotary frequencies
# What all models of Llama 3.1 to 3.3 have; their files hold the divisors alone.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_CHECKED = ("attention.value_length", "rope.dimension_count")
_IDS = ("bos", "padding")
_ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message


class Slice(NamedTuple):
    """One tensor, to be read row by row, as safetensors' slices are."""

    tensor: Any
    heads: int  # whose rows are put back from pairs; 0: none

    def get_shape(self) -> list[int]:
        """Its shape as Hugging Face has it."""
        return [int(size) for size in self.tensor.shape[::-1]]

    def get_dtype(self) -> str:
        """Its quantisation."""
        return self.tensor.tensor_type.name

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A block of it in float32."""
        import gguf

        rows = np.arange(self.get_shape()[0])
        if self.heads:  # within a head row 2 j + s there is row s h / 2 + j here
            rows = rows.reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
        data, kind = self.tensor.data, self.tensor.tensor_type
        if len(index) == 1:  # a norm or a bias: one row
            return gguf.quants.dequantize(data, kind)[rows[index[0]]]
        return gguf.quants.dequantize(data[rows[index[0]]], kind)[:, index[1]]


@functools.cache
def is_readable(quantisation: str) -> bool:
    """Whether the ``gguf`` package turns a quantisation into numbers."""
    import gguf

    kind = gguf.GGMLQuantizationType[quantisation]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class GgufFile:
    """An open file, with the methods of an open safetensors file."""

    def __init__(self, path: Path) -> None:
        """Maps a file into memory; nothing is read yet.

        Raises:
          ValueError: if it is no GGUF file.
        """
        state = path.stat()
        self._reader = _read(path, state.st_size, state.st_mtime_ns)
        self._tensors = {_hf_name(t.name): t for t in self._reader.tensors}

    def keys(self) -> Iterator[str]:
        """The names of the tensors, as Hugging Face has them."""
        return (name for name in self._tensors if name != _ROPE)

    def get_slice(self, name: str) -> Slice:
        """One tensor, not read yet."""
        paired = 0
        if self.field("general.architecture") == "llama":
            heads = self.field("llama.attention.head_count")
            if ".q_proj." in name:
                paired = heads
            if ".k_proj." in name:
                paired = self.field("llama.attention.head_count_kv") or heads
        return Slice(self._tensors[name], paired)

    def rope_divisors(self) -> np.ndarray | None:
        """What the rotary frequencies are divided by, if the file says so."""
        tensor = self._tensors.get(_ROPE)
        if tensor is None:
            return None
        return Slice(tensor, 0)[slice(0, int(tensor.shape[0])),]

    def field(self, name: str) -> Any:
        """The value of a field, or None."""
        found = self._reader.fields.get(name)
        return None if found is None else found.contents()

    def fields(self) -> Iterator[str]:
        """The names of all fields."""
        return iter(self._reader.fields)

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *error: Any) -> None:
        """Leaves the file to the cache of ``_read``."""


@functools.lru_cache(maxsize=1)
def _read(path: Path, size: int, changed: int) -> Any:
    """The reader of a file; its lists of tokens take seconds to read."""
    with optional("GGUF files"):
        import gguf
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        if "GGMLQuantizationType" in str(error):
            raise ValueError(
                f"{path} has tensors in a format that the installed `gguf` package "
                f"does not know: {error}. Try a newer one: pip install -U gguf."
            ) from error
        raise ValueError(
            f"{path} ({size} bytes) is no whole GGUF file: {error}. It may have been "
            "cut short while copied; fetch it again."
        ) from error


def _hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``layers.3.self_attn.q_proj.weight``."""
    stem, _, tensor = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{tensor}"
    block, _, rest = stem.partition(".")
    number, _, part = rest.partition(".")
    if block == "blk" and part in _LAYER:
        return f"layers.{number}.{_LAYER[part]}.{tensor}"
    return name  # not known: listed as unused


def gguf_config(path: Path) -> dict[str, Any]:
    """Returns what the ``config.json`` of a GGUF file would be.

    Args:
      path: the file.

    Raises:
      ValueError: if its architecture or one of its fields is not implemented.
    """
    with GgufFile(path) as file:
        kind = file.field("general.architecture")
        if kind not in ARCHITECTURES:
            raise ValueError(
                f"{path} has architecture {kind!r}; known are {list(ARCHITECTURES)}. "
                "Load the model's safetensors folder."
            )
        own = [name for name in file.fields() if name.startswith(f"{kind}.")]
        known = {f"{kind}.{name}" for name in (*_FIELDS, *_CHECKED)}
        if odd := sorted(set(own) - known):
            raise ValueError(
                f"{path} has fields that are not implemented: "
                f"{ {name: file.field(name) for name in odd} }. Load the model's "
                "safetensors folder."
            )
        config: dict[str, Any] = {
            ours: file.field(f"{kind}.{theirs}")
            for theirs, ours in _FIELDS.items()
            if file.field(f"{kind}.{theirs}") is not None
        }
        heads = config["num_attention_heads"]
        config.setdefault("head_dim", config["hidden_size"] // heads)
        for name in _CHECKED:
            size = file.field(f"{kind}.{name}")
            if size not in (None, config["head_dim"]):
                raise ValueError(
                    f"{path} has {kind}.{name} {size}, which is not implemented; only "
                    f"the size of a head, {config['head_dim']}, is."
                )
        for name in _IDS:
            ours = {"padding": "pad"}.get(name, name)
            config[f"{ours}_token_id"] = file.field(f"tokenizer.ggml.{name}_token_id")
        if (divisors := file.rope_divisors()) is not None:
            config["rope_parameters"] = _scaled_rope(divisors, config)
        ends = [file.field(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
        ends = [i for i in dict.fromkeys(ends) if i is not None]
        config["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
        names = list(file.keys())
        if "vocab_size" not in config:
            table = file.get_slice("embed_tokens.weight").get_shape()
            config["vocab_size"] = table[0]
        tied = "lm_head.weight" not in names
        writes = {"architectures": [f"{TRAITS[kind].stem}ForCausalLM"]}
        return {"model_type": kind, **writes, **config, "tie_word_embeddings": tied}


def _scaled_rope(divisors: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    """The ``rope_parameters`` of divisors: Llama 3.1's where they are those.

    Others are written as LongRoPE's, with the same divisors for texts of any length.
    """
    theta = config.pop("rope_theta", 1e4)
    if len(divisors) != config["head_dim"] // 2:
        raise ValueError(
            f"{_ROPE} has {len(divisors)} divisors for {config['head_dim'] // 2} "
            "rotary frequencies."
        )
    factor = float(divisors.max())
    low, high, original = _LLAMA3.values()
    plain = Rope(theta, config["head_dim"])
    scaled = plain._replace(
        rope_type="llama3", factor=factor, low=low, high=high, original=original
    )
    if np.allclose(divisors, frequencies(plain) / frequencies(scaled), rtol=1e-4):
        return {"rope_theta": theta, "rope_type": "llama3", "factor": factor} | _LLAMA3
    each = [float(x) for x in divisors]
    return {
        "rope_theta": theta,
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
        "short_factor": each,
        "long_factor": each,
    }
