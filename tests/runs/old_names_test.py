"""Configs and folders from before ranks were one section are read as they were."""

import json

import ml_collections
import pytest

import train
from jaxpeft import runs, training

OLD = """
import ml_collections
def get_config():
    config = ml_collections.ConfigDict()
    config.allocation = "ranks.json"
    config.allocate = dict(name="importance", target_rank=2)
    config.stage_changes = dict(domain=dict(allocation=None, seed=1))
    return config.lock()
"""


def renamed(fields):
    """The fields as they were called before."""
    ranks = fields.pop("ranks")
    return fields | {"allocation": ranks["before"], "allocate": ranks["during"]}


def test_a_config_with_old_names_has_the_new_ones(tmp_path):
    (tmp_path / "old.py").write_text(OLD)
    config = runs.load_config(tmp_path / "old.py", ["ranks.during.target_rank=3"])
    assert config.to_dict() == {
        "ranks": {
            "before": "ranks.json",
            "during": {"name": "importance", "target_rank": 3},
        },
        "stage_changes": {"domain": {"ranks": {"before": None}, "seed": 1}},
    }
    assert config.is_locked


def test_a_config_that_has_both_names_is_refused(tmp_path):
    """One made out of the quickstart's has the section already: empty is no value."""
    both = OLD.replace(
        "    return", "    config.ranks = dict(before={}, during=None)\n    return"
    )
    (tmp_path / "both.py").write_text(both.replace("{}", "None"))
    assert runs.load_config(tmp_path / "both.py").ranks.before == "ranks.json"
    (tmp_path / "both.py").write_text(both.replace("{}", "'other.json'"))
    with pytest.raises(ValueError, match="`config.allocation` is `config.ranks.before"):
        runs.load_config(tmp_path / "both.py")


def test_a_config_from_before_a_field_attends_as_it_did(tiny_config):
    config = tiny_config()
    fields = config.to_dict()
    del fields["model"]["attention"], fields["input"]
    old = runs.config_from_json(json.dumps(fields))
    assert old.model.attention is None and old.is_locked
    assert old.input.to_dict() == {"workers": 0, "prefetch": 0}
    before = ml_collections.ConfigDict(fields)
    assert runs.config_differences(before, config, free=runs.FREE) == []
    runs.check_fields(old)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("allocation", "ranks.before"),
        ("allocation.rank", "ranks.before.rank"),
        ("allocate.target_rank", "ranks.during.target_rank"),
    ],
)
def test_the_command_line_takes_new_names_alone(old, new, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        argv = [f"--config={tiny}", f"--workdir={tmp_path}", f"--config.{old}=2"]
        train.main(argv)
    assert caught.value.code == 2
    said = f"`--config.{old}` is `--config.{new}` now; write that"
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_config_that_was_read_by_nobody_is_told(tiny_config):
    config = ml_collections.ConfigDict(renamed(tiny_config().to_dict()))
    with pytest.raises(ValueError, match="`config.allocate` is `config.ranks.during`"):
        runs.check_fields(config)
    runs.check_fields(training.with_new_names(config))


@pytest.mark.slow
def test_a_folder_from_before_is_resumed(tiny_config, tmp_path):
    """Its config and its checkpoints' have the old names."""
    config = tiny_config("train_for=2 steps", "evaluate_every=1 step")
    with config.unlocked():
        config.log.tensorboard = False
        config.adapter = None
        config.adapter = dict(name="adalora", rank=4)
        config.ranks.during = dict(
            name="importance", target_rank=2, initial_steps=0, final_steps=0, every=1
        )
    results = train.run(config, tmp_path)
    files = [tmp_path / "config.json"]
    files += [p / "meta/metadata" for p in (tmp_path / "checkpoints").glob("[0-9]*")]
    assert len(files) > 1
    for file in files:
        found = json.loads(file.read_text())
        if "meta" in found:  # nor was it sealed
            found = found["meta"] | {"config": renamed(found["meta"]["config"])}
            (file.parents[1] / "metrics").mkdir()
            scores = json.dumps(found.pop("scores"))
            (file.parents[1] / "metrics/metrics").write_text(scores)
            for name in ("step", "kept", "values"):
                del found[name]
        else:
            found = renamed(found)
        file.write_text(json.dumps(found))
    again = train.run(config, tmp_path)
    assert again["after"] == results["after"] and again["ranks"] == results["ranks"]
    with config.unlocked():  # control: names are not all that is compared
        config.ranks.during.target_rank = 1
    with pytest.raises(runs.WorkdirError, match="ranks.during.target_rank: 2, now 1"):
        train.run(config, tmp_path)
