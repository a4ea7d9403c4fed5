"""LoRA-XS: a small trained matrix between fixed singular vectors (arXiv 2405.17604)."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxpeft.numerics import top_factors
from jaxpeft.parts import SCALINGS, check_options, check_site_rank, scale_leaf
from jaxpeft.tree import Adapter, Factors, Term, Where, method


@method(drawn=("std",))
def lora_xs(
    rank: int = 8,
    alpha: int | float | None = None,
    dropout: int | float = 0.0,
    std: int | float = 1e-5,
    iterations: int | None = None,
    scaling: Literal["alpha/r", "alpha/sqrt_r"] = "alpha/r",
) -> Adapter:
    r"""Returns LoRA-XS: train ``r x r`` numbers between fixed factors of the kernel.

    Once, at ``attach``, with :math:`W = U S V^T` (descending):

    .. math::
        a_0 = U_{:r} S_{:r}, \qquad b_0 = V_{:r}^T, \qquad
        core \sim \mathcal N(0, 10^{-10})

    then, with the scale ``s`` and :math:`z = \mathrm{dropout}(x)`,

    .. math:: y = x W + s\, \big((z a_0)\, core\big)\, b_0

    ``a0`` and ``b0`` never change, so that a site has ``r^2`` parameters whatever its
    size. All singular values stand on the in side.

    Notation:
        paper   official code, PyTorch           here
        W       weight [out, in]                 kernel [d_in, d_out] = weight.T
        A       lora_A.weight [r, in], frozen    a0 [d_in, r] = lora_A.T
        B       lora_B.weight [out, r], frozen   b0 [r, d_out] = lora_B.T
        R       latent_mapping.weight [r, r]     core [r, r] = R.T

    Args:
        rank: r, from 1 to min(d_in, d_out) of every site.
        alpha: numerator of the scale; ``None`` means ``rank``.
        dropout: probability in [0, 1) of dropping an entry of the path's input.
        std: standard deviation of ``core`` at the start, at least 0; with 0 the
            output at the start is exactly the base's.
        iterations: ``None``: the exact decomposition. A number: so many power
            iterations of a random block; the authors' code takes 10.
        scaling: "alpha/sqrt_r" is rsLoRA's.

    Returns:
        An ``Adapter`` with trainable ``core [r, r]``, and frozen ``scale``, ``a0``
        and ``b0``; loading a saved one never decomposes again.

    Raises:
        ValueError: a value outside of what is allowed; at ``attach``, a rank above
            min(d_in, d_out) of a site.

    Example:
        >>> import jaxpeft as jp
        >>> params = {"query": {"kernel": jnp.eye(6)[:, :4]}}
        >>> adapted = jp.attach(
        ...     params, lora_xs(rank=2), targets=["query"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0]
        4

    References:
        Balazy et al., LoRA-XS, arXiv 2405.17604, section 3. Code:
        github.com/MohammadrezaBanaei/LoRA-XS.
    """
    check_options(
        "lora_xs",
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        choices={"scaling": (scaling, SCALINGS)},
    )
    if not 0 <= std < float("inf"):
        raise ValueError(
            f"`std` must be at least 0 and finite, got {std}; write lora_xs(std=1e-5)."
        )
    if iterations is not None and iterations < 0:
        raise ValueError(
            f"`iterations` must be at least 0, or None for an exact decomposition; "
            f"got {iterations}. Write lora_xs(iterations=10)."
        )

    def init(key, kernel, rank, alpha):
        check_site_rank(rank, kernel.shape)
        key_core, key_svd = jax.random.split(key)
        a0, b0 = top_factors(
            kernel, rank, split="in", iterations=iterations, key=key_svd
        )
        scale = scale_leaf(alpha, rank, scaling, kernel.dtype)
        core = std * jax.random.normal(key_core, (rank, rank), kernel.dtype)
        return {"scale": scale, "a0": a0, "b0": b0}, {"core": core}

    def factors(kernel, frozen, trainable, call):
        del kernel, call
        core = frozen["scale"] * trainable["core"]
        b = jnp.matmul(core, frozen["b0"], precision="highest")
        return Factors((Term(frozen["a0"], b, drop=dropout),))

    return Adapter(
        init=init,
        factors=factors,
        where=Where(rank=rank, alpha=float(rank if alpha is None else alpha)),
    )
