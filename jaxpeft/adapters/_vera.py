"""VeRA: vector-based random matrix adaptation (arXiv 2310.11454)."""

import math

import jax
import jax.numpy as jnp

from jaxpeft.parts import PeftForm, check_options, peft_form
from jaxpeft.tree import Adapter, Factors, Term, Where, method

LEAVES = {"lam_d": "vera_lambda_d", "lam_b": "vera_lambda_b"}  # in PEFT's files


@method(numbers=("d_initial",), drawn=("d_initial",))
def vera(
    rank: int = 256, d_initial: int | float = 0.1, dropout: int | float = 0.0
) -> Adapter:
    r"""Returns VeRA: two random matrices for all sites, two trained vectors for each.

    With one frozen pair ``A [max d_in, r]`` and ``B [r, max d_out]`` for all sites of
    one ``attach``, cut to each kernel's size,

    .. math::
        y = x W + \big(((z A_{:d_{in}}) \lambda_d)\, B_{:, :d_{out}}\big) \lambda_b,
        \qquad z = \mathrm{dropout}(x)

    :math:`\lambda_d` starts as ``d_initial``, :math:`\lambda_b` as 0: at the start the
    adapted model is the base.

    Notation:
        paper      HF PEFT                      here
        W_0        weight [out, in]             kernel [d_in, d_out] = weight.T
        A          vera_A [r, max in]           vera_a [max d_in, r] = vera_A.T
        B          vera_B [max out, r]          vera_b [r, max d_out] = vera_B.T
        d          vera_lambda_d [r]            lam_d [r]
        b          vera_lambda_b [out]          lam_b [d_out]

    Args:
        rank: r, at least 1; may exceed the kernels' sizes. A ``rank_pattern`` gives a
            site the leading part of the shared matrices.
        d_initial: start of ``lam_d``, > 0.
        dropout: probability in [0, 1) of dropping an entry of the low-rank path's
            input.

    Returns:
        An ``Adapter`` with trainable ``lam_d`` and ``lam_b``, frozen ``used`` (ones)
        and the frozen pair ``vera_a``, ``vera_b``, the same two arrays at all sites.

    Raises:
        ValueError: a value outside of what is allowed.

    Example:
        >>> import jaxpeft as jp
        >>> params = {n: {"kernel": jnp.ones((6, 4))} for n in ("query", "value")}
        >>> adapted = jp.attach(
        ...     params, vera(rank=3), ["query", "value"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0] == 2 * (3 + 4)
        True

    References:
        Kopiczko et al., VeRA, arXiv 2310.11454, eq. 2 and section 3.2. HF PEFT:
        ``VeraConfig``, whose widths of the random matrices these are.
    """
    check_options("vera", rank=rank, dropout=dropout, positive={"d_initial": d_initial})

    def shared(key, d_in, d_out, rank, dtype):
        key_a, key_b = jax.random.split(key)
        wide_a, wide_b = math.sqrt(6 / d_in), math.sqrt(6 / rank)
        draw = jax.random.uniform
        return {
            "vera_a": draw(key_a, (d_in, rank), dtype, -wide_a, wide_a),
            "vera_b": draw(key_b, (rank, d_out), dtype, -wide_b, wide_b),
        }

    def init(key, kernel, rank, alpha):
        del key, alpha
        # Ones that are padded with zeros: layers of a stack may differ in rank.
        return {"used": jnp.ones((rank,), kernel.dtype)}, {
            "lam_d": jnp.full((rank,), d_initial, kernel.dtype),
            "lam_b": jnp.zeros((kernel.shape[1],), kernel.dtype),
        }

    def factors(kernel, frozen, trainable, call):
        del call
        d_in, d_out = kernel.shape
        lam_d, lam_b = trainable["lam_d"] * frozen["used"], trainable["lam_b"]
        rank = lam_d.shape[0]
        b = lam_d[:, None] * frozen["vera_b"][:rank, :d_out] * lam_b[None, :]
        return Factors((Term(frozen["vera_a"][:d_in, :rank], b, drop=dropout),))

    return Adapter(
        init=init,
        factors=factors,
        shared=shared,
        where=Where(rank=rank),
    )


@peft_form(vera)
def _form(*, dropout, d_initial, **_):
    return PeftForm(
        peft_type="VERA",
        kinds=("linear", "conv1d"),
        to_leaves=lambda frozen, trainable, kind: {
            theirs: trainable[ours] for ours, theirs in LEAVES.items()
        },
        from_leaves=lambda leaves, kind: {
            ours: leaves[theirs] for ours, theirs in LEAVES.items()
        },
        fields={
            "vera_dropout": dropout,
            "d_initial": d_initial,
            "save_projection": True,
            "init_weights": True,
            "projection_prng_key": 0,  # not used: the matrices are in the file
        },
        patterns=False,
        shared={"vera_a": "base_model.vera_A", "vera_b": "base_model.vera_B"},
        read=_read,
    )


def _read(config, kind):
    """The options that a PEFT config means; see ``PeftForm.read``."""
    if config["peft_type"] != "VERA" or kind == "embedding":
        return None
    if not config["save_projection"]:
        raise ValueError(
            "save_projection is false, so its random matrices are not in the file and "
            "only PyTorch's generator could draw them again; save it in PEFT with "
            "VeraConfig(save_projection=True)"
        )
    names = {"rank": "r", "d_initial": "d_initial", "dropout": "vera_dropout"}
    return {ours: config[theirs] for ours, theirs in names.items()}
