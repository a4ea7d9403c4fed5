"""What decides about ranks during training."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PyTree


class Allocator(NamedTuple):
    """What decides about ranks during training; its functions are pure.

    Attributes:
        init: ``(trainable) -> state``, from the first half of ``jaxpeft.partition``.
        update: ``(state, trainable, gradients, step, before) -> (state, trainable)``,
            after each update of the optimiser: with the updated leaves, that update's
            gradients, the number of updates done, this one included, and the leaves
            before it.
        settled: the number of updates after which ranks change no more.
        decide: ``(state, trainable, frozen) -> (state, trainable, Allocation)``, on the
            host, once, after update ``settled``, with both halves of the tree;
            ``None``: ``update`` does all there is.
    """

    init: Callable[[PyTree], Any]
    update: Callable[..., tuple[Any, PyTree]]
    settled: int
    decide: Callable[[Any, PyTree], tuple[Any, PyTree, Any]] | None = None
