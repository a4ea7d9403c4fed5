"""What a method is: a tuple of pure functions on one two-dimensional kernel."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, Literal, NamedTuple

from jaxtyping import Array

from jaxpeft.tree._terms import Factors, Term


class Penalty(NamedTuple):
    """What a method adds to the loss, for one layer of one site.

    Attributes:
        of_leaves: ``(frozen, trainable) -> scalar``, once a step.
        of_seen: ``(frozen, seen) -> array`` of what the site's gate reported, in every
            micro-batch, see ``Gate.report``. The leading axes of ``seen`` are the
            layers and the uses of the kernel; the array has one entry for each of
            them. ``frozen`` holds the leaves of the first layer.
        joined: how the sites of this method are joined.
    """

    of_leaves: Callable[..., Array] | None = None
    of_seen: Callable[..., Array] | None = None
    joined: Literal["sum", "mean"] = "sum"


class Where(NamedTuple):
    """Where a method sits, and with which sizes if no pattern says others.

    Attributes:
        leaf: ``"kernel"`` for methods on the matrix of a contraction, ``"any"`` for
            methods on leaves of any shape, biases included, ``"bias"`` for methods on
            biases alone.
        bias: what happens to the bias beside a kernel: ``"left"`` leaves it as it is,
            ``"scaled"`` multiplies it by ``o``, too.
        rank: the rank; ``None`` for methods without one.
        alpha: the numerator of the scale, or ``None``.
        layers: ``(number of layers) -> the options that differ, for each layer``, for
            methods whose layers may differ in more than their rank. Leaves are padded
            with zeros in a stack.
    """

    leaf: Literal["kernel", "any", "bias"] = "kernel"
    bias: Literal["left", "scaled"] = "left"
    rank: int | None = None
    alpha: float | None = None
    layers: Callable[[int], Sequence[Mapping[str, Any]]] | None = None


class Call(NamedTuple):
    """What a call of the adapted function added for one layer of a site.

    Attributes:
        key: the key of dropout on inputs, another in every micro-batch. The library
            uses it; ``factors`` does not.
        step_key: the key of dropout on leaves, the same in all micro-batches of a step.
        mask: 1 for tokens, 0 for padding, mostly ``[batch, length]``.
        gates: ``[batch, N]``, the weight of each expert for each row of the batch.
        rows: ``[batch]``, the slot that each row takes, of a kernel with slots.
    """

    key: Any = None
    step_key: Any = None
    mask: Any = None
    gates: Any = None
    rows: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Options(Mapping[str, Any]):
    """The arguments of a method's constructor.

    Two methods are equal where the options agree that decide about code and shapes.
    Alpha, numbers and what only ``init`` reads do not count: the first two are leaves
    of the tree, and the third has done its work. ``jit`` may therefore give a tree back
    with another tree's values of these options, and nothing reads them off a tree.

    Attributes:
        given: ``((name, value), ...)``.
        numbers: the options that are leaves. Alpha is not among them: its leaf is the
            scale that the method makes of it.
        drawn: the options that only ``init`` reads.
        constructor: the function whose arguments they are.
        scaled: whether the method has an alpha.
    """

    given: tuple[tuple[str, Any], ...] = ()
    numbers: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    constructor: Callable[..., Any] | None = None
    scaled: bool = False

    def __getitem__(self, name: str) -> Any:
        return dict(self.given)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.given))

    def __len__(self) -> int:
        return len(self.given)

    @functools.cached_property
    def structure(self) -> Any:
        """The options that functions and shapes follow from."""
        # A number that is exactly 0 has no leaf, so whether it is there is structure.
        return (self.constructor, self.scaled) + tuple(
            (n, _is_there(v) if n in self.numbers else v)
            for n, v in self.given
            if n in self.numbers
            or not (n in self.drawn or (n == "alpha" and self.scaled))
        )

    @functools.cached_property
    def code(self) -> int:
        """The hash of ``structure``, which every call of a jitted function asks for."""
        return hash(self.structure)

    @functools.cached_property
    def start(self) -> Any:
        """What initial leaves follow from beside ``structure``, alpha and numbers."""
        return tuple((n, v) for n, v in self.given if n in self.drawn)


def _is_there(value: Any) -> Any:
    """Whether a number is there (neither ``None`` nor exactly 0); of a tuple, each."""
    return tuple(map(bool, value)) if isinstance(value, tuple) else bool(value)


class Adapter(NamedTuple):
    """A method: how one kernel's leaves begin, and which factors they make.

    All functions are pure, see one two-dimensional kernel, and know nothing of
    trees, stacks or models. The library maps them over the layers of a stack (one key a
    layer), reshapes kernels with more axes to two and their leaves back, pads
    layers of unequal rank and never shows the padding to ``penalty`` or ``report``.

    Attributes:
        init: ``(key, kernel, rank, alpha) -> (frozen, trainable)``, two dicts of
            arrays. ``kernel [d_in, d_out]`` is float32 (float64 if the base is).
            Shapes follow from ``d_in``, ``d_out`` and ``rank`` alone. Frozen leaves
            whose names begin with ``scale``, and no others, are proportional to alpha.
            A rank that the method forbids raises ``ValueError``; ``attach`` adds the
            site's name. ``init`` must accept any large kernel: the library traces it
            on an abstract one to learn which axes of a leaf are ``d_in`` and which
            ``d_out``.
        factors: ``(kernel, frozen, trainable, call) -> Factors``. It runs once a call,
            outside the model. ``call`` is a ``Call`` with the entries that this
            function reads; the library finds out which these are.
        penalty: what the method adds to the loss.
        report: ``(frozen, trainable) -> {name: scalar}``, facts about one site that
            ``describe`` shows.
        where: where it sits.
        folded: ``(frozen) -> terms`` that already stand in the kernel: ``attach`` adds
            them to it, and ``detach`` takes them off.
        shared: ``(key, d_in, d_out, rank, dtype) -> frozen leaves`` that all sites of
            one ``attach`` have in common. The sizes are the largest of its sites. They
            are drawn once and kept once; ``factors`` finds them in ``frozen``, but
            ``init``, ``penalty`` and ``report`` do not see them.
        name: the constructor's name, filled in by ``method``.
        options: the constructor's arguments, filled in by ``method``.
    """

    init: Callable[..., tuple[dict[str, Array], dict[str, Array]]]
    factors: Callable[..., Factors]
    penalty: Penalty = Penalty()
    report: Callable[..., dict[str, Array]] | None = None
    where: Where = Where()
    folded: Callable[..., tuple[Term, ...]] | None = None
    shared: Callable[..., dict[str, Array]] | None = None
    name: str = ""
    options: Options = Options()

    def __hash__(self) -> int:
        return self.options.code if self.name else object.__hash__(self)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        alike = isinstance(other, Adapter) and self.name and self.name == other.name
        return bool(alike) and self.options.structure == other.options.structure

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __copy__(self) -> "Adapter":
        return self

    def __deepcopy__(self, memo: Any) -> "Adapter":
        return self

    def __reduce__(self):
        # By name, as in files: its functions are nested, and those do not pickle.
        if not is_named(self):
            make = self.options.constructor
            if make is not None and make(*self.options.values()) is self:
                return make, tuple(self.options.values())
            raise TypeError(
                f"{self!r} cannot be pickled: it is not what a known method of its "
                "name returns. Decorate its constructor with @jaxpeft.tree.method"
            )
        return _named, (self.name, self.options.given)

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"{self.name or 'Adapter'}({inside})"


def _named(name: str, options: tuple[tuple[str, Any], ...]) -> Adapter:
    """The method of a name, for ``pickle``."""
    return find_method(name)(**dict(options))


_METHODS: dict[str, Callable[..., Adapter]] = {}


def methods() -> dict[str, Callable[..., Adapter]]:
    """Returns the constructors of all methods that are known, by name.

    Those of ``jaxpeft.adapters``, and those of other packages that are imported.
    """
    return dict(sorted(_METHODS.items()))


def find_method(name: str) -> Callable[..., Adapter]:
    """Returns the constructor of a name.

    Raises:
        ValueError: no method has it; the message says which there are.
    """
    if name not in _METHODS:
        raise ValueError(
            f"unknown method {name!r}; there are {', '.join(methods())}. A method of "
            "another package is known once the module that defines it is imported: "
            "import it first"
        )
    return _METHODS[name]


def rebuild(adapter: Adapter, **changes: Any) -> Adapter:
    """Returns the same method with some options changed.

    Args:
        adapter: a method with a name.
        **changes: options of its constructor.
    """
    return find_method(adapter.name)(**(dict(adapter.options) | changes))


def is_named(adapter: Adapter) -> bool:
    """Whether an adapter's name and options give it again; files rely on that."""
    constructor = _METHODS.get(adapter.name)
    made_by = getattr(constructor, "__wrapped__", None)
    if constructor is None or made_by is not adapter.options.constructor:
        return False
    return constructor(**adapter.options) is adapter


def method(
    constructor: FunctionType | None = None,
    *,
    numbers: tuple[str, ...] = (),
    drawn: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Makes a constructor a method: it has a name, and equal calls give one object.

    Files of adapters name the method of each site, and reading one looks the name up
    among the methods that are known. A method of any package is known as soon as its
    module is imported; files import nothing by themselves.

    Adapters are static parts of adapted trees, and functions compare by identity:
    if equal calls gave two objects, two trees made by them would not be the same
    pytree. Calls that differ in alpha, in ``numbers`` or in ``drawn`` give equal ones.

    Args:
        constructor: a function with plain, hashable arguments that returns an
            ``Adapter``.
        numbers: names of arguments, beside alpha, that are leaves: the library puts
            each one that is neither ``None`` nor 0 among the frozen leaves, by its own
            name, and no function reads the argument itself. Where ``init`` has to,
            ``drawn`` names the argument, too.
        drawn: names of arguments that only ``init`` reads, such as the width of an
            initial draw. Files leave them out, unless they are numbers, too.

    Returns:
        The constructor; its results carry ``name`` and ``options``.

    Raises:
        ValueError: another constructor has this name already. (The same one may be
            defined again, as in a notebook.)
        TypeError: an argument is unknown, or not a plain hashable value (when
            called).

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> from jaxpeft.tree import Adapter, Factors, Term, method
        >>> @method
        ... def rank_one() -> Adapter:
        ...     def init(key, kernel, rank, alpha):
        ...         d_in, d_out = kernel.shape
        ...         a = jax.random.normal(key, (d_in, 1))
        ...         return {}, {"a": a, "b": jnp.zeros((1, d_out))}
        ...
        ...     def factors(kernel, frozen, trainable, call):
        ...         return Factors((Term(trainable["a"], trainable["b"]),))
        ...
        ...     return Adapter(init, factors)
        >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
        >>> adapted = jp.attach(params, rank_one(), ["query"], key=jax.random.key(0))
        >>> jp.count(adapted)
        (10, 34)
    """
    if constructor is None:
        return functools.partial(method, numbers=numbers, drawn=drawn)
    name, made = constructor.__name__, cached(constructor, numbers, drawn)
    place = lambda f: (f.__module__, f.__qualname__)
    known = _METHODS.get(name)
    if known is not None and place(known) != place(constructor):
        raise ValueError(
            f"a method named {name!r} is known already, {'.'.join(place(known))}; "
            "files tell methods apart by name: give yours another one."
        )
    _METHODS[name] = made
    return made


def cached(
    constructor: FunctionType,
    numbers: tuple[str, ...] = (),
    drawn: tuple[str, ...] = (),
) -> Callable[..., Adapter]:
    """``method`` without an entry among the known ones.

    For methods that the library itself attaches, and that no file names.
    """
    signature = inspect.signature(constructor)

    @functools.cache
    def build(arguments: tuple[tuple[str, Any], ...], kinds: tuple[type, ...]):
        del kinds  # 1, 1.0 and True are equal keys, but not equal options
        adapter = constructor(**dict(arguments))
        scaled = adapter.where.alpha is not None
        options = Options(arguments, numbers, drawn, constructor, scaled)
        return adapter._replace(name=constructor.__name__, options=options)

    @functools.wraps(constructor)
    def wrapper(*args, **kwargs) -> Adapter:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if isinstance(value, list):  # as JSON writes a tuple
                bound.arguments[name] = value = tuple(value)
            if not isinstance(value, int | float | str | bool | tuple | None):
                raise TypeError(
                    f"`{name}` of {constructor.__name__} must be a plain Python value "
                    f"(a number, a string, a tuple or None), got {type(value).__name__}"
                )
        kinds = tuple(type(v) for v in bound.arguments.values())
        return build(tuple(bound.arguments.items()), kinds)

    return wrapper
