"""Full training of chosen leaves: heads, biases, norms, or whole kernels."""

from jaxpeft.parts import whole_leaf
from jaxpeft.tree import Adapter, method


@method
def full() -> Adapter:
    r"""Returns the method that trains a copy of the leaf itself.

    .. math:: y = x W', \qquad W' = W \text{ at the start}

    The copy is float32 (float64 over float64) whatever the leaf's dtype, so that
    small steps are not rounded away over a bfloat16 base; the base leaf stays frozen
    beside it, so that ``detach`` returns it bit for bit. Any floating leaf will do,
    of any number of axes.

    Notation:
        HF PEFT              here
        modules_to_save      targets=["classifier"]: every leaf of the module

    Returns:
        An ``Adapter`` with one trainable leaf ``value`` of the leaf's own shape, and
        neither rank nor penalty.

    Example:
        >>> import jax
        >>> import jaxpeft as jp
        >>> params = {"classifier": {"kernel": jax.numpy.ones((4, 2))}}
        >>> adapted = jp.attach(
        ...     params, jp.full(), targets=["classifier"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)
        (8, 16)
    """
    return whole_leaf("any")
