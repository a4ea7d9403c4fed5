"""LoRA: low-rank adaptation (arXiv 2106.09685), with rsLoRA's scale (2312.03732)."""

from typing import Literal

from jaxpeft.numerics import ZERO_STARTS, zero_factors
from jaxpeft.parts import (
    SCALINGS,
    check_options,
    lora_form,
    peft_form,
    read_lora,
    scale_leaf,
)
from jaxpeft.tree import Adapter, Factors, Term, Where, method


@method
def lora(
    rank: int = 8,
    alpha: int | float | None = None,
    dropout: int | float = 0.0,
    init: Literal["uniform", "gaussian", "embedding"] = "uniform",
    scaling: Literal["alpha/r", "alpha/sqrt_r"] = "alpha/r",
) -> Adapter:
    r"""Returns LoRA: a trained product of two thin matrices beside the kernel.

    .. math:: y = x W + s\, (z a)\, b, \qquad z = \mathrm{dropout}(x), \qquad
              s = \alpha / r \ \text{ or } \ \alpha / \sqrt{r}

    Initial values, with ``d_in`` the product of the input axes:

    ============  ==========================================  ====================
    ``init``      ``a [d_in, r]``                             ``b [r, d_out]``
    ============  ==========================================  ====================
    "uniform"     Uniform(-1/sqrt(d_in), 1/sqrt(d_in))        0
    "gaussian"    Normal(0, (1/r)^2)                          0
    "embedding"   0                                           Normal(0, 1)
    ============  ==========================================  ====================

    One of the two is always 0: at the start the adapted model is the base, and only
    the factor that is 0 gets a gradient.

    Notation:
        paper    PyTorch, HF PEFT        here
        W_0      weight [out, in]        kernel [d_in, d_out] = weight.T
        A        lora_A.weight [r, in]   a [d_in, r] = lora_A.T
        B        lora_B.weight [out, r]  b [r, d_out] = lora_B.T
        alpha/r  scaling                 scale, a frozen scalar

    Args:
        rank: r, at least 1; ``rank_pattern`` of ``attach`` overrides it per site.
        alpha: numerator of the scale; ``None`` means ``rank``, a scale of 1 where no
            pattern changes the rank. The scale uses each site's own rank and alpha.
        dropout: probability in [0, 1) of dropping an entry of the low-rank path's
            input; on only under ``with_dropout``.
        init: see the table. "uniform" is HF PEFT's default, "embedding" its choice
            for embedding tables.
        scaling: "alpha/sqrt_r" is rsLoRA.

    Returns:
        An ``Adapter`` with trainable ``a`` and ``b`` and frozen ``scale``.

    Raises:
        ValueError: a value outside of what is allowed.

    Example:
        >>> import jax, jaxpeft as jp
        >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
        >>> adapted = jp.attach(
        ...     params, lora(rank=2, alpha=4), targets=["query"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0] == 2 * (6 + 4)
        True

    References:
        Hu et al., LoRA, arXiv 2106.09685, eq. 3 and section 4.1. Kalajdzievski,
        rsLoRA, arXiv 2312.03732, for ``alpha/sqrt_r``.

    Note:
        The paper draws ``a`` from a normal distribution whose width it does not give;
        its code, and HF PEFT after it, draw it uniformly as above. Several JAX
        libraries use ``he_uniform``, which is sqrt(6) times wider.
    """
    return _low_rank("lora", rank, alpha, dropout, init, scaling)


@method
def rslora(
    rank: int = 8,
    alpha: int | float | None = None,
    dropout: int | float = 0.0,
    init: Literal["uniform", "gaussian", "embedding"] = "uniform",
) -> Adapter:
    r"""Returns rsLoRA: LoRA whose scale falls with the root of the rank.

    .. math:: y = x W + s\, (z a)\, b, \qquad s = \alpha / \sqrt r

    so that outputs and gradients keep their size as the rank grows. All else is
    ``lora``'s, and this is ``lora(scaling="alpha/sqrt_r")`` under its own name.

    Notation:
        paper          HF PEFT            here
        gamma_r        use_rslora=True    scale, a frozen scalar

    Args:
        rank: r, at least 1; ``rank_pattern`` of ``attach`` overrides it per site.
        alpha: numerator of the scale; ``None`` means ``rank``, a scale of sqrt(r).
        dropout: as in ``lora``.
        init: as in ``lora``.

    Returns:
        An ``Adapter`` with trainable ``a [d_in, r]`` and ``b [r, d_out]`` and frozen
        ``scale``.

    Raises:
        ValueError: a value outside of what is allowed.

    Example:
        >>> import jax, jaxpeft as jp
        >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
        >>> adapted = jp.attach(
        ...     params, rslora(rank=4, alpha=8), ["query"], key=jax.random.key(0)
        ... )
        >>> float(adapted["query"]["kernel"].frozen["scale"])
        4.0

    References:
        Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA,
        arXiv 2312.03732. HF PEFT: ``use_rslora``.
    """
    return _low_rank("rslora", rank, alpha, dropout, init, "alpha/sqrt_r")


def _low_rank(name, rank, alpha, dropout, init, scaling) -> Adapter:
    check_options(
        name,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        choices={"init": (init, ZERO_STARTS), "scaling": (scaling, SCALINGS)},
    )

    def init_leaves(key, kernel, rank, alpha):
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}")
        a, b = zero_factors(key, kernel.shape, rank, init, kernel.dtype)
        scale = scale_leaf(alpha, rank, scaling, kernel.dtype)
        return {"scale": scale}, {"a": a, "b": b}

    def factors(kernel, frozen, trainable, call):
        del kernel, call
        b = frozen["scale"] * trainable["b"]
        return Factors((Term(trainable["a"], b, drop=dropout),))

    return Adapter(
        init=init_leaves,
        factors=factors,
        where=Where(rank=rank, alpha=float(rank if alpha is None else alpha)),
    )


@peft_form(lora)
def _lora_form(*, scaling, dropout, **_):
    return lora_form(scaling=scaling, dropout=dropout, read=_read)


@peft_form(rslora)
def _rslora_form(*, dropout, **_):
    # A file's config is one method's: there, this scale is an option of LoRA's.
    return lora_form(scaling="alpha/sqrt_r", dropout=dropout)


def _read(config, kind):
    """The options that a PEFT config means; see ``PeftForm.read``."""
    init = {"init": "embedding" if kind == "embedding" else "uniform"}
    options = read_lora(config, kind)
    return None if options is None else options | init
