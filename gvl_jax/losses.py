"""Arrays in, arrays out: log-probabilities without [B, T, V] logits, and the losses of both training stages."""

import jax
import jax.numpy as jnp
from jax import lax


def _chunk(tokens: int) -> int:
    """Targets whose logits exist at a time: 0.15 or 0.6 GiB in fp32 at V = 151,936.

    Each round adds to the whole gradient of the head, and half of the last chunk is padding on average: many tokens
    want large chunks, few tokens small ones. On a CPU all sizes from 256 to 1,024 cost the same within 12 %.
    """
    return 1024 if tokens > 8192 else min(256, tokens)


def token_logprobs(
    hidden, head, targets, mask=None, *, temperature=1.0, banned=None, entropy: bool = False, chunk: int | None = None
):
    """log softmax(hidden · head / temperature)[targets] where mask is True, 0.0 elsewhere; fp32.

    hidden [..., D], head [D, V], targets i32[...], mask bool[...] (None: all True); banned bool[V] marks ids outside
    the distribution (the sampler never draws them). entropy: also the distribution's, f32[...], without gradient.
    Only tokens under the mask cost logits: they are put first, and a loop works them off, `chunk` at a time, for as
    many rounds as their number needs. The gradient, by hidden and head, computes the logits of a chunk again.
    """
    mask = jnp.ones(targets.shape, bool) if mask is None else mask
    banned = jnp.zeros(head.shape[1], bool) if banned is None else banned
    chunk = chunk or _chunk(mask.size)
    order = jnp.flatnonzero(mask, size=mask.size + -mask.size % chunk, fill_value=mask.size)
    rounds = (mask.sum() + chunk - 1) // chunk
    flat = hidden.reshape(-1, hidden.shape[-1])
    ordered = _logprobs(flat, head, targets.reshape(-1), order.reshape(-1, chunk), rounds, temperature, banned)
    in_place = [jnp.zeros(mask.size).at[order].set(x.reshape(-1), mode="drop").reshape(mask.shape) for x in ordered]
    return tuple(in_place) if entropy else in_place[0]


def _rows(values, at):
    """values[at], and 0 where `at` is past the end: the slots that pad the last chunk."""
    return jnp.take(values, at, axis=0, mode="fill", fill_value=0)


def _logits(rows, head, temperature, banned):
    logits = jnp.matmul(rows, head, preferred_element_type=jnp.float32) / temperature
    return jnp.where(banned[None], -jnp.inf, logits)


@jax.custom_vjp
def _logprobs(hidden, head, targets, order, rounds, temperature, banned):
    """hidden [N, D], order i32[chunks, chunk] → log-probs and entropies f32[chunks, chunk] of tokens order[:rounds]."""
    return _logprobs_forward(hidden, head, targets, order, rounds, temperature, banned)[0]


def _logprobs_forward(hidden, head, targets, order, rounds, temperature, banned):
    kernel = head.astype(hidden.dtype)

    def one_chunk(i, carry):
        logits = _logits(_rows(hidden, order[i]), kernel, temperature, banned)
        chosen = jnp.take_along_axis(logits, _rows(targets, order[i])[:, None], 1)[:, 0]
        highest = logits.max(1)
        weights = jnp.exp(logits - highest[:, None])
        total = weights.sum(1)
        mean = jnp.where(weights > 0, weights * logits, 0.0).sum(1) / total  # of a banned id: 0 · -inf
        normaliser = highest + jnp.log(total)
        new = chosen - normaliser, normaliser - mean, normaliser
        return tuple(array.at[i].set(x) for array, x in zip(carry, new, strict=True))

    empty = jnp.zeros(order.shape)
    logprobs, entropies, normalisers = lax.fori_loop(0, rounds, one_chunk, (empty, empty, empty))
    return (logprobs, entropies), (hidden, head, targets, order, rounds, temperature, banned, normalisers)


def _logprobs_backward(saved, gradients):
    hidden, head, targets, order, rounds, temperature, banned, normalisers = saved
    kernel, by_logprobs = head.astype(hidden.dtype), gradients[0] / temperature

    def one_chunk(i, carry):
        by_hidden, by_head = carry
        rows = _rows(hidden, order[i])
        probs = jnp.exp(_logits(rows, kernel, temperature, banned) - normalisers[i][:, None])
        is_target = jnp.arange(len(banned))[None] == _rows(targets, order[i])[:, None]
        by_logits = (jnp.where(is_target & ~banned[None], 1.0, 0.0) - probs) * by_logprobs[i][:, None]
        by_logits = by_logits.astype(hidden.dtype)
        by_rows = jnp.matmul(by_logits, kernel.T, preferred_element_type=jnp.float32).astype(hidden.dtype)
        by_head = by_head + jnp.matmul(rows.T, by_logits, preferred_element_type=jnp.float32)
        return by_hidden.at[order[i]].set(by_rows, mode="drop"), by_head

    empty = jnp.zeros_like(hidden), jnp.zeros(head.shape)
    by_hidden, by_head = lax.fori_loop(0, rounds, one_chunk, empty)
    return by_hidden, by_head.astype(head.dtype), None, None, None, None, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def next_token_logprobs(hidden, head, tokens, mask=None, *, chunk: int | None = None):
    """hidden [B, T, D], tokens i32[B, T] → f32[B, T]: log-prob of token t given those before it.

    0 for the first token of a row and where mask bool[B, T] (the loss mask) is False.
    """
    mask = None if mask is None else mask[:, 1:]
    predicted = token_logprobs(hidden[:, :-1], head, tokens[:, 1:], mask, chunk=chunk)
    return jnp.pad(predicted, ((0, 0), (1, 0)))


def sft_loss(logprobs, loss_mask, total):
    """-Σ log p over answer tokens / total. `total` counts the whole global batch, so micro-batching changes nothing."""
    return -jnp.sum(jnp.where(loss_mask, logprobs, 0.0)) / total


def group_advantages(rewards, epsilon: float = 1e-6):
    """rewards f32[B, R] → (r - mean) / (std + epsilon) in each group of R; unbiased std. A group of equals gives 0."""
    shifted = rewards - rewards[:, :1]  # exact zeros for equals: the mean of 12 times -37.7 is not -37.7 in fp32
    centred = shifted - shifted.mean(1, keepdims=True)
    std = jnp.sqrt(jnp.sum(centred**2, 1, keepdims=True) / (rewards.shape[1] - 1))
    return centred / (std + epsilon)


def clip_schedule(step, total_steps: int, epsilon: float):
    """Eq. 7: B_s = ε · Π_{i=1..s} (s_total - i) / s_total, for step s = 1 … total_steps. The last one is 0."""
    factors = 1 - jnp.arange(1, total_steps + 1) / total_steps
    return epsilon * jnp.prod(jnp.where(jnp.arange(1, total_steps + 1) <= step, factors, 1.0))


def policy_loss(
    logprobs, old_logprobs, advantages, loss_mask, *, clip_low, clip_high, mean: str = "sequence", total=None
):
    """PPO's form of Eq. 6: -min(K·A, clip(K, 1 - clip_low, 1 + clip_high)·A), K = exp(logprobs - old_logprobs) a token.

    logprobs, old_logprobs f32[..., J], loss_mask bool[..., J], advantages f32[...]. mean: "sequence" averages
    the tokens of each sequence, then the sequences; "token" averages all tokens. total: sequences (or tokens) of
    the whole update, default those given. clip_low and clip_high are arrays: a traced step sees each new value.
    Returns the loss and metrics: sums over tokens, to be divided by `tokens`.
    """
    mask = loss_mask.astype(jnp.float32)
    log_ratio = jnp.where(loss_mask, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    advantages = jnp.broadcast_to(advantages[..., None], ratio.shape)
    clipped = jnp.clip(lax.stop_gradient(ratio), 1 - clip_low, 1 + clip_high) * advantages
    # The clipped branch is a constant. At a tie the gradient is the unclipped one, also when the range is empty.
    objective = jnp.where(ratio * advantages <= clipped, ratio * advantages, clipped)
    lengths = mask.sum(-1)
    if mean == "sequence":
        per_sequence = (objective * mask).sum(-1) / jnp.maximum(lengths, 1)
        loss = -per_sequence.sum() / ((lengths > 0).sum() if total is None else total)
    elif mean == "token":
        loss = -(objective * mask).sum() / (lengths.sum() if total is None else total)
    else:
        raise ValueError(f"policy_loss: mean is {mean!r}, expected 'sequence' or 'token'")
    metrics = {
        "tokens": lengths.sum(),
        "ratio": (ratio * mask).sum(),
        "ratio_max": jnp.where(loss_mask, ratio, 0.0).max(),
        "clipped": ((ratio * advantages > clipped) * mask).sum(),
        "approx_kl": ((ratio - 1 - log_ratio) * mask).sum(),
        "clip_low": clip_low,
        "clip_high": clip_high,
    }
    return loss, lax.stop_gradient(metrics)
