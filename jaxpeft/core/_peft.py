"""How a method looks in HF PEFT's files: data, and small pure functions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

Leaves = Mapping[str, Any]  # arrays, of JAX or of NumPy


class PeftForm(NamedTuple):
    """A method's form in HF PEFT's files; the ``peft`` field of its ``Adapter``.

    All functions see one layer's two-dimensional leaves, as ``Adapter.init`` makes
    them, without padding. ``kind`` is that of a ``ModuleName``.

    Attributes:
        peft_type: the config's ``peft_type``, ``"LORA"``; ``None``: PEFT has no form
            of its own for the method, but ``pair`` may have.
        kinds: the kinds of modules that PEFT adapts in this way.
        to_leaves: ``(frozen, trainable, kind) -> {end of the key in the file: array}``.
        from_leaves: the inverse, ``(leaves, kind) -> trainable``; ``init`` makes the
            frozen leaves.
        fields: the config's fields beyond those that every method shares.
        alpha: ``(frozen, rank) -> alpha`` that gives this layer's scale in PEFT.
        read: ``(config, kind) -> options`` of the constructor, or ``None`` where the
            config is another method's. A config belongs to one method at most.
        pair: ``(frozen, trainable) -> (a, b)`` with ``original + a b`` the merged
            kernel, or ``None`` where the change of the kernel is not of low rank.
        redone: whether a reader of the file must decompose its own base again.
        refusal: why these options have no native form; empty: they have.
        whole: the leaf's new value is written in place of the leaf.
    """

    peft_type: str | None = None
    kinds: tuple[str, ...] = ()
    to_leaves: Callable[[Leaves, Leaves, str], dict[str, Any]] | None = None
    from_leaves: Callable[[Leaves, str], dict[str, Any]] | None = None
    fields: Mapping[str, Any] = {}
    alpha: Callable[[Leaves, int], Array] | None = None
    read: Callable[[Mapping[str, Any], str], dict[str, Any] | None] | None = None
    pair: Callable[[Leaves, Leaves], tuple[Any, Any]] | None = None
    redone: bool = False
    refusal: str = ""
    whole: bool = False


# What LoRA's own leaves are called, by the kind of module.
_LINEAR = {"a": "lora_A.weight", "b": "lora_B.weight"}
_EMBEDDING = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
LORA_KINDS = ("linear", "conv1d", "embedding")

# Values of `init_lora_weights` that leave the base as it is.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


def low_rank_leaves(extra: Mapping[str, str] | None = None):
    """``(to_leaves, from_leaves)`` for ``a`` and ``b``, transposed, and vectors.

    Args:
        extra: ``{our leaf: its name in the file}`` of trained vectors.
    """

    def named(kind: str) -> dict[str, str]:
        return {**(_EMBEDDING if kind == "embedding" else _LINEAR), **(extra or {})}

    def to_leaves(frozen: Leaves, trainable: Leaves, kind: str) -> dict[str, Any]:
        del frozen
        return {theirs: trainable[ours].T for ours, theirs in named(kind).items()}

    def from_leaves(leaves: Leaves, kind: str) -> dict[str, Any]:
        return {ours: leaves[theirs].T for ours, theirs in named(kind).items()}

    return to_leaves, from_leaves


def read_lora(config: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """Options that every LoRA-like method shares; ``None`` for another type.

    Args:
        config: an ``adapter_config.json`` with PEFT's defaults filled in.
        kind: kind of the module.
    """
    if config["peft_type"] != "LORA" or kind not in LORA_KINDS:
        return None
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config["lora_dropout"],
        "scaling": "alpha/sqrt_r" if config["use_rslora"] else "alpha/r",
    }


def starts_plain(config: Mapping[str, Any]) -> bool:
    """Whether a LoRA config leaves the base kernel as it is."""
    return config["init_lora_weights"] in _PLAIN_STARTS


def scaled(frozen: Leaves, b: Any) -> Any:
    """``scale * b`` with the scale that ``init`` left among the frozen leaves."""
    return frozen["scale"].astype(b.dtype) * b


def joined(*pairs: tuple[Any, Any]) -> tuple[Array, Array]:
    """The sum of products of pairs as one product of the sum of their ranks."""
    return (
        jnp.concatenate([a for a, _ in pairs], axis=1),
        jnp.concatenate([b for _, b in pairs], axis=0),
    )
