"""Which modules and ranks a PEFT config means, against what PEFT itself wraps."""

import json

import jax
import pytest
from families_toolbox import Family, quiet

from jaxpeft import allocate, interop
from jaxpeft.interop._modules import MATRICES, Table
from jaxpeft.interop.peft._config import DEFAULTS, target_names
from jaxpeft.interop.peft._rules import by_pattern, is_target
from jaxpeft.models import ModuleName
from jaxpeft.tree import is_node, leaves_with_path

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]

CONFIGS = {
    "suffix": {"target_modules": ["query"]},
    "two parts": {"target_modules": ["output.dense"]},
    "dense": {"target_modules": ["dense"]},
    "expression": {"target_modules": r".*layer\.1\..*(query|key)"},
    "full path": {"target_modules": ["bert.encoder.layer.0.attention.self.key"]},
    "all": {"target_modules": "all-linear"},
    "layers": {"target_modules": ["key", "dense"], "layers_to_transform": 1},
    "layers by name": {
        "target_modules": ["key", "value"],
        "layers_to_transform": [0],
        "layers_pattern": "layer",
    },
    "excluded": {
        "target_modules": ["key", "query"],
        "exclude_modules": ["0.attention.self.key"],
    },
    "excluded by expression": {
        "target_modules": ["key", "query"],
        "exclude_modules": r".*\.1\..*",
    },
    "saved": {"target_modules": ["dense"], "modules_to_save": ["pooler"]},
    "embedding": {"target_modules": ["word_embeddings", "key"]},
    "ranks": {
        "target_modules": ["query", "key", "dense"],
        "rank_pattern": {"output.dense": 3, r"attention\..*": 4, r".*layer\.1.*": 5},
    },
}


@pytest.fixture(scope="module")
def bert(oracle, tmp_path_factory):
    family = Family("bert", oracle, tmp_path_factory.mktemp("bert"))
    return family, Table(family.model.names, dict(leaves_with_path(family.params)))


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
@pytest.mark.parametrize("case", CONFIGS)
def test_targets_and_ranks(case, task, bert, oracle):
    family, table = bert
    given = CONFIGS[case]
    config = oracle.peft.LoraConfig(r=2, task_type=task, **given)
    with quiet():
        model = oracle.peft.get_peft_model(family.fresh(), config)
    base = model.base_model
    theirs = {
        n: base.model.get_submodule(n).r["default"] for n in base.targeted_module_names
    }
    # As in the file: PEFT has added the head to what is saved.
    mine = DEFAULTS["LORA"] | {"r": 2} | given
    mine["modules_to_save"] = config.modules_to_save
    modules = [m for m in table.modules if m.kind in MATRICES]
    targets = lambda config: [m for m in modules if is_target(config, m.name, m.kind)]
    found = targets(mine)
    ranks = {m.name: by_pattern(mine["rank_pattern"], m.name, 2) for m in found}
    assert ranks == theirs
    # And the list that we would write for the same modules means them again.
    names = target_names(found, table.modules)
    again = targets(DEFAULTS["LORA"] | {"target_modules": names})
    assert again == found
    assert len(names) <= len(found)


def test_ends_that_two_rows_share_are_not_written(bert):
    """Such an end may match a module that the table does not have (a pooler)."""
    _, table = bert
    sort = lambda end: [m for m in table.modules if m.name.endswith(end)]
    assert target_names(sort("self.query"), table.modules) == ["query"]
    inner = sort("intermediate.dense")
    assert target_names(inner, table.modules) == ["intermediate.dense"]
    both = sort(".output.dense")
    assert target_names(both, table.modules) == [
        "attention.output.dense",
        *(f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)),
    ]
    assert target_names(inner[:1], table.modules) == [inner[0].name]


# Beyond those above: what a decoder has that ties nothing, and what PEFT says of it.
LLAMA_CONFIGS = {
    "all": {"target_modules": "all-linear"},
    "all, in capitals": {"target_modules": "ALL-LINEAR"},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head saved whole": {
        "target_modules": ["q_proj", "lm_head"],
        "modules_to_save": ["lm_head"],
    },
    "all, a block saved whole": {
        "target_modules": "all-linear",
        "modules_to_save": ["mlp"],
    },
    "layers": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
    "layers, one by its path": {
        "target_modules": ["v_proj", "model.layers.0.self_attn.k_proj"],
        "layers_to_transform": 1,
        "layers_pattern": ["layers"],
    },
    "expression": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "expression that layers do not restrict": {
        "target_modules": r".*\.(q|k)_proj",
        "exclude_modules": r".*\.0\..*k_proj",
    },
    "embedding": {"target_modules": ["embed_tokens", "k_proj"]},
    "ranks": {
        "target_modules": "All-Linear",
        "rank_pattern": {"self_attn.q_proj": 3, r"layers\.1\..*": 5},
        "alpha_pattern": {r"mlp\..*": 6},
    },
}


@pytest.fixture(scope="module")
def llama(oracle, tmp_path_factory):
    return Family("llama", oracle, tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("case", LLAMA_CONFIGS)
def test_both_doors_and_peft_mean_the_same(case, llama, oracle, tmp_path):
    """An allocation of a config, and the tree loaded with it, as PEFT wraps them."""
    given = LLAMA_CONFIGS[case]
    config = oracle.peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **given)
    with quiet():
        model = oracle.peft.get_peft_model(llama.fresh(), config)
        model.save_pretrained(tmp_path)
    base = model.base_model
    layers = {n: base.model.get_submodule(n) for n in base.targeted_module_names}
    theirs = {
        name: (layer.r["default"], layer.scaling["default"] * layer.r["default"])
        for name, layer in layers.items()
    }
    file = tmp_path / "adapter_config.json"
    # PEFT writes out what the words meant; a config written by hand has the words.
    read = json.loads(file.read_text()) | given
    file.write_text(json.dumps(read))

    names, axes = llama.model.names, llama.model.axes
    everything = lambda path, leaf: path.rpartition("/")[2] in ("kernel", "embedding")
    shapes = allocate.kernel_shapes(llama.params, everything, axes=axes)
    found = interop.allocation_from_peft(read, names, shapes)
    table = Table(names, dict(leaves_with_path(llama.params)))
    (modules, alone) = table.by_leaf, lambda path, site: (site.rank, site.alpha)
    assert all(len(each) == 1 for each in modules.values())  # no stacks here
    told = {modules[p][0].name: alone(p, s) for p, s in found.sites if s.rank}
    assert told == theirs

    with jax.disable_jit():
        tree = interop.load_peft(tmp_path, llama.params, names=names, axes=axes)
    adapted = {
        modules[path][0].name: (node.site.ranks[0], node.site.alphas[0])
        for path, node in leaves_with_path(tree)
        if is_node(node) and node.site.ranks  # not those that are trained whole
    }
    assert adapted == theirs
    assert 0 < len(theirs) < len(shapes)


def test_tied_modules_are_added_for_an_allocation_too():
    """``ensure_weight_tying`` means the same wherever a config is read."""
    names = [
        ModuleName("model.embed_tokens", "embed", "embedding", tied="lm_head"),
        ModuleName("lm_head", "lm_head", "linear"),
    ]
    shapes = {"lm_head/kernel": allocate.KernelShape(None, 4, 9)}
    shapes["embed/embedding"] = allocate.KernelShape(None, 9, 4)
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"]}
    apart = interop.allocation_from_peft(config, names, shapes).ranks()
    assert apart == {"lm_head/kernel": 0, "embed/embedding": 2}
    config["ensure_weight_tying"] = True
    both = interop.allocation_from_peft(config, names, shapes).ranks()
    assert both == {"lm_head/kernel": 2, "embed/embedding": 2}


def test_a_config_without_targets_is_refused():
    shapes = {"q/kernel": allocate.KernelShape(None, 4, 4)}
    names = [ModuleName("q", "q", "linear")]
    for config in ({"r": 2}, {"r": 2, "target_modules": None}):
        with pytest.raises(ValueError, match="`config` has no target_modules"):
            interop.allocation_from_peft(config, names, shapes)
    none = {"r": 2, "target_modules": "dummy-target-modules"}
    assert interop.allocation_from_peft(none, names, shapes).ranks() == {"q/kernel": 0}
