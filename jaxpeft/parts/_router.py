"""The router of a mixture: which experts a token has, and what that costs."""

import functools
import math
import warnings
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.tree_util import Partial

from jaxpeft.numerics import (
    balance_and_z,
    gated,
    gated_copies,
    kept_experts,
    router_logits,
    routing_sums,
    softmax_gates,
)
from jaxpeft.parts._options import check_options
from jaxpeft.tree import Penalty

# Arguments of every method with a router that are leaves, see ``method``.
NUMBERS = ("temperature", "balance_coef", "z_coef", "gates")


class Router(NamedTuple):
    r"""How gates follow from an input.

    .. math:: g = \mathrm{softmax}(x w / \tau \text{ of the kept experts})

    Attributes:
        top_k: experts kept for each token; ``None``: all.
        renormalise: whether the gates of the kept ones add up to 1.
        temperature: :math:`\tau`.
        std: standard deviation of a new :math:`w`; ``None``: uniform up to
            1/sqrt(d_in).
        balance_coef: weight of the balance loss.
        z_coef: weight of the z-loss.
        reduction: how these two losses are joined over sites.
    """

    top_k: int | None = None
    renormalise: bool = True
    temperature: int | float = 1.0
    std: int | float | None = 0.02
    balance_coef: int | float = 0.0
    z_coef: int | float = 0.0
    reduction: Literal["sum", "mean"] = "sum"

    def check(self, name: str, experts: int) -> None:
        """Raises unless the settings are allowed; warns of a router that never learns.

        Args:
            name: the method's.
            experts: the most that a site has.
        """
        check_options(
            name,
            weights={"balance_coef": self.balance_coef, "z_coef": self.z_coef},
            positive={"temperature": self.temperature},
            choices={"aux_reduce": (self.reduction, ("sum", "mean"))},
        )
        if self.top_k is not None and (
            not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise ValueError(
                f"`top_k` must be a whole number from 1 up, or None for all experts, "
                f"got {self.top_k!r}; write {name}(top_k=2)."
            )
        most = max(1, experts)
        if self.top_k is not None and self.top_k > most:
            raise ValueError(
                f"`top_k` is {self.top_k}, but a router chooses among at most "
                f"{experts} experts; write {name}(top_k={most}) or give more of them."
            )
        if self.std is not None and not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(
                f"`router_std` of {name} must be at least 0, got {self.std}"
            )
        alone = self.top_k == 1 and self.renormalise and experts > 1
        if alone and not self.balance_coef + self.z_coef:
            warnings.warn(
                f"{name}(top_k=1) without `balance_coef`: the gates of the kept "
                "experts add up to 1, so every gate is 1 and the router never learns; "
                "write a balance_coef, keep more experts, or, where there is that "
                "option, renormalise=False",
                stacklevel=6,
            )

    @property
    def rule(self) -> "Rule":
        """The settings that a forward pass is compiled for; the others are leaves."""
        return Rule(self.top_k, self.renormalise)

    def penalty(self) -> Penalty:
        """The balance loss and z-loss of what a site's gate reported, weighted."""
        if not self.balance_coef and not self.z_coef:
            return Penalty(joined=self.reduction)

        def of_seen(frozen, seen):
            found = zip(("balance_coef", "z_coef"), balance_and_z(seen), strict=True)
            return sum(frozen[name] * x for name, x in found if name in frozen)

        return Penalty(of_seen=of_seen, joined=self.reduction)


class Rule(NamedTuple):
    """How gates follow from logits, see ``Router``."""

    top_k: int | None
    renormalise: bool

    def gates(self, routed, temperature, active=None):
        """``(logits, kept, gates)`` of an input's product with the router."""
        logits = router_logits(routed, active, temperature)
        kept = kept_experts(logits, self.top_k)
        return logits, kept, softmax_gates(logits, kept, self.renormalise)

    def report(self, temperature, active, mask):
        """What a gate reports: sums over its input; see ``numerics.routing_sums``."""
        return Partial(_report(self), temperature, active, mask)


# Cached, for `Partial` compares functions by identity: equal settings, one function.
@functools.cache
def _report(rule: Rule):
    def report(temperature, active, mask, routed):
        return routing_sums(*rule.gates(routed, temperature, active), mask, rule.top_k)

    return report


@functools.cache  # as `_report`
def weighing(rule: Rule | None, shared: bool, ranks: tuple[int, ...]):
    """What acts between ``a`` and ``b``; without a rule the call's gates are used.

    Experts that share ``a`` have one hidden vector, which is copied for each of them;
    the others have theirs side by side in ``h``.
    """

    def apply(temperature, active, rows, routed, h):
        if rule is None:
            gates = row_gates(rows, h)
        else:
            gates = rule.gates(routed, temperature, active)[2]
        return gated_copies(h, gates) if shared else gated(h, gates, ranks)

    return apply


def row_gates(rows: Any, h: Any):
    """Gates ``[batch, N]`` given with the call, for a hidden ``[batch, ..., r]``."""
    if h.ndim < 2 or rows.shape[0] != h.shape[0]:
        raise ValueError(
            f"`gates` are for a batch of {rows.shape[0]} rows, but a site's input has "
            f"leading axes {tuple(h.shape[:-1])}; the first must be the batch"
        )
    return rows.reshape(rows.shape[0], *(1,) * (h.ndim - 2), rows.shape[-1])


def empty_pair(d_in: int, d_out: int, dtype: Any):
    """A pair of rank 0: a term that adds nothing, and still names its experts."""
    return jnp.zeros((d_in, 0), dtype), jnp.zeros((0, d_out), dtype)
