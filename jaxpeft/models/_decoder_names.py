"""Names of decoders' modules, in checkpoints and in our trees."""

from jaxpeft.models._decoder_config import DecoderConfig
from jaxpeft.models._families import module_names
from jaxpeft.models._names import ModuleName
from jaxpeft.models._parts import LOOKUP


def decoder_names(
    config: DecoderConfig, head: str | None, scanned: bool
) -> tuple[ModuleName, ...]:
    """Returns the names of a decoder's modules, as transformers' class has them.

    A tied model has rows for both kinds of tree: with one leaf for embedding and
    head, and untied, with one for each.

    Args:
      config: its sizes and constants.
      head: the model's head; without one names have no prefix.
      scanned: whether the layers are one stack.
    """
    gpt2 = config.model_type == "gpt2"
    rows = _gpt2() if gpt2 else _llama(config)
    prefix = "" if head is None else "transformer." if gpt2 else "model."
    names = [
        (
            prefix + config.part + theirs,
            theirs.replace(".{i}", ".layer_{i}").replace(".", "/"),
            kind,
        )
        for theirs, kind in rows
    ]
    if head == "causal_lm":
        names.append(("lm_head", "lm_head", "linear"))
    if head in ("classification", "regression"):
        names.append(("score", "score", "linear"))
    words, *others = module_names(names, scanned)
    found = [words, *others]
    if head == "causal_lm" and config.tie_word_embeddings:
        # The table is both modules, or each has its own: the tree says which.
        apart = words._replace(ours=f"{words.ours}/{LOOKUP}")
        found = [words._replace(tied="lm_head"), apart, *others]
    part = config.part
    saved = lambda theirs: theirs.replace(part, "", 1) if part else ""
    return tuple(row._replace(saved=saved(row.theirs)) for row in found)


def _llama(config: DecoderConfig) -> list[tuple[str, str]]:
    traits, layer = config.traits, "layers.{i}."
    attention, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    if traits.fused:
        attention, mlp = ["qkv_proj"], ["gate_up_proj"]
    linears = [f"self_attn.{name}" for name in (*attention, "o_proj")]
    linears += [f"mlp.{name}" for name in (*mlp, "down_proj")]
    norms = ["self_attn.q_norm", "self_attn.k_norm"] if traits.head_norms else []
    norms += ["input_layernorm", "post_attention_layernorm"]
    if traits.sandwich:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return [
        ("embed_tokens", "embedding"),
        *((layer + name, "linear") for name in linears),
        *((layer + name, "norm") for name in norms),
        ("norm", "norm"),
    ]


def _gpt2() -> list[tuple[str, str]]:
    linears = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    return [
        ("wte", "embedding"),
        ("wpe", "embedding"),
        *((f"h.{{i}}.{name}", "conv1d") for name in linears),
        *((f"h.{{i}}.{name}", "norm") for name in ("ln_1", "ln_2")),
        ("ln_f", "norm"),
    ]
