"""What ends an answer, and what tokenizer goes along, by the command line."""

import io
import json
import types
import warnings

import jax
import numpy as np
import pytest
from tokens_toolbox import TEMPLATE, set_json, write_base

import jaxpeft as jp
from jaxpeft import interop, models
from jaxpeft.cli import main

PROMPT = "w7 w9 w11"
CHAT, CHAT_IDS = "w4 w7 w9 w11 w5", [4, 7, 9, 11, 5]


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def said(capsys):
    """Runs ``jaxpeft``; gives back its status and what it said."""

    def call(*argv):
        capsys.readouterr()
        more = ["--max-new-tokens", "12"] * (argv[0] == "generate")
        status = main([*map(str, argv), *more])
        out, err = capsys.readouterr()
        return types.SimpleNamespace(
            status=status, out=out, lines=out.split("\n"), err=err
        )

    return call


@pytest.fixture
def answer(said):
    """The words of an answer."""

    def call(*argv):
        done = said("generate", *argv)
        assert done.status == 0, done.err
        return done.out.split()

    return call


def answer_ids(model, params, ids):
    return models.generate(model, params, [ids], max_new_tokens=12, stop=())[0]


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory):
    """A base that, asked in a chat, writes the token that ends a turn."""
    folder = tmp_path_factory.mktemp("chat")
    model, params = write_base(folder / "first")
    whole = answer_ids(model, params, CHAT_IDS)
    turn = ending(whole)
    write_base(folder / "base", ends={turn: "<turn>"}, chat_template=TEMPLATE)
    return folder / "base", turn, whole


def ending(whole):
    """A token that is written neither at once nor twice before."""
    turn = next(t for i, t in enumerate(whole) if i > 3 and t not in whole[:i])
    assert not {turn, *whole[:4]} & {0, 1, *CHAT_IDS}, whole
    return turn


def test_a_chat_stops_at_the_end_of_its_turn(chat_base, answer, tmp_path):
    base, turn, whole = chat_base
    end = whole.index(turn)
    plain = answer(CHAT, "--base", base)  # the same text, not asked as a chat
    assert answer(PROMPT, "--base", base, "--chat") == plain
    assert plain == [f"w{i}" for i in whole[:end]]
    # The other places that name an end: each alone, in a copy of the base.
    for file in ("config.json", "generation_config.json"):
        for value in (whole[2], [1, whole[2]]):
            copy = tmp_path / f"{file}-{value}".replace(" ", "")
            copy.mkdir()
            for one in base.iterdir():
                (copy / one.name).write_bytes(one.read_bytes())
            set_json(copy / file, eos_token_id=value)
            stopped = answer(CHAT, "--base", copy)
            assert stopped == [f"w{i}" for i in whole[: whole.index(whole[2])]]


def test_stop_tokens_and_texts(chat_base, answer, said):
    base, _, _ = chat_base
    go = lambda *stops: answer(
        PROMPT, "--base", base, *(x for stop in stops for x in ("--stop", stop))
    )
    whole = go()
    assert len(whole) > 6
    assert go(whole[3]) == whole[: whole.index(whole[3])]
    two = f"{whole[4]} {whole[5]}"  # two tokens, and the space between
    at = next(i for i in range(12) if whole[i : i + 2] == whole[4:6])
    assert go(two) == whole[:at]
    assert go("nowhere", two) == whole[:at]
    part = whole[2][-1] + " " + whole[3][:2]  # inside of both
    assert part in " ".join(whole)
    cut = " ".join(whole).partition(part)[0].split()
    got = go(part)
    assert len(got) in (len(cut) - 1, len(cut)) and got == cut[: len(got)]
    assert go("nowhere") == whole
    with pytest.raises(SystemExit, match="2"):  # while the command line is parsed
        said("generate", PROMPT, "--base", base, "--stop", "")


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_lines_of_standard_input(chat_base, said, monkeypatch, ends):
    base, *_ = chat_base
    prompts = [PROMPT, "w20 w30"]
    wanted = said("generate", *prompts, "--base", base)
    text = ends.join(["", prompts[0], "  ", prompts[1], "", ""])
    monkeypatch.setattr("sys.stdin", io.StringIO(text, newline=""))
    got = said("generate", "--base", base)
    assert got.status == 0 and got.lines == wanted.lines
    assert "3 blank lines are left out" in got.err
    monkeypatch.setattr("sys.stdin", io.StringIO(ends * 3, newline=""))
    refused = said("generate", "--base", base)
    assert refused.status == 2 and "nothing on standard input" in refused.err


def test_a_chat_needs_a_template(said, tmp_path):
    write_base(tmp_path / "base")
    refused = said("generate", PROMPT, "--base", tmp_path / "base", "--chat")
    assert refused.status == 2 and "has no chat template" in refused.err


# --- what was chosen in training goes along


def tuned(model, params, targets=("q_proj", "down_proj")):
    adapted = jp.attach(params, jp.lora(2), [*targets], key=jax.random.key(1))
    trainable, frozen = jp.partition(adapted)
    return jp.combine(jax.tree.map(lambda x: x + 0.3, trainable), frozen)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A base without template and padding, and an adapter trained with both."""
    folder = tmp_path_factory.mktemp("chosen")
    model, params = write_base(folder / "first")
    adapted = tuned(model, params)
    whole = answer_ids(model, adapted, CHAT_IDS)
    turn = ending(whole)
    write_base(folder / "base", ends={turn: "<turn>"})
    tokenizer = models.tokenizer(
        folder / "base", pad_token="<turn>", chat_template=TEMPLATE
    )
    told = {"tokenizer": models.tokenizer_options(tokenizer)}
    interop.save_adapter(adapted, folder / "own", metadata=told)
    return types.SimpleNamespace(
        folder=folder, base=folder / "base", own=folder / "own", turn=turn, whole=whole
    )


def same_tokenizer(folder, chosen):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.pad_token, theirs.chat_template) == ("<turn>", TEMPLATE)
    assert theirs.pad_token_id == chosen.turn
    return theirs


def test_an_own_adapter_is_asked_as_it_was_trained(chosen, answer):
    asked = answer(PROMPT, "--base", chosen.base, "--adapter", chosen.own, "--chat")
    end = chosen.whole.index(chosen.turn)
    assert asked == [f"w{i}" for i in chosen.whole[:end]]


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_a_merged_chat_stops_in_transformers(chosen, said, tmp_path):
    import transformers

    out = tmp_path / "merged"
    done = said("merge", chosen.own, "--base", chosen.base, "--out", out)
    assert done.status == 0, done.err
    told = json.loads((out / "generation_config.json").read_text())
    assert told["eos_token_id"] == [1, chosen.turn]
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == chosen.turn
    tokenizer = same_tokenizer(out, chosen)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    found = theirs.generate(**asked, max_new_tokens=12, do_sample=False)
    found = found[0, asked["input_ids"].shape[1] :].tolist()
    end = chosen.whole.index(chosen.turn)
    assert found == chosen.whole[: end + 1]  # theirs keeps the end
    # Control: the base's own files name one end, and it goes on.
    theirs.generation_config.eos_token_id = 1
    found = theirs.generate(**asked, max_new_tokens=12, do_sample=False)
    assert found.shape[1] - asked["input_ids"].shape[1] == 12


@pytest.mark.interop
def test_an_export_carries_the_tokenizer_and_its_import_keeps_it(
    chosen, said, answer, tmp_path
):
    peft, own = tmp_path / "peft", tmp_path / "own"
    done = said("export", chosen.own, "--base", chosen.base, "--out", peft)
    assert done.status == 0, done.err
    same_tokenizer(peft, chosen)
    done = said("import", peft, "--base", chosen.base, "--out", own)
    assert done.status == 0, done.err
    wanted = answer(PROMPT, "--base", chosen.base, "--adapter", chosen.own, "--chat")
    for folder in (peft, own):
        chat = (PROMPT, "--base", chosen.base, "--adapter", folder, "--chat")
        assert answer(*chat) == wanted
    rows = (f"--adapter=a={peft}", f"--adapter=b={own}", "--rows=b,a")
    done = said("generate", PROMPT, PROMPT, "--base", chosen.base, "--chat", *rows)
    assert done.status == 0, done.err


def test_a_base_s_own_tokenizer_is_copied_as_it_is(chat_base, said, tmp_path):
    base, turn, _ = chat_base
    model, params = models.load(base, head="causal_lm")
    interop.save_adapter(tuned(model, params), tmp_path / "own")
    set_json(base / "tokenizer_config.json", pad_token="<unk>")
    out = tmp_path / "merged"
    done = said("merge", tmp_path / "own", "--base", base, "--out", out)
    assert done.status == 0, done.err
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    told = json.loads((out / "generation_config.json").read_text())
    assert told["eos_token_id"] == [1, turn]


@pytest.mark.interop
@pytest.mark.parametrize("closed", [False, True])
def test_a_merged_classifier_takes_a_batch_in_transformers(closed, said, tmp_path):
    """Its config names the padding; texts contain, or end with, the end token."""
    import torch
    import transformers

    base, own, out = (tmp_path / name for name in ("base", "own", "merged"))
    model, params = write_base(base, head="classification", closed=closed)
    tokenizer = models.tokenizer(base)
    assert tokenizer.pad_token == ("<unk>" if closed else "</s>")
    adapted = tuned(model, params)
    told = {"tokenizer": models.tokenizer_options(tokenizer)}
    interop.save_adapter(adapted, own, metadata=told)
    done = said("merge", own, "--base", base, "--out", out, "--num-labels", 3)
    assert done.status == 0, done.err
    config = json.loads((out / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.pad_token_id
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    texts = ["w7 w9 w11 w13 w15", "w7 </s> w9", "w20", "</s> w30 </s> w31"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = transformers.AutoTokenizer.from_pretrained(out)
    batch = reader(texts, padding=True, padding_side="right", return_tensors="pt")
    assert 1 in batch["input_ids"][1, :2] and not batch["attention_mask"].all()
    with torch.no_grad():
        wanted = theirs.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.numpy()
    inputs = [
        batch[x].numpy().astype(np.int32) for x in ("input_ids", "attention_mask")
    ]
    got = np.asarray(model.apply({"params": jp.merge(adapted)}, *inputs))
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    end = int(inputs[1][1].sum())  # alone, without a mask
    alone = model.apply({"params": jp.merge(adapted)}, inputs[0][1:2, :end])
    np.testing.assert_allclose(alone, got[1:2], atol=2e-5)
