"""What a comparison may ask for."""

from pathlib import Path

import pytest

from jaxpeft import compare

ROOT = Path(__file__).parents[2]
TEXT = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    changes = dict(train_for="9 steps")
    config.tasks = dict(a=dict(config={quickstart!r}, changes=changes))
    lora = dict(name="lora", rank=2, alpha=4.0)
    config.methods = dict(
        lora=dict(changes=dict(adapter=lora)),
        ia3=dict(changes=dict(adapter=dict(name="ia3")), grid=dict()),
    )
    config.grid = dict(
        optimizer=dict(learning_rate=(1e-3, 1e-2)), adapter=dict(alpha=(1.0, 2.0))
    )
    config.seeds, config.choose_with, config.reference = (3, 4), (4,), "lora"
    config.budget = dict()
    {change}
    return config
"""


@pytest.fixture
def read(tmp_path):
    def read(change="pass"):
        file = tmp_path / "some.py"
        quickstart = str(ROOT / "configs/quickstart.py")
        file.write_text(TEXT.format(quickstart=quickstart, change=change))
        return compare.read_comparison(file)

    return read


def test_the_rows(read):
    asked = read()
    rows = asked.rows["a", "lora"]
    assert len(rows) == 8 and [row.seed for row in rows] == [4] * 4 + [3] * 4
    names = [row.at for row in rows[:4]]
    assert set(names) == {
        f"alpha={alpha},learning_rate={rate}"
        for alpha in (1.0, 2.0)
        for rate in (0.001, 0.01)
    }
    first = rows[0]
    assert first.name == f"a/lora/{first.at}/seed=4"
    assert first.config.adapter.to_dict() == {
        "name": "lora",
        "rank": 2,
        "alpha": first.point["adapter.alpha"],
    }
    assert first.config.train_for == "9 steps" and first.config.is_locked
    other = asked.rows["a", "ia3"]
    assert [row.at for row in other] == ["as-given", "as-given"]
    assert other[0].config.adapter.to_dict() == {"name": "ia3"}
    assert asked.methods == ["lora", "ia3"] and asked.tasks == ["a"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("del config.budget", r"no comparison: missing \['budget'\]"),
        ("config.epochs = 3", r"unknown \['epochs'\]"),
        ("config.seeds = (3, 3)", "different numbers"),
        ("config.choose_with = (5,)", r"some of the seeds \(3, 4\)"),
        ("config.choose_with = ()", "some of the seeds"),
        ("config.reference = 'dora'", "'dora' is none of the methods"),
        ("config.methods.lora.changes.seed = 1", r"\['seed'\], which is for tasks"),
        ("config.methods.lora.changes.train_for = '1 steps'", "'train_for'"),
        ("config.methods.lora.steps = 1", r"\['steps'\]; allowed: changes, grid"),
        ("config.grid.optimizer = dict(b1=0.9)", "must be a tuple of values"),
        ("config.grid.optimizer.rate = (1e-3,)", "rate`: adamw takes no such argument"),
        ("config.grid.adapter = dict(alhpa=(1.0,))", "alhpa.*takes no such argument"),
        ("config.grid.adapter = dict(rank=(0, 1))", "rank"),
        ("config.tasks.a.changes.max_lenght = 3", "no field.*max_lenght"),
        ("config.tasks.a.changes.max_length = -3", "max_length"),
        ("config.tasks.a = dict(file='x.py')", "is dict"),
        ("config.budget = dict(total=3)", "is dict"),
        ("config.grid.adapter.alpha = (1.0, 1.0)", r"rows have \d+ names, 'a/lora/"),
        ("config.grid.optimizer = dict(schedule=('a b', 'a-b'))", "schedule"),
        ("config.methods['a/b'] = dict()", "'a/b' names a folder"),
        ("config.methods.lora.changes.stages = ('univresal',)", "'univresal'; write"),
    ],
)
def test_what_is_refused(read, change, words):
    with pytest.raises(ValueError, match=words):
        read(change)


def test_a_grid_may_take_any_argument_of_the_optimizer(read):
    asked = read("config.grid.optimizer = dict(lora_plus_ratio=(4.0, 16.0))")
    ratios = [row.config.optimizer.lora_plus_ratio for row in asked.rows["a", "lora"]]
    assert set(ratios) == {4.0, 16.0}


def test_some_methods_alone(read):
    whole = read()
    some = whole.of(["lora"])
    assert [*some.rows] == [("a", "lora")] and some.methods == ["lora"]
    assert some.rows["a", "lora"] == whole.rows["a", "lora"]
    with pytest.raises(ValueError, match="'dora' is none of lora, ia3"):
        whole.of(["lora", "dora"])
    with pytest.raises(ValueError, match="lack 'lora'"):
        whole.of(["ia3"])
