"""The table of rules: what an equation does to the kernels among its operands."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft.transform import _compat
from jaxpeft.transform._moved import Kernel, NoRule


@dataclasses.dataclass
class Uses:
    """What one walk through a function gathers where it uses its kernels.

    Attributes:
        tap: the user's function, ``"own"`` for each method's, or ``None``.
        target: the platform that the program is for.
        numbers: the uses of each site, by the equations that lead to them; shared by
            all bodies of one trace, so that tracing a body twice changes nothing.
        learnt: for ``infer_axes``, what each use says of a kernel's axes.
        tapped: ``(path, statistics)`` in order.
        trail: the equations that lead here, outermost first.
    """

    tap: Callable[..., Any] | str | None
    target: str
    numbers: dict[str, dict[tuple[int, ...], int]] = dataclasses.field(
        default_factory=dict
    )
    learnt: dict[str, list] = dataclasses.field(default_factory=dict)
    tapped: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    trail: tuple[Any, ...] = ()

    def at(self, eqn) -> "Uses":
        """The same gathering, one equation further in."""
        return dataclasses.replace(self, trail=(*self.trail, eqn))

    def child(self) -> "Uses":
        """For the body of a loop or branch, whose statistics come out on their own."""
        return dataclasses.replace(self, tapped=[])

    def record(self, path: str, statistics: Any) -> None:
        """Keeps what a tap or a report gave at a site, if it gave anything."""
        if jax.tree.leaves(statistics):
            self.tapped.append((path, statistics))

    def number(self, path: str) -> int:
        """Which use of the site this is, in the order of the program."""
        seen = self.numbers.setdefault(path, {})
        return seen.setdefault(tuple(map(id, self.trail)), len(seen))


def joined(tapped: list[tuple[str, Any]]) -> dict[str, Any]:
    """``{site: statistics}``; several uses of a site are stacked on a first axis."""
    by_site: dict[str, list] = {}
    for path, statistics in tapped:
        by_site.setdefault(path, []).append(statistics)
    stack = lambda *x: jnp.stack(x)
    return {
        path: jax.tree.map(stack, *each) if each[1:] else each[0]
        for path, each in by_site.items()
    }


@dataclasses.dataclass(frozen=True)
class Equation:
    """One equation with kernels among its operands, as its rule sees it.

    Attributes:
        raw: the equation of the jaxpr.
        evaluate: ``evaluate(jaxpr, consts, args, uses)`` walks through a body.
        uses: what the walk gathers.
        shared: the contractions of this jaxpr that read one input.
    """

    raw: Any
    evaluate: Callable[..., list]
    uses: Uses
    shared: Any

    @property
    def params(self) -> dict[str, Any]:
        """The equation's parameters, as a jaxpr prints them."""
        return self.raw.params

    def enter(self, jaxpr: Any, operands: Sequence) -> tuple[list, dict[str, Any]]:
        """Walks through a body of its own; returns its results and what it tapped."""
        inside = self.uses.child()
        outs = self.evaluate(*_compat.opened(jaxpr), operands, inside)
        return outs, joined(inside.tapped)

    def apply(self, operands: list) -> list:
        """What the rule makes of operands among which kernels are."""
        name = self.raw.primitive.name
        if name not in RULES:
            raise NoRule("the kernel is used by something that is not a contraction")
        return self.results(RULES[name].apply(self, *operands))

    def results(self, outs: Any) -> list:
        """One result, or several, as a list."""
        return list(outs) if self.raw.primitive.multiple_results else [outs]

    def run(self, *operands: Any, **changes: Any) -> Any:
        """Issues the equation on arrays, with some of its parameters changed."""
        primitive, invars = self.raw.primitive, self.raw.invars
        # Inside of a `shard_map` a primitive wants operands that differ along the same
        # axes of the mesh; a factor may differ along fewer than its kernel.
        if len(invars) == len(operands):
            axes = [_compat.varying_axes(var.aval) for var in invars]
            operands = tuple(map(_compat.as_varying, operands, axes))
        params = primitive.get_bind_params(self.params)
        if isinstance(params, tuple):  # (functions, parameters) in some versions
            functions, params = params
            return primitive.bind(*functions, *operands, **(params | changes))
        return primitive.bind(*operands, **(params | changes))


class Rule(NamedTuple):
    """An entry of the table."""

    apply: Callable[..., Any]
    moves: bool


RULES: dict[str, Rule] = {}


def rule(*primitives: str, moves: bool = False) -> Callable[[Callable], Callable]:
    """Registers what primitives do to an adapted kernel among their operands.

    ``adapt`` follows kernels through every primitive that has a rule. One of your own,
    a Pallas or FFI kernel behind a primitive for example, takes part once you say what
    it does; ``capture`` and ``infer_axes`` walk with the same rules. The rule is
    called as ``rule(eqn, *operands)``: an ``Equation``, and its operands, of which at
    least one is a ``Kernel`` and the others are arrays. It returns what the equation
    does, arrays or kernels; a list where the primitive has several results. Where it
    cannot say, it raises ``NoRule("the reason")``.

    A kernel that only moves is changed by its own methods (``Kernel.transpose``,
    ``Kernel.reshape``, ``Kernel.along``, ...). Where it meets its input, call
    ``contract``, or ``look_up`` for rows of a table.

    Args:
        *primitives: their names, as a jaxpr prints them.
        moves: whether the rule returns its kernel moved, and nothing else depends on
            when; then ``adapt`` may apply it earlier, so that kernels which read one
            input share a thin product.

    Returns:
        A decorator that gives the function back.

    Raises:
        ValueError: a primitive has a rule of another function already. (The same one
            may be defined again, as in a notebook.)
        TypeError: a primitive is not named by a string.

    Example:
        A matmul of one's own, with its kernel first:

        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> from jax.extend.core import Primitive
        >>> from jax.interpreters import mlir
        >>> own_matmul = Primitive("own_matmul")
        >>> compute = lambda w, x: x @ w
        >>> own_matmul.def_impl(compute) is compute
        True
        >>> _ = own_matmul.def_abstract_eval(
        ...     lambda w, x: jax.core.ShapedArray((x.shape[0], w.shape[1]), x.dtype)
        ... )
        >>> lower = mlir.lower_fun(compute, multiple_results=False)
        >>> mlir.register_lowering(own_matmul, lower)
        >>> @jp.rule("own_matmul")
        ... def _own_matmul(eqn, w, x):
        ...     numbers = ((1,), (0,)), ((), ())  # of x and w, as in lax.dot_general
        ...     run = lambda x, base: eqn.run(base, x)
        ...     return jp.transform.contract(eqn, w, x, numbers, run)
        >>> fn = lambda params, x: own_matmul.bind(params["w"], x)
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
        >>> adapted = jp.attach(params, jp.lora(rank=1), ["w"], key=jax.random.key(0))
        >>> jp.adapt(fn)(adapted, x)
        Array([[3., 3.]], dtype=float32)
        >>> jp.infer_axes(fn, params, x)
        {'w': 'in out'}
    """
    for name in primitives:
        if not isinstance(name, str):
            raise TypeError(
                f"`primitives` are names, got a {type(name).__name__}: write "
                f"@rule({getattr(name, 'name', 'my_primitive')!r})"
            )

    def register(apply: Callable) -> Callable:
        place = lambda f: f"{f.__module__}.{f.__qualname__}"
        for name in primitives:
            known = RULES.get(name)
            if known is not None and place(known.apply) != place(apply):
                raise ValueError(
                    f"primitive {name!r} has a rule already, {place(known.apply)}; "
                    f"{place(apply)} would be a second one. Give your primitive a "
                    "name of its own."
                )
        RULES.update(dict.fromkeys(primitives, Rule(apply, moves)))
        return apply

    return register


def only_kernel(operands: tuple) -> int:
    """The position of the one kernel among some operands."""
    places = [i for i, x in enumerate(operands) if isinstance(x, Kernel)]
    if len(places) > 1:
        raise NoRule("two adapted kernels meet")
    return places[0]
