"""IA3: infused adapter by inhibiting and amplifying inner activations (2205.05638)."""

from typing import Literal

import jax.numpy as jnp

from jaxpeft.parts import PeftForm, check_options, peft_form
from jaxpeft.tree import Adapter, Factors, Where, method


@method
def ia3(scale: Literal["out", "in"] = "out") -> Adapter:
    r"""Returns (IA)3: one trained vector that scales a layer's output or input.

    .. math::
        \text{out:}\quad y = (x W + \text{bias})\, l \qquad
        \text{in:}\quad y = (x\, l) W + \text{bias}

    The paper scales keys and values (their outputs) and the hidden activations of the
    feed-forward (the input of its last kernel): two calls of ``attach``. ``l`` starts
    as ones. With "out" the bias that lies beside the kernel is scaled too, in
    ``adapt`` as in ``merge``.

    Notation:
        paper       HF PEFT                             here
        l_k, l_v    ia3_l [out, 1]                      l [d_out], scale="out"
        l_ff        ia3_l [1, in], feedforward_modules  l [d_in], scale="in"

    Args:
        scale: which side of the kernel is scaled.

    Returns:
        An ``Adapter`` with one trainable vector ``l``, and neither rank nor dropout.

    Raises:
        ValueError: ``scale`` is neither.

    Example:
        >>> import jax, jaxpeft as jp
        >>> params = {n: {"kernel": jnp.ones((6, 4))} for n in ("key", "down")}
        >>> key = jax.random.key(0)
        >>> adapted = jp.attach(params, ia3(), ["key"], key=key)
        >>> adapted = jp.attach(adapted, ia3(scale="in"), ["down"], key=key)
        >>> jp.count(adapted)[0]
        10

    References:
        Liu et al., arXiv 2205.05638, section 3.3. HF PEFT: ``IA3Config``.
    """
    check_options("ia3", choices={"scale": (scale, ("out", "in"))})

    def init(key, kernel, rank, alpha):
        del key, rank, alpha
        size = kernel.shape[1 if scale == "out" else 0]
        return {}, {"l": jnp.ones((size,), kernel.dtype)}

    def factors(kernel, frozen, trainable, call):
        del kernel, frozen, call
        return Factors(**{"o" if scale == "out" else "c": trainable["l"]})

    bias = "scaled" if scale == "out" else "left"
    return Adapter(init=init, factors=factors, where=Where(bias=bias))


@peft_form(ia3)
def _form(*, scale):
    to_file = (lambda l: l[:, None]) if scale == "out" else (lambda l: l[None, :])
    return PeftForm(
        peft_type="IA3",
        kinds=("linear", "conv1d"),
        to_leaves=lambda frozen, trainable, kind: {"ia3_l": to_file(trainable["l"])},
        from_leaves=lambda leaves, kind: {"l": leaves["ia3_l"].reshape(-1)},
        fields={"init_ia3_weights": True},
        lists={"feedforward_modules": scale == "in"},
        read=_read,
    )


def _read(config, kind):
    """The options that a PEFT config means; see ``PeftForm.read``."""
    if config["peft_type"] != "IA3" or kind == "embedding":
        return None
    return {"scale": "in" if config["feedforward_modules"] else "out"}
