import ml_collections
import pytest

from jaxpeft import runs

FILE = """
import ml_collections
def get_config(task="cola", size="base"):
    config = ml_collections.ConfigDict()
    config.task, config.size = task, size
    config.adapter = dict(name="indent", rank=8, alpha=16.0, flag=True)
    config.model = dict(name="some")
    config.targets = ("query", "key")
    config.limit = None
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("adapter.rank=16", 16),
        ("adapter.alpha=8", 8.0),
        ("adapter.alpha=1e-4", 1e-4),
        ("adapter.flag=false", False),
        ("adapter.name=kasa", "kasa"),
        ("targets=value", ("value",)),
        ("targets=query,value", ("query", "value")),
        ("targets=('a', 'b')", ("a", "b")),
        ("limit=3", 3),
        ("limit=None", None),
        ("limit=train[:9%]", "train[:9%]"),
        ("task=a=b", "a=b"),
    ],
)
def test_overrides_take_the_type_of_what_they_replace(file, text, value):
    config = runs.load_config(file, [text])
    got = runs.flat_config(config)[text.partition("=")[0]]
    assert got == value and type(got) is type(value)
    with pytest.raises((AttributeError, KeyError)):
        config.new_field = 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter.rnak=16", "no such field; nearest: .'adapter.rank'"),
        ("rank=16", "no such field; nearest: .'adapter.rank'"),
        ("adapter.rank.x=16", "no such field"),
        ("adapter.rank=1.5", "adapter.rank` is of type int .now 8. and cannot be"),
        ("adapter.alpha=fast", "is of type float"),
        ("adapter.flag=maybe", "is of type bool"),
        ("model=3", "is a section, not a value; set one of its fields: .'model.name'"),
        ("adapter=kasa(3)", "argument without a name; write kasa.argument=value"),
        ("adapter=kasa(rank=eight)", "rank=eight is no number.*rank='eight'"),
        ("adapter=kasa(rank=8", "is no call; write name or name"),
        ("adapter=kasa(rank=8))", "cannot be read"),
        ("adapter=kasa(rank=8)(alpha=3)", "more than one call"),
        ("adapter=kasa(rank=8, rank=9)", "says rank twice"),
        ("adapter=kasa(name='x')", "says name twice"),
        ("adapter=kasa(**{'rank': 3})", "argument without a name"),
        ("adapter=kasa(rank=__import__('os').getpid())", "nothing is evaluated"),
        ("adapter=", "is no call"),
        ("adapter.rank", "has no value"),
    ],
)
def test_a_wrong_override_names_the_field(file, text, message):
    with pytest.raises(ValueError, match=message):
        runs.load_config(file, [text])


@pytest.mark.parametrize(
    ("text", "section"),
    [
        ("adapter=bora(rank=16)", {"name": "bora", "rank": 16}),
        ("adapter=dora", {"name": "dora"}),
        (
            "adapter=files(train='a (1).csv', labels=('a', 'b'), x=None)",
            {"name": "files", "train": "a (1).csv", "labels": ("a", "b"), "x": None},
        ),
    ],
)
def test_a_section_as_a_call(file, text, section):
    config = runs.load_config(file, [text, "adapter.name=other"])
    assert config.adapter.to_dict() == section | {"name": "other"}  # and not the old's


def test_ranks_as_calls(tmp_path):
    file = tmp_path / "ranks.py"
    there = tmp_path / "ranks(1).json"
    there.write_text("{}")
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    ranks = dict(before='gelora(budget=0.5)', during='')\n"
        "    return ConfigDict(dict(adapter='lora(rank=2)', data='trec', ranks=ranks))"
    )
    config = runs.load_config(file)
    assert config.to_dict() == {
        "adapter": {"name": "lora", "rank": 2},
        "data": {"name": "trec"},
        "ranks": {"before": {"name": "gelora", "budget": 0.5}, "during": None},
    }
    changed = runs.load_config(
        file, ["ranks.before=uniform", "ranks.during=ggm(by='x')"]
    )
    assert changed.ranks.before == "uniform"  # or a file of ranks: text stays
    assert changed.ranks.during.to_dict() == {"name": "ggm", "by": "x"}
    assert runs.load_config(file, [f"ranks.before={there}"]).ranks.before == str(there)


def test_the_file_takes_arguments(file):
    config = runs.load_config(f"{file}:task=rte,size=large")
    assert (config.task, config.size) == ("rte", "large")
    with pytest.raises(ValueError, match="'tsk=rte' is not an arg.*'task', 'size'"):
        runs.load_config(f"{file}:tsk=rte")


def test_a_missing_file_names_its_neighbours(file):
    with pytest.raises(ValueError, match="no file .*rum.py.*nearest.*run.py"):
        runs.load_config(file.with_name("rum.py"))
    empty = file.with_name("empty.py")
    empty.write_text("")
    with pytest.raises(ValueError, match="has no function get_config"):
        runs.load_config(empty)


def test_json_and_back(file):
    config = runs.load_config(file)
    again = runs.config_from_json(runs.config_to_json(config))
    assert again == config and again.is_locked
    changed = runs.load_config(file, ["adapter.rank=4", "targets=value"])
    assert runs.config_differences(config, again) == []
    assert runs.config_differences(config, changed) == [
        "adapter.rank: 8, now 4",
        "targets: ('query', 'key'), now ('value',)",
    ]
    fewer = ml_collections.ConfigDict({"seed": 0})
    assert "seed: absent, now 0" in runs.config_differences(config, fewer)


def test_call_named_says_what_there_is():
    import textwrap

    section = lambda **fields: ml_collections.ConfigDict(fields)
    with pytest.raises(ValueError, match=r"config.q.name` 'indnet'.*nearest.*indent"):
        runs.call_named(textwrap, section(name="indnet"), "q")
    with pytest.raises(ValueError, match="config.q.prefx`.*nearest: .'prefix'"):
        runs.call_named(textwrap, section(name="indent", text="a", prefx=""), "q")


@pytest.mark.parametrize(
    "text", ["200", "0 steps", "-1 epochs", "3 days", "1.2.3 steps"]
)
def test_a_length_needs_a_unit(text):
    with pytest.raises(ValueError, match="config.train_for` is .*'200 steps' or"):
        runs.count_steps(text, 10, field="train_for")


def test_fields_that_may_differ():
    old, new = (
        ml_collections.ConfigDict(
            {"mesh": {"data": d}, "meshes": d, "log": {"every": d}}
        )
        for d in (1, 2)
    )
    found = runs.config_differences(old, new, free=("mesh", "log.every"))
    assert found == ["meshes: 1, now 2"]
