"""From a config to a Linen module, and parameters drawn for it."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpeft.models._bert import Bert
from jaxpeft.models._config import BERTS, read_config
from jaxpeft.models._deberta import Deberta
from jaxpeft.models._deberta_config import read_deberta_config
from jaxpeft.models._decoder import Decoder
from jaxpeft.models._decoder_config import read_decoder_config, text_part
from jaxpeft.models._decoder_families import TRAITS, WHOLES
from jaxpeft.models._families import FAMILIES


def from_config(
    config: Any,
    *,
    head: str | None = None,
    num_labels: int | None = None,
    dtype: Any = None,
    param_dtype: Any = None,
    scan_layers: bool = False,
    remat: str | None = None,
    attention: str | None = None,
) -> nn.Module:
    """Returns the model of a Hugging Face config, without weights.

    Args:
      config: the content of a ``config.json`` (a mapping), or a transformers config.
      head: None for hidden states, ``"classification"``, ``"regression"``, and for
        decoders ``"causal_lm"``.
      num_labels: classes of the head; by default the config's.
      dtype: dtype of activations and matmuls; by default ``param_dtype``.
      param_dtype: dtype of parameters that are drawn; by default float32.
      scan_layers: whether the layers are one scanned stack.
      remat: what a layer keeps for its backward pass; see ``Bert`` and
        ``Decoder``.
      attention: how a decoder attends; see ``Decoder``. ``None``: what suits the
        machine that the program is for.

    Returns:
      A Linen module. ``models.init(model, key)`` draws its parameters,
      ``models.abstract(model)`` gives their shapes.

    Raises:
      ValueError: if the config is of another family or needs what is not
        implemented, or an argument is not one of its names.

    Example:
        >>> model = from_config({"model_type": "bert", "num_hidden_layers": 2})
        >>> shapes = abstract(model)
        >>> shapes["encoder"]["layer_1"]["attention"]["query"]["kernel"].shape
        (768, 768)
    """
    raw = dict(config) if isinstance(config, Mapping) else config.to_dict()
    build, read = _class_of(raw.get("model_type"))
    known = read(raw)
    if head in (None, "causal_lm") and num_labels is not None:
        raise ValueError(
            f"`num_labels` is {num_labels} but `head` is {head!r}; "
            "write head='classification'."
        )
    if head == "regression":
        if num_labels not in (None, 1):
            raise ValueError(f"`num_labels` is {num_labels}; regression has 1.")
        num_labels = 1
    num_labels = known.num_labels if num_labels is None else num_labels
    if num_labels < 1:
        raise ValueError(f"`num_labels` is {num_labels}; write at least 1.")
    param_dtype = floating("param_dtype", param_dtype, jnp.float32)
    more = {}
    if build is Decoder:
        more = {"stop_tokens": end_ids(raw), "attention": attention}
    elif attention is not None:
        raise ValueError(
            f"`attention` is {attention!r}, but a {build.__name__} has one program for "
            "it; write attention=None."
        )
    return build(
        known,
        head=head,
        num_labels=num_labels,
        dtype=floating("dtype", dtype, param_dtype),
        param_dtype=param_dtype,
        scan_layers=scan_layers,
        remat=remat,
        **more,
    )


def end_ids(config: Mapping[str, Any], *more: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids in ``eos_token_id`` of configs, a number or a list, each once.

    Those that are no row of the embedding, such as -1, are never written.
    """
    config = text_part(config)
    size, found = config.get("vocab_size"), []
    for one in (config, *more):
        ids = one.get("eos_token_id")
        found += ids if isinstance(ids, list | tuple) else [ids]
    known = (i for i in found if i is not None and 0 <= i < (size or i + 1))
    return tuple(dict.fromkeys(known))


def _class_of(model_type: Any) -> tuple[Any, Any]:
    """The module of a family, and what reads its config."""
    if model_type in TRAITS or model_type in WHOLES:
        return Decoder, read_decoder_config
    if model_type in BERTS:
        return Bert, read_config
    if model_type == "deberta-v2":
        return Deberta, read_deberta_config
    # No near name is offered: families with near names are built otherwise.
    raise ValueError(
        f"`config` has model_type {model_type!r}, which is not implemented; known are "
        f"{sorted(FAMILIES)}."
    )


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding of a config; None for a family that is not here."""
    if config.get("model_type") not in FAMILIES:
        return None
    _, read = _class_of(config["model_type"])
    return read(config).vocab_size


def abstract(model: nn.Module) -> dict[str, Any]:
    """Returns the parameters of a model as shapes and dtypes, without memory.

    Args:
      model: what ``from_config`` or ``load`` returned.

    Returns:
      A nested dict of ``jax.ShapeDtypeStruct``.
    """
    return jax.eval_shape(lambda: _draw(model, jax.random.key(0)))


def init(model: nn.Module, key: jax.Array, *, sharding: Any = None) -> dict[str, Any]:
    """Returns new parameters of a model, as transformers would draw them.

    Kernels and embeddings are normal with the config's ``initializer_range``,
    biases 0, norm scales 1, in the model's ``param_dtype``.

    Args:
      model: what ``from_config`` or ``load`` returned.
      key: a typed key, ``jax.random.key(seed)``.
      sharding: as for ``load``; every leaf is made where it belongs.

    Returns:
      A nested dict of arrays.
    """
    shapes = flatten_dict(abstract(model), sep="/")
    where = places(sharding, {path: leaf.shape for path, leaf in shapes.items()})
    return unflatten_dict(draw_leaves(model, key, tuple(shapes), where), sep="/")


def floating(name: str, given: Any, default: Any) -> np.dtype:
    dtype = jnp.dtype(default if given is None else given)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`{name}` is {dtype.name}; write a floating dtype.")
    return jax.dtypes.canonicalize_dtype(dtype)  # float64 only where JAX has it


def places(
    sharding: Any, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, jax.sharding.Sharding | None]:
    """The sharding of every leaf, checked against its shape."""
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        found = dict.fromkeys(shapes, sharding)
    elif callable(sharding):
        found = {path: sharding(path, shape) for path, shape in shapes.items()}
    else:
        found = flatten_dict(dict(sharding), sep="/")
        if odd := sorted(set(found) ^ set(shapes)):
            raise ValueError(
                f"`sharding` is a tree that differs from the parameters in {odd}."
            )
    for path, place in found.items():
        if place is None:
            continue
        if not isinstance(place, jax.sharding.Sharding):
            raise ValueError(
                f"`sharding` of {path} is {place!r}; write "
                "jax.sharding.NamedSharding(mesh, spec)."
            )
        try:
            place.shard_shape(shapes[path])
        except ValueError as error:
            raise ValueError(f"`sharding` of {path}: {error}") from error
    return found


def _draw(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def draw_leaves(
    model: nn.Module,
    key: jax.Array | None,
    paths: tuple[str, ...],
    places: Mapping[str, jax.sharding.Sharding | None],
) -> dict[str, jax.Array]:
    """Draws some leaves of a model; XLA drops the work for the others."""
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        raise ValueError(f"`key` is {key!r}; write jax.random.key(seed).")

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        drawn = flatten_dict(_draw(model, key), sep="/")
        return {path: drawn[path] for path in paths}

    where = {path: places[path] for path in paths}
    return jax.jit(draw, out_shardings=where)(key)
