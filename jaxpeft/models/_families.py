"""Names of Hugging Face checkpoints and of our trees, as data.

One row a module: (its Hugging Face name, ours, kind). ``{i}`` counts layers; in a
scanned stack ``layer_{i}`` is ``layer``. A kind says which tensors a module has, how
our leaves are called and whether they are transposed.
"""

from typing import NamedTuple

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
      head: rows of a sequence-classification head, outside or inside the prefix.
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
            ("pooler.dense", "pooler/dense", "linear"),
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


def sources(
    model_type: str, *, head: bool, layers: int, scanned: bool
) -> dict[str, Source]:
    """Returns the source of every leaf, by our path.

    Args:
      model_type: a key of ``FAMILIES``.
      head: whether the model has a head.
      layers: number of layers.
      scanned: whether the layers are one stack.
    """
    family = FAMILIES[model_type]
    found = {}
    for theirs, ours, kind in family.body + (family.head if head else ()):
        for tensor, leaf, transposed in KINDS[kind]:
            name, path = f"{theirs}.{tensor}", f"{ours}/{leaf}"
            every = tuple(name.format(i=i) for i in range(layers))
            if "{i}" not in ours:
                found[path] = Source((name,), False, transposed)
            elif scanned:
                stack = path.replace("layer_{i}", "layer")
                found[stack] = Source(every, True, transposed)
            else:
                for i, one in enumerate(every):
                    found[path.format(i=i)] = Source((one,), False, transposed)
    return found
