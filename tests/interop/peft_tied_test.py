"""PEFT's adapters on an embedding that is also the output head.

PEFT changes the look-up or the logits, where one table is both. Everything here is
compared with PEFT's own function; the control is that adapter on the shared table.
"""

import copy

import jax
import numpy as np
import pytest
from families_toolbox import close, far, quiet
from safetensors.numpy import load_file, save_file
from tied_toolbox import (
    APART,
    BOTH,
    HEAD,
    LOOKUP,
    E,
    H,
    Q,
    merged,
    opened,
    read,
    tables,
    theirs,
    tied_models,
    trained,
)

import jaxpeft as jp
from jaxpeft import interop
from jaxpeft.tree._node import nodes

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*"),
]


@pytest.fixture(scope="module")
def tied(oracle, tmp_path_factory):
    return tied_models(oracle, tmp_path_factory)


# The config, our leaves, and those of them that carry an adapter.
CASES = {
    "lora": ({"target_modules": [Q, E]}, APART, [LOOKUP]),
    "rslora": ({"target_modules": [E], "use_rslora": True}, APART, [LOOKUP]),
    "dora": ({"target_modules": [E], "use_dora": True}, APART, [LOOKUP]),
    "pissa": ({"target_modules": [E], "init_lora_weights": "pissa"}, APART, [LOOKUP]),
    "olora, dora": (
        {"target_modules": [E], "init_lora_weights": "olora", "use_dora": True},
        *(APART, [LOOKUP]),
    ),
    "pattern": ({"target_modules": r".*(v_proj|tokens)"}, APART, [LOOKUP]),
    "full path": ({"target_modules": ["model.embed_tokens"]}, APART, [LOOKUP]),
    "head": ({"target_modules": [Q, H]}, APART, [HEAD]),
    "head, dora": ({"target_modules": [H], "use_dora": True}, APART, [HEAD]),
    "head, ia3": (
        {"method": "IA3Config", "target_modules": [H], "feedforward_modules": []},
        *(APART, [HEAD]),
    ),
    "head, adalora": (
        {"method": "AdaLoraConfig", "target_modules": [H], "total_step": 10},
        *(APART, [HEAD]),
    ),
    "head, vera": (
        {"method": "VeraConfig", "target_modules": [H], "r": 4},
        *(APART, [HEAD]),
    ),
    "two, unlike": (
        {
            "target_modules": [E, H],
            "rank_pattern": {E: 2, H: 4},
            "alpha_pattern": {H: 5},
        },
        *(APART, APART),
    ),
    "whole": ({"target_modules": [Q], "modules_to_save": [E]}, APART, [LOOKUP]),
    "whole, ia3": (
        {
            "method": "IA3Config",
            "target_modules": [Q],
            "feedforward_modules": [],
            "modules_to_save": [E],
        },
        *(APART, [LOOKUP]),
    ),
    "whole head": ({"target_modules": [Q], "modules_to_save": [H]}, APART, [HEAD]),
    "two whole": ({"target_modules": [Q], "modules_to_save": [E, H]}, APART, APART),
    "lora and whole": ({"target_modules": [E], "modules_to_save": [H]}, APART, APART),
    "kept tied": (
        {"target_modules": [Q, E], "ensure_weight_tying": True},
        *([BOTH], [BOTH]),
    ),
    "kept tied by the head": (
        {"target_modules": [H], "ensure_weight_tying": True},
        *([BOTH], [BOTH]),
    ),
    "kept tied, pattern": (
        {"target_modules": r".*(q_proj|tokens)", "ensure_weight_tying": True},
        *([BOTH], [BOTH]),
    ),
    "kept tied, whole": (
        {"target_modules": [Q], "modules_to_save": [E], "ensure_weight_tying": True},
        *([BOTH], [BOTH]),
    ),
    "tied factors, unlike scales": (
        {
            "target_modules": [E],
            "ensure_weight_tying": True,
            "alpha_pattern": {H: 2},
        },
        *(APART, APART),
    ),
    "tied factors, dora": (
        {"target_modules": [E], "ensure_weight_tying": True, "use_dora": True},
        *(APART, APART),
    ),
    "embeddings in the file": ({"target_modules": [Q], "whole": True}, [BOTH], []),
    "embeddings beside lora": (
        {"target_modules": [Q, E], "whole": True},
        *(APART, [LOOKUP]),
    ),
    "embeddings beside whole": (
        {"target_modules": [Q], "modules_to_save": [E], "whole": True},
        *(APART, [LOOKUP]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_pefts_function_both_ways(case, tied, tmp_path):
    fields, leaves, adapted = CASES[case]
    llama = tied("llama")
    want = trained(llama, tmp_path / "theirs", **fields)
    tree = read(llama, tmp_path / "theirs")
    own, sites = tables(tree)
    assert (sorted(own), sorted(sites)) == (sorted(leaves), sorted(adapted))
    close(np.asarray(llama.run(merged(tree))), want)
    far(want, theirs(llama, llama.base))
    saved = interop.save_peft(
        tree, tmp_path / "ours", names=llama.model.names, task_type="CAUSAL_LM"
    )
    close(theirs(llama, opened(llama, saved.folder)), want)
    again = read(llama, saved.folder)
    assert tables(again) == tables(tree)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
        assert np.array_equal(one, other)


def test_one_adapter_on_both_is_another_function(tied, tmp_path):
    """The control: what each of these factors does on the table that is shared."""
    llama = tied("llama")
    want = trained(llama, tmp_path / "theirs", target_modules=[E])
    (node,) = nodes(read(llama, tmp_path / "theirs"))
    with jax.disable_jit():
        shared = jp.attach(
            llama.params, node.adapter, [E], key=jax.random.key(0), alpha_pattern={E: 8}
        )
    (place,) = nodes(shared)
    shared["embed_tokens"] = {"embedding": place.replace(trainable=node.trainable)}
    far(np.asarray(llama.run(merged(shared))), want)
    # And it has a form in PEFT's files now: one adapter for both modules there.
    interop.save_peft(shared, tmp_path / "both", names=llama.model.names)
    both = theirs(llama, opened(llama, tmp_path / "both"))
    close(np.asarray(llama.run(merged(shared))), both)


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "gemma3_text"])
@pytest.mark.parametrize("how", ["lora", "dora", "whole"])
def test_other_families(kind, how, tied, tmp_path):
    """GPT-2's names; Gemma, which scales what it looks up."""
    of = tied(kind)
    table, q = ("wte", "c_attn") if kind == "gpt2" else (E, Q)
    fields = {"target_modules": [q], "modules_to_save": [table]}
    if how != "whole":
        fields = {"target_modules": [table, H], "use_dora": how == "dora"}
    want = trained(of, tmp_path / "theirs", **fields)
    tree = read(of, tmp_path / "theirs")
    assert len(tables(tree)[0]) == 2
    close(np.asarray(of.run(merged(tree))), want)
    far(want, theirs(of, of.base))
    interop.save_peft(tree, tmp_path / "ours", names=of.model.names)
    close(theirs(of, opened(of, tmp_path / "ours")), want)


def test_pefts_rules_and_not_its_model_in_memory(tied, tmp_path):
    """It ties GPT-2's table by its head, and of the file it wrote then forgets that."""
    gpt2 = tied("gpt2")
    want = trained(
        gpt2,
        tmp_path / "theirs",
        target_modules=["c_attn", H],
        ensure_weight_tying=True,
    )
    with quiet():
        model = gpt2.peft.PeftModel.from_pretrained(
            copy.deepcopy(gpt2.base), tmp_path / "theirs"
        )
    far(theirs(gpt2, model.eval()), want)
    with pytest.raises(ValueError, match=r"left over: .*lm_head.lora_A"):
        read(gpt2, tmp_path / "theirs")


def test_old_keys_and_a_second_adapter(tied, tmp_path):
    """The adapter's name in the keys; one on the head over one on the look-up."""
    llama = tied("llama")
    trained(llama, tmp_path / "one", target_modules=[E])
    want = theirs(llama, opened(llama, tmp_path / "one"))
    file = tmp_path / "one" / "adapter_model.safetensors"
    old = {
        key.replace("embedding_A", "embedding_A.default"): x
        for key, x in load_file(file).items()
    }
    save_file(old, file)
    first = read(llama, tmp_path / "one")
    close(np.asarray(llama.run(merged(first))), want)
    both = trained(llama, tmp_path / "two", target_modules=[H])
    with jax.disable_jit():
        second = interop.load_peft(
            tmp_path / "two", first, names=llama.model.names, axes=None
        )
    assert tables(second)[1] == sorted(APART)
    with quiet():  # PEFT's own sum of the two
        model = llama.peft.PeftModel.from_pretrained(
            copy.deepcopy(llama.base), tmp_path / "one"
        )
        model.load_adapter(tmp_path / "two", "two")
        model.base_model.set_adapter(["default", "two"])
    close(np.asarray(llama.run(merged(second))), theirs(llama, model.eval()))
    far(np.asarray(llama.run(merged(second))), both)
    with pytest.raises(ValueError, match="already carries an adapter in"):
        interop.load_peft(tmp_path / "one", second, names=llama.model.names)
