"""The chunked cross-entropy: the plain formula's numbers, in an eighth of its room."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft.numerics import token_cross_entropy

WIDTH, VOCABULARY = 6, 11


def plain(head, hidden, targets):
    logits = hidden @ head
    logits = logits.astype(jnp.float32) if logits.dtype.itemsize < 4 else logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def ours(head, hidden, targets, chunk=8):
    return token_cross_entropy(lambda h: h @ head, hidden, targets, chunk=chunk)[0]


def problem(rows=(3,), tokens=7, dtype=float):
    random = np.random.default_rng(0)
    head = random.normal(size=(WIDTH, VOCABULARY)).astype(dtype)
    hidden = random.normal(size=(*rows, tokens, WIDTH)).astype(dtype)
    targets = random.integers(0, VOCABULARY, (*rows, tokens), np.int32)
    weights = random.random((*rows, tokens)).astype(dtype)
    return *map(jnp.asarray, (head, hidden, targets)), jnp.asarray(weights)


# Two tokens of three rows at a time, one of each, all; three of one text.
@pytest.mark.parametrize(
    ("rows", "chunk"), [((3,), 8), ((3,), 1), ((3,), 100), ((), 3)], ids=str
)
def test_value_and_gradients_in_float64(rows, chunk):
    with jax.enable_x64(True):
        head, hidden, targets, weights = problem(rows)
        total = lambda loss: (
            lambda head, hidden: jnp.sum(weights * loss(head, hidden, targets))
        )
        chunked = lambda *a: ours(*a, chunk=chunk)
        both = lambda *a: [
            jax.value_and_grad(total(f), (0, 1))(*a) for f in (chunked, plain)
        ]
        (value, grads), (expected, theirs) = jax.jit(both)(head, hidden)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-14)
        for grad, other in zip(grads, theirs, strict=True):
            np.testing.assert_allclose(grad, other, rtol=1e-12, atol=1e-14)


def test_hits_and_targets_outside():
    head, hidden, targets, _ = problem(dtype=np.float32)
    best = jnp.argmax(hidden @ head, axis=-1)
    targets = jnp.where(jnp.arange(7)[None] < 4, best.astype(jnp.int32), targets)
    _, hits = token_cross_entropy(lambda h: h @ head, hidden, targets, chunk=8)
    np.testing.assert_array_equal(hits, best == targets)
    assert 12 <= hits.sum() < 21
    values = ours(head, hidden, targets.at[1, 2].set(VOCABULARY))
    assert np.argwhere(np.isnan(values)).tolist() == [[1, 2]]


def test_half_precision_is_added_up_in_float32():
    head, hidden, targets, _ = problem(dtype=jnp.bfloat16)
    values = ours(head, hidden, targets)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, plain(head, hidden, targets), rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["kernel", "tied"])
def test_an_adapted_head(tied):
    """The loss is a plain function, so that ``adapt`` sees through it."""
    head, hidden, targets, _ = problem(dtype=np.float32)
    params = {"embedding": head.T} if tied else {"lm_head": {"kernel": head}}

    def loss(params, hidden, lossy=ours):
        kernel = params["embedding"].T if tied else params["lm_head"]["kernel"]
        return jnp.mean(lossy(kernel, hidden, targets))

    targeted = "embedding" if tied else "lm_head"
    adapted = jp.attach(
        params, jp.lora(rank=2), targets=[targeted], key=jax.random.key(0)
    )
    trainable, frozen = jp.partition(adapted)
    # Not all alike: a shift of all logits is none.
    trainable = jax.tree.map(
        lambda x: x + jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
        trainable,
    )

    def of(forward):
        loss = lambda t: forward(jp.combine(t, frozen), hidden)
        return jax.jit(jax.value_and_grad(loss))

    value, grads = of(jp.adapt(loss))(trainable)
    merged = lambda adapted, hidden: loss(jp.merge(adapted), hidden, plain)
    expected, theirs = of(merged)(trainable)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert abs(value - loss(params, hidden)) > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        grads,
        theirs,
    )


def test_an_eighth_of_the_plain_forms_memory():
    """At the size of Llama 3's vocabulary; nothing is run."""
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((64, 128 * 1024), jnp.float32),
        shape((2, 1024, 64), jnp.float32),
        shape((2, 1024), jnp.int32),
    )

    def temporaries(loss):
        grad = jax.grad(lambda h, head, t: jnp.mean(loss(head, h, t)))
        head, hidden, targets = arguments
        compiled = jax.jit(grad).lower(hidden, head, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    naive = temporaries(plain)
    assert naive >= 2048 * 128 * 1024 * 4  # the logits of all tokens
    chunked = temporaries(lambda *a: ours(*a, chunk=128))

    assert chunked <= naive / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "`chunk` must be at least 1, got 0"),
        ({"targets": jnp.zeros((3, 6), jnp.int32)}, r"got \(3, 7, 6\) and \(3, 6\)"),
    ],
    ids=["chunk", "shapes"],
)
def test_bad_input(change, message):
    head, hidden, targets, _ = problem(dtype=np.float32)
    arguments = {"targets": targets, "chunk": 4} | change
    with pytest.raises(ValueError, match=message):
        ours(head, hidden, **arguments)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_vocabulary_cut_over_devices(tied):
    """Each device reads out its part; values, gradients and hits are the plain ones."""
    head, hidden, targets, weights = problem((4,), dtype=np.float32)
    head = jnp.pad(head, ((0, 0), (0, 1)))  # 12 ids over 4 devices
    head = head.at[:, 5].set(head[:, 2]) if tied else head  # equal logits on two
    targets = targets.at[0, 0].set(-1).at[1, 1].set(2).at[1, 2].set(5)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(None, "tensor"), P("data", None, None), spec),
        out_specs=(spec, spec),
    )
    def cut(head, hidden, targets):
        read_out = lambda h: h @ head
        return token_cross_entropy(
            read_out, hidden, targets, chunk=4, mesh_axis="tensor"
        )

    whole = lambda head, hidden, targets: token_cross_entropy(
        lambda h: h @ head, hidden, targets, chunk=8
    )

    def run(f, targets):
        def loss(head, hidden):
            values, hits = f(head, hidden, targets)
            return jnp.sum(values * weights), (values, hits)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(head, hidden)

    found, wanted = run(cut, targets), run(whole, targets)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6),
        found,
        wanted,
    )
    assert 0 < wanted[0][1][1].sum() < targets.size, "some are hit"
    outside = targets.at[1, 2].set(12).at[3, 3].set(-13)
    values = jax.jit(cut)(head, hidden, outside)[0]
    assert np.argwhere(np.isnan(values)).tolist() == [[1, 2], [3, 3]]
