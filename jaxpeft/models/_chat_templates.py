"""Chat templates for tokenizers that have none: a few in wide use, or one's own."""

import difflib
import logging
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.console import optional
from jaxpeft.models._prompts import opened

_LOG = logging.getLogger("jaxpeft.models")

# Words for short chats, which stand in no template.
ASKED, SAID, MORE = "question4711", "answer4711", "more4711"


class Template(NamedTuple):
    """How a chat is written.

    Attributes:
        text: in Jinja. A model's first token is left to ``opened``.
        marks: tokens in it.
        end: the mark that ends a turn; "": the tokenizer's end token, by its name.
    """

    text: str
    marks: tuple[str, ...] = ()
    end: str = ""


# A system message where the format has no place for one stands before the first user's.
_SYSTEM = """\
{% set told = namespace(system='') %}
{% if messages[0]['role'] == 'system' %}
{% set told.system = messages[0]['content'] + '\\n\\n' %}
{% set messages = messages[1:] %}
{% endif %}
"""
TEMPLATES = {
    "chatml": Template(
        """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
""",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "llama3": Template(
        """\
{% for message in messages %}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "gemma": Template(
        _SYSTEM
        + """\
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + (told.system if loop.first else '') }}
{{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<start_of_turn>model\\n' }}
{%- endif %}
""",
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
    ),
    "phi3": Template(
        """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\\n' }}
{%- endif %}
""",
        ("<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
    ),
    "zephyr": Template(
        """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\\n' }}
{%- endif %}
"""
    ),
    "mistral": Template(
        _SYSTEM
        + """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + (told.system if loop.first else '') + message['content'] + ' [/INST]' }}
{%- else %}
{{ ' ' + message['content'] | trim + eos_token }}
{%- endif %}
{% endfor %}
"""
    ),
    "vicuna": Template(
        _SYSTEM
        + """\
{{ told.system | trim + (' ' if told.system else '') }}
{%- for message in messages %}
{% if message['role'] == 'user' %}
{{ 'USER: ' + message['content'] + ' ' }}
{%- else %}
{{ 'ASSISTANT: ' + message['content'] + eos_token }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ 'ASSISTANT:' }}
{%- endif %}
"""
    ),
    "alpaca": Template(
        _SYSTEM
        + """\
{{ told.system }}
{%- for message in messages %}
{% if message['role'] == 'user' %}
{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- else %}
{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '### Response:\\n' }}
{%- endif %}
"""
    ),
}


def chat_template(tokenizer: Any, given: str) -> str:
    """Returns a chat template as Jinja text, checked on a short chat.

    Args:
        tokenizer: whose tokens it will be of.
        given: a key of ``TEMPLATES``, a file, or the text itself.

    Raises:
        ValueError: there is no such template, the tokenizer lacks what it is written
            with, or it does not render.
    """
    if "{{" in given or "{%" in given:
        text = given
    elif given in TEMPLATES:
        text = _named(tokenizer, given)
    elif Path(given).expanduser().is_file():
        text = Path(given).expanduser().read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(given, TEMPLATES, n=1)
        raise ValueError(
            f"`chat_template` {given!r} is no file, no Jinja text and none of "
            f"{', '.join(TEMPLATES)}.{f' Did you mean {near[0]!r}?' if near else ''}"
        )
    with optional("Chat templates"):
        import jinja2

    chat = [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": SAID},
    ]
    try:
        found = tokenizer.apply_chat_template(
            chat, chat_template=text, tokenize=False, add_generation_prompt=False
        )
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: None + 'text'
        raise ValueError(f"`chat_template` {given!r} fails: {error}") from error
    if ASKED not in found or SAID not in found:
        raise ValueError(
            f"`chat_template` {given!r} loses what is said: of user {ASKED!r} and "
            f"assistant {SAID!r} it makes {found!r}."
        )
    return text


def _named(tokenizer: Any, name: str) -> str:
    """A template of the table, in the tokens that the tokenizer has."""
    text, marks, end = TEMPLATES[name]
    vocabulary, eos = tokenizer.get_vocab(), tokenizer.eos_token
    lost = [mark for mark in marks if mark not in vocabulary]
    if eos is None and (not end or end in lost):
        raise ValueError(
            f"`chat_template` {name!r} ends a turn with {end or 'the end token'}, and "
            "the tokenizer has no such token and no end token; give `eos_token`."
        )
    unknown = tokenizer.unk_token_id
    for mark in lost:
        ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
        if mark != end and unknown is not None and unknown in ids:
            raise ValueError(
                f"`chat_template` {name!r} is written with {mark}, which the tokenizer "
                "cannot write; give another."
            )
    if end in lost:
        # Written out in pieces it would be no single token that generation stops at.
        text = text.replace(end, eos)
        _LOG.warning(
            "the tokenizer has no token %s, with which a turn ends in %r; %s, its end "
            "token, stands there instead",
            *(end, name, eos),
        )
    if tokenizer.bos_token_id in opened(tokenizer, ""):
        text = "{{ bos_token }}" + text
    return text
