"""What a study must not do in silence: round, ask what was learnt, guess, forget."""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import data, dimension, interop, study
from jaxpeft.cli import _dimension, main
from jaxpeft.data._prompt_forms import FORMS
from jaxpeft.study import _collect, _findings, _tiny
from jaxpeft.study._estimate import Result


@pytest.fixture(scope="module")
def adapted():
    _, params = study.tiny_model()
    return jp.attach(params, jp.lora(2), ["q_proj"], key=jax.random.key(0))


@pytest.fixture(scope="module")
def tiny_llama_16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "base"
    model, params = study.tiny_model()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config = _tiny._CONFIG | {"architectures": ["LlamaForCausalLM"]}
    interop.save_hf(params, folder, names=model.names, config=config)
    return folder, model, params


def test_a_checkpoint_of_16_bits_is_asked_in_32(tiny_llama_16, tmp_path):
    """Also with an adapter that was trained on its values in 32."""
    folder, model, params = tiny_llama_16
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    trained = jp.attach(wide, jp.lora(2), ["q_proj"], key=jax.random.key(0))
    interop.save_adapter(trained, tmp_path / "adapter")
    given = argparse.Namespace(model=str(folder))
    for adapter in (None, str(tmp_path / "adapter")):
        found, _ = _dimension._load(given, adapter)
        assert found.dtype == jnp.float32


def test_rows_it_was_trained_on_are_not_asked(adapted, tmp_path, capsys):
    config = {"data": {"name": "prompted/trec", "train": 30}}
    interop.save_adapter(adapted, tmp_path / "run/adapter", metadata={"config": config})
    given = ["dimension", "--model", "tiny", "--task", "trec", "--n-eval", "5"]
    given += ["--out", str(tmp_path / "out"), "--sft", str(tmp_path / "run")]
    for more in (("--n-train", "20"), ("--n-train", "30", "--seed", "1")):
        assert main([*given, *more]) == 2
        assert "Write --n-train 30 --seed 42" in capsys.readouterr().err


def test_the_same_weights_saved_twice_are_one_adapter(adapted, tmp_path):
    keys = []
    for name in ("one", "two"):
        interop.save_adapter(adapted, tmp_path / name)
        keys.append(_collect._identity(study.Run("sft", 0, str(tmp_path / name))))
    assert keys[0]["adapter_key"] == keys[1]["adapter_key"]
    other = jax.tree.map(lambda x: x + 1, adapted)
    interop.save_adapter(other, tmp_path / "other")
    key = _collect._identity(study.Run("sft", 0, str(tmp_path / "other")))
    assert key["adapter_key"] != keys[0]["adapter_key"]


def test_no_spread_is_no_verdict():
    def result(shots, dim):
        one = dimension.IdEstimate(dim, 0.1, 99, 0, 0, False, "twonn-linear")
        meta = {"shots": shots, "paradigm": "icl"}
        return Result(
            f"icl-{shots}", Path(), meta, None, None, {"twonn-linear": [one] * 4}
        )

    runs = {f"icl-{k}": result(k, dim) for k, dim in ((0, 5.0), (10, 10.0), (20, 30.0))}
    for found in _findings.findings(runs, "twonn-linear"):
        assert found.verdict == "not tested", found


def test_what_is_said_of_estimates():
    sure = dimension.IdEstimate(5.0, 0.1, 99, 0, 0, False, "mle-5", (5.0, 5.1), 0.1)
    poor = sure._replace(fit_999=0.05)
    assert study.remarks([sure, sure._replace(fit_999=0.2)]) == []
    (said,) = study.remarks([sure, poor])
    assert said.startswith("poor fit (1 of 2): ")
    (said,) = study.remarks([sure._replace(halves=())])
    assert "8 to 18 of them: estimate with --sd subsample" in said
    x = np.random.default_rng(0).normal(size=(60, 2))
    assert study.find_estimator("gride-3-6", sd="analytic")(x).method == "gride-3-6"
    with pytest.raises(ValueError, match="and gride-N1-N2 for any two, gride-8-16"):
        study.find_estimator("gride-3")


def test_a_poor_fit_is_printed(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(400, 4))
    x[200:] = x[:200] + 0.02 * np.random.default_rng(1).normal(size=(200, 4))
    np.save(tmp_path / "x.npy", x)
    given = ["dimension", "points", "--file", str(tmp_path / "x.npy")]
    assert main([*given, "--estimator", "twonn-linear", "--sd", "analytic"]) == 0
    printed = capsys.readouterr()
    assert printed.out.rstrip().endswith(" poor")
    assert "poor fit (1 of 1): distances" in printed.err
    assert "analytic sds are too small" in printed.err


def test_too_few_rows_for_halves_are_not_taken_for_one_point():
    states = np.random.default_rng(0).normal(size=(2, 90, 4)).astype(np.float32)
    with pytest.raises(ValueError, match="halves of more than 50"):
        dimension.id_profile(states, lambda x: dimension.mle(x, k=50, sd="subsample"))


def test_a_new_line_in_a_template_is_one():
    given = _dimension_arguments("--template", r"{text}\nGood?", "--task", "trec")
    given.n_train, given.n_eval = 2, 2
    assert _dimension._records(given).train[0].input.endswith("\nGood?")


def _dimension_arguments(*given):
    parser = argparse.ArgumentParser()
    _dimension.arguments(parser)
    return parser.parse_args([*given])


def test_what_a_step_does_not_use_is_refused(tmp_path, capsys):
    given = ["dimension", "report", "--runs", str(tmp_path), "--out", str(tmp_path)]
    for more in (("--sd", "analytic"), ("--estimator", "twonn-linear,mle-25")):
        assert main([*given, *more]) == 2
        assert more[0] in capsys.readouterr().err
    given = ["dimension", "--model", "tiny", "--task", "trec", "--out", str(tmp_path)]
    assert main([*given, "--runs", "other"]) == 2
    assert "takes no --runs" in capsys.readouterr().err


@pytest.mark.parametrize("task", sorted(FORMS))
def test_the_tiny_model_tells_the_words_of_every_task_apart(task):
    """Which begin with the same byte where bytes are all that it reads."""
    template, words = FORMS[task]
    record = data.Record("which?", words[0])
    records = data.PromptSet(task, (), (), (record,), words, {})
    for how in ("in_context", "bare"):
        found = study.ask(
            records,
            study.tiny_tokenizer(words),
            vocab_size=384,
            max_length=99,
            label_tokens=how,
        )
        assert len(set(found.tokens[0].tolist())) == len(words)
    firsts = {word.encode()[:1] for word in words}
    if len(firsts) < len(words):
        with pytest.raises(ValueError, match="begin with the same token"):
            study.ask(records, study.tiny_tokenizer(), vocab_size=384, max_length=99)


def test_the_tiny_model_on_trec(tmp_path, capsys):
    given = ["dimension", "collect", "--model", "tiny", "--task", "trec", "--n-eval"]
    given += ["4", "--shots", "0,1", "--out", str(tmp_path / "study")]
    assert main(given) == 0, capsys.readouterr().err
    assert "icl-1: 4 prompts" in capsys.readouterr().err


def test_the_tiny_model_has_room_for_so_many_words():
    assert len(study.tiny_tokenizer([f"w{i}" for i in range(125)])) == 384
    with pytest.raises(ValueError, match="126 labels are too many .* room for 125"):
        study.tiny_tokenizer([f"w{i}" for i in range(126)])


def test_files_of_records_in_another_encoding(tmp_path):
    row = '{"input": "café?", "output": "yes"}\n'
    (tmp_path / "r.json").write_bytes(row.encode("latin-1"))
    file = str(tmp_path / "r.json")
    given = _dimension_arguments("--task", file, "--eval", file)
    with pytest.raises(ValueError, match='encoding="latin-1"'):
        _dimension._records(given)
    given.task_option = ["encoding=latin-1"]
    assert _dimension._records(given).train[0].input == "café?"
    given.task_option = ["cache=x"]
    with pytest.raises(ValueError, match="but delimiter, quoting and encoding"):
        _dimension._records(given)
    tsv = tmp_path / "r.tsv"
    tsv.write_text('input\toutput\n"say ""hi""!"\tyes\n', encoding="utf-8")
    given = _dimension_arguments("--task", str(tsv), "--eval", str(tsv))
    with pytest.raises(ValueError, match="Write quoting=True"):
        _dimension._records(given)
    given.task_option = ["quoting=True"]  # as the message says
    assert _dimension._records(given).train[0].input == 'say "hi"!'
