"""Runs that die the hard way, and whether two runs came to the same."""

import numpy as np
import safetensors.numpy

from jaxpeft import runs

# To stand before a program that runs train.py: once a step of a run in {folder} has
# been written down, its process is no more.
DIES = """
import os, signal
from jaxpeft import runs
write = runs.MetricsWriter.write
def write_and_die(self, event, step, **values):
    write(self, event, step, **values)
    if (event, step) == ("train", {step}) and {folder!r} in self._file.name:
        os.kill(os.getpid(), signal.SIGKILL)
runs.MetricsWriter.write = write_and_die
"""


def adapter_of(folder):
    """Every array of the saved adapter, by file and name."""
    files = sorted((folder / "adapter").rglob("*.safetensors"))
    assert files
    return {
        f"{file.name}/{name}": array
        for file in files
        for name, array in safetensors.numpy.load_file(file).items()
    }


def curve(folder, event, name):
    return [(e["step"], e[name]) for e in runs.read_metrics(folder, event)]


def assert_same_run(folder, other, metric="accuracy"):
    ours, theirs = adapter_of(folder), adapter_of(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    for event, name in (("train", "loss"), ("train", "grad_norm"), ("eval", metric)):
        assert curve(folder, event, name) == curve(other, event, name)
