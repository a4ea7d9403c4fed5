"""Texts that end an answer, wherever tokens begin: against search in the whole text."""

import itertools
import re

import jax
import numpy as np
import pytest
from decoder_toolbox import content
from tokenizers_toolbox import CORPUS, byte_level

from jaxpeft import models
from jaxpeft.models._stop_texts import HIT, StopTexts, split_stops


def of_gpt2():
    from tokenizers import decoders

    made = byte_level()
    made.backend_tokenizer.decoder = decoders.ByteLevel()
    return made


def of_llama():
    """SentencePiece's way: a mark for a space, letters that are unknown as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    as_bytes = [f"<0x{i:02X}>" for i in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *as_bytes]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    backend.train_from_iterator([text.replace("\n", "") for text in CORPUS], trainer)
    backend = Tokenizer.from_str(_without_added(backend.to_str(), as_bytes))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _without_added(text, names):
    import json

    told = json.loads(text)
    kept = [t for t in told["added_tokens"] if t["content"] not in names]
    return json.dumps(told | {"added_tokens": kept})


KINDS = {"gpt2": of_gpt2, "llama": of_llama}
TEXT = "The capital of France is 🙂 Paris.\nHello there, hello ☃ happiness"


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def read(stops, row):
    """How many tokens there are when a text has appeared; None: it has not."""
    state = 0
    for n, token in enumerate(row, 1):
        state = stops.table[state, token]
        if state == HIT:
            return n
    return None


STOPS = [
    ("is",),
    ("\n",),
    ("🙂",),
    ("🙂 Paris.\nH",),
    ("ance i", "nowhere"),
    ("ness", "app", "☃ "),
    ("ello ther", "ello t"),
    ("aab", "hello ☃ h"),
]


@pytest.mark.parametrize("texts", STOPS)
def test_a_text_is_found_where_it_is_complete(tokenizer, texts):
    rng = np.random.default_rng(0)
    stops = StopTexts(texts, tokenizer, len(tokenizer) + 3)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [ids(TEXT)]
    for _ in range(20):  # in other tokens, as a model may write it
        at = [0, *sorted(rng.integers(0, len(TEXT), 8)), len(TEXT)]
        parts = [TEXT[i:j] for i, j in itertools.pairwise(at)]
        rows.append([i for part in parts for i in ids(part)])
    found = 0
    for row in rows:
        start = len(tokenizer.decode(row[:0]))
        written = [tokenizer.decode(row[:n])[start:] for n in range(len(row) + 1)]
        complete = [
            n for n, text in enumerate(written) if any(s in text for s in texts)
        ]
        wanted = complete[0] if complete else None
        assert read(stops, row) == wanted
        if wanted is None:
            assert stops.cut(row) == row
            continue
        found += 1
        text = written[wanted]
        ends = [(text.find(s) + len(s), text.find(s)) for s in texts if s in text]
        assert tokenizer.decode(stops.cut(row)) == text[: min(ends)[1]]
        kept = len(stops.cut(row[: wanted - 1]))
        assert kept == wanted - 1  # control: not before it is complete
    assert found


def test_tokens_and_texts(tokenizer):
    ends = tokenizer.eos_token_id
    (is_token,) = tokenizer(" is", add_special_tokens=False)["input_ids"]
    name = tokenizer.convert_ids_to_tokens(is_token)
    split = split_stops([5, "</s>", name, "is Par", 5], tokenizer)
    assert split == ((5, ends, is_token), (name, "is Par"))
    with pytest.raises(ValueError, match="has an empty text"):
        split_stops([""], tokenizer)
    with pytest.raises(
        ValueError, match="the text 'END'; give the model's `tokenizer`"
    ):
        split_stops(["END"], None)


def bytes_of(tokenizer):
    """Tokens that are no whole letters: their logits are 0, and never the highest."""
    return [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).isascii()] + [
        tokenizer.convert_tokens_to_ids(f"<0x{i:02X}>") for i in range(32, 128)
    ] * (tokenizer.unk_token is not None)


@pytest.mark.interop
def test_where_transformers_stops(tokenizer, tmp_path):
    import torch
    import transformers

    size = len(tokenizer)
    sizes = {"vocab_size": size, "max_position_embeddings": 64, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(**content("llama", **sizes))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
        theirs.lm_head.weight[bytes_of(tokenizer)] = 0.0
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path, head="causal_lm")
    prompt = tokenizer("The capital", add_special_tokens=False)["input_ids"]
    ours = lambda **more: models.generate(
        model, params, [prompt], max_new_tokens=16, **more
    )[0]
    whole = ours()
    assert len(whole) == 16  # nothing to stop at
    text = tokenizer.decode(whole)
    # Over the border of two tokens; theirs knows no bytes of letters.
    places = [len(tokenizer.decode(whole[:n])) for n in range(2, 12)]
    stops = {text[n - 1 : n + 1] for n in places if text[n - 1 : n + 1].isascii()}
    assert stops
    for stop in sorted(stops)[:3]:
        out = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
            stop_strings=[stop],
            tokenizer=tokenizer,
        )[0, len(prompt) :].tolist()
        assert len(out) < 16 and stop in tokenizer.decode(out)
        cut = ours(stop=[stop], tokenizer=tokenizer)
        assert tokenizer.decode(cut) == tokenizer.decode(out).partition(stop)[0]
    # What has been written when the loop ends: no step more than theirs.
    assert ours(stop=[whole[3]]) == whole[: whole.index(whole[3])]


def test_rows_stop_each_at_its_own(tokenizer):
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    model = models.from_config(content("llama", **sizes), head="causal_lm")
    params = models.init(model, jax.random.key(3))
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)
    head = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = head.at[:, np.array(bytes_of(tokenizer))].set(0.0)
    prompts = [[50, 60], [7], [9, 9, 9]]
    go = lambda stop, **more: models.generate(
        model, params, prompts, max_new_tokens=12, stop=stop, **more
    )
    whole = go([])
    texts = [tokenizer.decode(row) for row in whole]
    stops = [re.search(r"[ -~]{3}", text[3:])[0] for text in texts[:2]]
    cut = go(stops, tokenizer=tokenizer)
    for row, text in zip(cut, texts, strict=True):
        ends = [text.find(s) + len(s) for s in stops if s in text]
        starts = [text.find(s) for s in stops if s in text]
        wanted = text[: starts[ends.index(min(ends))]] if ends else text
        assert tokenizer.decode(row) == wanted
    assert [len(row) for row in cut] != [12] * 3
