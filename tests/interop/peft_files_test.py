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

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, oracle, tmp_path_factory):
    return Family(request.param, oracle, tmp_path_factory.mktemp(request.param))


def in_our_words(targets):
    return [target.replace(".", "/") for target in targets]


def attached(family, adapter):
    """The adapter on two sorts of sites, different ranks and alphas; the head."""
    some, others = map(in_our_words, family.facts.targets)
    patterns = {}
    if adapter.peft.patterns and adapter.rank is not None:
        patterns = {
            "rank_pattern": {f".*_1/.*{some[0]}": 2},
            "alpha_pattern": {f".*_0/.*{others[0]}": 5},
        }
    adapted = family.attach(family.params, adapter, [*some, *others], **patterns)
    for head in family.facts.heads:
        adapted = jp.attach(adapted, jp.full(), [head], key=jax.random.key(1))
    return scrambled(adapted)


# Every method with a form: what is attached, and the form that is asked for.
OURS = {
    "lora": (jp.lora(3, 7), "native"),
    "rslora": (jp.lora(3, 7, scaling="alpha/sqrt_r"), "native"),
    "kasa": (jp.kasa(3, 7, reduction="sum"), "native"),
    "kasa as lora": (jp.kasa(3, 7), "auto"),
    "dora": (jp.dora(3, 7), "native"),
    "dora from pissa": (jp.dora(3, 7, init="pissa"), "native"),
    "dora from pissa, its factors": (jp.dora(3, 7, init="pissa"), "auto"),
    "pissa": (jp.pissa(3, 7), "native"),
    "pissa as lora": (jp.pissa(3, 7), "auto"),
    "olora": (jp.olora(3, 7), "native"),
    "milora as lora": (jp.milora(3, 7), "auto"),
    "lora_xs as lora": (jp.lora_xs(3, 7), "auto"),
    "adalora": (jp.adalora(3, 7), "native"),
    "vera": (jp.vera(3), "native"),
    "ia3": (jp.ia3(), "native"),
}


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_what_we_write(case, family, oracle, tmp_path):
    adapter, form = OURS[case]
    adapted = attached(family, adapter)
    if form == "native" and family.conv1d and adapter.peft.redone:
        with pytest.raises(ValueError, match="form='portable' writes plain LoRA"):
            save_peft(adapted, tmp_path / "a", names=family.model.names, form=form)
        form = "auto"
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
    again = load_peft(
        saved.folder, family.params, names=family.model.names, axes=family.model.axes
    )
    if form == "native":  # bit for bit
        mine = jp.core.flat(jp.partition(adapted)[0])
        for path, x in jp.core.flat(jp.partition(again)[0]).items():
            assert np.array_equal(x, mine.pop(path)), path
        assert not mine
    else:
        close(family.ours(again), family.ours(adapted))
        assert config_of(saved.folder)["lora_alpha"] == saved.rank


def theirs_of(case, family, peft):
    some, others = family.facts.targets
    patterns = {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": [*some, *others],
        "task_type": family.facts.task,
        "rank_pattern": {rf".*\.1\..*{some[0]}": 2},
        "alpha_pattern": {others[0]: 5},
    }
    extra = {
        "lora": {},
        "rslora, one layer": {"use_rslora": True, "layers_to_transform": [1]},
        "kasa": {"kasa_config": peft.KasaConfig(beta=0.2, gamma=0.1)},
        "embedding": {"target_modules": family.facts.embeddings},
    }
    return peft.LoraConfig(**(patterns | extra[case]))


@pytest.mark.parametrize("case", ["lora", "rslora, one layer", "kasa", "embedding"])
def test_we_load_what_peft_writes(case, family, oracle, tmp_path):
    if case == "kasa" and family.conv1d:
        with pytest.raises(TypeError, match="only supports"):
            family.peft_model(theirs_of(case, family, oracle.peft))
        return
    model = family.peft_model(theirs_of(case, family, oracle.peft))
    expected = family.theirs(model)
    model.save_pretrained(tmp_path / "theirs")
    adapted = load_peft(
        tmp_path / "theirs",
        family.params,
        names=family.model.names,
        axes=family.model.axes,
    )
    close(family.ours(adapted), expected)
    far(family.run(family.params), expected)
    config = config_of(tmp_path / "theirs")
    save_peft(
        adapted,
        tmp_path / "ours",
        names=family.model.names,
        task_type=family.facts.task,
        form="native",
    )
    first, second = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert {k for k in first if "base_layer" not in k} == second.keys()
    for key, x in second.items():
        assert np.array_equal(x, first[key]), key
    again = config_of(tmp_path / "ours")
    same = ("peft_type", "r", "lora_alpha", "use_rslora", "kasa_config", "lora_dropout")
    assert {k: again.get(k) for k in same} == {k: config.get(k) for k in same}
