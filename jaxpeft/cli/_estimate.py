"""``jaxpeft estimate``: what a config's step needs on a machine that is not here."""

import argparse

from jaxpeft.cli._types import ending, whole

NAME = "estimate"
SUMMARY = "say what a config's step needs on a TPU pod or here, without running it"
DESCRIPTION = """\
Compiles the training step of a config for a machine and says what it needs on each
device: memory by parts, FLOPs, collectives, the least time. Neither weights nor data
are read (a folder with config.json alone will do as `model.name`), and the machine need
not be here: for TPUs, pip install "jaxpeft[tpu]". The step is that of train.py.

--config.FIELD=VALUE replaces a value of the config, as for train.py. The exit status is
2 where the step does not fit.
"""
EXAMPLE = "jaxpeft estimate configs/quickstart.py --target v5e:4x4 --fit"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a Python file with get_config()")
    add(
        "--target",
        help="v5e:4x4, v4:2x2x4, v5p:..., v6e:..., tpu7x:..., cpu, cpu:8, gpu "
        "(default: what JAX would run on here)",
    )
    add("--slices", type=whole(1), default=1, help="so many such slices of TPUs")
    add("--num-labels", type=whole(1), help="the width of the head; 1: a regression's")
    add("--fit", action="store_true", help="look for changes with which it fits")
    add("--json", type=ending(".json"), metavar="FILE", help="write all of it there")
    add("--plot", type=ending(".png"), metavar="FILE", help="draw the memory as bars")
    add(
        "--train",
        metavar="FILE",
        help="the train.py with the step (default: of the config's project, or here)",
    )
    parser.set_defaults(overrides=[])


def run(given: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxpeft import runs

    config = runs.load_config(given.config, given.overrides)
    program = runs.load_program(runs.program_file(given.config, given.train))
    runs.dry_run(
        config,
        attach=program.attach_all,
        make_step=program.make_step,
        target=given.target,
        slices=given.slices,
        num_labels=given.num_labels,
        look=given.fit,
        json_file=given.json,
        picture=given.plot,
    )
