"""Arrays in, arrays out: log-probabilities without [B, T, V] logits, and the losses of both training stages."""

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 2048  # tokens whose logits exist at a time: 1.2 GiB in fp32 at V = 151,936


def token_logprobs(hidden, head, targets, *, temperature=1.0, banned=None, chunk: int = CHUNK):
    """log softmax(hidden · head / temperature)[targets], `chunk` tokens at a time; fp32.

    hidden [..., D], head [D, V], targets i32[...]; banned bool[V] marks ids outside the distribution (the
    sampler never draws them). Logits are computed again in the backward pass, so they never exist whole.
    """
    shape, width = targets.shape, hidden.shape[-1]
    hidden, targets = hidden.reshape(-1, width), targets.reshape(-1)
    count = len(targets)
    chunk = min(chunk, count)
    padding = -count % chunk
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, width)
    targets = jnp.pad(targets, (0, padding)).reshape(-1, chunk)

    @jax.checkpoint
    def one_chunk(pair):
        hidden, targets = pair
        logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32) / temperature
        if banned is not None:
            logits = jnp.where(banned[None], -jnp.inf, logits)
        chosen = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, 1)

    return lax.map(one_chunk, (hidden, targets)).reshape(-1)[:count].reshape(shape)


def next_token_logprobs(hidden, head, tokens, *, chunk: int = CHUNK):
    """hidden [B, T, D], tokens i32[B, T] → f32[B, T]: log-prob of token t given those before it; 0 for the first."""
    predicted = token_logprobs(hidden[:, :-1], head, tokens[:, 1:], chunk=chunk)
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
