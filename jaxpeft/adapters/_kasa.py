"""KaSA: knowledge-aware singular-value adaptation (arXiv 2412.06071)."""

import math
import warnings
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.numerics import (
    bottom_triplets,
    frobenius_norm,
    gram_distance,
    outer_gram_distance,
)
from jaxpeft.parts import (
    SCALINGS,
    check_options,
    check_site_rank,
    lora_form,
    peft_form,
    read_lora,
    scale_leaf,
)
from jaxpeft.tree import Adapter, Factors, Penalty, Term, Where, method

# m, the number of dropped components, from d_in, d_out and r.
TRUNCATION = {
    "min": lambda d_in, d_out, r: r,
    "official": lambda d_in, d_out, r: max(0, min(d_in, d_out) - max(0, d_in - r)),
    "none": lambda d_in, d_out, r: 0,
}
ORTHOGONALITY = {"paper": gram_distance, "official": outer_gram_distance}
CHOICES = {
    "truncation": tuple(TRUNCATION),
    "core": ("diag", "full"),
    "sigma": ("trained", "ones"),
    "orthogonality": tuple(ORTHOGONALITY),
    "reduction": ("mean", "sum"),
    "base": ("separate", "folded"),
    "scaling": tuple(SCALINGS),
    "svd": ("exact", "gram", "inverse"),
}


@method(numbers=("beta", "gamma"))
def kasa(
    rank: int = 8,
    alpha: int | float | None = None,
    beta: int | float = 1e-4,
    gamma: int | float = 1e-3,
    dropout: int | float = 0.0,
    truncation: Literal["min", "official", "none"] = "min",
    core: Literal["diag", "full"] = "diag",
    sigma: Literal["trained", "ones"] = "trained",
    orthogonality: Literal["paper", "official"] = "paper",
    reduction: Literal["mean", "sum"] = "mean",
    base: Literal["separate", "folded"] = "separate",
    scaling: Literal["alpha/r", "alpha/sqrt_r"] = "alpha/r",
    svd: Literal["exact", "gram", "inverse"] = "exact",
) -> Adapter:
    r"""Returns KaSA: drop the kernel's smallest components, train a scaled LoRA.

    Once, at ``attach``, with :math:`W = U S V^T` and the ``m`` smallest singular
    values marked ``d``:

    .. math::
        W_{kept} = W - u_d\, \mathrm{diag}(s_d)\, v_d, \qquad
        a \sim \mathcal U(\pm 1/\sqrt{d_{in}}), \quad b = 0, \quad
        \sigma \sim \mathcal N(0, 1)

    then, with :math:`z = \mathrm{dropout}(x)` and :math:`s = \alpha / r`,

    .. math::
        y &= x W_{kept} + s\, (z a)\, \mathrm{diag}(\sigma)\, b \\
        \text{penalty} &= \frac1N \sum_{\text{sites}} \big(
            \beta \lVert \sigma \rVert^2
            + \gamma \lVert a^T a - I \rVert_F + \gamma \lVert b b^T - I \rVert_F \big)

    The adapter is **not** the identity at the start: the output is that of
    ``W_kept``. How far that is from the base, ``describe`` shows for every site. The
    factors are not started from what was dropped, and may leave its subspace.

    Notation:
        paper        PyTorch, HF PEFT        here
        W            weight [out, in]        kernel [d_in, d_out] = weight.T
        dV^T         lora_A.weight [r, in]   a [d_in, r] = lora_A.T
        dU           lora_B.weight [out, r]  b [r, d_out] = lora_B.T
        dSigma       lora_diag [r]           sigma [r] (core [r, r])
        W_world      overwritten weight      W_kept, never stored by default
        dropped      not kept                u_d [d_in, m], s_d [m], v_d [m, d_out]

    ``u_d`` is on the in side: it comes from the SVD of our kernel, PyTorch's ``V``.

    Presets:
        paper text: the defaults.
        official code today: truncation="official", orthogonality="official".
        published GLUE runs: the same and core="full" (see the note).
        HF PEFT 0.21: reduction="sum".
        ablations: truncation="none"; beta=0, gamma=0; sigma="ones".

    Args:
        rank: r, at least 1 and below min(d_in, d_out) of every site.
        alpha: numerator of the scale; ``None`` means ``rank``. The authors' runs have
            twice the rank (GLUE: 16 of rank 8, common sense: 64 of rank 32).
        beta: weight of the L2 term on sigma, >= 0; 0 skips the term.
        gamma: weight of the orthogonality terms, >= 0; 0 skips them.
        dropout: probability in [0, 1) of dropping an entry of the trained path's
            input; the dropped components' term never sees it.
        truncation: how many components to drop. "min": m = r. "official": the
            authors' rule keeps d_in - r components, m = max(0, k - max(0, d_in - r))
            with k = min(d_in, d_out): r for d_in <= d_out, fewer or none (with a
            warning) for d_in > d_out. "none": m = 0, no SVD.
        core: "diag": sigma [r]. "full": a trained matrix, leaf ``core [r, r]``, that
            starts as diag(Normal(0, 1)); its L2 runs over all entries.
        sigma: "ones" fixes it there: no leaf, no L2 term (ablation; core "diag").
        orthogonality: "official" takes both distances on the other Grams,
            ||a a^T - I||_F and ||b^T b - I||_F, as the authors' code does: the same
            direction, a weaker pull, and a floor of sqrt(d - r) in the value.
        reduction: "mean" divides the penalty by the number of sites N (layers of a
            stack count); "sum" does not.
        base: "separate" leaves W alone and subtracts the dropped part in the forward;
            "folded" stores W_kept in its place, which saves the thin matmuls but
            rounds, so fold float32 kernels only.
        scaling: "alpha/sqrt_r" is rsLoRA's.
        svd: how the smallest components are found. "gram" suits wide kernels,
            "inverse" near-square ones; both choose a slightly different subspace, and
            remove exactly what they store.

    Returns:
        An ``Adapter`` with trainable ``a``, ``b`` and ``sigma`` (or ``core``), and
        frozen ``scale``, ``u_d``, ``s_d``, ``v_d`` (where m > 0), ``base_norm``
        (||W||_F), ``base_top`` (the largest singular value) and ``svd_residual``.

    Raises:
        ValueError: a value outside of what is allowed; at ``attach``, a rank not
            below min(d_in, d_out) of a site.

    Example:
        >>> import jaxpeft as jp
        >>> params = {"query": {"kernel": jnp.eye(6)[:, :4]}}
        >>> adapted = jp.attach(
        ...     params, kasa(rank=2), targets=["query"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0] == 2 * (6 + 4) + 2
        True

    References:
        Wang et al., arXiv 2412.06071, ICLR 2025, section 3. Code:
        github.com/juyongjiang/KaSA. HF PEFT: ``KasaConfig``.

    Note:
        Paper and code differ in ``truncation`` and ``orthogonality``; the text of the
        paper and HF PEFT's rule are the defaults. ``reduction`` is the code's, as the
        text does not say. Before January 2025 the code trained all r x r entries of
        the diagonal, and the published GLUE scores date from then. At b = 0 the
        gradient of the orthogonality terms for b is exactly 0, in both forms.
    """
    given = {
        "truncation": truncation,
        "core": core,
        "sigma": sigma,
        "orthogonality": orthogonality,
        "reduction": reduction,
        "base": base,
        "scaling": scaling,
        "svd": svd,
    }
    check_options(
        "kasa",
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        weights={"beta": beta, "gamma": gamma},
        choices={name: (value, CHOICES[name]) for name, value in given.items()},
    )
    if sigma == "ones" and core == "full":
        raise ValueError(
            "`sigma='ones'` fixes the diagonal core and cannot be joined with "
            "core='full'; write kasa(sigma='ones', core='diag')."
        )

    def dropped(frozen):
        # To subtract what is dropped is 10 times more accurate than to multiply the
        # components that are kept.
        if "s_d" not in frozen:
            return ()
        return (Term(-frozen["u_d"] * frozen["s_d"][None, :], frozen["v_d"]),)

    def init(key, kernel, rank, alpha):
        (d_in, d_out), dtype = kernel.shape, kernel.dtype
        check_site_rank(rank, kernel.shape, most=min(d_in, d_out) - 1)
        key_a, key_sigma, key_svd = jax.random.split(key, 3)
        bound = 1 / math.sqrt(d_in)
        frozen = {"scale": scale_leaf(alpha, rank, scaling, dtype)}
        trainable = {
            "a": jax.random.uniform(key_a, (d_in, rank), dtype, -bound, bound),
            "b": jnp.zeros((rank, d_out), dtype),
        }
        if sigma == "trained":
            drawn = jax.random.normal(key_sigma, (rank,), dtype)
            if core == "full":
                trainable["core"] = jnp.diag(drawn)
            else:
                trainable["sigma"] = drawn
        if truncation == "none":
            return frozen, trainable

        m = TRUNCATION[truncation](d_in, d_out, rank)
        zero = jnp.zeros((), dtype)
        frozen |= {"base_norm": frobenius_norm(kernel), "base_top": zero}
        frozen |= {"svd_residual": zero}
        if m == 0:
            warnings.warn(
                f"truncation={truncation!r} drops nothing from a kernel "
                f"{[d_in, d_out]} at rank {rank}; write truncation='min' to drop "
                f"{rank} components, or 'none' to say that none should be.",
                stacklevel=2,
            )
            return frozen, trainable
        found = bottom_triplets(kernel, m, method=svd, key=key_svd)
        frozen |= {"u_d": found.u, "s_d": found.s, "v_d": found.vt}
        frozen |= {"base_top": found.top, "svd_residual": found.residual}
        return frozen, trainable

    def factors(kernel, frozen, trainable, call):
        del kernel, call
        a, b, scale = trainable["a"], trainable["b"], frozen["scale"]
        if "core" in trainable:
            b = jnp.matmul(scale * trainable["core"], b, precision="highest")
        elif "sigma" in trainable:
            b = (scale * trainable["sigma"])[:, None] * b
        else:
            b = scale * b
        terms = (Term(a, b, drop=dropout),)
        return Factors(terms if base == "folded" else terms + dropped(frozen))

    def penalty(frozen, trainable):
        leaves = jax.tree.map(
            lambda x: x.astype(np.promote_types(x.dtype, np.float32)), trainable
        )
        total = jnp.zeros((), leaves["a"].dtype)
        if "beta" in frozen and sigma == "trained":
            weights = leaves["core" if core == "full" else "sigma"]
            total += frozen["beta"] * jnp.sum(weights**2)
        if "gamma" in frozen:
            distance = ORTHOGONALITY[orthogonality]
            total += frozen["gamma"] * (distance(leaves["a"]) + distance(leaves["b"].T))
        return total

    def report(frozen, trainable):
        del trainable
        zero = jnp.zeros_like(frozen["scale"])
        s_d = frozen.get("s_d", jnp.zeros((0,), zero.dtype))
        largest = s_d[0] if s_d.size else zero
        norm = frobenius_norm(s_d)
        whole, top = frozen.get("base_norm", zero), frozen.get("base_top", zero)
        return {
            "drift": _ratio(norm, whole),  # of the base's Frobenius norm
            "dropped": jnp.asarray(s_d.size),
            "dropped_norm": norm,
            "largest": largest,
            "largest/top": _ratio(largest, top),
            f"{svd}_residual": frozen.get("svd_residual", zero),
        }

    return Adapter(
        init=init,
        factors=factors,
        penalty=Penalty(penalty, joined=reduction),
        where=Where(rank=rank, alpha=float(rank if alpha is None else alpha)),
        folded=dropped if base == "folded" and truncation != "none" else None,
        report=report if truncation != "none" else None,
    )


@peft_form(kasa)
def _form(*, beta, gamma, dropout, scaling, **options):
    wanted = {"truncation": "min", "core": "diag", "sigma": "trained"}
    other = [
        f"{n}={options[n]!r}" for n, value in wanted.items() if options[n] != value
    ]
    return lora_form(
        scaling=scaling,
        dropout=dropout,
        extra={"sigma": "lora_diag"},
        fields={"kasa_config": {"beta": beta, "gamma": gamma}},
        kinds=("linear",),
        read=_read,
        redone=True,
        refusal=f"PEFT's KaSA has no {', '.join(other)}" if other else "",
    )


def _read(config, kind):
    """The options that a PEFT config means; see ``PeftForm.read``."""
    options = read_lora(config, kind, kasa_config=True)
    if options is None or kind != "linear":
        return None
    weights = {name: config["kasa_config"][name] for name in ("beta", "gamma")}
    return options | weights | {"reduction": "sum"}


def _ratio(part, whole):
    return part / jnp.where(whole == 0, 1.0, whole)
