"""What a classifier's outputs are called, in every file that says something of it."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import interop, models
from jaxpeft.interop import head_info, save_adapter, save_hf, save_peft

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")

NLI = ("contradiction", "entailment", "neutral")
MOODS = ("angry", "calm", 'häppy, "very"')
SIZES = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "max_position_embeddings": 20,
}
IDS = np.random.default_rng(0).integers(3, 64, (2, 7)).astype(np.int32)


def words(names, kind="single_label_classification"):
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": kind,
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a classifier of natural language inference."""
    folder = tmp_path_factory.mktemp("labels") / "nli"
    model = models.from_config(SIZES, head="classification", num_labels=3)
    params = models.init(model, jax.random.key(0))
    save_hf(params, folder, names=model.names, config=model.hf_config | words(NLI))
    return folder


def opened(base, head="classification", **options):
    return models.load(base, head=head, **options)


def trained(model, params, head=True):
    """LoRA on the queries, and where asked a new head, as every fine-tuning has it."""
    key = jax.random.key(1)
    tree = jp.attach(params, jp.lora(2), ["query"], key=key)
    if head:
        tree = jp.attach(tree, jp.full(), ["classifier"], key=key)
    trainable, frozen = jp.partition(tree)
    draw = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jp.combine(jax.tree.map(draw, trainable), frozen)


def merged(tmp_path, model, tree, source, name="merged", **options):
    done = save_hf(
        tree,
        tmp_path / name,
        names=model.names,
        config=model.hf_config,
        source=source,
        **options,
    )
    return json.loads((done.folder / "config.json").read_text(encoding="utf-8"))


def test_a_trained_head_is_never_called_by_its_base_s_names(base, tmp_path):
    model, params = opened(base)
    tree = trained(model, params)
    found = merged(tmp_path, model, tree, base, labels=MOODS)
    assert {k: found[k] for k in words(MOODS)} == words(MOODS)
    assert found["num_labels"] == 3
    assert head_info(tmp_path / "merged") == interop.HeadInfo(MOODS, False)
    # Nothing is said of it: then transformers' word for classes without a name.
    found = merged(tmp_path, model, tree, base, "unsaid")
    assert list(found["label2id"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    # A control: a head that is the base's keeps the base's names, word for word.
    found = merged(tmp_path, model, trained(model, params, head=False), base, "kept")
    assert {k: found[k] for k in words(NLI)} == words(NLI)
    assert merged(tmp_path, model, params, None, "bare")["num_labels"] == 3


@pytest.mark.parametrize("base_kind", ["regression", "multi_label_classification"])
def test_the_kind_of_problem_is_the_head_s(base, tmp_path, base_kind):
    """A base that gave numbers does not make its new classes numbers."""
    model, params = opened(base)
    source = tmp_path / "base"
    source.mkdir()
    content = json.loads((base / "config.json").read_text()) | words(NLI, base_kind)
    (source / "config.json").write_text(json.dumps(content))
    found = merged(tmp_path, model, trained(model, params), source, labels=MOODS)
    assert found["problem_type"] == "single_label_classification"
    # Of a base with several classes at once, whose head is trained on as it was.
    found = merged(tmp_path, model, trained(model, params), source, "unsaid")
    single, multi = "single_label_classification", "multi_label_classification"
    assert found["problem_type"] == (multi if base_kind == multi else single)


def test_a_number_is_no_class(base, tmp_path):
    model = models.from_config(SIZES, head="regression")
    params = models.init(model, jax.random.key(0))
    found = merged(tmp_path, model, trained(model, params), base)
    assert found["problem_type"] == "regression" and len(found["id2label"]) == 1
    assert head_info(tmp_path / "merged") == interop.HeadInfo(None, True)
    with pytest.raises(ValueError, match="this head gives a number; leave them out"):
        merged(tmp_path, model, params, base, "no", labels=["low"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b"], "`labels` has 2 names.*the head has 3 classes"),
        (["a", "b", "a"], "`labels` must be different names"),
        ("abc", "`labels` must be different names of classes, a str each"),
    ],
)
def test_names_that_are_none(base, tmp_path, labels, message):
    model, params = opened(base)
    with pytest.raises(ValueError, match=message):
        merged(tmp_path, model, params, base, labels=labels)
    tree = trained(model, params)
    with pytest.raises(ValueError, match=message):
        save_peft(tree, tmp_path / "p", names=model.names, labels=labels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labels", [3, {"a": 0, "b": 1}, "abc", ["a", 1]])
def test_metadata_that_names_no_classes(tmp_path, labels):
    params = {"classifier": {"kernel": jax.numpy.ones((4, 2))}}
    adapted = jp.attach(params, jp.full(), ["classifier"], key=jax.random.key(0))
    interop.save_adapter(adapted, tmp_path / "own", metadata={"labels": labels})
    with pytest.raises(ValueError, match="must be different names of classes"):
        interop.head_info(tmp_path / "own")


def test_a_model_without_classes_has_no_names_for_them(base, tmp_path):
    model, params = opened(base, head=None)
    with pytest.raises(ValueError, match="this head has no classes; leave them out"):
        merged(tmp_path, model, params, base, labels=MOODS)
    found = merged(tmp_path, model, params, None, "body")
    assert "num_labels" not in found and "id2label" not in found


@pytest.mark.interop
def test_transformers_reads_the_names_of_a_merged_model(base, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers
    model, params = opened(base)
    tree = trained(model, params)
    merged(tmp_path, model, tree, base, labels=MOODS)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged"
    ).eval()
    assert theirs.config.id2label == dict(enumerate(MOODS))
    assert theirs.config.label2id == {name: i for i, name in enumerate(MOODS)}
    with torch.no_grad():
        logits = theirs(torch.tensor(IDS, dtype=torch.long)).logits.numpy()
    mine = jp.adapt(model.apply)({"params": tree}, IDS)
    np.testing.assert_allclose(mine, logits, rtol=0, atol=1e-5)


@pytest.mark.interop
def test_peft_s_files_keep_the_names_beside_them(base, tmp_path):
    """PEFT has no field for names: its reader must be told, and the card says how."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import transformers
    model, params = opened(base)
    tree = trained(model, params)
    folder = tmp_path / "peft"
    options = dict(names=model.names, task_type="SEQ_CLS", base_model=str(base))
    save_peft(tree, folder, labels=MOODS, **options)
    assert head_info(folder) == interop.HeadInfo(MOODS, False)
    # PEFT, and transformers with PEFT inside, read the folder as before.
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a field it does not know would be a warning
        peft.PeftConfig.from_pretrained(folder)
    kind = transformers.AutoModelForSequenceClassification
    given = {"id2label": dict(enumerate(MOODS)), "label2id": words(MOODS)["label2id"]}
    theirs = kind.from_pretrained(folder, **given)
    assert theirs.config.id2label == dict(enumerate(MOODS))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"id2label={dict(enumerate(MOODS))!r}" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    known = {
        "AutoModelForSequenceClassification": kind,
        "PeftModel": peft.PeftModel,
        "this_folder": folder,
    }
    exec(code, known)
    assert known["model"].config.id2label == dict(enumerate(MOODS))
    # Where nothing is known, nothing is said.
    save_peft(tree, tmp_path / "unsaid", **options)
    assert head_info(tmp_path / "unsaid") == interop.HeadInfo()
    assert "id2label" not in (tmp_path / "unsaid/README.md").read_text()


def test_one_output_without_a_name_is_a_number_in_peft_s_files(tmp_path):
    model = models.from_config(SIZES, head="regression")
    tree = trained(model, models.init(model, jax.random.key(0)))
    folder = save_peft(
        tree, tmp_path / "peft", names=model.names, task_type="SEQ_CLS"
    ).folder
    assert head_info(folder) == interop.HeadInfo(None, True)
    assert "problem_type='regression'" in (folder / "README.md").read_text()


def test_an_adapter_of_ours_keeps_what_it_is_given(tmp_path):
    tree = jp.attach(
        {"q": {"kernel": jnp.ones((4, 6))}}, jp.lora(2), ["q"], key=jax.random.key(0)
    )
    save_adapter(tree, tmp_path / "a", metadata={"labels": list(MOODS)})
    assert head_info(tmp_path / "a").labels == MOODS
    save_adapter(tree, tmp_path / "b", metadata={"labels": ["a", "a"]})
    with pytest.raises(ValueError, match=r"metadata in .*adapter.json must be differ"):
        head_info(tmp_path / "b")
    assert head_info(save_adapter(tree, tmp_path / "c")) == interop.HeadInfo()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"id2label": {"1": "a", "2": "b"}}')
    with pytest.raises(ValueError, match=r"id2label for \[1, 2\], not 0, 1"):
        head_info(tmp_path / "model")


def test_a_run_s_folder_stands_for_its_adapter(tmp_path):
    tree = jp.attach(
        {"q": {"kernel": jnp.ones((4, 6))}}, jp.lora(2), ["q"], key=jax.random.key(0)
    )
    inner = save_adapter(tree, tmp_path / "stages/02_router/adapter")
    assert interop.adapter_folder(tmp_path / "stages/02_router") == inner
    assert interop.adapter_folder(inner) == inner
    with pytest.raises(FileNotFoundError, match=r"There are .*02_router\."):
        interop.adapter_folder(tmp_path / "stages")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        interop.adapter_folder(tmp_path / "none")
