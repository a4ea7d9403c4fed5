"""Names of Hugging Face checkpoints and of our trees, as data.

One row a module: (its Hugging Face name, ours, kind). ``{i}`` counts layers; in a
scanned stack ``layer_{i}`` is ``layer``. A kind says which tensors a module has, how
our leaves are called and whether they are transposed.
"""

from collections.abc import Container, Iterable
from typing import NamedTuple

from jaxpeft.models._deberta_config import DebertaConfig
from jaxpeft.models._decoder_families import PART, TRAITS, WHOLES
from jaxpeft.models._names import ModuleName

# kind -> (tensor on disk, our leaf, whether ours is its transpose)
KINDS = {
    "linear": (("weight", "kernel", True), ("bias", "bias", False)),
    "conv1d": (("weight", "kernel", False), ("bias", "bias", False)),
    "embedding": (("weight", "embedding", False),),
    "norm": (("weight", "scale", False), ("bias", "bias", False)),
}

# Names in old files -> today's.
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

_EMBEDDINGS = (
    ("embeddings.word_embeddings", "embeddings/word_embeddings", "embedding"),
    ("embeddings.position_embeddings", "embeddings/position_embeddings", "embedding"),
    (
        "embeddings.token_type_embeddings",
        "embeddings/token_type_embeddings",
        "embedding",
    ),
    ("embeddings.LayerNorm", "embeddings/LayerNorm", "norm"),
)
_LAYER = tuple(
    (f"encoder.layer.{{i}}.{theirs}", f"encoder/layer_{{i}}/{ours}", kind)
    for theirs, ours, kind in (
        ("attention.self.query", "attention/query", "linear"),
        ("attention.self.key", "attention/key", "linear"),
        ("attention.self.value", "attention/value", "linear"),
        ("attention.output.dense", "attention/output/dense", "linear"),
        ("attention.output.LayerNorm", "attention/output/LayerNorm", "norm"),
        ("intermediate.dense", "intermediate/dense", "linear"),
        ("output.dense", "output/dense", "linear"),
        ("output.LayerNorm", "output/LayerNorm", "norm"),
    )
)


class Family(NamedTuple):
    """What differs between model types.

    Attributes:
      prefix: what the base model's names start with inside a model with a head.
      older: what they start with in other files, tried in this order after it.
      heads: first parts of the names of all heads' modules.
      drawn: those of them that may be absent from a checkpoint, and are drawn then.
      ignored: patterns of tensors no model here has, without the prefix.
    """

    prefix: str
    heads: tuple[str, ...]
    drawn: tuple[str, ...]
    ignored: tuple[str, ...]
    older: tuple[str, ...] = ()

    def within(self, name: str) -> str:
        """A tensor's name without what the base model's names start with."""
        for prefix in (self.prefix, *self.older):
            if name.startswith(prefix):
                return name.removeprefix(prefix)
        return name


_BUFFERS = ("*.position_ids", "*.token_type_ids")
_POOLED = ("pooler", "classifier")
_DECODER = Family(
    prefix="model.",
    heads=("lm_head", "score"),
    drawn=("score",),
    ignored=("*.rotary_emb.inv_freq", "qa_outputs.*", "classifier.*"),
)

FAMILIES = {
    "bert": Family("bert.", _POOLED, _POOLED, (*_BUFFERS, "cls.*", "qa_outputs.*")),
    "roberta": Family(
        "roberta.", _POOLED, _POOLED, (*_BUFFERS, "lm_head.*", "qa_outputs.*")
    ),
    "deberta-v2": Family(
        "deberta.",
        _POOLED,
        _POOLED,
        (*_BUFFERS, "lm_predictions.*", "mask_predictions.*", "cls.*", "qa_outputs.*"),
    ),
    **dict.fromkeys(TRAITS, _DECODER),
    **dict.fromkeys(
        WHOLES,
        _DECODER._replace(
            prefix="model." + PART,
            older=(PART + "model.", PART, "model."),
            ignored=(*_DECODER.ignored, "vision_tower.*", "multi_modal_projector.*"),
        ),
    ),
    "gpt2": _DECODER._replace(
        prefix="transformer.", ignored=("*.attn.bias", "*.attn.masked_bias")
    ),
}

_HEADS = {
    "bert": (
        ("bert.pooler.dense", "pooler/dense", "linear"),
        ("classifier", "classifier", "linear"),
    ),
    "roberta": (
        ("classifier.dense", "classifier/dense", "linear"),
        ("classifier.out_proj", "classifier/out_proj", "linear"),
    ),
}


class Source(NamedTuple):
    """Where one leaf of ours lies in a checkpoint.

    Attributes:
      tensors: names on disk without the prefix; one a layer for a stacked leaf.
      stacked: whether our leaf has a leading layer axis.
      transposed: whether our leaf (a layer of it) is the tensor's transpose.
    """

    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool


def bert_names(model_type: str, *, head: bool, scanned: bool) -> tuple[ModuleName, ...]:
    """Returns the names of an encoder's modules, as transformers' class has them.

    Args:
      model_type: ``"bert"`` or ``"roberta"``.
      head: whether the model has a head; without one names have no prefix.
      scanned: whether the layers are one stack.
    """
    prefix = FAMILIES[model_type].prefix if head else ""
    rows = [(prefix + theirs, ours, kind) for theirs, ours, kind in _EMBEDDINGS]
    rows += [(prefix + theirs, ours, kind) for theirs, ours, kind in _LAYER]
    rows += _HEADS[model_type] if head else ()
    return module_names(rows, scanned)


def deberta_names(
    config: DebertaConfig, *, head: bool, scanned: bool
) -> tuple[ModuleName, ...]:
    """Returns the names of a DeBERTa's modules, as transformers' class has them.

    Args:
      config: its sizes and constants.
      head: whether the model has a head; without one names have no prefix.
      scanned: whether the layers are one stack.
    """
    absent = set() if config.position_biased_input else {"position_embeddings"}
    absent |= set() if config.type_vocab_size else {"token_type_embeddings"}
    rows = [row for row in _EMBEDDINGS if row[1].split("/")[-1] not in absent]
    if config.relative_attention:
        rows.append(("encoder.rel_embeddings", "encoder/rel_embeddings", "embedding"))
    if config.norm_distances:
        rows.append(("encoder.LayerNorm", "encoder/LayerNorm", "norm"))
    own = ("query", "key", "value")
    for theirs, ours, kind in _LAYER:
        end = "_proj" if theirs.split(".")[-1] in own else ""
        rows.append((theirs + end, ours + end, kind))
    if config.relative_attention and not config.share_att_key:
        names = ("pos_key_proj",) * config.c2p + ("pos_query_proj",) * config.p2c
        for name in names:
            theirs = f"encoder.layer.{{i}}.attention.self.{name}"
            rows.append((theirs, f"encoder/layer_{{i}}/attention/{name}", "linear"))
    if head:
        rows = [("deberta." + theirs, ours, kind) for theirs, ours, kind in rows]
        rows.append(("pooler.dense", "pooler/dense", "linear"))
        rows.append(("classifier", "classifier", "linear"))
    # transformers takes the weight of this one and never calls the module.
    return tuple(
        row._replace(called=not row.theirs.endswith("rel_embeddings"))
        for row in module_names(rows, scanned)
    )


def module_names(
    rows: Iterable[tuple[str, str, str]], scanned: bool
) -> tuple[ModuleName, ...]:
    """Rows for layers one by one, as names of a model whose layers may be a stack."""
    return tuple(
        ModuleName(
            theirs, ours.replace("layer_{i}", "layer") if scanned else ours, kind
        )
        for theirs, ours, kind in rows
    )


def sources(
    names: Iterable[ModuleName], shapes: Container[str], *, prefix: str, layers: int
) -> dict[str, Source]:
    """Returns the source of every leaf, by our path.

    Args:
      names: the modules of the model.
      shapes: the paths of its leaves; a tensor without a leaf (the bias of a
        projection that has none) is not looked for.
      prefix: what is cut off the names.
      layers: number of layers.
    """
    found = {}
    for row in names:
        theirs, ours, kind = row.saved or row.theirs, row.ours, row.kind
        for tensor, leaf, transposed in KINDS[kind]:
            name, path = f"{theirs.removeprefix(prefix)}.{tensor}", f"{ours}/{leaf}"
            every = tuple(name.format(i=i) for i in range(layers))
            if "{i}" not in theirs:
                found[path] = Source((name,), False, transposed)
            elif "{i}" not in ours:
                found[path] = Source(every, True, transposed)
            else:
                for i, one in enumerate(every):
                    found[path.format(i=i)] = Source((one,), False, transposed)
    return {path: source for path, source in found.items() if path in shapes}
