"""The models that are measured, and the least number of matmul FLOPs a step needs.

**The minimum.** For ``T`` tokens, two FLOPs to a multiply-add:

- a frozen linear ``d_in x d_out``: ``2 T d_in d_out`` forward and the same for the
  gradient of its input; a trained one also for its own. Where the backward pass has
  to make the linear's output again, the forward once more: under full
  rematerialisation, unless it has no use for that output (the last projection of a
  pre-norm block: only a sum follows);
- a low-rank pair of width ``r``: ``2 T r d_in`` for ``h = x a``, ``2 T r d_out`` for
  ``h b``; backward the same two for ``dh`` and the input's gradient, one each for the
  gradients of ``a`` and ``b`` where something in them trains; made again: ``h b``
  where the linear's output is, and ``h`` under any rematerialisation if that or the
  gradient of ``b`` needs it;
- attention: two matmuls forward, four backward, two made again;
- a head: forward and the gradient of its input; a trained head also its own.

What a method computes from its leaves alone, such as norms, is not in the minimum:
it is what the ratio shows.

All layers of a scan run the same body, so the first layer's input gradient counts
although nothing below it trains. Penalties and elementwise work do not count.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxpeft as jp
from jaxpeft import models
from jaxpeft.tree import Call


@dataclasses.dataclass(frozen=True)
class Linear:
    """One frozen linear of a layer.

    Attributes:
        name: its module's name in the tree.
        d_in: input width.
        d_out: output width.
        output_needed: whether the backward pass needs its output.
    """

    name: str
    d_in: int
    d_out: int
    output_needed: bool = True


class Parts(NamedTuple):
    """What an adapter makes of a kernel, as far as matmuls go.

    Attributes:
        pairs: ``(width, whether a trains, whether b trains)`` of each thin pair.
        scaled: whether inputs or outputs are scaled.
        kernel_trains: whether the kernel itself does.
    """

    pairs: tuple[tuple[int, bool, bool], ...]
    scaled: bool
    kernel_trains: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """A model, its inputs and what is known about its matmuls.

    Attributes:
        name: for tables.
        loss: ``loss(params, ids) -> scalar``.
        params: shapes of the parameters.
        axes: for ``attach``.
        linears: the linears of one layer; all of them get an adapter.
        head: names of modules that train in full.
        layers: number of scanned layers.
        batch: sequences a step.
        length: tokens of a sequence.
        width: of the residual stream, for the attention's matmuls.
        outside: FLOPs of the matmuls outside of the layers.
        remat: what a layer keeps for its backward pass: ``"none"`` (of the
            rematerialisation: everything stays), ``"full"`` (nothing does) or
            ``"unscaled"`` (outputs that an adapter scales).
        biases: whether the linears have biases.
    """

    name: str
    loss: Callable[[Any, Any], Any]
    params: Any
    axes: dict[str, str]
    linears: tuple[Linear, ...]
    head: tuple[str, ...]
    layers: int
    batch: int
    length: int
    width: int
    outside: float
    remat: str
    biases: bool

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    def frozen_flops(self) -> float:
        """The minimum without adapters: forward, what is made again, dX."""
        again = self.remat != "none"
        linears = sum(
            2.0 * self.tokens * w.d_in * w.d_out * (2 + (again and w.output_needed))
            for w in self.linears
        )
        matmuls = 8 if again else 6
        attention = matmuls * 2.0 * self.batch * self.length**2 * self.width
        return self.layers * (linears + attention) + self.outside

    def minimum(self, parts: Parts) -> float:
        """The minimum with an adapter at every linear.

        Args:
            parts: of the adapter, from ``parts_of``.
        """
        more = 0.0
        for w in self.linears:
            kept = self.remat == "unscaled" and parts.scaled
            again = self.remat != "none" and w.output_needed and not kept
            kernel = w.d_in * w.d_out
            more += 2.0 * self.tokens * kernel * parts.kernel_trains
            if kept and w.output_needed:  # counted in the frozen step
                more -= 2.0 * self.tokens * kernel
            both = w.d_in + w.d_out
            for r, a_trains, b_trains in parts.pairs:
                count = both * 2 + a_trains * w.d_in + b_trains * w.d_out
                count += again * w.d_out
                if self.remat != "none":
                    count += (b_trains or again) * w.d_in
                more += 2.0 * self.tokens * r * count
        if kept and not any(a or b for _, a, b in parts.pairs):
            # Nothing needs the last projection's input, the mixed values, again.
            more -= 2.0 * self.batch * self.length**2 * self.width
        return self.frozen_flops() + self.layers * more


def parts_of(adapter: jp.tree.Adapter, rank: int) -> Parts | None:
    """Reads the parts off one small kernel: they are the method's, not the kernel's.

    Returns:
        The parts, or ``None`` for a method that does not sit on kernels or that
        depends on the input.
    """
    if adapter.where.leaf == "bias":
        return None
    d_in, d_out = 2 * rank + 3, 2 * rank + 2
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = jax.random.normal(keys[0], (d_in, d_out))
    frozen, trainable = adapter.init(keys[1], kernel, rank, float(rank))
    if adapter.shared is not None:
        frozen |= adapter.shared(keys[2], d_in, d_out, rank, jnp.float32)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    factors = lambda t: adapter.factors(kernel, frozen, t, Call())
    f = factors(trainable)
    if f.reads_input:
        return None

    def trains(part):
        gradient = jax.grad(lambda t: jnp.sum(part(factors(t)) ** 2))(trainable)
        return any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradient))

    pairs = [
        (
            term.a.shape[1],
            trains(lambda f, i=i: f.terms[i].a),
            trains(lambda f, i=i: f.terms[i].b),
        )
        for i, term in enumerate(f.terms)
    ]
    scaled = f.c is not None or f.o is not None
    return Parts(tuple(pairs), scaled, f.kernel is not None)


def encoder(
    width: int,
    hidden: int,
    layers: int,
    batch: int,
    length: int,
    heads: int = 4,
    remat: str = "full",
) -> Program:
    """A BERT classifier: post-norm, so every output is needed for its norm."""
    labels, vocabulary = 6, 512
    config = {
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "max_position_embeddings": length,
    }
    model = models.from_config(
        config,
        head="classification",
        num_labels=labels,
        scan_layers=True,
        remat=None if remat == "none" else remat,
    )
    params = models.abstract(model)

    def loss(params, ids):
        logits = model.apply({"params": params}, ids)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    attention = "encoder/layer/attention"
    linears = (
        *(Linear(f"{attention}/{n}", width, width) for n in ("query", "key", "value")),
        Linear(f"{attention}/output/dense", width, width),
        Linear("encoder/layer/intermediate/dense", width, hidden),
        Linear("encoder/layer/output/dense", hidden, width),
    )
    pooler = 2 * 2.0 * batch * width * width
    classifier = 3 * 2.0 * batch * width * labels
    return Program(
        name=f"encoder D={width} F={hidden} L={layers} tokens={batch}x{length}",
        loss=loss,
        params=params,
        axes=model.axes,
        linears=linears,
        head=("classifier",),
        layers=layers,
        batch=batch,
        length=length,
        width=width,
        outside=pooler + classifier,
        remat=remat,
        biases=True,
    )


class _Block(nn.Module):
    """A llama-like block: RMS norms, causal attention, SwiGLU."""

    width: int
    hidden: int
    heads: int

    @nn.compact
    def __call__(self, x, _):
        dense = lambda n, name: nn.Dense(n, use_bias=False, name=name)
        y = nn.RMSNorm(name="norm_1")(x)
        q, k, v = (dense(self.width, n)(y) for n in ("q", "k", "v"))
        split = lambda t: t.reshape(*t.shape[:2], self.heads, -1)
        q, k, v = split(q), split(k), split(v)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        weights = nn.softmax(jnp.where(causal, scores, -1e9))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + dense(self.width, "o")(y)
        y = nn.RMSNorm(name="norm_2")(x)
        y = nn.silu(dense(self.hidden, "gate")(y)) * dense(self.hidden, "up")(y)
        return x + dense(self.width, "down")(y), None


class _Decoder(nn.Module):
    width: int
    hidden: int
    heads: int
    layers: int
    vocabulary: int
    remat: str

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.vocabulary, self.width, name="embed")(ids)
        block, policies = _Block, jax.checkpoint_policies
        if self.remat != "none":
            policy = policies.nothing_saveable
            if self.remat == "unscaled":
                policy = policies.save_only_these_names(jp.transform.UNSCALED)
            block = nn.remat(_Block, prevent_cse=False, policy=policy)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = stack(self.width, self.hidden, self.heads, name="layer")(x, None)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(self.vocabulary, use_bias=False, name="lm_head")(x)


def decoder(
    width: int,
    hidden: int,
    layers: int,
    batch: int,
    length: int,
    heads: int = 4,
    vocabulary: int = 512,
    remat: str = "full",
) -> Program:
    """A llama-like language model: pre-norm, so ``down`` is not recomputed."""
    model = _Decoder(width, hidden, heads, layers, vocabulary, remat)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]

    def loss(params, ids):
        scores = jax.nn.log_softmax(model.apply({"params": params}, ids))
        chosen = jnp.take_along_axis(scores[:, :-1], ids[:, 1:, None], -1)
        return -jnp.mean(chosen)

    linears = (
        *(Linear(f"layer/{n}", width, width) for n in ("q", "k", "v", "o")),
        Linear("layer/gate", width, hidden),
        Linear("layer/up", width, hidden),
        Linear("layer/down", hidden, width, output_needed=False),
    )
    return Program(
        name=f"decoder D={width} F={hidden} L={layers} tokens={batch}x{length}",
        loss=loss,
        params=params,
        axes={"layer/.*": "layer in out"},
        linears=linears,
        head=(),
        layers=layers,
        batch=batch,
        length=length,
        width=width,
        outside=2 * 2.0 * batch * length * width * vocabulary,
        remat=remat,
        biases=False,
    )
