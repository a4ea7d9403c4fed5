"""The tokenizer of a model, and the tokens after which writing has ended."""

import difflib
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpeft.console import optional
from jaxpeft.models._chat_templates import ASKED, MORE, SAID
from jaxpeft.models._chat_templates import chat_template as _chat_template
from jaxpeft.models._checkpoint import GGUF
from jaxpeft.models._decoder_config import text_part
from jaxpeft.models._folder_tokenizer import folder_tokenizer
from jaxpeft.models._gguf_tokenizer import gguf_tokenizer
from jaxpeft.models._load import find_checkpoint, named_ends, read_model_config

_LOG = logging.getLogger("jaxpeft.models")

# One of these is there where there is a tokenizer.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.*",
    "*.model",
    "tekken.json",
)


def tokenizer(
    folder_or_name: str | Path,
    *,
    pad_token: str | None = None,
    eos_token: str | None = None,
    chat_template: str | None = None,
) -> Any:
    """Returns the tokenizer that belongs to a model, a transformers object.

    Rows of a batch are padded; where the tokenizer has no token for that (Llama,
    Mistral, GPT-2), its end token is taken, and a log line of ``jaxpeft.models`` says
    so once. Losses and heads go by the mask, never by the id. transformers'
    classifiers do go by the id: a tokenizer that ends every text with its end token
    is padded with its unknown token, if it has one.

    Args:
        folder_or_name: as for ``load``.
        pad_token: the token that short rows are filled up with; None: its own.
        eos_token: the token that ends a text; None: its own.
        chat_template: how chats are written; None: its own. A file of Jinja, the text
            itself, or one of ``"chatml"``, ``"llama3"``, ``"gemma"``, ``"phi3"``,
            ``"zephyr"``, ``"mistral"``, ``"vicuna"``, ``"alpaca"``. Where the
            vocabulary lacks the token that ends a turn there, the end token stands
            in its place.

    Returns:
        The tokenizer, with a padding token.

    Raises:
        ValueError: there is no such model, its tokenizer's files are missing or
            another model's, a token is not in its vocabulary, or there is no such
            template or it does not render.

    Example:
        >>> tokenizer("smollm2", chat_template="alpaca")  # doctest: +SKIP
    """
    made = read_tokenizer(find_checkpoint(folder_or_name))
    for name, token in {"pad_token": pad_token, "eos_token": eos_token}.items():
        if token is not None:
            setattr(made, name, _known(made, name, token))
    if made.pad_token_id is None and made.eos_token_id is not None:
        made.pad_token = _padding(made)
        _say_once(
            f"{folder_or_name}: the tokenizer has no padding token; short rows are "
            f"filled up with {made.pad_token!r}, which the mask leaves out"
        )
    if chat_template is not None:
        made.chat_template = _chat_template(made, chat_template)
    return made


def read_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of a folder or a GGUF file, as its files have it.

    Args:
        folder: of ``find_checkpoint``.

    Returns:
        A tokenizer of transformers, perhaps without a padding token.

    Raises:
        ValueError: its files are missing or another model's.
    """
    if folder.suffix == GGUF and folder.is_file():
        return gguf_tokenizer(folder)
    return folder_tokenizer(folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in a folder; in a GGUF file there always is.

    Args:
        folder: a folder, or a GGUF file.

    Returns:
        Whether a file of a tokenizer lies there; none is read.
    """
    if folder.suffix == GGUF and folder.is_file():
        return True
    return any(file for name in _FILES for file in folder.glob(name))


def tokenizer_options(tokenizer: Any) -> dict[str, str | None]:
    """Returns the options with which ``models.tokenizer`` makes a tokenizer again.

    Args:
        tokenizer: from ``models.tokenizer``.

    Returns:
        ``{"pad_token": ..., "eos_token": ..., "chat_template": ...}``, of the base's
        tokenizer; plain text, for a file. Several templates by name, as some models
        have, are left to the model: the last is then None.

    Example:
        >>> options = tokenizer_options(tokenizer("minilm"))  # doctest: +SKIP
        >>> options["pad_token"]  # doctest: +SKIP
        '[PAD]'
    """
    template = getattr(tokenizer, "chat_template", None)
    return {
        "pad_token": tokenizer.pad_token,
        "eos_token": tokenizer.eos_token,
        "chat_template": template if isinstance(template, str) else None,
    }


def stop_tokens(folder_or_name: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens after which a model has finished.

    A chat model ends its turn with another token than a text ends with, and says so
    in one of several places; these are all of them.

    Args:
        folder_or_name: the model, as for ``load``.
        tokenizer: its tokenizer, from ``models.tokenizer``.

    Returns:
        Ids below the model's vocabulary size, each once: the tokenizer's end token,
        ``eos_token_id`` of ``config.json`` and of ``generation_config.json`` (in a
        GGUF file, the tokens that end texts, turns and messages), and ``turn_end``.

    Raises:
        ValueError: there is no such model.

    Example:
        >>> stop_tokens("smollm2", tokenizer("smollm2"))  # doctest: +SKIP
        (2,)
    """
    folder = find_checkpoint(folder_or_name)
    config = read_model_config(folder)
    own = (tokenizer.eos_token_id, turn_end(tokenizer))
    size = text_part(config).get("vocab_size") or len(tokenizer)
    more = [token for token in own if token is not None and token < size]
    return tuple(dict.fromkeys([*more, *named_ends(folder, config)]))


def turn_end(tokenizer: Any) -> int | None:
    """Returns the token that the chat template ends an assistant's turn with.

    It is the first token of its own kind (an added one: special, or matched whole)
    behind an answer, the same whether the chat goes on or not. A template that ends a
    turn with words, a line end or nothing has none, nor has one that cannot render
    such a chat.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Returns:
        The token's id, or None.

    Example:
        >>> turn_end(tokenizer("smollm2"))  # doctest: +SKIP
        2
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template or (isinstance(template, Mapping) and "default" not in template):
        return None
    return _turn_end(tokenizer, str(template), len(tokenizer))


@functools.lru_cache(maxsize=8)  # asked once a chat
def _turn_end(tokenizer: Any, template: str, size: int) -> int | None:
    with optional("Chat templates"):
        import jinja2

    chat = [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": SAID},
        {"role": "user", "content": MORE},
    ]
    try:
        ends, goes_on = (
            tokenizer.apply_chat_template(
                chat[:n], tokenize=False, add_generation_prompt=False
            )
            for n in (2, 3)
        )
    except (jinja2.TemplateError, TypeError):
        return None  # no chat of this form, so none that would have to end
    first = _first_added(tokenizer, ends.rpartition(SAID)[2])
    between = goes_on.rpartition(SAID)[2].partition(MORE)[0]
    if SAID not in ends or first != _first_added(tokenizer, between):
        return None  # what begins the next turn, not what ends this one
    return first


def _first_added(tokenizer: Any, text: str) -> int | None:
    added = {
        i: str(token).strip() for i, token in tokenizer.added_tokens_decoder.items()
    }
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if added.get(i)), None)


def _known(made: Any, name: str, token: str) -> str:
    vocabulary = made.get_vocab()
    if token not in vocabulary:
        near = difflib.get_close_matches(token, vocabulary, n=3)
        raise ValueError(
            f"`{name}` {token!r} is not in the tokenizer's vocabulary; nearest: "
            f"{near or 'none'}. A new token would need a new row of the embedding."
        )
    return token


def _padding(made: Any) -> str:
    """The token to pad with where there is none for it."""
    ended = made("a")["input_ids"][-1:] == [made.eos_token_id]
    unknown = made.unk_token_id not in (None, made.eos_token_id)
    return made.unk_token if ended and unknown else made.eos_token


@functools.cache
def _say_once(text: str) -> None:
    _LOG.warning("%s", text)
