"""``jaxpeft compare``: methods side by side, chosen on validation rows alone."""

import argparse

NAME = "compare"
SUMMARY = "train methods side by side, and make a table of what is told apart"
DESCRIPTION = """\
Trains every method on every task for every seed, in processes of their own: first all
points of the grid with the seeds that choose, then the other seeds at the point that
was best on validation rows. Test scores are read once all choices are written down, of
what was chosen alone. Results are one JSON a row; the same command goes on where it was
stopped, and does not run again what has been run.

CONFIG is a Python file whose get_config() returns tasks, methods, grid, seeds,
choose_with, reference and budget; see configs/compare_small.py.
"""
EXAMPLE = "jaxpeft compare configs/compare_small.py --out runs/compared"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a Python file with get_config()")
    add(
        "--out",
        metavar="DIR",
        help="for runs, table and picture (default: runs/CONFIG)",
    )
    add("--results", metavar="DIR", help="one JSON a row (default: results in --out)")
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="ROW",
        help="run these rows alone; a beginning of names will do: trec/lora",
    )
    add(
        "--methods",
        metavar="NAME,NAME",
        help="these methods alone, in the table, too (default: all)",
    )
    add("--list", action="store_true", help="name the rows, and run nothing")
    add(
        "--train",
        metavar="FILE",
        help="the train.py (default: of the config's project)",
    )


def run(given: argparse.Namespace) -> None:
    """Runs the command."""
    from pathlib import Path

    import rich.console

    from jaxpeft import compare, runs

    name = Path(given.config.partition(":")[0]).stem
    out = compare.check_out(given.out or Path("runs") / name)
    found = compare.read_comparison(given.config)
    if given.methods is not None:
        found = found.of(given.methods.split(","))
    if given.list:
        print("\n".join(row.name for rows in found.rows.values() for row in rows))
        return
    made = compare.compare(
        found,
        config=given.config,
        train=runs.program_file(given.config, given.train),
        out=out,
        results=None if given.results is None else Path(given.results),
        only=given.only,
    )
    if not given.only:
        rich.console.Console().print(compare.show(made))
        print(out / "table.json")
