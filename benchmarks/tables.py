"""The tables of the README and the documentation, out of committed results.

    python -m benchmarks.tables            # writes them anew

A page has a place, ``<!-- NAME: what makes the results -->`` to ``<!-- end -->``, for
each table here; a test holds pages and results equal. ``docs/pods.md`` has one of
``benchmarks.estimates_table``.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMPARISON = ROOT / "benchmarks/methods/table.json"


def results(name: str) -> dict[str, Any]:
    """What ``benchmarks/results/NAME.json`` holds."""
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _spread(ratio: Sequence[float], digits: int = 2) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in ratio)
    return f"{middle} ({low} to {high})"


# ------------------------------------- Methods ---------------------------------------


@functools.cache
def over_lora() -> dict[str, tuple[float, float]]:
    """FLOPs and temporaries of a step over LoRA's, by method.

    Of the decoder in ``flops.json`` without rematerialisation; of mixtures over one
    LoRA of their whole width, in ``mixture_speed.json``.
    """
    rows = {
        row["method"]: (row["flops"], row["temporary_bytes"])
        for row in results("flops")["rows"]
        if row["program"].startswith("decoder")
        and (row["remat"], row["way"]) == ("none", "adapt")
    }
    flops, temporaries = rows["lora"]
    found = {name: (f / flops, t / temporaries) for name, (f, t) in rows.items()}
    for row in results("mixture_speed")["rows"]:
        found.setdefault(row["method"], (row["flops"], row["temporaries"]))
    return found


def methods() -> str:
    """Each method with its paper, its cost, and what becomes of it in HF PEFT."""
    rows = []
    for name, found in results("methods")["methods"].items():
        paper = found["arxiv"]
        flops, _ = over_lora().get(name, (None, None))
        cost = "-" if flops is None else f"{flops:.2f}"
        link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper else ""
        rows.append((f"`jp.{name}`", link, cost, found["peft"]))
    head = ("method", "arXiv", "FLOPs / LoRA", "in HF PEFT: itself, or LoRA of rank")
    return markdown(head, rows)


def costs() -> str:
    """FLOPs and memory of a step of each method over LoRA's."""
    rows = sorted(over_lora().items(), key=lambda item: item[1])
    cells = [(f"`{name}`", f"{f:.3f}", f"{t:.2f}") for name, (f, t) in rows]
    return markdown(
        ("method", "matmul FLOPs over LoRA", "temporaries over LoRA"), cells
    )


def comparison() -> str:
    """Test scores of methods by one rule; a sentence until they are there."""
    if not COMPARISON.exists():
        return "*The comparison has not been run to its end yet.*\n"
    made = json.loads(COMPARISON.read_text())
    rows = []
    for row in made["rows"]:
        sd = "" if row["sd"] is None else f" ({row['sd']:.3f})"
        beside = ""
        if "difference" in row:
            low, high = f"{row['low']:+.3f}", f"{row['high']:+.3f}"
            beside = f"{row['difference']:+.3f} ({low} to {high})"
        sizes = (f"{row[name]:,}" for name in ("trainable", "stored", "head"))
        score = f"{row['mean']:.3f}{sd}"
        rows.append((row["task"], f"`{row['method']}`", score, beside, *sizes))
    beside = f"beside {made['reference']} (95 %)"
    head = ("task", "method", "test score (sd)", beside, "trains", "stores", "whole")
    return markdown(head, rows)


# ------------------------------------- Figures ---------------------------------------


def peers() -> str:
    """Steps beside HF PEFT on PyTorch."""
    rows = []
    for row in results("peers")["rows"]:
        ours, theirs = row["step_ms"]
        step = f"{ours:.0f} / {theirs:.0f}"
        ratios = (_spread(row["time"]), _spread(row["frozen"]), f"{row['memory']:.2f}")
        rows.append((row["model"], row["method"], step, *ratios))
    head = ("ms a step, ours / theirs", "over PEFT (range)")
    beside = ("over our own frozen step (range)", "peak memory over PEFT")
    return markdown(("model", "method", *head, *beside), rows)


def by_hand() -> str:
    """A step beside the same one in plain JAX."""
    rows = []
    for row in results("by_hand")["rows"]:
        gflop = "{:.3f} / {:.3f}".format(*row["gflop"]) + f" ({row['flops']:.4f})"
        memory = "{:.1f} / {:.1f}".format(*row["temporary_mb"])
        memory += f" ({row['temporaries']:.3f})"
        rows.append((row["layers"], gflop, memory, _spread(row["time"])))
    counts = ("GFLOP, ours / by hand", "temporaries, MB")
    return markdown(("layers", *counts, "time ratio (range)"), rows)


def decoding() -> str:
    """Writing beside transformers."""
    rows = []
    for row in results("decoding")["rows"]:
        speed = "{} / {}".format(*row["tokens_a_second"])
        rows.append((row["layers"], str(row["batch"]), speed, _spread(row["speed"])))
    head = ("layers", "prompts", "tokens/s, ours / theirs", "speed ratio (range)")
    return markdown(head, rows)


def mixtures() -> str:
    """Mixtures beside one LoRA of their width."""
    rows = []
    for row in results("mixture_speed")["rows"]:
        counts = (f"{row['flops']:.3f}", f"{row['temporaries']:.3f}")
        times = (f"{row['processor'][0]:.2f}", f"{row['time'][0]:.2f}")
        rows.append((f"`{row['method']}`", *counts, *times))
    return markdown(("method", "FLOPs", "temporaries", "processor time", "time"), rows)


def many() -> str:
    """Many adapters in one batch."""
    rows = []
    for row in results("many_adapters")["rows"]:
        ratios = (_spread(row["ratios"][name]) for name in ("mixed", "apart"))
        rows.append((row["task"], row["layers"], row["how"], *ratios))
    head = ("task", "layers", "how", "16 adapters in one call", "a call each")
    return markdown(head, rows)


def memory() -> str:
    """Memory of a chip by model and method, from the committed estimates."""
    rows = []
    for row in results("estimates")["rows"]:
        size, method, target, *_ = (*row["case"].split("/"), "")
        base = "bfloat16"
        if row["case"].count("/") == 3:
            size, method, base, target = row["case"].split("/")
        parts = (row["base"], row["adapters"] + row["optimizer"], row["temporaries"])
        gb = [f"{part / 1e9:.2f}" for part in (*parts, row["peak"])]
        rows.append((size.upper(), f"`{method}`", base, target, *gb))
    head = ("model", "method", "base", "chips")
    parts = ("base, GB a chip", "adapters, AdamW", "temporaries", "peak")
    return markdown((*head, *parts), rows)


def figures() -> str:
    """Five figures for the README, each with its results and its command."""
    peer = {(row["model"], row["method"]): row for row in results("peers")["rows"]}
    encoder = peer["small encoder", "dora"]
    hand = results("by_hand")["rows"][0]
    fastest = results("decoding")["rows"][0]
    kills = results("kills")
    chip = {row["case"]: row for row in results("estimates")["rows"]}["8b/lora/v5e:4x4"]
    said = [
        (
            "FLOPs, temporaries: LoRA step over plain JAX",
            f"{hand['flops']:.4f}, {hand['temporaries']:.3f}",
            ("by_hand", "benchmarks.by_hand"),
        ),
        (
            "processor time: DoRA step over HF PEFT's, small encoder",
            _spread(encoder["time"]),
            ("peers", "benchmarks.against_peers --sizes small --core 0"),
        ),
        (
            "writing speed over transformers, SmolLM2-135M, one prompt",
            _spread(fastest["speed"]),
            ("decoding", "benchmarks.decoding --tokens 32 --turns 5"),
        ),
        (
            f"run killed {len(kills['kills'])} times, bit for bit one that was not",
            "yes" if kills["bit_equal"] else "no",
            ("kills", kills["command"].removeprefix("python -m ")),
        ),
        (
            "GB a chip: LoRA on 8B, v5e:4x4, compiled only",
            f"{chip['peak'] / 1e9:.2f}",
            ("estimates", "benchmarks.estimates"),
        ),
    ]
    rows = [
        (what, value, f"[JSON](benchmarks/results/{file}.json), `python -m {command}`")
        for what, value, (file, command) in said
    ]
    return markdown(("what", "figure", "from"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "methods": methods,
    "costs": costs,
    "comparison": comparison,
    "peers": peers,
    "by_hand": by_hand,
    "decoding": decoding,
    "mixtures": mixtures,
    "many": many,
    "memory": memory,
    "figures": figures,
}
_PLACE = re.compile(r"(<!-- (\w+): [^\n]* -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """A page with its tables as the results have them; other places stay."""

    def put(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            return found[0]
        return f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}"

    return _PLACE.sub(put, page)


def pages() -> list[Path]:
    """The README and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    """Writes the pages whose tables have changed."""
    for path in pages():
        text = path.read_text()
        if (new := filled(text)) != text:
            path.write_text(new)
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
