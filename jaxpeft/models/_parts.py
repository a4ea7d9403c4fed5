"""What every model is built from: projections, tables, norms, remat by name.

Norms are computed in float32 whatever ``dtype`` is.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxpeft.models._on_mesh import look_up
from jaxpeft.transform import UNSCALED

LOOKUP = "lookup"  # a table for the look-up alone, inside of the embedding's module


@jax.custom_jvp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, ``x (1 + erf(x / sqrt 2)) / 2``, in the dtype of ``x``.

    ``flax.linen.gelu`` goes through erfc, whose code on a CPU takes more than twice the
    time in the forward pass, and a third more in both passes. Here ``1 + erf`` cancels
    below zero, so it is computed in float32 at least; one array of the dtype of ``x``,
    the slope, waits for the backward pass.
    """
    return (x.astype(wide(x.dtype)) * _normal_cdf(x)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    wider = x.astype(wide(x.dtype))
    density = jnp.exp(-0.5 * wider * wider) * (2 * np.pi) ** -0.5
    slope = (_normal_cdf(x) + wider * density).astype(x.dtype)
    return gelu(x), slope * dx


def _normal_cdf(x: Array) -> Array:
    return 0.5 + 0.5 * jax.lax.erf(x.astype(wide(x.dtype)) * 0.5**0.5)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,  # erf, as in the paper's code
    "gelu_new": nn.gelu,  # tanh form
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}

# Which values of a layer's forward pass remain for its backward pass. Adapters that
# scale a projection's output name what they scale; it is kept with the projections.
_POLICIES = jax.checkpoint_policies
REMAT: dict[str, Callable[..., Any]] = {
    "full": _POLICIES.nothing_saveable,
    "dots": _POLICIES.dots_saveable,
    "dots_no_batch": _POLICIES.dots_with_no_batch_dims_saveable,
    "names": _POLICIES.save_only_these_names("projection", UNSCALED),
    "unscaled": _POLICIES.save_only_these_names(UNSCALED),
}


def check_known(**choices: tuple[Any, tuple[Any, ...]]) -> None:
    """Refuses an argument that is none of its known values."""
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"`{name}` is {value!r}; known are {list(known)}.")


def dense(
    module: Any, features: int, name: str | None, *, use_bias: bool = True
) -> nn.Dense:
    """A projection in the dtypes of ``module``, initialised as transformers does."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=nn.initializers.normal(module.config.initializer_range),
        name=name,
    )


def keep(x: Array) -> Array:
    """Names a projection's result, for ``remat="names"``."""
    return checkpoint_name(x, "projection")


def wide(dtype: Any) -> Any:
    """Float32, or the dtype itself if that is wider."""
    return dtype if jnp.dtype(dtype).itemsize > 4 else jnp.float32


def at_least_float32(x: Array) -> Array:
    return x.astype(wide(x.dtype))


class Part(nn.Module):
    """The fields of every part; ``config`` is a dataclass of sizes and constants."""

    config: Any
    dtype: Any
    param_dtype: Any


class LayerNorm(Part):
    # nn.LayerNorm mixes dtypes when x or the scale is bfloat16; this one never does.
    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        y = at_least_float32(x)
        centred = y - y.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.config.layer_norm_eps)
        row = (1,) * (x.ndim - 1) + shape
        scale, bias = (v.reshape(row).astype(y.dtype) for v in (scale, bias))
        return (normal * scale + bias).astype(self.dtype)


class Embedding(Part):
    """A table of ``rows`` vectors; an id outside of it gives NaN.

    It is ``embedding``, or ``lookup/embedding`` where the parameters have that.
    """

    rows: int

    def setup(self) -> None:
        if self.has_variable("params", LOOKUP):
            self.lookup = Embedding(
                self.config, self.dtype, self.param_dtype, self.rows
            )
            return
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(self.config.initializer_range),
            (self.rows, self.config.hidden_size),
            self.param_dtype,
        )

    def __call__(
        self, ids: Int[Array | np.ndarray, "*batch"]
    ) -> Float[Array, "*batch d"]:
        if self.has_variable("params", LOOKUP):
            return self.lookup(ids)
        return look_up(self.embedding, ids).astype(self.dtype)

    def attend(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch rows"]:
        """The product of ``x`` with every row, added up in float32."""
        table = self.embedding.astype(self.dtype)
        return jnp.einsum(
            "...d,vd->...v", x, table, preferred_element_type=wide(self.dtype)
        )
