"""BitFit: train the biases, and nothing else (arXiv 2106.10199)."""

from jaxpeft.parts import whole_leaf
from jaxpeft.tree import Adapter, method


@method
def bitfit() -> Adapter:
    r"""Returns BitFit: biases are trained, every other weight is frozen.

    .. math:: y = x W + b', \qquad b' = b \text{ at the start}

    It sits on leaves named ``bias`` (or ``b``), those of norms included:
    ``targets=".*"`` takes all of them, a list the biases inside the named modules.
    The copies are float32 (float64 over float64); the base's stay frozen beside them.
    A model without biases is an error, not a training run of nothing.

    Notation:
        paper        HF PEFT                 here
        b            LoraConfig(bias="all")  value [d_out], in place of the bias

    Returns:
        An ``Adapter`` with one trainable leaf ``value`` of the bias's own shape.

    Example:
        >>> import jax, jaxpeft as jp
        >>> jnp = jax.numpy
        >>> params = {"query": {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}}
        >>> adapted = jp.attach(params, bitfit(), ".*", key=jax.random.key(0))
        >>> jp.count(adapted)
        (4, 32)

    References:
        Ben Zaken et al., BitFit, arXiv 2106.10199, section 3.
    """
    return whole_leaf("bias")
