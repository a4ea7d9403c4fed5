"""A model so small that a study of it takes a minute, and needs no download."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxpeft import models
from jaxpeft.console import optional

TINY = "tiny"
_CONFIG = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def tiny_model(seed: int = 0) -> tuple[Any, Any]:
    """Returns a random Llama of four layers that reads bytes, and its parameters.

    It knows nothing: of the paper's findings none is to be expected of it.

    Args:
        seed: of the draw.

    Returns:
        ``(model, params)``, with ``head="causal_lm"``.

    Example:
        >>> tiny_model()[0].config.num_hidden_layers
        4
    """
    model = models.from_config(_CONFIG, head="causal_lm")
    return model, models.init(model, jax.random.key(seed))


def tiny_tokenizer(words: Sequence[str] = ()) -> Any:
    """Returns the tokenizer of ``tiny_model``: a token a byte, no files.

    Args:
        words: what answers are told apart by, by their first token. Where two begin
            with the same byte, each has a token of its own, as short words have in
            tokenizers of real models.

    Raises:
        ValueError: there are more words than the model has room for.
        ImportError: transformers is not installed.

    Example:
        >>> tiny_tokenizer()("ab", add_special_tokens=False)["input_ids"]
        [100, 101]
    """
    with optional("Tokenizers"):
        import transformers

    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    if len({word.encode()[:1] for word in words}) == len(words):
        return tokenizer
    room = _CONFIG["vocab_size"] - len(tokenizer)
    if len(words) > room:
        raise ValueError(
            f"`label_tokens`: {len(words)} labels are too many for the model 'tiny', "
            f"which has room for {room}. Write label_tokens='none', or take another "
            "model."
        )
    tokenizer.add_tokens([word for word in words if word])
    return tokenizer
