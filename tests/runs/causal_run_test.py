"""train.py on a language model: sums a tiny Llama learns by heart."""

import numpy as np
import pytest

import train
from jaxpeft import interop, runs


def test_a_run(tiny_llama, tiny_config, tmp_path):
    config, path = tiny_config(), str(tiny_llama / "sums.jsonl")
    with config.unlocked():
        config.model.name = str(tiny_llama)
        config.data = dict(
            name="texts",
            train=path,
            validation=path,
            prompt="q",
            completion="a",
            metrics=("perplexity", "exact_match", "token_accuracy"),
            pack=True,
        )
        config.max_length, config.lengths = 28, (28,)
        config.targets, config.head = ("q_proj", "v_proj", "down_proj"), ()
        config.adapter = dict(name="lora", rank=8, alpha=16.0)
        config.optimizer.learning_rate = 2e-2
        config.batch_size, config.eval_batch_size = 8, 16
        config.train_for = config.evaluate_every = "30 steps"
        config.save_every = "15 steps, kept"
        config.log.tensorboard = False
    results = train.run(config, tmp_path / "run")
    before, after = results["before"], results["after"]
    names = {"perplexity", "exact_match", "token_accuracy", "loss"}
    assert before.keys() == after.keys() == names
    assert results["metric"] == "perplexity"
    assert after["perplexity"] == pytest.approx(np.exp(after["loss"]), rel=1e-5)
    assert after["perplexity"] < before["perplexity"] / 4
    assert after["token_accuracy"] > before["token_accuracy"] + 0.3
    kept = {p.name: interop.adapter_info(p) for p in tmp_path.glob("run/adapters/*")}
    steps = {name: info["metadata"]["step"] for name, info in kept.items()}
    assert steps == {"15": 15, "30": 30}
    # Every row is there, four to a sequence.
    counts = {"rows": 100, "continued": 0, "left_out": 0, "tokens": 700}
    facts = results["data"]["train"]
    assert facts == {**counts, "learnt_tokens": 200, "sequences": 25}
    assert results["data"]["validation"]["rows"] == 100
    train_steps = runs.read_metrics(tmp_path / "run", "train")
    # Eight sequences of eight learnt tokens.
    assert {event["weight"] for event in train_steps} == {64.0}
