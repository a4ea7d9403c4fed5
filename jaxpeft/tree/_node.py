"""The node that takes a kernel's place in an adapted tree."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization

from jaxpeft.numerics import is_quantised
from jaxpeft.tree._adapter import Adapter
from jaxpeft.tree._paths import path_strings
from jaxpeft.tree._terms import BATCH as BATCH
from jaxpeft.tree._terms import IN as IN
from jaxpeft.tree._terms import OUT as OUT


@dataclasses.dataclass(frozen=True)
class Site:
    """Where an adapter sits: the static half of an ``AdaptedKernel``.

    Attributes:
        path: the kernel's path in the parameter tree.
        roles: ``"batch"``, ``"in"`` or ``"out"`` for each axis of the kernel.
        ranks: the rank of each layer (one entry for a kernel without batch axes),
            or ``None`` for methods without a rank.
        pattern: the entry of ``targets`` that found this site. It is for readers only:
            sites that differ in it are equal, ``jit`` may give back another tree's,
            and nothing is computed from it.
        alphas: the alpha of each layer as it was given. For readers only, as the
            pattern is: what counts is the scale, a leaf.
        each: where a site has several adapters, ``{name: its own site}``, with its
            pattern and its alphas. For readers only.
    """

    path: str
    roles: tuple[str, ...]
    ranks: tuple[int, ...] | None
    pattern: str = dataclasses.field(default="", compare=False)
    alphas: tuple[float, ...] | None = dataclasses.field(default=None, compare=False)
    each: Mapping[str, "Site"] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def rank(self) -> int | None:
        """The largest rank of its layers, to which the leaves of a stack are padded."""
        return None if self.ranks is None else max(self.ranks)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedKernel:
    """A kernel with an adapter beside it; a pytree node.

    Attributes:
        base: the kernel as it was. Where the method folds a part of its change into
            it (``Adapter.folded``), the kernel with that part.
        frozen: the adapter's fixed leaves, batch axes first, then the kernel's own
            in or out axes in place of ``d_in`` or ``d_out``.
        trainable: the adapter's trained leaves, in the same layout.
        adapter: the method. Static.
        site: the place. Static.
        call: what ``with_call`` added: ``{entry of a Call: array}`` with batch axes
            first, or ``None``.
    """

    base: Any
    frozen: dict[str, Any]
    trainable: dict[str, Any]
    adapter: Adapter
    site: Site
    call: Any = None  # a dict; any leaf where JAX rebuilds the node with its own

    def tree_flatten_with_keys(self):
        key = jax.tree_util.DictKey  # which Orbax and others know
        frozen, trainable = sorted(self.frozen), sorted(self.trainable)
        children = [(key("base"), self.base), (key("call"), self.call)]
        children += [(key(n), self.frozen[n]) for n in frozen]
        children += [(key(n), self.trainable[n]) for n in trainable]
        return children, (tuple(frozen), tuple(trainable), self.adapter, self.site)

    @classmethod
    def tree_unflatten(cls, static, children):
        frozen, trainable, adapter, site = static
        base, call, *rest = children
        return cls(
            base=base,
            frozen=dict(zip(frozen, rest[: len(frozen)], strict=True)),
            trainable=dict(zip(trainable, rest[len(frozen) :], strict=True)),
            adapter=adapter,
            site=site,
            call=call,
        )

    def replace(self, **changes) -> "AdaptedKernel":
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def map_leaves(self, f: Callable[[str, Any], Any]) -> "AdaptedKernel":
        """A copy with ``f(name, leaf)`` in place of each of the adapter's leaves."""
        frozen, trainable = (
            {name: f(name, x) for name, x in part.items()}
            for part in (self.frozen, self.trainable)
        )
        return self.replace(frozen=frozen, trainable=trainable)

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the base's axes, also after leading ones came or went."""
        return trailing(self.site.roles, self.base.ndim)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def ndim(self) -> int:
        return self.base.ndim

    def __jax_array__(self):
        raise TypeError(
            f"the adapted kernel {self.site.path!r} reached a JAX function outside of "
            "jaxpeft.adapt. Wrap the function that takes the tree: "
            "`forward = jaxpeft.adapt(model.apply)`, or fold the tree first with "
            "`jaxpeft.merge(adapted)`."
        )

    def __repr__(self) -> str:
        leaves = {
            n: getattr(v, "shape", v)
            for n, v in {"base": self.base, **self.frozen, **self.trainable}.items()
        }
        return f"AdaptedKernel({self.site.path!r}, {self.adapter!r}, {leaves})"


def _to_state(node: AdaptedKernel) -> dict[str, Any]:
    """The node's leaves, as Flax's serialisation has those of a dataclass."""
    names = ("base", "call", "frozen", "trainable")
    return {n: serialization.to_state_dict(getattr(node, n)) for n in names}


def _from_state(node: AdaptedKernel, state: dict[str, Any]) -> AdaptedKernel:
    """The node with leaves from a state; method and site are the node's own."""
    leaves = {
        name: serialization.from_state_dict(getattr(node, name), value, name=name)
        for name, value in state.items()
    }
    return node.replace(**leaves)


serialization.register_serialization_state(AdaptedKernel, _to_state, _from_state)


def trailing(roles: tuple[str, ...], ndim: int) -> tuple[str, ...]:
    """The roles of the last ``ndim`` axes.

    A scan takes leading axes off a kernel and ``vmap`` puts some on: the latter are
    batch axes.
    """
    return (BATCH,) * (ndim - len(roles)) + roles[max(0, len(roles) - ndim) :]


def is_node(x: Any) -> bool:
    """Whether ``x`` is an ``AdaptedKernel``."""
    return isinstance(x, AdaptedKernel)


def is_whole(x: Any) -> bool:
    """Whether ``x`` stands for one array of the model: a node, or a quantised one."""
    return is_node(x) or is_quantised(x)


def is_abstract(x: Any) -> bool:
    """Whether an array, or a quantised one, is a shape without values."""
    x = x.codes if is_quantised(x) else x
    return isinstance(x, jax.ShapeDtypeStruct)


def is_traced(x: Any) -> bool:
    """Whether an array, or a quantised one, is being traced."""
    x = x.codes if is_quantised(x) else x
    return isinstance(x, jax.core.Tracer)


def map_nodes(f, tree, *rest):
    """Maps ``f`` over the nodes of a tree; everything else stays as it is."""
    return jax.tree.map(
        lambda x, *r: f(x, *r) if is_node(x) else x, tree, *rest, is_leaf=is_node
    )


def nodes(tree: Any) -> list[AdaptedKernel]:
    """All adapted kernels of a tree, in the order of its leaves; whole ones only."""
    found = [x for x in jax.tree.leaves(tree, is_leaf=is_node) if is_node(x)]
    for node in found:
        leaves = (*node.frozen.values(), *node.trainable.values())
        if node.base is None and all(x is not None for x in leaves):
            raise ValueError(
                f"site {node.site.path!r} has no base: put what extract took off onto "
                "one, jaxpeft.graft(params, adapter), or join the halves of a "
                "partition, jaxpeft.combine(trainable, frozen)"
            )
        if node.base is None or any(x is None for x in leaves):
            raise ValueError(
                f"site {node.site.path!r} is one half of a partition; join the two "
                "first: jaxpeft.combine(trainable, frozen)"
            )
    return found


def leaves_with_path(tree: Any, is_leaf=is_whole) -> list[tuple[str, Any]]:
    """``(path, leaf)`` of a tree; an adapted or quantised kernel counts as one leaf.

    Raises:
        ValueError: two leaves have the same path.
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = path_strings([path for path, _ in pairs])
    if len(set(paths)) != len(paths):
        twice = sorted({p for p in paths if paths.count(p) > 1})
        raise ValueError(f"two leaves of the tree have the same path: {twice}")
    return [(path, leaf) for path, (_, leaf) in zip(paths, pairs, strict=True)]


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with other leaves, or nodes, at some paths."""
    structure = jax.tree.structure(tree, is_leaf=is_whole)
    return structure.unflatten([leaves.get(p, x) for p, x in leaves_with_path(tree)])


def made_like(kernel: Any, f: Callable[..., Any], *args: Any) -> Any:
    """``f(*args)``, or its shapes beside a kernel that is a shape itself."""
    return jax.eval_shape(f, *args) if is_abstract(kernel) else f(*args)


def check_key(key: Any) -> None:
    """Raises unless ``key`` is one typed key."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed or key.shape != ():
        got = type(key).__name__ if dtype is None else f"{dtype}{list(key.shape)}"
        raise TypeError(
            f"`key` must be one typed key, got {got}: write jax.random.key(seed)"
        )


def wider(*dtypes) -> jnp.dtype:
    """The dtype that holds all of these, also where the user forbids promotion."""
    # float8 types promote with nothing; bfloat16 holds every one of them.
    dtypes = [
        jnp.bfloat16 if jnp.issubdtype(d, jnp.floating) and d.itemsize == 1 else d
        for d in map(jnp.dtype, dtypes)
    ]
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def working_dtype(dtype) -> jnp.dtype:
    """The dtype of adapter leaves over a kernel: float32, or float64 over float64."""
    return wider(dtype, jnp.float32)
