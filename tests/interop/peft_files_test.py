"""Adapter files between jaxpeft and the real HF PEFT, both ways, family by family.

Tolerance 2e-5 of the largest logit; measured 6e-7 at 2.
"""

import jax
import numpy as np
import pytest
from families_toolbox import (
    FAMILIES,
    Family,
    close,
    config_of,
    far,
    scrambled,
    tensors_of,
)

import jaxpeft as jp
from jaxpeft.interop import load_peft, save_peft
from jaxpeft.parts import form_of

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*"),
]


@pytest.fixture(scope="module")
def family(request, oracle, tmp_path_factory):
    return Family(request.param, oracle, tmp_path_factory.mktemp(request.param))


def load(folder, family):
    with jax.disable_jit():  # decompositions of tiny kernels: compiling is the cost
        return load_peft(
            folder, family.params, names=family.model.names, axes=family.model.axes
        )


def in_our_words(targets):
    return [target.replace(".", "/") for target in targets]


def attached(family, adapter):
    """The adapter on two sorts of sites, different ranks and alphas; the head."""
    some, others = map(in_our_words, family.facts.targets)
    patterns = {}
    if form_of(adapter).patterns and adapter.where.rank is not None:
        patterns = {
            "rank_pattern": {f".*_1/.*{some[0]}": 2},
            "alpha_pattern": {f".*_0/.*{others[0]}": 5},
        }
    adapted = family.attach(family.params, adapter, [*some, *others], **patterns)
    for head in family.facts.heads:
        adapted = jp.attach(adapted, jp.full(), [head], key=jax.random.key(1))
    return scrambled(adapted)


# What is attached, and the form that is asked for. Other native forms are written at
# the end of the way back, below.
OURS = {
    "lora": (jp.lora(3, 7), "native"),
    "kasa": (jp.kasa(3, 7, reduction="sum"), "native"),
    "kasa as lora": (jp.kasa(3, 7), "auto"),
    "dora": (jp.dora(3, 7), "native"),
    "dora from pissa, its factors": (jp.dora(3, 7, init="pissa"), "auto"),
    "pissa as lora": (jp.pissa(3, 7), "auto"),
    "milora as lora": (jp.milora(3, 7), "auto"),
    "lora_xs as lora": (jp.lora_xs(3, 7), "auto"),
    "adalora": (jp.adalora(3, 7), "native"),
    "vera": (jp.vera(3), "native"),
    "ia3": (jp.ia3(), "native"),
}


# What one family is enough for: PEFT also opens what we write of everything it wrote.
ONCE = {*OURS} - {"lora", "pissa as lora"}


def cases(of, once=()):
    return [(f, c) for f in FAMILIES for c in of if f == "bert" or c not in once]


@pytest.mark.parametrize(("family", "case"), cases(OURS, ONCE), indirect=["family"])
def test_peft_loads_what_we_write(case, family, oracle, tmp_path):
    adapter, form = OURS[case]
    adapted = attached(family, adapter)
    saved = save_peft(
        adapted,
        tmp_path / "a",
        names=family.model.names,
        task_type=family.facts.task,
        form=form,
    )
    theirs = family.opened(saved.folder)
    close(family.ours(adapted), family.theirs(theirs))
    far(family.run(family.params), family.theirs(theirs))
    keys = oracle.peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert keys.keys() == tensors_of(saved.folder).keys()
    if family.name != "bert":
        return  # one family is enough for the way back
    again = load(saved.folder, family)
    if form == "native":  # bit for bit
        mine = jp.tree.flat(jp.partition(adapted)[0])
        for path, x in jp.tree.flat(jp.partition(again)[0]).items():
            assert np.array_equal(x, mine.pop(path)), path
        assert not mine
    else:
        close(family.ours(again), family.ours(adapted))
        assert config_of(saved.folder)["lora_alpha"] == saved.rank


THEIRS = {
    "lora": {},
    "rslora, one layer": {"use_rslora": True, "layers_to_transform": [1]},
    "embedding": {},
    "dora": {"use_dora": True},
    "dora embedding": {"use_dora": True},
    "dora from pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {},
    "all biases": {"bias": "all"},
    "biases of targets": {"bias": "lora_only"},
    "adalora": {},
    "vera": {},
    "ia3": {},
}


def theirs_of(case, family, peft):
    """PEFT's config."""
    some, others = family.facts.targets
    common = {"target_modules": [*some, *others], "task_type": family.facts.task}
    if case == "adalora":
        schedule = {"init_r": 4, "target_r": 2, "total_step": 2, "deltaT": 1}
        return peft.AdaLoraConfig(lora_alpha=7, **schedule, **common)
    if case == "vera":
        return peft.VeraConfig(r=3, **common)
    if case == "ia3":
        return peft.IA3Config(feedforward_modules=others, **common)
    low_rank = common | THEIRS[case] | {"r": 3, "lora_alpha": 7}
    if "embedding" in case:
        low_rank["target_modules"] = family.facts.embeddings
    else:
        low_rank["rank_pattern"] = {rf".*\.1\..*{some[0]}": 2}
        low_rank["alpha_pattern"] = {others[0]: 5}
    if case == "kasa":
        low_rank["kasa_config"] = peft.KasaConfig(beta=0.2, gamma=0.1)
    return peft.LoraConfig(**low_rank)


@pytest.mark.parametrize(
    ("family", "case"),
    cases(THEIRS, ("dora from pissa", "dora embedding", "embedding", "all biases")),
    indirect=["family"],
)
def test_we_load_what_peft_writes(case, family, oracle, tmp_path):
    config = theirs_of(case, family, oracle.peft)
    if family.conv1d and case in ("kasa", "olora"):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            family.theirs(family.peft_model(config))  # PEFT itself does not do this
        adapted = attached(family, getattr(jp, case)(3, 7))
        with pytest.raises(ValueError, match="of kind 'conv1d'; form='auto' writes"):
            save_peft(adapted, tmp_path, names=family.model.names, form="native")
        return
    model = family.peft_model(config)
    if case == "adalora":
        family.prune(model)
    expected = family.theirs(model)
    model.save_pretrained(tmp_path / "theirs")
    adapted = load(tmp_path / "theirs", family)
    close(family.ours(adapted), expected)
    far(family.run(family.params), expected)
    save_peft(
        adapted,
        tmp_path / "ours",
        names=family.model.names,
        task_type=family.facts.task,
        form="native",
    )
    first, second = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    if case == "biases of targets":
        assert first.keys() <= second.keys()  # ours are always all
    elif case != "adalora":  # ours keep the pruned components, with a weight of 0
        copies = ("base_layer.weight", "original_module", "modules_to_save")
        own = {k for k in first if not any(word in k for word in copies)}
        assert own == second.keys()
        for key, x in second.items():
            assert np.array_equal(x, first[key]), key
    before, again = config_of(tmp_path / "theirs"), config_of(tmp_path / "ours")
    same = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "kasa_config")
    for field in same:
        if field in again and case not in ("adalora", "rslora, one layer"):
            assert again[field] == before.get(field), field
    close(family.theirs(family.opened(tmp_path / "ours")), expected)
