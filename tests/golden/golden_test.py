"""Every number stays: against files that ``make_golden.py`` made once."""

import importlib.metadata
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import distance
from contract_toolbox import make_params
from golden_toolbox import (
    AXES,
    NAMES,
    PAIRS,
    SLOTS,
    compiled_slots,
    compiled_step,
    counts_of,
    folder,
    inputs,
    kept,
    numbers_of,
    read_json,
    slots_tree,
    write_peft,
)

import jaxpeft as jp
from jaxpeft import interop
from jaxpeft.interop._tensors import TensorFile

# Another order of sums in float32 moves a value by 1e-6 of its largest.
# AdamW divide small gradients by their own size, which magnifies that.
CLOSE = 3e-6
COUNTS = read_json("counts.json")
SAME = read_json("versions.json")["jaxlib"] == importlib.metadata.version("jaxlib")


def read(file) -> dict[str, np.ndarray]:
    opened = TensorFile(file)
    return {name: opened.read(name) for name in opened.shapes}


def differing(got: dict, case) -> dict[str, float]:
    golden = read(folder(case) / "numbers.safetensors")
    assert sorted(got) == sorted(golden)
    gaps = {name: distance(jnp.asarray(got[name]), x) for name, x in golden.items()}
    return {name: gap for name, gap in gaps.items() if not gap < CLOSE}


def check_counts(case, now: dict[str, int]):
    """No more dots, copies and bytes, and at most two arguments more a site."""
    golden = COUNTS["-".join(case)]
    # Another compiler fuses and lays out otherwise; its products are the same.
    kinds = ("dots", "copies", "bytes") if SAME else ("dots",)
    more = {kind: now[kind] - golden[kind] for kind in kinds}
    assert max(more.values()) <= 0, f"more than when they were counted: {more}"
    assert now["sites"] == golden["sites"] > 0
    assert now["arguments"] <= golden["arguments"] + 2 * golden["sites"]


@pytest.mark.parametrize("case", PAIRS, ids="-".join)
def test_every_number_stays_and_a_step_does_no_more(case):
    adapted = kept(case)
    program = compiled_step(adapted)
    assert not differing(numbers_of(adapted, program), case)
    check_counts(case, counts_of(program[0], adapted))


NEW_FILES = [
    ("modula_flan", "universal"),
    ("modula_flan", "domain:one"),
    ("modula_res", "universal"),
]


def products(tensors):
    """The changes that the pairs of a file make."""
    down, up = "lora_A.weight", "lora_B.weight"
    return {
        name: tensors[name.replace(down, up)] @ x
        for name, x in tensors.items()
        if name.endswith(down)
    }


@pytest.mark.parametrize("case", PAIRS, ids="-".join)
def test_pefts_files_stay(case, tmp_path):
    adapted, files = kept(case), folder(case) / "peft"
    had = files.exists()
    # What had files has them; a stage whose change is a product may have them now.
    assert write_peft(adapted, tmp_path / "peft") == (had or case in NEW_FILES)
    for file in sorted(files.iterdir()) if had else ():
        written = tmp_path / "peft" / file.name
        if file.suffix == ".json":
            assert json.loads(written.read_text()) == json.loads(file.read_text())
            continue
        got, golden = read(written), read(file)
        assert sorted(got) == sorted(golden)
        if case == ("pc", "folded"):  # of nearly equal components, which is first
            got, golden = products(got), products(golden)
        assert distance(got, golden) < CLOSE
    if not had and case not in NEW_FILES:
        return
    files = files if had else tmp_path / "peft"
    again = interop.load_peft(files, make_params(), names=NAMES, axes=AXES)
    leaves = jax.tree.map(jnp.asarray, jp.merge(again))
    assert distance(leaves, jp.merge(adapted)) < CLOSE


def test_slots_compute_what_they_did_and_no_more():
    adapted = slots_tree()
    compiled = compiled_slots(adapted)
    assert not differing({"y": compiled(adapted, inputs())}, SLOTS)
    check_counts(SLOTS, counts_of(compiled, adapted))


def test_a_number_that_moves_is_seen():
    """Control: a change of one in a thousand is none that passes."""
    case = ("lora", "default")
    moved = jp.scaled(kept(case), 1.001)
    got = numbers_of(moved, compiled_step(moved))
    assert {"y", "loss"} <= set(differing(got, case))


def test_a_product_more_is_seen():
    case = ("lora", "default")
    now = COUNTS["-".join(case)]
    with pytest.raises(AssertionError, match="more than when"):
        check_counts(case, now | {"dots": now["dots"] + 1})
