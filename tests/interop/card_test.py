"""The cards beside what is saved."""

import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import pytest
import yaml

import jaxpeft as jp
from jaxpeft import cli, interop, study
from jaxpeft.models import ModuleName

RUN = {
    "config": {"data": {"name": "trec", "rows": 9}, "model": {"name": "some/base"}},
    "step": 200,
    "labels": ["no", "yes"],
    "test": {"accuracy": 0.93536, "loss": 0.21858},
}
NAMES = [ModuleName("up", "up", "linear")]


@pytest.fixture
def adapted():
    params = {"up": {"kernel": jnp.ones((4, 6))}}
    return jp.attach(params, jp.lora(2), ["up"], key=jax.random.key(0))


def read(folder):
    """What the hub reads, and what people do."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_every_card_says_what_it_is_of(adapted, tmp_path):
    interop.save_adapter(adapted, tmp_path / "own", metadata=RUN)
    more = dict(names=NAMES, base_model="some/base", metadata=RUN)
    interop.save_peft(adapted, tmp_path / "peft", task_type="CAUSAL_LM", **more)
    config = {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    interop.save_hf(adapted, tmp_path / "hf", config=config, **more)
    for name, library, relation, load in (
        ("own", "jaxpeft", "adapter", "interop.load_adapter(this_folder"),
        ("peft", "peft", "adapter", "PeftModel.from_pretrained(base, this_folder)"),
        ("hf", "transformers", "finetune", "MineForCausalLM.from_pretrained(this_fol"),
    ):
        head, text = read(tmp_path / name)
        assert head == {
            "library_name": library,
            "base_model": "some/base",
            "base_model_relation": relation,
            "tags": ["jaxpeft", "lora"],
        }
        assert "lora(rank=2" in text and load in text
        assert '`trec` {"rows": 9}, 200 steps' in text
        assert "On its test rows: accuracy 0.9354, loss 0.2186." in text
        compile(text.partition("```python\n")[2].partition("```")[0], name, "exec")
    assert "head='classification', num_labels=2" in read(tmp_path / "own")[1]


def test_the_hub_is_told_of_no_folder(adapted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my/base").mkdir()
    for i, base in enumerate(("my/base", "minilm", "/home/me/base", None)):
        options = dict(names=NAMES, base_model=base)
        saved = interop.save_peft(adapted, tmp_path / str(i), **options)
        head, text = read(saved.folder)
        assert "base_model" not in head and (base is None or f"`{base}`" in text)


def test_metadata_may_be_anything(adapted, tmp_path):
    for i, metadata in enumerate(
        ({"config": 3, "test": "good"}, {"config": {"data": "x", "model": [1]}}, {})
    ):
        folder = interop.save_adapter(adapted, tmp_path / str(i), metadata=metadata)
        assert "`the base`" not in read(folder)[1]


def test_a_card_of_somebody_s_own_stays(adapted, tmp_path):
    card = interop.save_adapter(adapted, tmp_path / "a", metadata=RUN) / "README.md"
    interop.save_adapter(adapted, tmp_path / "a", overwrite=True)
    assert "trec" not in card.read_text()  # ours is written anew
    card.write_text("mine")
    interop.save_adapter(adapted, tmp_path / "a", overwrite=True, metadata=RUN)
    assert card.read_text() == "mine"


class Hub:
    """The hub's client, with a folder in the place of a network."""

    def __init__(self, place, refuse=False):
        self.place, self.refuse = place, refuse

    def create_repo(self, name, **options):
        if self.refuse:
            raise ConnectionError("401 who are you?")
        (self.place / name).mkdir(parents=True, exist_ok=options["exist_ok"])
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path):
        shutil.copytree(folder_path, self.place / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, name, allow_patterns):
        if not (self.place / name).is_dir():
            raise ConnectionError("404")
        return str(self.place / name)


def test_up_to_the_hub_and_down_again(adapted, tmp_path, monkeypatch, capsys):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    folder = interop.save_adapter(adapted, tmp_path / "own")
    assert interop.push(folder, "me/mine") == "https://hub/me/mine"
    assert interop.adapter_folder("me/mine") == tmp_path / "hub/me/mine"
    assert cli.main(["describe", "me/mine"]) == 0 and "lora" in capsys.readouterr().out
    (run,) = study.adapter_runs("theirs", "me/mine")
    assert run.adapter == str(tmp_path / "hub/me/mine")
    with pytest.raises(FileNotFoundError, match="is no folder, and the Hugging.*404"):
        interop.adapter_folder("me/other")
    (tmp_path / "runs").mkdir()  # a slip of a path is nothing for the hub
    with pytest.raises(FileNotFoundError, match="'runs/new' is no folder.$"):
        interop.adapter_folder("runs/new")
    hub.refuse = True
    with pytest.raises(ValueError, match="who are you.*is whole; upload it again"):
        interop.push(folder, "me/mine")
    given = ["export", str(folder), "--out", str(tmp_path / "out"), "--push", "mine"]
    assert cli.main(given) == 2 and "write user/name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
