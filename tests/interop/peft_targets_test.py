"""Which modules and ranks a PEFT config means, against what PEFT itself wraps."""

import pytest
from families_toolbox import Family, quiet

from jaxpeft.interop._modules import MATRICES, Table
from jaxpeft.interop.peft._config import DEFAULTS, by_pattern, target_names, targets
from jaxpeft.tree._node import leaves_with_path

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
    found = targets(mine, modules)
    ranks = {m.name: by_pattern(mine["rank_pattern"], m.name, 2) for m in found}
    assert ranks == theirs
    # And the list that we would write for the same modules means them again.
    names = target_names(found, table.modules)
    again = targets(DEFAULTS["LORA"] | {"target_modules": names}, modules)
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
