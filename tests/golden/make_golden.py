"""Makes the golden files.

    PYTHONPATH=.:tests:tests/golden python tests/golden/make_golden.py

They say what every method computed when they were made; a change of the library that
is to change no number is held to them. Make them anew only where a number is *meant*
to change, and say in the commit which and why.
"""

import conftest  # noqa: F401, I001  the settings of the tests, before jax starts

import importlib.metadata
import json
import shutil

from golden_toolbox import (
    CASES,
    HERE,
    PAIRS,
    SLOTS,
    compiled_slots,
    compiled_step,
    counts_of,
    folder,
    inputs,
    kept,
    made,
    numbers_of,
    slots_tree,
    write_peft,
)
from rich.progress import track

from jaxpeft import interop
from jaxpeft.interop._tensors import write_tensors


def main():
    shutil.rmtree(CASES, ignore_errors=True)
    counts = {}
    for case in track(PAIRS):
        where = folder(case)
        where.mkdir(parents=True)
        interop.save_adapter(made(case), where / "adapter")
        adapted = kept(case)
        program = compiled_step(adapted)
        write_tensors(where / "numbers.safetensors", numbers_of(adapted, program), {})
        counts["-".join(case)] = counts_of(program[0], adapted)
        if write_peft(adapted, where / "peft"):
            (where / "peft" / "README.md").unlink()
    folder(SLOTS).mkdir()
    adapted = slots_tree()
    compiled = compiled_slots(adapted)
    y = {"y": compiled(adapted, inputs())}
    write_tensors(folder(SLOTS) / "numbers.safetensors", y, {})
    counts["-".join(SLOTS)] = counts_of(compiled, adapted)
    (HERE / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
