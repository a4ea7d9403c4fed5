"""A decoder's loss and gradients on one device and on eight: the same numbers.

With the vocabulary cut over the tensor axis, and hidden states along their tokens.
"""

import functools
import math
import re

import jax
import meshes_toolbox as toolbox
import numpy as np
import pytest

from jaxpeft import training

# data, fsdp, tensor, and of some sequence
SIZES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4), (4, 1, 2)]
SIZES += [(2, 1, 2, 2), (1, 2, 1, 4)]

pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.cache
def decoder(**changes):
    """The decoder, its batch, and the numbers of one device."""
    given = *toolbox.make(**changes), toolbox.rows_of()
    one = training.make_mesh(devices=jax.devices()[:1])
    return given, toolbox.gradient_on(one, *given)


def assert_same(found, wanted):
    (loss, norm, grads), (one_loss, one_norm, one_grads) = found[:3], wanted[:3]
    # Measured: 2e-7 at most.
    assert loss == pytest.approx(one_loss, rel=1e-6)
    assert norm == pytest.approx(one_norm, rel=1e-6)
    sites = {path.rpartition("[")[0] for path in one_grads}
    for site in sites:  # Measured: 2e-6 at most
        each = [path for path in one_grads if path.startswith(site)]
        size = np.sqrt(sum(np.sum(one_grads[path] ** 2) for path in each))
        off = sum(np.sum((grads[path] - one_grads[path]) ** 2) for path in each)
        assert np.sqrt(off) <= 1e-5 * size, (site, np.sqrt(off) / size)
        assert size > 0, site


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_eight_devices_are_one(sizes, capfd):
    given, one = decoder()
    capfd.readouterr()
    found = toolbox.gradient_on(training.make_mesh(*sizes), *given)
    data, fsdp, tensor, *sequence = sizes
    cut = tensor * math.prod(sequence)
    said = capfd.readouterr().err
    # A CPU's attention gives tokens in four parts to two heads of keys by way of a
    # whole copy; splash attention, a TPU's, has its own way.
    assert cut > 2 or "rematerialization" not in said, "nothing is replicated"
    assert_same(found, one)
    text = found[3]
    rows, tokens = toolbox.ROWS // (data * fsdp), toolbox.TOKENS // cut
    vocabulary = toolbox.SIZES["vocab_size"]
    carries = f"f32[2,{rows},{tokens},16]"
    assert carries in text, "what the layers keep is cut along tokens"
    gathered = re.findall(r"= (f32\[\d+,\d+\])\S* all-gather\(", text)
    assert f"f32[{vocabulary},16]" not in gathered, "nobody holds the whole embedding"
    if fsdp > 1:  # the head's table, once, of this device's vocabulary
        assert gathered.count(f"f32[16,{vocabulary // tensor}]") == 1
