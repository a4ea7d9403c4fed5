"""What a mixture behind its universal expert holds in memory, read off the program."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from benchmarks.hlo import made_of_shape

T, D_IN, D_OUT, N, R = 1024, 256, 320, 8, 8
NAMES = tuple(f"domain_{i}" for i in range(N))
SHAPE = jax.ShapeDtypeStruct
WIDE = [(T, D_OUT)]
EACH = [(T, N, D_OUT), (T, N + 1, D_OUT)]


def use(params, x):
    return x @ params["w"]


def halves(adapter):
    run = lambda params, key: jp.attach(params, adapter, ["w"], key=key)
    return jp.partition(
        jax.eval_shape(run, {"w": SHAPE((D_IN, D_OUT), jnp.float32)}, jax.random.key(0))
    )


def forward(trainable, frozen, x):
    return jp.adapt(use)(jp.combine(trainable, frozen), x)


def gradient(trainable, frozen, x):
    loss = lambda t, x: jnp.sum(forward(t, frozen, x) ** 2)
    return jax.grad(loss, argnums=(0, 1))(trainable, x)


def compiled(fn, adapter):
    x = SHAPE((T, D_IN), jnp.float32)
    program = jax.jit(fn).lower(*halves(adapter), x).compile()
    return program.as_text(), program.memory_analysis().temp_size_in_bytes


def test_behind_the_universal_expert_takes_no_more_than_beside_it():
    """Eight domains and the universal expert against nine experts that are alike."""
    behind = jp.modula_res(NAMES, rank=R, rank_universal=R)
    plain = jp.molora(R, experts=N + 1)
    for fn in (forward, gradient):
        text, mine = compiled(fn, behind)
        _, theirs = compiled(fn, plain)
        assert 0 < mine <= 1.25 * theirs, fn.__name__
        assert not made_of_shape(text, EACH), fn.__name__
        if fn is forward:  # the base's output, the change, and their sum
            made = made_of_shape(text, WIDE)
            assert 1 <= len(made) <= 3, made


def test_the_search_finds_what_is_forbidden():
    """Control: the printed equations, expert by expert through ``h``."""

    def printed(x, w, a_u, b_u, a, b, gates):
        h = x @ a_u @ b_u
        inner = jax.nn.leaky_relu(jnp.einsum("to,nor->tnr", h, a))
        each = jnp.einsum("tnr,nro->tno", inner, b)
        return x @ w + h + jnp.einsum("tn,tno->to", gates, each)

    sizes = [(T, D_IN), (D_IN, D_OUT), (D_IN, R), (R, D_OUT)]
    sizes += [(N, D_OUT, R), (N, R, D_OUT), (T, N)]
    args = [SHAPE(size, np.float32) for size in sizes]
    text = jax.jit(printed).lower(*args).compile().as_text()
    assert made_of_shape(text, EACH) and len(made_of_shape(text, WIDE)) > 3
