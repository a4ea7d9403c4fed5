"""What a causal language model makes of a batch, and the loss of that."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpeft import numerics
from jaxpeft.training._mesh import BATCH_AXES, check_tokens
from jaxpeft.training._routed import call_adapted
from jaxpeft.training._step import (
    Batch,
    Forward,
    Loss,
    apply_model,
    cross_entropy,
    in_context,
    model_forward,
    squared_error,
)
from jaxpeft.tree import is_node, leaves_with_path, names_leaf, structure_of

CHUNK = 256  # tokens of a device read out at a time: 0.25 GB at a vocabulary of 256k


def causal_forward(model: Any, *, mesh: Mesh, dropout: bool = False) -> Forward:
    """Returns the function that runs an adapted tree of a language model's parameters.

    Logits of the whole batch are never held (``numerics.token_cross_entropy``). The
    head may be adapted, and tied to the embedding.

    Args:
        model: a Linen module with ``head="causal_lm"``; without its head
            (``model.clone(head=None)``) it gives hidden states, which
            ``apply(..., method="logits")`` reads out; or, where it has that,
            ``method="token_losses"`` (of ``models.Decoder``), which knows how to cut
            its vocabulary over the mesh.
        mesh: the mesh.
        dropout: whether the model's own dropout is on in training steps.

    Returns:
        ``forward(adapted, batch, key) -> (outputs, seen)``, as of ``model_forward``.
        The outputs are ``[rows, 3]``, float32, for ``causal_loss`` and for
        ``data.score``. Of every row: minus the log-probability of its targets,
        weighted by ``target_weights`` and summed up; the sum of these weights; and the
        sum of those whose target has the highest logit. Batches are those of a writing
        task (``data.batches``). A sequence longer than the model's positions is a
        ``ValueError``, also where the texts packed into it are shorter.

    Raises:
        ValueError: as ``model_forward``.
    """
    check_tokens(model, mesh)
    body = model.clone(head=None)
    shards = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
    longest = model.config.max_position_embeddings

    def forward(adapted, batch, key):
        deterministic = key is None or not dropout
        by_hand = hasattr(model, "token_losses") and not _routed_head(adapted)
        names = ("input_ids", "attention_mask", "segment_ids", "positions")
        inputs = {name: batch[name] for name in names if name in batch}
        tokens = inputs["input_ids"].shape[1]
        if tokens > longest:
            raise ValueError(
                f"`batch` has sequences of {tokens} tokens; the model allows {longest}."
                f" Tokenise with max_length={longest}."
            )

        def apply(params, inputs, targets, rngs):
            hidden = apply_model(
                body, params, inputs, mesh=mesh, deterministic=deterministic, rngs=rngs
            )
            hidden = numerics.where_shown(batch["target_weights"], hidden)
            if by_hand:
                given = hidden, targets
                with in_context(mesh):
                    return model.apply(
                        {"params": params}, *given, chunk=CHUNK, method="token_losses"
                    )
            read_out = lambda h: model.apply({"params": params}, h, method="logits")
            return numerics.token_cross_entropy(
                read_out, hidden, targets, chunk=CHUNK * shards
            )

        rngs = {} if deterministic else {"dropout": key}
        called = call_adapted(apply, adapted, batch, inputs, batch["targets"], rngs)
        (losses, hits), seen = called
        weights = batch["target_weights"]
        losses = numerics.where_shown(weights, losses)
        sums = (losses * weights, weights, hits.astype(weights.dtype) * weights)
        return jnp.stack([x.astype(jnp.float32).sum(1) for x in sums], axis=1), seen

    return forward


def _routed_head(adapted: Any) -> bool:
    """Whether a router sits at the head: what it says of its tokens stays whole."""
    return any(
        names_leaf("lm_head", path) and bool(structure_of(leaf).experts)
        for path, leaf in leaves_with_path(adapted)
        if is_node(leaf)
    )


def causal_loss(outputs: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The loss of a language model, row by row: every learnt token counts once.

    Args:
        outputs: ``[rows, 3]``, from ``causal_forward``.
        batch: with ``"weight"`` (float, ``[rows]``) and ``"label"``; where that is
            ``[rows, 5]``, of a multiple-choice task (``data.Encoded``), the tokens of
            right choices alone count.

    Returns:
        ``(values, weights)``, both float32 ``[rows]``: the mean loss of each row's
        learnt tokens, and their number times the row's weight.
    """
    losses, counts = outputs[:, 0], outputs[:, 1]
    none = counts == 0
    weights = counts * batch["weight"]
    if batch["label"].ndim == 2:
        weights = weights * batch["label"][:, -1].astype(weights.dtype)
    return losses / jnp.where(none, 1.0, counts), weights


def objective(model: Any, *, mesh: Mesh, dropout: bool = False) -> tuple[Forward, Loss]:
    """Returns what training and evaluation need for a model's head.

    Args:
        model: a Linen module of ``jaxpeft.models``, with a head.
        mesh: the mesh.
        dropout: whether the model's own dropout is on in training steps.

    Returns:
        ``(forward, loss)``: ``causal_forward`` and ``causal_loss`` for
        ``head="causal_lm"``, else ``model_forward`` and ``squared_error``
        (``"regression"``) or ``cross_entropy`` (``"classification"``).

    Raises:
        ValueError: the model has none of these heads.
    """
    losses = {
        "causal_lm": causal_loss,
        "classification": cross_entropy,
        "regression": squared_error,
    }
    if model.head not in losses:
        raise ValueError(
            f"`model` has head={model.head!r}, which has no loss; load it with one of "
            f"head={', '.join(map(repr, losses))}."
        )
    make = causal_forward if model.head == "causal_lm" else model_forward
    return make(model, mesh=mesh, dropout=dropout), losses[model.head]
