"""Chats: what is learnt of them is what the model says where it says it.

The templates are in the style of real ones; transformers renders them.
"""

import json

import numpy as np
import pytest

from jaxpeft import data

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What is generated is marked, the end token with it.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == "
    "'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{{ '\\n' }}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Earlier thinking is left out; of the last turn it is written, empty if need be.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' "
    "%}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant'"
    " %}{% set parts = m['content'].split('</think>') %}{% set think = '' %}"
    "{% if parts | length > 1 %}{% set think = parts[0].split('<think>')[-1].strip() %}"
    "{% endif %}{% if loop.index0 > ns.last %}<think>\n{{ think }}\n</think>\n\n"
    "{% endif %}{{ parts[-1].strip() }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)
# Thinking is left out of every turn, and a turn is opened with it.
OPENED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|assistant|>{{ m['content'].split('</think>')[-1] }}<|im_end|>{% else %}"
    "<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n"
    "{% endfor %}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{% if m.content %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nMe."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nYes."},
]
PLAIN = [{**m, "content": m["content"].split("\n")[-1]} for m in CHAT]


@pytest.fixture(scope="module")
def tokenizer_with():
    """A token a character or a special word; the template is the caller's."""
    import tokenizers
    import transformers

    special = ["<pad>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    special += ["<|user|>", "<|assistant|>"]
    letters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = {word: i for i, word in enumerate([*special, *letters])}

    def make(template, eos="<|im_end|>"):
        model = tokenizers.models.BPE(
            vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=False
        )
        backend = tokenizers.Tokenizer(model)
        backend.add_special_tokens(special)
        backend.decoder = tokenizers.decoders.Fuse()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token=eos,
            pad_token="<pad>",
            unk_token="<unk>",
            chat_template=template,
            model_max_length=4096,
        )

    return make


def encode(tokenizer, rows, split="validation", max_length=1024, **columns):
    columns = {"messages": "m"} | columns
    task = data.make_text_task("toy", {"train": rows, "validation": rows}, **columns)
    return data.tokenize(
        task, tokenizer, vocab_size=len(tokenizer), max_length=max_length
    )[split]


def texts_of(tokenizer, encoded):
    """Of every sequence its text, and its learnt text."""
    found = []
    for begin, end in zip(encoded.offsets, encoded.offsets[1:], strict=False):
        ids, learn = encoded.ids[begin:end], encoded.learn[begin:end]
        found.append((tokenizer.decode(ids), tokenizer.decode(ids[learn])))
    return found


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_chat_is_one_sequence_of_which_what_is_said_is_learnt(
    tokenizer_with, template
):
    tokenizer = tokenizer_with(template)
    encoded = encode(tokenizer, [{"m": PLAIN}])
    theirs = tokenizer.apply_chat_template(PLAIN, tokenize=False)
    assert texts_of(tokenizer, encoded) == [(theirs, "Me.<|im_end|>Yes.<|im_end|>")]
    marks = tokenizer_with(MARKED).apply_chat_template(
        PLAIN, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.ids.tolist() == marks["input_ids"]
    assert encoded.learn.astype(int).tolist() == marks["assistant_masks"]
    assert not {"chats_by_turns", "borders_moved"} & set(encoded.facts)


def test_marks_decide_what_is_learnt(tokenizer_with):
    """Also against what stands in the turn: here the end token is left out."""
    template = MARKED.replace(
        "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    )
    tokenizer = tokenizer_with(template)
    encoded = encode(tokenizer, [{"m": PLAIN}])
    assert texts_of(tokenizer, encoded)[0][1] == "Me.Yes."
    assert encoded.facts["chats_without_end"] == 1
    nothing = MARKED.replace("== 'assistant'", "== 'nobody'")
    with pytest.raises(ValueError, match="row 0: no token of what the assistant says"):
        encode(tokenizer_with(nothing), [{"m": PLAIN}])


def test_rewritten_history_makes_sequences_of_turns(tokenizer_with):
    """Each as it stands when the model says it: transformers' own prompt before it."""
    tokenizer = tokenizer_with(THINKING)
    encoded = encode(tokenizer, [{"m": CHAT}])
    prompts = [
        tokenizer.apply_chat_template(
            CHAT[:i], tokenize=False, add_generation_prompt=True
        )
        for i in (2, 4)
    ]
    said = [
        "<think>\nhm\n</think>\n\nMe.<|im_end|>",
        "<think>\nso\n</think>\n\nYes.<|im_end|>",
    ]
    assert texts_of(tokenizer, encoded) == [
        (prompt + one + "\n", one) for prompt, one in zip(prompts, said, strict=True)
    ]
    assert "hm" not in prompts[1]  # control: history is rewritten
    assert encoded.facts["chats_by_turns"] == 1
    # Marked too: the marks of all turns, but each turn is learnt in its own sequence.
    marked = THINKING.replace(
        "{% if loop.index0 > ns", "{% generation %}{% if loop.index0 > ns"
    ).replace(
        "{{ parts[-1].strip() }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>",
        "{{ parts[-1].strip() }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m['content'] }}<|im_end|>{% endif %}{{ '' }}",
    )
    assert "endgeneration" in marked
    again = encode(tokenizer_with(marked), [{"m": CHAT}])
    assert texts_of(tokenizer, again) == texts_of(tokenizer, encoded)


def test_a_turn_that_is_opened_with_what_the_template_leaves_out(tokenizer_with):
    tokenizer = tokenizer_with(OPENED)
    encoded = encode(tokenizer, [{"m": CHAT}])
    prompts = [
        tokenizer.apply_chat_template(
            CHAT[:i], tokenize=False, add_generation_prompt=True
        )
        for i in (2, 4)
    ]
    said = ["hm\n</think>\n\nMe.<|im_end|>", "so\n</think>\n\nYes.<|im_end|>"]
    assert prompts[0].endswith("<|assistant|><think>\n")
    assert texts_of(tokenizer, encoded) == [
        (prompt + one, one) for prompt, one in zip(prompts, said, strict=True)
    ]
    # The template alone would have lost the thinking.
    assert "hm" not in tokenizer.apply_chat_template(CHAT, tokenize=False)
    # Without any, the turn stands as the template writes it, and that is said.
    with pytest.warns(UserWarning, match="follows them, 2 of.*the chat template opens"):
        plain = encode(tokenizer, [{"m": PLAIN}], split="validation")
    whole = tokenizer.apply_chat_template(PLAIN, tokenize=False)
    assert texts_of(tokenizer, plain) == [(whole, "Me.<|im_end|>Yes.<|im_end|>")]


def test_a_turn_that_is_not_closed_is_counted(tokenizer_with):
    open_end = CHATML.replace(
        "<|im_end|>\n",
        "{% if not loop.last or m['role'] == 'user' %}<|im_end|>{{ '\\n' }}{% endif %}",
    )
    encoded = encode(tokenizer_with(open_end), [{"m": PLAIN}])
    assert encoded.facts["chats_without_end"] == 1
    closed = encode(tokenizer_with(CHATML), [{"m": PLAIN}])
    assert "chats_without_end" not in closed.facts


def test_a_template_that_does_not_say_it_at_all(tokenizer_with):
    """Also where what is said ends as the header or the end token does."""
    silent = CHATML.replace("{{ m['content'] }}", "")
    for said in ("Me.", "It", "an end"):
        chat = [PLAIN[1], {"role": "assistant", "content": said}]
        with pytest.raises(ValueError, match="does not write what message 1 says"):
            encode(tokenizer_with(silent), [{"m": chat}])


def test_tools_and_further_keys_reach_the_template(tokenizer_with):
    tokenizer = tokenizer_with(TOOLS)
    tools = [{"type": "function", "function": {"name": "clock"}}]
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    chat = [
        {"role": "user", "content": "Late?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "noon", "name": "clock"},
        {"role": "assistant", "content": "Noon.", "tool_calls": None},
    ]
    theirs = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False)
    learnt = '{"name": "clock", "arguments": {}}<|im_end|>Noon.<|im_end|>'
    for given in (tools, json.dumps(tools)):
        encoded = encode(tokenizer, [{"m": chat, "t": given}], tools="t")
        assert texts_of(tokenizer, encoded) == [(theirs, learnt)]
        assert encoded.facts["unread name"] == 1  # the template never asks for it
    without = encode(tokenizer, [{"m": chat, "t": tools}, {"m": chat}], tools="t")
    assert [text == theirs for text, _ in texts_of(tokenizer, without)] == [True, False]
    with pytest.raises(ValueError, match="no training row has the column `tools` 'u'"):
        encode(tokenizer, [{"m": chat, "t": tools}], tools="u")
    with pytest.raises(ValueError, match="row 0: column 't' is not JSON"):
        encode(tokenizer, [{"m": chat, "t": "[{"}], tools="t")
    with pytest.raises(ValueError, match="does not read 'tool_calls'"):
        encode(tokenizer_with(MARKED), [{"m": chat}])


def test_messages_in_other_forms(tokenizer_with):
    tokenizer = tokenizer_with(CHATML)
    usual = encode(tokenizer, [{"m": PLAIN}])
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    forms = {
        "ShareGPT": [{"from": names[m["role"]], "value": m["content"]} for m in PLAIN],
        "parts": [
            {
                "role": m["role"],
                "content": [
                    {"type": "text", "text": m["content"][:2]},
                    {"type": "text", "text": m["content"][2:]},
                ],
            }
            for m in PLAIN
        ],
        "nulls": [{**m, "name": None, "tool_calls": None} for m in PLAIN],
        "TFDS": {
            "role": np.array([m["role"].encode() for m in PLAIN], object),
            "content": np.array([m["content"].encode() for m in PLAIN], object),
        },
    }
    for name, form in forms.items():
        found = encode(tokenizer, [{"m": form}])
        np.testing.assert_array_equal(found.ids, usual.ids, err_msg=name)
        np.testing.assert_array_equal(found.learn, usual.learn, err_msg=name)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "column 'm' must be a list of messages; got 'hi'"),
        ([{"content": "x"}], "message 0 has no 'role'"),
        ([{"from": "me", "value": "x"}], "'from' 'me' is none of human, user, gpt"),
        ([PLAIN[2]], "message 0 is the assistant's, with nothing before it"),
        ([{"role": "user"}, PLAIN[2]], "message 0, of the role 'user', has no 'cont"),
        (
            [{"role": "user", "content": [{"type": "image"}]}, PLAIN[2]],
            "message 0: a part of its content is 'image'",
        ),
    ],
)
def test_bad_chats(tokenizer_with, messages, message):
    with pytest.raises(ValueError, match=f"row 0.*{message}"):
        encode(tokenizer_with(CHATML), [{"m": messages}])


def test_without_characters_of_tokens(tokenizer_with):
    """A slow tokenizer: the same by rendering alone."""
    fast = tokenizer_with(CHATML)

    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            assert "return_offsets_mapping" not in options
            return fast(text, **options)

        def __getattr__(self, name):
            return getattr(fast, name)

        def __len__(self):
            return len(fast)

    usual, slow = (encode(t, [{"m": PLAIN}]) for t in (fast, Slow()))
    np.testing.assert_array_equal(slow.ids, usual.ids)
    np.testing.assert_array_equal(slow.learn, usual.learn)
