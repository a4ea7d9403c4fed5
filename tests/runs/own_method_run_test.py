"""A method of another package in a config: trained, saved, predicted with."""

import importlib
import json
import sys

import jax
import pytest

import jaxpeft as jp
import train
from jaxpeft import data, interop, models, runs, serving, training
from jaxpeft.cli import main
from jaxpeft.tree import _adapter

# MiSS (arXiv 2409.15371): the features of the input are added up in r groups, and one
# trained matrix reads the sums.
METHOD = '''
import jax
import jax.numpy as jnp
from jaxpeft.tree import Adapter, Factors, Term, Where, method


@method
def miss(rank: int = 4) -> Adapter:
    """Matrix shard sharing."""

    def init(key, kernel, rank, alpha):
        return {}, {"d": jnp.zeros((rank, kernel.shape[1]), kernel.dtype)}

    def factors(kernel, frozen, trainable, call):
        d = trainable["d"]
        groups = jnp.arange(kernel.shape[0]) % d.shape[0]
        return Factors((Term(jax.nn.one_hot(groups, d.shape[0], dtype=d.dtype), d),))

    return Adapter(init, factors, where=Where(rank=rank))
'''
CONFIG = """
import importlib.util
import their_package.miss

def get_config():
    spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config().unlock()
    config.adapter = None
    config.adapter = dict(name="miss", rank=2)
    config.train_for = config.evaluate_every = config.save_every = "2 steps"
    config.log.tensorboard = False
    return config.lock()
"""


@pytest.fixture
def theirs(tiny, tmp_path, monkeypatch):
    """The path of their config; nothing of theirs is imported yet."""
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "miss.py").write_text(METHOD)
    (package / "config.py").write_text(CONFIG.format(tiny=str(tiny)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_adapter, "_METHODS", dict(_adapter._METHODS))
    yield package / "config.py"
    for name in ("their_package", "their_package.miss"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_it_is_trained_saved_and_predicted_with(theirs, tmp_path, capsys, monkeypatch):
    config = runs.load_config(theirs, ["adapter.rank=3"])
    results = train.run(config, tmp_path / "run")
    assert results["steps"] == 2 and results["trainable"] > 0
    task, mesh = data.task(config.data), training.make_mesh()
    key, *_ = jax.random.split(jax.random.key(config.seed), 4)
    model, params = runs.load_base(config, task, mesh, key)
    folder = tmp_path / "run/adapter"
    adapted = interop.load_adapter(folder, params, names=model.names)
    ranks = {n.site.ranks[0] for n in jp.tree.nodes(adapted) if n.adapter.where.rank}
    assert ranks == {3}
    question = interop.adapter_info(folder)["metadata"]["questions"][0]
    rows = task.splits["validation"]
    found = serving.predict(
        model,
        adapted,
        models.tokenizer(config.model.name),
        [{"text": row["text"]} for row in rows],
        data.Question.from_json(question),
        max_length=config.max_length,
        lengths=config.lengths,
    )
    right = [f["label"] == row["label"] for f, row in zip(found, rows, strict=True)]
    assert sum(right) / len(right) == results["after"]["accuracy"]

    # The command reads the folder, too, where the module is imported; it imports none.
    rows = [json.dumps({"text": row["text"]}) for row in rows]
    (tmp_path / "asked.jsonl").write_text("\n".join(rows))
    asked = ["predict", "--adapter", str(tmp_path / "run"), "--input"]
    capsys.readouterr()  # what the run has said
    assert main([*asked, str(tmp_path / "asked.jsonl")]) == 0
    again = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    assert again == [one["label"] for one in found]
    monkeypatch.delitem(_adapter._METHODS, "miss")
    assert main([*asked, str(tmp_path / "asked.jsonl")]) == 2
    assert "unknown method 'miss'" in " ".join(capsys.readouterr().err.split())


def test_a_name_that_nobody_has_entered_says_how(tiny_config, theirs, tmp_path):
    config = tiny_config()
    with config.unlocked():
        config.adapter = None
        config.adapter = dict(name="miss")
    words = "`config.adapter.name`: unknown method 'miss'.*import it first, at the top"
    with pytest.raises(ValueError, match=words):
        runs.check_run(config, tmp_path / "run", train.attach_all)
    importlib.import_module("their_package.miss")
    assert runs.make_adapter(config).where.rank == 4
    with config.unlocked():
        config.adapter.rnak = 2
    with pytest.raises(ValueError, match="`config.adapter.rnak`: miss takes no such"):
        runs.make_adapter(config)
