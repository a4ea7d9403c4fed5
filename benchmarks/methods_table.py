"""What the table of methods says of each: its paper, and how HF PEFT gets it.

python -m benchmarks.methods_table      # writes benchmarks/results/methods.json
"""

import inspect
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft as jp
from jaxpeft import interop, mixtures, models
from jaxpeft.parts import has_native_form

# The order of the table: what most want, then by kind.
ORDER = (
    *("lora", "rslora", "kasa", "bora", "dora", "pissa", "milora", "olora", "pc"),
    *("adalora", "lora_xs", "vera", "ia3", "bitfit", "full"),
    *("modula_res", "modula_flan", "mosld", "molora", "mola", "hydralora"),
)
RANK = 2
RESULTS = Path(__file__).parent / "results/methods.json"
_IDENTIFIER = re.compile(r"arXiv\s+(\d{4}\.\d{5})")


def names() -> list[str]:
    """Every method of the library: those of ``ORDER``, then others."""
    every = [n for n in dir(jp.adapters) if callable(getattr(jp.adapters, n))]
    return [*ORDER, *sorted(set(every) - set(ORDER))]


def paper(name: str) -> str:
    """The arXiv number that a method's References name first, or nothing."""
    said = getattr(jp, name).__doc__.partition("References:")[2]
    return next(iter(_IDENTIFIER.findall(said)), "")


def export(name: str) -> str:
    """How ``interop.save_peft`` writes a trained site of a method, in a few words."""
    params = {"query": {"kernel": jnp.eye(12)[:, :10], "bias": jnp.zeros(10)}}
    adapter = _adapter(name)
    targets = ".*" if adapter.where.leaf == "bias" else ["query"]
    adapted = jp.attach(params, adapter, targets, key=jax.random.key(0))
    trainable, frozen = jp.partition(adapted)
    adapted = jp.combine(jax.tree.map(lambda x: x + 0.01, trainable), frozen)
    if written := _written(name, adapted):
        return written
    if jp.mergeable(adapted):
        return "merged only"
    expert = "law" if "domains" in adapter.options else "0"
    written = _written(name, mixtures.fix_gates(adapted, {expert: 1.0}))
    return f"{written}, fixed gates" if written else "no"


def _written(name: str, adapted: Any) -> str:
    """What ``save_peft`` makes of a tree: itself, or the rank of plain LoRA.

    Empty where it refuses.
    """
    table = [models.ModuleName("attention.query", "query", "linear")]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "peft"
        try:
            interop.save_peft(adapted, where, names=table)
        except ValueError:
            return ""
        config = json.loads((where / interop.PEFT_CONFIG).read_text())
    if config["peft_type"] != "LORA" or getattr(jp, name)().where.rank is None:
        return "itself"
    if config["r"] > RANK:
        return "2r" + (", or itself" if has_native_form(name) else "")
    return "itself" if has_native_form(name) else "r"


def _adapter(name: str) -> Any:
    make = getattr(jp, name)
    options: dict[str, Any] = {"rank": RANK} if make().where.rank else {}
    experts = {"experts": 2, "domains": ("law", "code"), "rank_universal": RANK}
    taken = inspect.signature(make).parameters
    return make(**options, **{k: v for k, v in experts.items() if k in taken})


def main() -> int:
    """Tries every method, and keeps what was found."""
    found = {name: {"arxiv": paper(name), "peft": export(name)} for name in names()}
    RESULTS.write_text(json.dumps({"methods": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
