"""One step of fine-tuning a model that knows nothing of adapters, with checks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from adapt_toolbox import distance, perturb

import jaxpeft as jp

METHODS = (jp.lora(rank=3), jp.bora(rank=2), jp.kasa(rank=2))

# Float32 through a few blocks with norms and softmax: the largest distance seen, of
# values and of gradients, is 4e-7. The adapters move the values by 0.1 and more.
SAME = 1e-5


def fine_tunes(fn, params, *inputs, axes, targets, keys, rate=0.1):
    """Attaches three methods by pattern, takes a step, and checks every promise.

    The adapted function equals the function on merged parameters, in value and in the
    gradient of every trained leaf; each of those learns; a step lowers the loss; the
    base comes back bit for bit.

    Args:
        fn: ``fn(params, *inputs)``.
        params: its parameters.
        *inputs: arrays.
        axes: ``{path: roles}`` that ``infer_axes`` must read off the function, for
            all sites and no other.
        targets: for each of ``METHODS``, the targets that it is attached to.
        keys: source of keys.
        rate: the size of the step.

    Returns:
        The adapted tree.
    """
    found = jp.infer_axes(fn, params, *inputs)

    @jax.jit
    def attach(params, key):
        own = jax.random.split(key, len(METHODS))
        for method, chosen, key in zip(METHODS, targets, own, strict=True):
            params = jp.attach(params, method, chosen, key=key, axes=found)
        return params

    adapted = perturb(attach(params, next(keys)), scale=0.1)
    nodes = filter(_is_node, jax.tree.leaves(adapted, is_leaf=_is_node))
    assert {x.site.path: found.get(x.site.path) for x in nodes} == axes
    trainable, frozen = jp.partition(adapted)

    def loss(call, trainable, frozen, inputs):
        out = call(jp.combine(trainable, frozen), *inputs)
        aim = jnp.sin(1.7 * jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.mean((out - aim) ** 2), out

    def step(call):
        return jax.jit(jax.value_and_grad(functools.partial(loss, call), has_aux=True))

    adapted_step = step(jp.adapt(fn))
    merged_step = step(lambda tree, *inputs: fn(jp.merge(tree), *inputs))
    (before, out), grads = adapted_step(trainable, frozen, inputs)
    (_, expected), expected_grads = merged_step(trainable, frozen, inputs)
    assert distance(out, expected) < SAME
    assert distance(jax.jit(fn)(params, *inputs), expected) > 1e-2, "nothing happened"
    assert distance(grads, expected_grads) < SAME
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(np.asarray(gradient) != 0), f"{path} never learns"
    moved = jax.tree.map(lambda x, g: x - rate * g, trainable, grads)
    (after, _), _ = adapted_step(moved, frozen, inputs)
    assert after < before
    original = jp.detach(jp.combine(moved, frozen))
    assert jax.tree.structure(original) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, original, params))
    return adapted


def _is_node(x):
    return isinstance(x, jp.tree.AdaptedKernel)
