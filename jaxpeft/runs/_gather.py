"""What ranks are estimated from: a pretrained model's states, inputs of kernels."""

import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import allocate, dimension, models
from jaxpeft.transform import capture

Draw = Callable[[int, int], tuple[int, Iterable[Mapping[str, Any]]]]
WIDE = 8192  # inputs: second moments of more take too much memory
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "segment_ids", "positions")
_TOKENS, _SVDS = ("mask", "label_mask"), ("covariance", "incremental")


def _profile(
    model,
    params,
    draw: Draw,
    *,
    shapes,
    options,
    progress: bool,
    samples: int = 5000,
    seed: int = 0,
    pool: str = "mean",
    method: str = "linear",
    discard: int | float | None = None,
    sd: str = "subsample",
    plateau: bool = False,
):
    """The dimension of states 0 to L, and facts."""
    del shapes, options
    rows, batches = draw(samples, seed)
    estimator = functools.partial(
        dimension.twonn, method=method, discard=discard, sd=sd, seed=seed
    )
    if plateau:
        estimator = functools.partial(dimension.plateau, estimator=estimator, seed=seed)
    step = functools.partial(models.pooled_states(model, how=pool), params)
    with tempfile.TemporaryDirectory() as folder:
        states = dimension.collect(
            step,
            batches,
            folder,
            rows=rows,
            valid=lambda batch: batch["valid"],
            progress=progress,
        )
        each = _told(states, states.layers, "dimensions", "states", progress)
        profile = dimension.id_profile(each, estimator)
    return profile, {"rows": rows, "pool": pool, "estimator": profile[-1].method}


def _spectra(
    model,
    params,
    draw: Draw,
    *,
    shapes,
    options,
    progress: bool,
    samples: int = 5000,
    seed: int = 0,
    tokens: str = "mask",
    svd: str | None = None,
    keep: int | None = None,
    tau: int | float | None = 0.99,
):
    """Spectra of the sites' inputs over real tokens, and facts."""
    if tokens not in _TOKENS:
        raise ValueError(
            f"`ranks.before.tokens` must be one of {_TOKENS}, got {tokens!r}"
        )
    if svd is None:  # the same for all: their shares are compared
        svd = _SVDS[max(shape.d_in for shape in shapes.values()) > WIDE]
    if svd not in _SVDS:
        raise ValueError(f"`ranks.before.svd` must be one of {_SVDS}, got {svd!r}")
    most = allocate.most_directions(shapes, **options)
    if svd == "covariance":
        if keep is not None:
            raise ValueError(
                f"`ranks.before.keep` ({keep}) is of svd='incremental'; "
                "'covariance' keeps all directions"
            )
        tau = None
    elif keep is None:
        keep = max(64, 4 * most)
    rows, batches = draw(samples, seed)
    bare = model.clone(head=None)
    apply = lambda params, inputs: bare.apply(
        {"params": params}, **inputs, deterministic=True
    )

    @jax.jit
    def run(params, inputs, mask):
        reduce = lambda x: allocate.input_moments(x, mask, keep)
        chosen = lambda path, leaf: path in shapes
        return capture(apply, chosen, reduce, axes=model.axes)(params, inputs)[1]

    def step(batch):
        inputs = {n: np.asarray(batch[n]) for n in _INPUTS if n in batch}
        mask = inputs["attention_mask"] * batch["valid"][:, None].astype(np.int32)
        if tokens == "label_mask":
            if "target_weights" not in batch:
                raise ValueError(
                    "`ranks.before.tokens`='label_mask' is for tasks of writing; here "
                    "a loss belongs to a row, not to its tokens: write tokens='mask'"
                )
            mask = mask * (np.asarray(batch["target_weights"]) > 0)
        return run(params, inputs, jnp.asarray(mask))

    each = _told(batches, len(batches), "inputs", "batches", progress)
    moments = allocate.gather_moments(step, each, tau=tau, watch=most)
    spectra = {path: allocate.spectrum(moments[path]) for path in shapes}
    seen = int(np.max(next(iter(moments.values())).count))
    return spectra, {"rows": rows, "tokens": seen, "svd": svd}


def _told(each: Iterable, count: int, what: str, unit: str, progress: bool) -> Iterator:
    """The same, saying every few seconds how far it is."""
    started = said = time.monotonic()
    for number, one in enumerate(each):
        yield one
        now = time.monotonic()
        if progress and now - said > 5:
            said = now
            text = f"{what}: {number + 1}/{count} {unit}, {now - started:.0f} s"
            print(text, file=sys.stderr, flush=True)


# An argument of a function of jaxpeft.allocate, and what gathers it.
GATHER = {"profile": _profile, "spectra": _spectra}
