"""The tokenizer inside a GGUF file, as a transformers object.

A file holds the tokens, the type of each, and merges or scores. How a text is cut
before they are looked up it gives as a name alone; what the names mean is here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.console import optional
from jaxpeft.models._gguf import GgufFile

# Types of tokens. Those of control (<|im_end|>) and those a user defined (<think>) stay
# whole in a text; the others (normal, unknown, unused, byte) are found by merging.
_CONTROL, _USER_DEFINED = 3, 4
_TYPES = range(1, 7)

_FIELDS = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
    "padding_token_id",
)
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class _Cut(NamedTuple):
    """What the name of a pre-tokenizer of bytes means.

    Attributes:
      words: the pattern of one word; None: GPT-2's, which ``tokenizers`` has.
      digits: whether digits are cut off one by one beforehand.
      ignore_merges: whether a word that is a token stays whole, merges or not.
      opens: whether a text begins with the bos token where no field says so.
      composed: whether text is brought to Unicode's composed form first.
    """

    words: str | None = None
    digits: bool = False
    ignore_merges: bool = False
    opens: bool = False
    composed: bool = False


def _words(numbers: str) -> str:
    """English contractions, words, numbers, signs, and white space to a line's end."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA3 = _Cut(_words(r"\p{N}{1,3}"), ignore_merges=True, opens=True)
_CUTS = {
    "gpt-2": _Cut(),
    "smollm": _Cut(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Cut(_words(r"\p{N}"), composed=True),
    "deepseek-r1-qwen": _Cut(_words(r"\p{N}")),
}


def gguf_tokenizer(path: Path) -> Any:
    """Returns the tokenizer of a GGUF file, a ``PreTrainedTokenizerFast``.

    Args:
      path: the file.

    Raises:
      ValueError: if its tokenizer is of a kind that is not implemented, or the file
        contradicts itself.
    """
    with optional("Tokenizers"):
        from tokenizers import AddedToken
        from transformers import PreTrainedTokenizerFast

    with GgufFile(path) as file:
        get = {name: file.field(f"tokenizer.ggml.{name}") for name in _FIELDS}
        template = file.field("tokenizer.chat_template")
        rows = None
        if "embed_tokens.weight" in file.keys():
            rows = file.get_slice("embed_tokens.weight").get_shape()[0]
    _check(path, get, rows)
    tokens = get["tokens"]
    special = {
        f"{role}_token": tokens[get[f"{name}_token_id"]]
        for role, name in _ROLES.items()
        if get[f"{name}_token_id"] is not None
    }
    if get["model"] == "llama":
        inner = _sentencepiece(get, special.get("unk_token"))
    else:
        inner = _bytes(get)
    for kind in (_CONTROL, _USER_DEFINED):
        add = inner.add_special_tokens if kind == _CONTROL else inner.add_tokens
        add(
            [
                AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, its in zip(tokens, get["token_type"], strict=True)
                if its == kind
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        chat_template=template,
        model_input_names=["input_ids", "attention_mask"],
        add_bos_token=_opens(get) and "bos_token" in special,
        add_eos_token=bool(get["add_eos_token"]),
        **special,
    )


def _check(path: Path, get: Mapping[str, Any], rows: int | None) -> None:
    kind, pre = get["model"], get["pre"]
    if kind != "llama" and (kind != "gpt2" or pre not in _CUTS):
        raise ValueError(
            f"{path} has a tokenizer of model {kind!r} and pre-tokenizer {pre!r}; "
            f"known are 'llama', and 'gpt2' with {sorted(_CUTS)}. Load the tokenizer "
            "from the model's Hugging Face folder."
        )
    needed = {"tokens", "token_type"}
    needed |= {"merges"} if kind == "gpt2" else set()
    needed |= {"scores"} if kind == "llama" and get["merges"] is None else set()
    for end in ("bos", "eos"):
        needed |= {f"{end}_token_id"} if get[f"add_{end}_token"] else set()
    if absent := sorted(name for name in needed if get[name] is None):
        raise ValueError(
            f"{path} has no fields {[f'tokenizer.ggml.{name}' for name in absent]}, "
            "which its tokenizer needs; convert the model anew, or load the tokenizer "
            "from its Hugging Face folder."
        )
    count, types = len(get["tokens"]), get["token_type"]
    if odd := sorted(set(types) - set(_TYPES)):
        raise ValueError(
            f"{path} has tokens of types {odd}; known are {list(_TYPES)} (normal, "
            "unknown, control, user-defined, unused, byte)."
        )
    if count != len(types) or rows not in (None, count):
        raise ValueError(
            f"{path} has {count} tokens, types of {len(types)} and a table of {rows} "
            "embeddings; these are of different models, or damaged."
        )


def _opens(get: Mapping[str, Any]) -> bool:
    """Whether a text begins with the bos token: as the file says, or as its kind."""
    if get["add_bos_token"] is not None:
        return bool(get["add_bos_token"])
    return get["model"] == "llama" or _CUTS[get["pre"]].opens


def _vocabulary(get: Mapping[str, Any]) -> dict[str, int]:
    return {token: i for i, token in enumerate(get["tokens"])}


def _bytes(get: Mapping[str, Any]) -> Any:
    """BPE over bytes, as GPT-2, Llama 3 and Qwen have it."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    cut = _CUTS[get["pre"]]
    merges = [tuple(merge.split(" ")) for merge in get["merges"]]
    inner = Tokenizer(
        models.BPE(
            vocab=_vocabulary(get), merges=merges, ignore_merges=cut.ignore_merges
        )
    )
    steps = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    if cut.words is not None:
        steps.append(pre_tokenizers.Split(Regex(cut.words), "isolated"))
    steps.append(
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.words is None)
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.normalizer = normalizers.NFC() if cut.composed else None
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(get: Mapping[str, Any], unknown: str | None) -> Any:
    """BPE over characters, as Llama 2 and Mistral have it; unknown ones as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if get["merges"] is None:
        merges = _merges(get["tokens"], get["scores"])
    else:
        merges = [tuple(merge.split(" ")) for merge in get["merges"]]
    inner = Tokenizer(
        models.BPE(
            vocab=_vocabulary(get),
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = get["add_space_prefix"] is not False
    inner.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", left=1)] if prefix else steps
    )
    return inner


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that scores stand for: whatever makes the best token comes first."""
    known = set(tokens)
    found = [
        (-score, -cut, cut - len(token), token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    found.sort(key=lambda each: each[:3])  # of equal ones, the longer left part
    return [(left, right) for *_, left, right in found]
