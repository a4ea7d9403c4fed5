"""What a module is called in a checkpoint, and where it lies in a parameter tree."""

from typing import NamedTuple

# What lies beside the weights of a checkpoint and belongs to it: how texts become
# tokens, how a chat is written, how writing ends. Patterns of whole paths.
BESIDE = (
    "generation_config.json",
    "chat_template*",
    "chat_templates/*",
    "additional_chat_templates/*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "tekken.json",
)


class ModuleName(NamedTuple):
    """One module, or one of each layer, under its two names.

    Attributes:
        theirs: its path in the checkpoint, ``"encoder.layer.{i}.output.dense"``;
            ``{i}`` counts layers.
        ours: its path in our tree, ``"encoder/layer_{i}/output/dense"``. Without
            ``{i}``, where ``theirs`` has it, the layers are one stack.
        kind: ``"linear"`` (a weight [out, in]), ``"conv1d"`` (a weight [in, out], as
            GPT-2 has it), ``"embedding"`` or ``"norm"``.
        tied: the other module of the checkpoint that shares this one's weight,
            ``"lm_head"``; empty: none does. Two more rows say where the two lie once
            each has a leaf of its own (``interop.untie``): one of the same
            ``theirs`` and another ``ours``, one of the other module.
        interleaved: the head size, where the output's rotary pairs lie side by side,
            2j and 2j + 1, in our tree; the checkpoint has them half a head apart.
            For q, k and the norms of their heads; 0: ours are as the checkpoint's.
        saved: its path in a checkpoint of the tree alone, where ``theirs`` lies in a
            larger model that the tree is a part of; empty: it is ``theirs``.
        called: whether the checkpoint's class calls the module. Where it only reads
            the weight, an adapter of PEFT's beside it does nothing.
    """

    theirs: str
    ours: str
    kind: str
    tied: str = ""
    interleaved: int = 0
    saved: str = ""
    called: bool = True
