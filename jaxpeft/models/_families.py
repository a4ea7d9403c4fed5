"""Names of Hugging Face checkpoints and of our trees, as data.

One row a module: (its Hugging Face name, ours, kind). ``{i}`` counts layers; in a
scanned stack ``layer_{i}`` is ``layer``. A kind says which tensors a module has, how
our leaves are called and whether they are transposed.
"""

from collections.abc import Container, Iterable
from typing import NamedTuple

from jaxpeft.core import ModuleName

# kind -> (tensor on disk, our leaf, whether ours is its transpose)
KINDS = {
    "linear": (("weight", "kernel", True), ("bias", "bias", False)),
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
      body: rows of embeddings and layers.
      head: rows of a sequence-classification head, with the prefix where it has one.
      ignored: patterns of tensors no model here has, without the prefix.
    """

    prefix: str
    body: tuple[tuple[str, str, str], ...]
    head: tuple[tuple[str, str, str], ...]
    ignored: tuple[str, ...]


_BUFFERS = ("*.position_ids", "*.token_type_ids")

FAMILIES = {
    "bert": Family(
        prefix="bert.",
        body=_EMBEDDINGS + _LAYER,
        head=(
            ("bert.pooler.dense", "pooler/dense", "linear"),
            ("classifier", "classifier", "linear"),
        ),
        ignored=(*_BUFFERS, "cls.*", "qa_outputs.*"),
    ),
    "roberta": Family(
        prefix="roberta.",
        body=_EMBEDDINGS + _LAYER,
        head=(
            ("classifier.dense", "classifier/dense", "linear"),
            ("classifier.out_proj", "classifier/out_proj", "linear"),
        ),
        ignored=(*_BUFFERS, "lm_head.*", "pooler.*", "qa_outputs.*"),
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


def module_names(
    model_type: str, *, head: bool, scanned: bool
) -> tuple[ModuleName, ...]:
    """Returns the names of a model's modules, as transformers' class has them.

    Args:
      model_type: a key of ``FAMILIES``.
      head: whether the model has a head; without one names have no prefix.
      scanned: whether the layers are one stack.
    """
    family = FAMILIES[model_type]
    prefix = family.prefix if head else ""
    rows = [(prefix + theirs, ours, kind) for theirs, ours, kind in family.body]
    rows += family.head if head else ()
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
    for theirs, ours, kind, *_ in names:
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
