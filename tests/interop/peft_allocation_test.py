"""Allocations as patterns of PEFT, through the real library."""

import functools
import json
import warnings

import pytest

from jaxpeft import interop
from jaxpeft.allocate import Allocation, KernelShape, SiteRank
from jaxpeft.models import ModuleName

APART = [
    ModuleName("layers.{i}.q", "layer_{i}/q", "linear"),
    ModuleName("layers.{i}.v", "layer_{i}/v", "linear"),
]
STACKED = [row._replace(ours=row.ours.replace("_{i}", "")) for row in APART]
RANKS = [1, 4, 6, 1, 4, 0, 4, 4, 1, 1, 2, 6]


def allocations():
    """The same twice: layers apart, and one stack."""
    apart = {}
    for i, rank in enumerate(RANKS):
        apart[f"layer_{i}/q/kernel"] = SiteRank(rank, 1.5 * rank)
        apart[f"layer_{i}/v/kernel"] = SiteRank(4, 4.0)
    shapes = {path: KernelShape(None, 8, 8) for path in apart}
    stacked = {
        "layer/q/kernel": SiteRank(tuple(RANKS), tuple(1.5 * r for r in RANKS)),
        "layer/v/kernel": SiteRank((4,) * 12, (4.0,) * 12),
    }
    stacked_shapes = {path: KernelShape(12, 8, 8) for path in stacked}
    return (apart, shapes, APART), (stacked, stacked_shapes, STACKED)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_round_trip_through_peft(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer() for _ in RANKS])

    for sites, shapes, names in allocations():
        allocation = Allocation.of(sites)
        fields = interop.allocation_to_peft(allocation, names)
        assert json.loads(json.dumps(fields)) == fields
        assert (fields["r"], fields["lora_alpha"]) == (4, 4)
        model = peft.get_peft_model(Net(), peft.LoraConfig(**fields))
        for i, rank in enumerate(RANKS):
            q = model.base_model.model.layers[i].q
            if rank:
                assert q.r["default"] == rank
                assert q.scaling["default"] == 1.5
            else:
                assert type(q) is torch.nn.Linear
            assert model.base_model.model.layers[i].v.scaling["default"] == 1
        model.save_pretrained(tmp_path)
        read = json.loads((tmp_path / "adapter_config.json").read_text())
        assert interop.allocation_from_peft(read, names, shapes) == allocation
        read["alpha_pattern"] = {}  # control: PEFT's scale would be another
        assert interop.allocation_from_peft(read, names, shapes) != allocation


def test_short_keys_by_pefts_rule():
    """The first that fits wins; ends count from a dot."""
    _, shapes, names = allocations()[0]
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["q"]}
    config["rank_pattern"] = {r"layers\.1\.q": 3, r"1\.q": 5}
    with pytest.raises(ValueError, match=r"`config` names \['1\\\\.q'\]"):
        interop.allocation_from_peft(config, names, shapes)
    config["rank_pattern"] = {r"layers\.1\.q": 3, r"1.*q": 5}
    found = interop.allocation_from_peft(config, names, shapes).ranks()
    assert [found[f"layer_{i}/q/kernel"] for i in (0, 1, 10, 11)] == [2, 3, 5, 5]
    assert found["layer_0/v/kernel"] == 0


@pytest.mark.parametrize(
    "chosen",
    [
        {"layers_to_transform": [1, 4]},
        {"layers_to_transform": 11, "layers_pattern": "layers"},
    ],
    ids=["layers", "one-layer"],
)
@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_chosen_layers_are_pefts(chosen):
    """Those that PEFT itself adapts; its own rule wants a name before the layers."""
    import peft
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            linear = functools.partial(torch.nn.Linear, 8, 8)
            layer = lambda: torch.nn.ModuleDict({"q": linear(), "v": linear()})
            self.enc = torch.nn.Module()
            self.enc.layers = torch.nn.ModuleList([layer() for _ in RANKS])

    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q", "v"], **chosen)
    model = peft.get_peft_model(Net(), config).base_model.model
    theirs = {
        f"layer_{i}/{name}/kernel": layer[name].r["default"]
        for i, layer in enumerate(model.enc.layers)
        for name in "qv"
        if hasattr(layer[name], "r")
    }
    _, shapes, names = allocations()[0]
    names = [row._replace(theirs=f"enc.{row.theirs}") for row in names]
    fields = json.loads(json.dumps(config.to_dict(), default=list))
    found = interop.allocation_from_peft(fields, names, shapes).ranks()
    assert {path: rank for path, rank in found.items() if rank} == theirs
    assert 0 < len(theirs) < len(shapes)


def test_refusals():
    sites, shapes, names = allocations()[0]
    allocation = Allocation.of(sites)
    with pytest.raises(ValueError, match="'layer_0/v/kernel' is in no row of `names`"):
        interop.allocation_to_peft(allocation, names[:1])
    fields = interop.allocation_to_peft(allocation, names)
    with pytest.raises(ValueError, match="use_rslora"):
        interop.allocation_from_peft(fields | {"use_rslora": True}, names, shapes)
    with pytest.raises(ValueError, match="every site rank 0"):
        none = Allocation.of({"layer_0/q/kernel": SiteRank(0, 0.0)})
        interop.allocation_to_peft(none, names)
