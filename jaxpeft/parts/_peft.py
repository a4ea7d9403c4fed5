"""How a method looks in HF PEFT's files: data, and small pure functions."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxpeft.tree import Adapter, structure

Leaves = Mapping[str, Any]  # arrays, of JAX or of NumPy


class PeftForm(NamedTuple):
    """A method's form in HF PEFT's files, see ``peft_form``.

    All functions see one layer's two-dimensional leaves, as ``Adapter.init`` makes
    them, without padding. ``kind`` is that of a ``ModuleName``.

    Attributes:
        peft_type: the config's ``peft_type``, ``"LORA"``; ``None``: PEFT has no form
            of its own for the method, whose change may be written as plain LoRA.
        kinds: the kinds of modules that PEFT adapts in this way.
        to_leaves: ``(frozen, trainable, kind) -> {end of the key in the file: array}``.
        from_leaves: the inverse, ``(leaves, kind) -> trainable``; ``init`` makes the
            frozen leaves.
        arrange: ``(config, module, leaves) -> leaves`` as ``from_leaves`` takes them,
            where a file may leave some out; ``None``: it may not.
        fields: the config's fields beyond those that every method shares.
        rank: the config's field for the rank.
        patterns: whether a config may give sites ranks and alphas of their own.
        lists: ``{field of the config: whether it lists this site's module}``, of
            fields that are lists of modules.
        shared: ``{our shared leaf: its whole key in the file}``; the file has the
            transpose.
        read: ``(config, kind) -> options`` of the constructor, or ``None`` where the
            config is another method's. In place of a field of ``lists`` the config
            has a bool: whether the module is listed. A config belongs to one method
            at most.
        beside: ``{our leaf: end of its key}`` of the scales that PEFT multiplies the
            kernel and its low-rank change by; empty: none.
        beside_fields: the config's fields that turn these scales on.
        redone: whether a reader of the file must decompose its own base again.
        refusal: why these options have no native form; empty: they have.
    """

    peft_type: str | None = None
    kinds: tuple[str, ...] = ()
    to_leaves: Callable[[Leaves, Leaves, str], dict[str, Any]] | None = None
    from_leaves: Callable[[Leaves, str], dict[str, Any]] | None = None
    arrange: Callable[[Mapping[str, Any], str, Leaves], Leaves] | None = None
    fields: Mapping[str, Any] = {}
    rank: str = "r"
    patterns: bool = True
    lists: Mapping[str, bool] = {}
    shared: Mapping[str, str] = {}
    read: Callable[[Mapping[str, Any], str], dict[str, Any] | None] | None = None
    beside: Mapping[str, str] = {}
    beside_fields: Mapping[str, Any] = {}
    redone: bool = False
    refusal: str = ""


_FORMS: dict[str, Callable[..., PeftForm]] = {}


def peft_form(method: Callable[..., Adapter]):
    """Registers how a method looks in HF PEFT's files.

    A method without a form of its own is written as plain LoRA where its change of the
    kernel is a sum of thin products.

    Args:
        method: the constructor.

    Returns:
        A decorator of ``(**options) -> PeftForm``.

    Example:
        >>> from jaxpeft.tree import Adapter, method
        >>> @method
        ... def some_method(rank: int = 8, dropout: float = 0.0) -> Adapter: ...
        >>> @peft_form(some_method)
        ... def _form(*, dropout, **_):
        ...     return lora_form(scaling="alpha/r", dropout=dropout)
    """

    def register(make: Callable[..., PeftForm]):
        _FORMS[method.__name__] = make
        return make

    return register


def form_of(
    adapter: Adapter, options: Mapping[str, Any] | None = None
) -> PeftForm | None:
    """The form of a method; ``None``: PEFT has none for it.

    Args:
        adapter: the method.
        options: its options, where a tree's numbers are not those it was made with.
    """
    if adapter.name in _FORMS:
        given = adapter.options if options is None else options
        return _FORMS[adapter.name](**given)
    if adapter.where.leaf != "kernel":
        return PeftForm()
    found = structure(adapter, adapter.where.rank)
    return PeftForm() if found.only_adds else None


def has_native_form(name: str) -> bool:
    """Whether a form is registered for the method of a name."""
    return name in _FORMS


# What LoRA's own leaves are called, by the kind of module.
_LINEAR = {"a": "lora_A.weight", "b": "lora_B.weight"}
_EMBEDDING = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
LORA_KINDS = ("linear", "conv1d", "embedding")

# Values of `init_lora_weights` that leave the base as it is.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


def lora_form(
    *,
    scaling: str,
    dropout: float,
    extra: Mapping[str, str] | None = None,
    fields: Mapping[str, Any] | None = None,
    kinds: tuple[str, ...] = LORA_KINDS,
    **more: Any,
) -> PeftForm:
    """The form of a method that is a ``LoraConfig`` in PEFT.

    Args:
        scaling: a name in ``SCALINGS``.
        dropout: the method's.
        extra: ``{our leaf: end of its key}`` of trained vectors beside a and b.
        fields: the config's fields beyond scale and dropout.
        kinds: the kinds of modules that PEFT adapts in this way.
        **more: other attributes of ``PeftForm``.
    """

    def ends(kind: str) -> dict[str, str]:
        return {**(_EMBEDDING if kind == "embedding" else _LINEAR), **(extra or {})}

    def to_leaves(frozen: Leaves, trainable: Leaves, kind: str) -> dict[str, Any]:
        del frozen
        return {theirs: trainable[ours].T for ours, theirs in ends(kind).items()}

    def from_leaves(leaves: Leaves, kind: str) -> dict[str, Any]:
        return {ours: leaves[theirs].T for ours, theirs in ends(kind).items()}

    own = {"use_rslora": scaling == "alpha/sqrt_r", "lora_dropout": dropout}
    return PeftForm(
        peft_type="LORA",
        kinds=kinds,
        to_leaves=to_leaves,
        from_leaves=from_leaves,
        fields=own | dict(fields or {}),
        **more,
    )


def read_lora(
    config: Mapping[str, Any],
    kind: str,
    starts: Iterable[Any] = PLAIN_STARTS,
    **wanted: bool,
) -> dict[str, Any] | None:
    """Options that every LoRA-like method shares; ``None`` for another's config.

    Args:
        config: an ``adapter_config.json`` with PEFT's defaults filled in.
        kind: kind of the module.
        starts: the values of ``init_lora_weights`` that the method is.
        **wanted: whether ``use_dora`` and ``kasa_config`` are to be set.
    """
    wanted = {"use_dora": False, "kasa_config": False} | wanted
    if config["peft_type"] != "LORA" or kind not in LORA_KINDS:
        return None
    start = config["init_lora_weights"]
    if kind == "embedding" and start != "loftq":
        start = True  # PEFT takes nothing out of a table, whatever it is told
    if start not in tuple(starts):
        return None
    if any(bool(config[field]) is not value for field, value in wanted.items()):
        return None
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config["lora_dropout"],
        "scaling": "alpha/sqrt_r" if config["use_rslora"] else "alpha/r",
    }
