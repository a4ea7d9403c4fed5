"""Text from a decoder: prompts in, new tokens out, with a cache between the steps."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxpeft.models._cache import init_cache, room
from jaxpeft.models._decoder import Decoder
from jaxpeft.models._stop_texts import HIT, StopTexts, split_stops
from jaxpeft.transform import adapt

SHORTEST = 16  # prompts and answers are padded to powers of two from here on
# The range of normal numbers in float32, as Python's numbers.
SMALLEST, LARGEST = map(float, (np.finfo("float32").tiny, np.finfo("float32").max))


def generate(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: int | float = 0.0,
    top_k: int | None = None,
    top_p: int | float | None = None,
    stop: Sequence[int | str] | None = None,
    tokenizer: Any = None,
    key: Key[Array, ""] | None = None,
) -> list[list[int]]:
    r"""Returns what the model goes on with, for a batch of prompts.

    Prompts of unequal length are padded on the left to a power of two, prefilled at
    once, and continued a token at a time until every row has stopped. One program is
    compiled for each pair of padded lengths and each kind of choice; ``params`` may
    be an adapted tree of any method, whose factors are computed once a call.

    The next token is the likeliest (``temperature=0``), or is drawn from

    .. math:: p_i \propto \exp(z_i / \tau)

    over the ``top_k`` likeliest tokens and, of those, the fewest that together have a
    probability of ``top_p``.

    Args:
        model: a decoder with ``head="causal_lm"``.
        params: its parameters, plain or adapted, on any devices.
        prompts: token ids of each row, at least one each. Of a text take those of
            ``models.opened``: a prompt stands alone here, and ends as it does in
            training where it ends without a space (``models.joint``).
        max_new_tokens: the most tokens to add, at least 1.
        temperature: tau, at least 0; 0, or what is 0 in float32, takes the likeliest
            token.
        top_k: at least 1; ``None``: all tokens.
        top_p: in (0, 1]; ``None``: 1.
        stop: what ends a row and is not returned: token ids, and texts, wherever they
            appear in what is written, in tokens of their own or inside of others; a
            text that is a token of the vocabulary is that token, too. None: the
            model's own ids, ``model.stop_tokens``, which are those in the config files
            of its folder. ``models.stop_tokens`` knows the end of a chat's turn, too.
        tokenizer: the model's, needed where ``stop`` has texts.
        key: a typed key, needed where ``temperature`` is not 0.

    Returns:
        The new tokens of each row. Where a text of ``stop`` begins inside of a token,
        what stands before it there is given in smaller tokens, as far as the
        vocabulary has them.

    Raises:
        ValueError: an argument outside of what is allowed, or a prompt that leaves no
            room for ``max_new_tokens`` in the model's context, or in its original
            length where rotary positions change beyond it.

    Example:
        >>> from jaxpeft import models
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
        >>> heads = {"num_attention_heads": 2, "intermediate_size": 24}
        >>> config = {"model_type": "llama", **sizes, **heads}
        >>> model = models.from_config(config, head="causal_lm")
        >>> params = models.init(model, jax.random.key(0))
        >>> new = generate(model, params, [[1, 2, 3], [4]], max_new_tokens=5)
        >>> [len(row) for row in new]
        [5, 5]
        >>> generate(model, params, [[1]], max_new_tokens=5, stop=range(32))
        [[]]

    References:
        Top-p: Holtzman et al., arXiv 1904.09751, section 3.1.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, key)
    longest = max(map(len, prompts))
    slots = room(model.config)
    if longest + max_new_tokens > slots:
        raise ValueError(
            f"the longest prompt has {longest} tokens; with max_new_tokens="
            f"{max_new_tokens} that is more than the {slots} the model allows. "
            "Shorten one of them."
        )
    new = min(_padded(max_new_tokens), slots - longest)
    width = min(_padded(longest), slots - new)
    ids = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    ids_of, texts = split_stops(model.stop_tokens if stop is None else stop, tokenizer)
    _check_stops(ids_of, model.config.vocab_size)
    ends = np.full((_padded(len(ids_of)),), -1, np.int32)
    ends[: len(ids_of)] = ids_of
    found = StopTexts(texts, tokenizer, model.config.vocab_size) if texts else None
    settings = {
        "temperature": np.float32(temperature),
        "top_k": np.int32(top_k or model.config.vocab_size),
        "top_p": np.float32(1.0 if top_p is None else top_p),
    }
    # Below float32's normal numbers a division by it is one by zero.
    draws = bool(temperature >= SMALLEST)
    run = _compiled(model.clone(stop_tokens=()), new, draws)
    key = jax.random.key(0) if key is None else key  # of no use without a draw
    limit = np.int32(max_new_tokens)
    table = None if found is None else found.table
    tokens = np.asarray(run(params, ids, mask, limit, (ends, table), key, settings))
    rows = []
    for row in tokens[:, :max_new_tokens]:
        ended = np.flatnonzero(np.isin(row, ends))  # with the -1 of what is not written
        row = row[: ended[0] if ended.size else None].tolist()
        rows.append(row if found is None else found.cut(row))
    return rows


def _padded(n: int) -> int:
    return max(SHORTEST, 1 << max(n - 1, 0).bit_length())


@functools.lru_cache(maxsize=32)
def _compiled(model: Decoder, new: int, draws: bool):
    """The whole generation as one function of arrays, that takes adapted trees."""
    body = model.clone(head=None)

    def run(params, ids, mask, limit, stops, key, settings):
        ends, table = stops
        variables = {"params": params}
        batch, width = ids.shape
        lengths = jnp.sum(mask, axis=1)

        def read(hidden):
            return model.apply(variables, hidden[:, -1], method="logits")

        def choose(logits, step):
            if not draws:
                return jnp.argmax(logits, -1).astype(jnp.int32)
            own = jax.random.fold_in(key, step)
            # The likeliest is 0, the others at worst minus infinity: no overflow.
            logits = logits - jnp.max(logits, axis=-1, keepdims=True)
            kept = keep_likely(logits / settings["temperature"], **_cut(settings))
            return jax.random.categorical(own, kept).astype(jnp.int32)

        def follow(seen, token):
            return seen if table is None else table[seen, token]

        def ended(seen, token):
            found = jnp.isin(token, ends)
            return found if table is None else found | (seen == HIT)

        cache = init_cache(model, batch, width + new)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        hidden, cache = body.apply(
            variables, ids, mask, positions=positions, cache=cache
        )
        first = choose(read(hidden), 0)
        out = jnp.full((batch, new), -1, jnp.int32).at[:, 0].set(first)
        seen = follow(jnp.zeros(batch, jnp.int32), first)
        done = ended(seen, first)

        def going(state):
            step, _, _, done, _, _ = state
            return (step < limit) & ~jnp.all(done)

        def forward(state):
            step, last, seen, done, out, cache = state
            hidden, cache = body.apply(
                variables,
                last[:, None],
                positions=(lengths + step - 1)[:, None],
                cache=cache,
            )
            token = choose(read(hidden), step)
            out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
            seen = follow(seen, token)
            done = done | ended(seen, token)
            return step + 1, token, seen, done, out, cache

        state = (jnp.int32(1), first, seen, done, out, cache)
        return jax.lax.while_loop(going, forward, state)[4]

    return adapt(run)


def _cut(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("top_k", "top_p")}


def keep_likely(
    logits: Float[Array, "batch v"], top_k: Any, top_p: Any
) -> Float[Array, "batch v"]:
    """Minus infinity at all but the likeliest tokens; top-k first, then top-p.

    The likeliest is kept, however small top-p is.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None]
    cut = jnp.where(rank < top_k, ordered, -jnp.inf)
    shares = jax.nn.softmax(cut, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares  # of all that are likelier
    kept = (rank < top_k) & ((before < top_p) | (rank == 0))
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _check_stops(ids: Sequence[int], size: int) -> None:
    if wrong := [i for i in ids if not 0 <= i < size]:
        raise ValueError(
            f"`stop` has {wrong}, and token ids are from 0 to {size - 1}; "
            "models.stop_tokens(folder, tokenizer) gives those that end a text."
        )


def _check(model, prompts, max_new_tokens, temperature, top_k, top_p, key) -> None:
    if not isinstance(model, Decoder) or model.head != "causal_lm":
        raise ValueError(
            "`model` must be a decoder with a language-model head; write "
            "models.load(name, head='causal_lm')."
        )
    if not len(prompts) or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(
            "`prompts` must be lists of at least one token id each; start an empty "
            "text with the tokenizer's first token."
        )
    size = model.config.vocab_size
    if any(not 0 <= token < size for prompt in prompts for token in prompt):
        raise ValueError(f"`prompts` have token ids outside of 0 to {size - 1}.")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    if not 0 <= temperature <= LARGEST:
        raise ValueError(
            "`temperature` must be at least 0 and finite in float32, got "
            f"{temperature}; 1 draws as the model says."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1 or None, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be in (0, 1] or None, got {top_p}.")
    if temperature > 0 and key is None:
        raise ValueError(
            f"`key` is needed to draw at temperature {temperature}; write "
            "generate(..., key=jax.random.key(0)), or temperature=0."
        )
    if temperature == 0 and not (top_k is None and top_p is None):
        raise ValueError(
            "`top_k` and `top_p` change nothing at temperature 0; give a temperature, "
            "or leave them out."
        )
