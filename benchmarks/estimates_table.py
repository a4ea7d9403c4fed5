"""The table of estimates in ``docs/pods.md``, out of the committed results.

    python -m benchmarks.estimates_table            # writes it anew

``benchmarks.estimates`` makes the results; a test holds page and results equal.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/estimates.json"
PAGE = ROOT / "docs/pods.md"
_PLACE = re.compile(r"(<!-- estimates: [^\n]* -->\n).*?(<!-- end -->)", re.DOTALL)
_HEAD = (
    ("step", "mesh", "base, GB a chip", "adapters, AdamW", "temporaries"),
    ("peak", "of", "s a step, at least", "tokens/s a chip, at most"),
)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of a results file as a Markdown table, in their order."""
    head = [name for part in _HEAD for name in part]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    gb = lambda count: "-" if count is None else f"{count / 1e9:.2f}"
    number = lambda value, form: "-" if value is None else format(value, form)
    axes = " x ".join(f"{name} {n}" for name, n in row["mesh"].items() if n > 1)
    fits = "" if row["fits"] else ": does not fit"
    return [
        row["case"].replace("/", ", "),
        axes or "one device",
        gb(row["base"]),
        gb(row["adapters"] + row["optimizer"]),
        gb(row["temporaries"]),
        gb(row["peak"]),
        gb(row["memory"]) + fits,
        number(row["step_seconds"], ".2f"),
        number(row["tokens_per_second_per_device"], ",.0f"),
    ]


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """Returns a page with the table of these rows in its place.

    Raises:
        ValueError: the page has no such place.
    """
    if not _PLACE.search(page):
        raise ValueError("`page` has no <!-- estimates: ... --> and <!-- end -->")
    return _PLACE.sub(lambda found: found[1] + table(rows) + found[2], page)


def main() -> int:
    """Writes the page."""
    rows = json.loads(RESULTS.read_text())["rows"]
    PAGE.write_text(with_table(PAGE.read_text(), rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
