"""From a tree to a checkpoint folder that transformers opens, adapters folded in."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxpeft.interop._card import CARD, model_card
from jaxpeft.interop._folder import check_free, new_folder
from jaxpeft.interop._labels import REGRESSION, is_head, named_head
from jaxpeft.interop._modules import Module, Table
from jaxpeft.interop._stream import Planned, Writer, shard_bytes, shards
from jaxpeft.interop._tensors import is_finite, on_host
from jaxpeft.models import BESIDE, ModuleName
from jaxpeft.numerics import dense
from jaxpeft.tree import (
    BATCH,
    AdaptedKernel,
    detach,
    is_node,
    leaves_with_path,
    merge,
    mergeable,
    shared_names,
    wider,
    working_dtype,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What families call their number of layers.
LAYERS = ("num_hidden_layers", "n_layer")
LABELS = ("id2label", "label2id")
GENERATION = "generation_config.json"
# What older versions wrote beside a tokenizer's config, and would still be read.
OLD_TOKENIZER = ("special_tokens_map.json", "added_tokens.json")


class SavedModel(NamedTuple):
    """What ``save_hf`` wrote.

    Attributes:
        folder: where.
        files: names of the files of weights.
        size: bytes of all tensors.
        drift: ``{module: (largest change of a weight, norm of the change over the
            norm of the weight)}`` of modules whose weight was adapted or trained in
            full, the largest relative change first.
    """

    folder: Path
    files: tuple[str, ...]
    size: int
    drift: dict[str, tuple[float, float]]


def save_hf(
    params: PyTree,
    folder: str | Path,
    *,
    names: Sequence[ModuleName],
    config: Mapping[str, Any],
    source: str | Path | None = None,
    labels: Sequence[str] | None = None,
    tokenizer: Any = None,
    stop: Sequence[int] = (),
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    axes: Mapping[str, str] | None = None,
    base_model: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> SavedModel:
    """Writes a whole model as a folder that transformers opens.

    Adapters are folded in module by module, in float32 (float64 over float64), and
    cast once. One module of one layer at a time is on the host: no copy of the model
    or of a file is made. The folder appears whole or not at all.

    Args:
        params: a plain or an adapted tree.
        folder: a new or an empty folder.
        names: what the modules are called in the checkpoint: ``model.names``.
        config: content of ``config.json``: ``model.hf_config``.
            Of an untied tree (``untie``) the folder's says
            ``tie_word_embeddings: false``.
        source: the base's folder. Its ``config.json`` is then kept but for the dtype,
            a quantisation, a tie that is none any more, ``pad_token_id`` and, for a
            new head, labels and architecture; tokenizer, generation config and chat
            template are copied. Of a model with vision, the config of the text part
            alone is written.
        tokenizer: a tokenizer of transformers, to be written instead of that in
            ``source``; where the config has no ``pad_token_id``, it gets this one's.
        stop: token ids after which a text has ended (``models.stop_tokens``); those
            that ``generation_config.json`` lacks are added there, so that
            ``generate`` of transformers stops, too.
        labels: names of the classes, in the order of the head: what an adapter says of
            itself (``head_info(folder).labels``). ``None``: the base's names, where
            neither the head's weights nor its width are others than the base's; else
            ``LABEL_0`` and so on, transformers' word for classes without a name.
        dtype: dtype of the tensors; by default the leaves', which must then be one:
            transformers loads in the one dtype that ``config.json`` names.
        max_shard_size: largest file of weights, in bytes or as ``"500MB"``; above
            it there are several with an index.
        axes: roles of the axes of kernels beyond two, as in ``attach``;
            ``model.axes``.
        base_model: name or folder of the base, for the card (``README.md``).
        metadata: of the adapter (``adapter_info(folder)["metadata"]``): the card tells
            data and scores of a run.

    Returns:
        What was written, with each adapter's change of its weight.

    Raises:
        ValueError: a leaf is in no row of ``names``, a layer is missing, an adapter
            depends on the input, a value is not finite, the dtypes differ,
            ``config`` and the source's are of different models, or ``labels`` are not
            one for each class.
        FileExistsError: the folder has files in it.

    Example:
        >>> import tempfile
        >>> params = {"up": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}
        >>> names = [ModuleName("mlp.up_proj", "up", "linear")]
        >>> config = {"model_type": "mine"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_hf(params, folder, names=names, config=config)
        >>> saved.files, saved.size
        (('model.safetensors',), 120)
    """
    folder, most = Path(folder), shard_bytes(max_shard_size)
    check_free(folder)
    content = _config(config, source)
    if tokenizer is not None and content.get("pad_token_id") is None:
        content["pad_token_id"] = tokenizer.pad_token_id
    table = Table(names, dict(leaves_with_path(params)), axes)
    _check(table, params)
    _check_layers(table, content)
    content = named_head(
        content,
        config.get("num_labels"),
        labels,
        number=config.get("problem_type") == REGRESSION,
        trained=any(is_head(name) for name in _changed(table)),
    )
    planned = _planned(table, None if dtype is None else jnp.dtype(dtype))
    kind = planned[0].dtype
    content = {n: x for n, x in content.items() if n != "torch_dtype"}
    content |= {"dtype": kind.name}
    if any(row.tied in table.by_name for row in table.rows):
        content["tie_word_embeddings"] = False  # each has a table of its own here
    size, parts = sum(tensor.size for tensor in planned), shards(planned, most)
    named = lambda i: f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
    files = {named(i) if len(parts) > 1 else WEIGHTS: x for i, x in enumerate(parts)}
    drift: dict[str, tuple[float, float]] = {}
    stream = _stream(table, kind, drift)
    with new_folder(folder) as new:
        for file, tensors in files.items():
            _write(None if new is None else new / file, tensors, stream)
        if new is not None:
            _beside(new, source)
            _write_tokenizer(new, tokenizer)
            _add_stops(new / GENERATION, content, stop)
            _dump(new / CONFIG, content)
            text = model_card(params, content, base_model, metadata)
            (new / CARD).write_text(text, encoding="utf-8")
            if len(files) > 1:
                where = {x.name: f for f, tensors in files.items() for x in tensors}
                index = {"metadata": {"total_size": size}, "weight_map": where}
                _dump(new / (WEIGHTS + ".index.json"), index)
    ordered = dict(sorted(drift.items(), key=lambda x: -x[1][1]))
    return SavedModel(folder, tuple(files), size, ordered)


def _config(config: Mapping[str, Any], source: str | Path | None) -> dict[str, Any]:
    """The content of the new ``config.json``, but for the dtype."""
    if "model_type" not in config:
        raise ValueError(
            "`config` has no 'model_type', by which transformers finds the class; give "
            "model.hf_config."
        )
    if source is None:
        return dict(config)
    file = Path(source) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"`source` {str(source)!r} holds no {CONFIG}; give the base's folder, or "
            "leave `source` out."
        )
    kept = json.loads(file.read_text(encoding="utf-8"))
    inner, kind = kept.get("text_config"), config["model_type"]
    if inner is not None and inner.get("model_type", kind) == kind:
        # The tree is the text part of a larger model, and stands alone from here on.
        labels = {name: kept[name] for name in LABELS if name in kept}
        kept = dict(config) | labels
    if kept.get("model_type") != config["model_type"]:
        raise ValueError(
            f"`config` is of a {config['model_type']!r} and the one in `source` of a "
            f"{kept.get('model_type')!r}; give the folder of this model's base."
        )
    kept.pop("quantization_config", None)
    for field in ("architectures", "pad_token_id"):
        if config.get(field) is not None:
            kept[field] = config[field]
    return kept


def _changed(table: Table) -> list[str]:
    """Names of the modules with an adapter, or trained in full."""
    return [
        module.name
        for module in table.modules
        if any(is_node(table.leaves[path]) for path in module.leaves.values())
    ]


def _check(table: Table, params: PyTree) -> None:
    lost = [path for path in table.leaves if path not in table.by_leaf]
    if lost:
        raise ValueError(
            f"leaves {lost} are in no row of `names` and would be lost; add rows for "
            "their modules, or take them out of `params`."
        )
    if not mergeable(params):
        raise ValueError(
            "`params` has an adapter that depends on the input, so no kernel has its "
            "effect and no merged model; save_adapter keeps it."
        )


def _check_layers(table: Table, config: Mapping[str, Any]) -> None:
    """Raises unless every layer is there: a reader would draw the others at random."""
    have = sorted({m.number for m in table.modules if m.number is not None})
    counts = [config[field] for field in LAYERS if config.get(field) is not None]
    count = counts[0] if counts else max(have, default=-1) + 1
    if have and not set(have) >= {*range(count)}:
        raise ValueError(
            f"`params` has layers {have}, and the model {count} from 0 up; give the "
            "whole tree. save_adapter and save_peft write the adapters of a part."
        )


def _planned(table: Table, dtype: np.dtype | None) -> list[Planned]:
    planned = []
    for module, part in _parts(table):
        kind = dtype or jnp.dtype(table.leaves[module.leaves[part]].dtype)
        name = f"{module.saved}.{part}"
        planned.append(Planned(name, table.tensor_shape(module, part), kind))
    kinds = sorted({tensor.dtype.name for tensor in planned})
    if len(kinds) > 1:
        raise ValueError(
            f"the leaves have dtypes {kinds}, and transformers loads all of a "
            f"checkpoint in the one that its config names; write dtype={kinds[-1]!r}."
        )
    return planned


def _parts(table: Table) -> Iterator[tuple[Module, str]]:
    for module in table.modules:
        for part in sorted(module.leaves, reverse=True):
            yield module, part


def _stream(table: Table, dtype, drift) -> Iterator[np.ndarray]:
    """Every tensor in the order of ``_parts``, one module at a time."""
    for module in table.modules:
        pieces, sliced = _pieces(table, module)
        pieces = {part: _widened(x, dtype) for part, x in pieces.items()}
        merged = pieces
        if any(map(is_node, pieces.values())):
            # Under names as in a tree: a method may scale the bias beside its kernel.
            inside = {module.leaves[p].rpartition("/")[2]: p for p in pieces}
            tree = {"module": {name: pieces[p] for name, p in inside.items()}}
            whole = merge(tree)["module"]
            merged = {p: whole[name] for name, p in inside.items()}
            if is_node(pieces.get("weight")):
                before = detach(tree)["module"]
                old = {p: dense(before[name]) for name, p in inside.items()}
                drift[module.saved] = _change(old["weight"], merged["weight"])
        for part in sorted(module.leaves, reverse=True):
            value = on_host(dense(merged[part]))
            with np.errstate(over="ignore"):  # looked for here
                cast = table.tensor(module, part, value, sliced=sliced).astype(dtype)
            if not is_finite(cast):
                held = "" if not is_finite(value) else f", beyond what {dtype} holds"
                raise ValueError(
                    f"`params`: {module.leaves[part]!r} is not finite, as "
                    f"{module.saved}.{part}{held}; nothing was written."
                )
            yield cast


def _pieces(table: Table, module: Module) -> tuple[dict[str, Any], bool]:
    """A module's leaves; of a stack with one layer axis in front, this layer's."""
    leaves = {part: table.leaves[path] for part, path in module.leaves.items()}
    roles = [table.roles_of(path) for path in module.leaves.values()]
    simple = all(
        r is None or (r[0] == BATCH and r.count(BATCH) == 1) for r in roles
    ) and all(x.shape[0] == module.layers for x in leaves.values())
    if module.layer is None or not simple:
        return leaves, False
    return {part: _layer(x, module.layer) for part, x in leaves.items()}, True


def _layer(leaf: Any, i: int) -> Any:
    one = lambda x: jax.tree.map(lambda array: array[i], x)
    if not isinstance(leaf, AdaptedKernel):
        return one(leaf)
    common = shared_names(leaf.adapter)
    cut = lambda part: {n: x if n in common else x[i] for n, x in part.items()}
    return leaf.replace(
        base=one(leaf.base), frozen=cut(leaf.frozen), trainable=cut(leaf.trainable)
    )


def _widened(leaf: Any, dtype) -> Any:
    """An adapted leaf in the dtype that is written, where that holds more."""
    if not isinstance(leaf, AdaptedKernel):
        return leaf
    return leaf.replace(base=leaf.base.astype(wider(leaf.base.dtype, dtype)))


@jax.jit
def _norms(old, new):
    wide = working_dtype(old.dtype)
    old, new = old.astype(wide), new.astype(wide)
    largest, norm = jnp.max(jnp.abs(new - old)), jnp.linalg.norm(old.reshape(-1))
    return largest, jnp.linalg.norm((new - old).reshape(-1)), norm


def _change(old, new) -> tuple[float, float]:
    largest, change, norm = map(float, _norms(old, new))
    return largest, change / norm if norm else float("inf")


def _write(file: Path | None, planned: list[Planned], stream) -> None:
    """Writes one file's tensors; other processes only help to gather them."""
    writer = None if file is None else Writer(file, planned)
    try:
        for _ in planned:
            value = next(stream)
            if writer is not None:
                writer.add(value)
    finally:
        if writer is not None:
            writer.close()


def _beside(new: Path, source: str | Path | None) -> None:
    for pattern in BESIDE if source is not None else ():
        for file in Path(source).glob(pattern):
            if file.is_file():
                copy = new / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def _write_tokenizer(new: Path, tokenizer: Any) -> None:
    if tokenizer is not None:
        for name in OLD_TOKENIZER:
            (new / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(new)


def _add_stops(file: Path, config: Mapping[str, Any], stop: Sequence[int]) -> None:
    """Adds to a generation config the ids that it lacks."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # Without such a file transformers takes these from the config; with one, from it.
    known = {f"{name}_token_id": None for name in ("bos", "eos", "pad")}
    known |= {name: config.get(name) for name in known} | kept
    ends = known["eos_token_id"]
    ends = [*ends] if isinstance(ends, list) else [ends] if ends is not None else []
    if set(stop) <= set(ends):
        return
    ends = list(dict.fromkeys([*ends, *stop]))
    known["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    _dump(file, {name: value for name, value in known.items() if value is not None})


def _dump(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")
