"""How a text becomes token ids: opened as a prompt, or cut into prompt and answer."""

from typing import Any


def opened(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text that a model goes on with.

    In front stand the tokens that the tokenizer opens a text with (``<s>``,
    ``[CLS]``; most byte-level tokenizers have none), once, though the text may have
    them already, as what a chat template has written does. Behind stands nothing: a
    tokenizer that closes a text (``</s>``, ``[SEP]``) would say that there is no
    more to come.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the text; special tokens that are written out in it are read as such.

    Returns:
        Token ids; of an empty text those in front alone, maybe none.

    Example:
        >>> import transformers
        >>> opened(transformers.ByT5Tokenizer(), "ab")  # without its </s>
        [100, 101]
    """
    ids, front = _bare(tokenizer, text), _front(tokenizer)
    return ids if ids[: len(front)] == front else front + ids


def joint(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    r"""Returns the tokens of a prompt and of what follows, cut out of the whole text.

    Tokenised apart, a completion is not what stands in a text: SentencePiece puts a
    space of its own before it, a word that goes on is two words. So the two are
    tokenised as one text, ``opened(tokenizer, prompt + completion)``, and cut where
    the prompt ends. Mostly what is before the cut is ``opened(tokenizer, prompt)``,
    all that a model sees when it is used. In two cases it is not, and a model that is
    used on such a prompt reads other tokens than it was trained on:

    - Spaces at the end of the prompt are the completion's. To most tokenizers they
      are the beginning of the next word, and where the completions of one prompt are
      compared, all must begin at the same place.
    - A token may span the border (``"Fra"`` and ``"nce"``, a quotation mark and a
      full stop). It and all behind it are the completion's, so that no character is
      lost and none of the completion is given away.

    A prompt that ends with a whole word or a line end, before a completion that
    begins with its own space, is never one of them in practice.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: what is read; may be empty.
        completion: what follows it, with its own leading space where there is one.

    Returns:
        ``(prompt_ids, completion_ids)``. The first are empty where a token spans the
        border and there is none before it.

    Note:
        The rule is that of lm-evaluation-harness (``_encode_pair``) but for two
        things. The harness moves line ends at the end of a prompt, too; here they
        stay, since prompts end in them when a model is used (``"### Response:\n"``).
        And it cuts the whole after as many tokens as the prompt has alone, which
        where a token spans the border loses characters or has some twice.

        A tokenizer that cannot say which characters a token is of (not "fast") is cut
        at the first token that the prompt alone has not: the one that spans the
        border, or one before it in the same word.

    Example:
        >>> import transformers
        >>> joint(transformers.ByT5Tokenizer(), "a", "bc")
        ([100], [101, 102])
    """
    read = prompt.rstrip(" ")
    prompt, completion = read, prompt[len(read) :] + completion
    alone, whole = opened(tokenizer, prompt), opened(tokenizer, prompt + completion)
    cut = len(alone)
    if whole[:cut] != alone:
        if getattr(tokenizer, "is_fast", False):
            cut = len(whole) - _behind(tokenizer, prompt + completion, len(prompt))
        else:
            same = (a == b for a, b in zip(alone, whole, strict=False))
            cut = next((i for i, equal in enumerate(same) if not equal), len(whole))
    return whole[:cut], whole[cut:]


def _bare(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _front(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text, found with a short one."""
    if not tokenizer.num_special_tokens_to_add():
        return []
    bare, whole = _bare(tokenizer, "a"), tokenizer("a")["input_ids"]
    if not bare:  # a vocabulary without this letter and without an unknown token
        begins = (tokenizer.bos_token_id, tokenizer.cls_token_id)
        return whole[:1] if whole[:1] and whole[0] in begins else []
    places = range(len(whole) - len(bare) + 1)
    start = next((i for i in places if whole[i : i + len(bare)] == bare), 0)
    return whole[:start]


def _behind(tokenizer: Any, text: str, border: int) -> int:
    """How many tokens there are from the first on that reaches behind a character."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in found["offset_mapping"]]
    first = next((i for i, end in enumerate(ends) if end > border), len(ends))
    return len(ends) - first
