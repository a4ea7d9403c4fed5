"""What is not written to PEFT's files, and what of them is not read."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from families_toolbox import config_of, tensors_of
from safetensors.numpy import save_file
from trees_toolbox import (
    AXES,
    KEY,
    PART,
    STACKED,
    UNROLLED,
    L,
    make_adapted,
    make_params,
    moved,
)

import jaxpeft as jp
from jaxpeft.interop import load_peft, save_peft
from jaxpeft.models import ModuleName


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def adapted(params):
    return make_adapted(params)


@pytest.fixture(scope="module")
def saved(adapted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees") / "stacked"
    return save_peft(moved(adapted), folder, names=STACKED, base_model="some/base")


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved.folder, tmp_path / "copy")
    return tmp_path / "copy"


def refused(saving, tmp_path, match, tree, names=STACKED, **options):
    with pytest.raises(ValueError, match=match):
        save_peft(tree, tmp_path / "no", names=names, **options)
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_written(adapted, params, tmp_path):
    refuse = lambda match, tree, **o: refused(save_peft, tmp_path, match, tree, **o)
    refuse("no adapters", params)
    refuse("`form` must be one of", adapted, form="plain")
    refuse("`task_type` must be one of", adapted, task_type="chat")
    refuse("score.*no place beside portable LoRA", adapted, form="portable")
    refuse("`rank` is for plain LoRA", adapted, rank=2)
    refuse("'layers/layer/up/kernel' is in no row", adapted, names=STACKED[:3])
    refuse("none of their modules is in the tree", adapted, names=UNROLLED[1:4])
    refuse("has kind 'dense'", adapted, names=[ModuleName("a", "score", "dense")])
    tied = jp.attach(params, jp.dora(2, init="embedding"), ["embed"], key=KEY)
    refuse("'model.embed' shares its weight with 'head', and 'dora' changes", tied)
    save_peft(tied, tmp_path / "untied", names=STACKED, untie=True)
    two = jp.attach(params, jp.lora(2), ["up"], key=KEY, axes=AXES)
    two = jp.attach(two, jp.lora(2, dropout=0.1), ["q_proj"], key=KEY, axes=AXES)
    refuse("lora_dropout=0.0 in the one PEFT config", two)
    save_peft(two, tmp_path / "joined", names=STACKED, form="portable")
    plain = jp.attach(params, jp.lora(2), ["score"], key=KEY)
    for other, said in (
        (jp.pissa(2), "score' needs init_lora_weights=True in.*others 'pissa'"),
        (jp.kasa(2), "score' needs kasa_config=None in.*others {"),
        (jp.dora(2), "score' needs use_dora=False in.*others True"),
    ):  # else the one config would make the plain site another method's
        both = jp.attach(plain, other, ["o_proj"], key=KEY, axes=AXES)
        refuse(said, both, form="native")
    head = jp.attach(params, jp.lora(2), ["score"], key=KEY)
    refuse(
        "score' is saved whole and its weight has an adap", head, task_type="SEQ_CLS"
    )
    bora = jp.attach(params, jp.bora(2), ["score"], key=KEY)
    refuse("'bora' has no form in PEFT; jaxpeft.merge and save_hf", bora)
    dora = jp.attach(params, jp.dora(2), ["score"], key=KEY)
    refuse("not of low rank and cannot be plain LoRA", dora, form="portable")
    small = jp.attach(params, jp.milora(2), ["score"], key=KEY)
    refuse("PEFT does not start from these factors", small, form="native")
    ranks = jp.attach(
        params, jp.vera(3), ["up"], key=KEY, axes=AXES, rank_pattern={"up": [1, 2, 3]}
    )
    refuse(r"VERA has one r for all sites.*\[1, 2, 3\]", ranks)
    save_peft(ranks, tmp_path / "ranks", names=STACKED, form="portable")
    node = two["layers"]["layer"]["up"]["kernel"]
    bad = {**node.trainable, "a": node.trainable["a"].at[0, 0, 0].set(jnp.nan)}
    two["layers"]["layer"]["up"]["kernel"] = node.replace(trainable=bad)
    refuse("layers.0.up': leaf 'a' is not finite", two, form="portable")
    with pytest.raises(FileExistsError, match="not empty; choose another"):
        save_peft(adapted, tmp_path, names=STACKED)


def edit(folder, **fields):
    config = config_of(folder) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))


CHANGES = {
    "dropped key": ({}, {f"{PART}.1.up.lora_A.weight": None}, "missing: .*1.up.lora_A"),
    "surplus": ({}, {f"{PART}.1.up.lora_C": "x"}, "left over: .*lora_C' is not what"),
    "another model": ({}, {f"{PART}.1.down.lora_A.weight": "x"}, "left over: .*1.down"),
    "prefix": ({}, {"model.up.lora_A.weight": "x"}, "does not begin with"),
    "shape": ({"r": 4}, {}, r"shape \[2, 8\]; config and model make it \[4, 8\]"),
    "no target": ({"target_modules": ["gate"]}, {}, "'gate'.*matches no module"),
    "fewer targets": ({"target_modules": ["up"]}, {}, "left over: .*q_proj.lora_A"),
    "one layer": (
        {"layers_to_transform": [1]},
        {
            f"{PART}.{i}.{name}.lora_{x}.weight": None
            for i in (0, 2)
            for name in ("q_proj", "o_proj", "up")
            for x in "AB"
        },
        r"about layers \[1\] alone",
    ),
    "null targets": ({"target_modules": None}, {}, r"ignore=\['target_modules'\]"),
    "loftq": ({"init_lora_weights": "loftq"}, {}, "no method here is what PEFT does"),
    "a field": (
        {"use_qalora": True},
        {},
        "what jaxpeft does not do: .*use_qalora",
    ),
    "another type": ({"peft_type": "LOHA"}, {}, "peft_type 'LOHA'; known are LORA"),
    "no head": ({"modules_to_save": None}, {}, "left over: .*score.weight"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_does_not_fit_is_refused(case, copy, params):
    fields, keys, match = CHANGES[case]
    edit(copy, **fields)
    tensors = tensors_of(copy)
    for key, value in keys.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = np.zeros(2, np.float32)
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=match):
        load_peft(copy, params, names=STACKED, axes=AXES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(copy, params, value):
    tensors = tensors_of(copy)
    bad = [f"{PART}.1.up.lora_B.weight", "base_model.model.score.bias"]
    for key in bad:
        tensors[key] = tensors[key] + np.float32(value)
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="nothing was loaded") as raised:
        load_peft(copy, params, names=STACKED, axes=AXES)
    for key in bad:
        assert f"{key!r} is not finite" in str(raised.value)


def test_all_that_does_not_fit_is_listed_at_once(copy, params):
    tensors = tensors_of(copy)
    gone = [f"{PART}.{i}.up.lora_A.weight" for i in range(L)]
    for key in gone:
        del tensors[key]
    tensors["other"] = np.zeros(2, np.float32)
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(ValueError) as raised:
        load_peft(copy, params, names=STACKED, axes=AXES)
    assert all(key in str(raised.value) for key in [*gone, "other"])


def test_ignoring_is_asked_for(copy, params):
    edit(copy, use_qalora=True, target_modules=None)
    ignore = ["use_qalora", "target_modules"]
    tree = load_peft(copy, params, names=STACKED, axes=AXES, ignore=ignore)
    assert "kernel" in tree["layers"]["layer"]["up"]


def test_a_site_with_an_adapter_is_refused(saved, params):
    tree = jp.attach(params, jp.lora(2), ["up"], key=KEY, axes=AXES)
    with pytest.raises(ValueError, match="0.up' already carries an adapter"):
        load_peft(saved.folder, tree, names=STACKED, axes=AXES)


def test_files_that_are_not_opened(copy, params, tmp_path):
    load = lambda: load_peft(copy, params, names=STACKED, axes=AXES)
    weights = copy / "adapter_model.safetensors"
    outside = tmp_path / "elsewhere.safetensors"
    shutil.move(weights, outside)
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        load()
    (copy / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="pickled code and never opened"):
        load()
    weights.symlink_to(outside)
    with pytest.raises(ValueError, match="outside of the folder"):
        load()
    weights.unlink()
    weights.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load()
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged or no PEFT config"):
        load()
    (copy / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        load()
