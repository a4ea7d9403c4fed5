"""Every config loads, and takes one step."""

import ast
import itertools
import json
import re
from pathlib import Path

import pytest

import jaxpeft as jp
import train
from jaxpeft import compare, data, runs
from jaxpeft.data.tasks import _packaged

ROOT = Path(__file__).parents[2]
COMPARED = sorted((ROOT / "configs").glob("compare_*.py"))
PATHS = sorted(set((ROOT / "configs").glob("*.py")) - set(COMPARED))
# Steps of the others are tried on small rows; this one's is traced at full size.
STEPS = [path for path in PATHS if path.stem != "commonsense_kasa"]
QUICKSTART = ROOT / "configs/quickstart.py"
GLUE = ("cola", "sst2", "mrpc", "stsb", "qnli", "rte")
AT_HAND = ("trec", "sms", "movies", "reasoning_gym", "openbookqa", "mixture")
AT_HAND += ("prompted",)
SETTINGS = list(itertools.product(GLUE, ("base", "large")))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_is_locked_and_has_every_field(path):
    config, quickstart = runs.load_config(path), runs.load_config(QUICKSTART)
    assert config.is_locked
    # These hold what the method, its ranks and the task take.
    sections = {"adapter", "ranks", "data", "stage_changes"}
    fields = lambda c: {
        name for name in runs.flat_config(c) if name.split(".")[0] not in sections
    }
    assert fields(config) == fields(quickstart)
    assert set(config.ranks) == {"before", "during"}
    assert runs.config_from_json(runs.config_to_json(config)) == config


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_says_how_to_run_it_and_what_came_out(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    command = f"python train.py --config configs/{path.name}"
    assert ("python train.py" if path == QUICKSTART else command) in text
    assert "(Not run yet.)" in text or re.search(r"Measured: .*\d", text)


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_what_is_compared(path):
    asked = compare.read_comparison(path)
    every = [row for rows in asked.rows.values() for row in rows]
    for row in every:
        assert row.config.is_locked and row.config.seed == row.seed
        runs.make_adapter(row.config)
    assert len({row.name for row in every}) == len(every)
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f"jaxpeft compare configs/{path.name}" in text
    assert "(Not run yet.)" in text or re.search(r"Measured: .*\d", text)


@pytest.mark.parametrize(("task", "model"), SETTINGS)
def test_every_setting_of_glue(task, model):
    config = runs.load_config(f"{ROOT}/configs/glue_kasa.py:task={task},model={model}")
    assert hasattr(data.tasks, config.data.name)
    assert runs.make_adapter(config).where.rank == 8
    assert runs.count_steps(config.train_for, 100, field="train_for") >= 1000
    assert max(config.lengths) == config.max_length


def test_an_unknown_task_of_glue():
    with pytest.raises(
        ValueError, match="tasks are .*'rte'.*Write configs/glue_kasa.py:"
    ):
        runs.load_config(f"{ROOT}/configs/glue_kasa.py:task=ret")


# Sizes of the models that published settings need: what their config.json says.
ROBERTA = {"model_type": "roberta", "type_vocab_size": 1, "vocab_size": 50_265}
ROBERTA |= {"max_position_embeddings": 514, "layer_norm_eps": 1e-5}
ROBERTA |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
ROBERTA_BASE = ROBERTA | {"hidden_size": 768, "intermediate_size": 3072}
ROBERTA_BASE |= {"num_hidden_layers": 12, "num_attention_heads": 12}
ROBERTA_LARGE = ROBERTA | {"hidden_size": 1024, "intermediate_size": 4096}
ROBERTA_LARGE |= {"num_hidden_layers": 24, "num_attention_heads": 16}
LLAMA_3 = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336}
LLAMA_3 |= {"num_hidden_layers": 32, "vocab_size": 128_256}
LLAMA_3 |= {"num_attention_heads": 32, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("config", "model", "adapters", "head"),
    [
        # Of 24 and of 48 kernels rank 8 and 64 entries of the core; classifiers.
        ("glue_kasa.py:model=base", ROBERTA_BASE, 296_448, 592_130),
        ("glue_kasa.py:model=large", ROBERTA_LARGE, 789_504, 1_051_650),
        # Rank 32 at q, k, v, up and down of 32 layers, 32 entries of the diagonal.
        ("commonsense_kasa.py", LLAMA_3, 56_628_224, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*truncation=.*drops nothing")
def test_published_settings_are_traced_at_full_size(
    config, model, adapters, head, tmp_path
):
    """No checkpoint and no rows: the step of a config on the shapes of its model."""
    (tmp_path / "config.json").write_text(json.dumps(model))
    config, counts = runs.load_config(f"{ROOT}/configs/{config}"), []
    with config.unlocked():
        config.model.name = str(tmp_path)
        config.accumulate = 1  # the rows are cut over the devices of the tests

    def attach(*given):
        tree = train.attach_all(*given)
        counts.append(jp.count(tree))
        return tree

    how = dict(attach=attach, make_step=train.make_step)
    flops = runs.step_flops(config, num_labels=2 if head else None, **how)
    assert counts[0][0] == adapters + head
    # Forward and backward through all kernels of the layers, their gradients apart.
    width, middle = model["hidden_size"], model["intermediate_size"]
    keys = model.get("num_key_value_heads", 1) / model["num_attention_heads"]
    gated = model["model_type"] == "llama"
    layer = width * width * (2 + 2 * (keys if gated else 1))
    layer += width * middle * (3 if gated else 2)
    tokens = config.batch_size * max(config.lengths)
    least = 2 * 2 * tokens * layer * model["num_hidden_layers"]
    assert least < flops < 2.5 * least
    assert config.adapter.alpha == 2 * config.adapter.rank


@pytest.mark.slow
@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_it_takes_one_step(path, tiny_config, tiny_llama, tmp_path, monkeypatch):
    """On the small model; GLUE, whose data are not at hand, on the small rows.

    Of the packaged texts it reads every tenth: whole, they are read in their own tests.
    """
    config, small = runs.load_config(path), tiny_config()
    if not config.ranks.before:  # that needs the inputs of many texts
        whole = _packaged._task
        fewer = lambda name, rows, *options: whole(name, rows[::10], *options)
        monkeypatch.setattr(_packaged, "_task", fewer)
    with config.unlocked():
        writes = config.model.name == "smollm2"
        config.model.name = str(tiny_llama) if writes else small.model.name
        config.batch_size = config.eval_batch_size = 64
        config.train_for = config.evaluate_every = config.save_every = "1 step"
        steps = 1
        if config.ranks.during is not None:
            config.ranks.during.initial_steps = 0
            if collects := "collect_steps" in config.ranks.during:
                config.ranks.during.collect_steps, steps = 2, 3
                config.train_for, config.evaluate_every = "3 steps", "3 steps"
            else:  # one step is the last pruning's
                config.ranks.during.final_steps = 0
        config.stages = config.stages[:2]
        config.stage_changes = {kind: {} for kind in config.stage_changes}
        config.log.tensorboard = False
        if config.data.name.partition("/")[0] not in AT_HAND:
            config.data, config.head = small.data, small.head
        if config.model.quantise:  # these kernels hold no group of 64
            config.model.quantise = "int8"
        if "rank" in config.adapter:  # the small model's kernels are no larger
            config.adapter.rank = min(config.adapter.rank, 16)
        config.max_length = min(config.max_length, 64)
        config.lengths = (config.max_length,)
    results = train.run(config, tmp_path / "run")
    assert results["steps"] == results["best_step"] == steps
    assert results["after"].keys() == results["before"].keys()
    if config.ranks.during is not None:
        ranks = results["ranks"].values()
        mean = None if collects else config.ranks.during.target_rank
        assert sum(ranks) == (
            mean * len(ranks) if mean else config.ranks.during.n_select
        )
