"""At the first update of a rollout batch the policy is the old policy: the ratio is 1.0, to the last bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB, example, layout, tiny_config, tiny_params

from gvl_jax.data.packing import pack_prompts
from gvl_jax.losses import policy_loss, token_logprobs
from gvl_jax.models.qwen_vl.model import bind

CONFIG = tiny_config()
R, J = 3, 7


def logprobs(params, batch, tokens, remat=False):
    model = bind(CONFIG, params)
    last, prompt = model.prefill(batch, remat=remat)
    hidden = model.extend(tokens, prompt, remat=remat)[:, :, :-1]
    hidden = jnp.concatenate([jnp.broadcast_to(last[:, None, None], (*hidden.shape[:2], 1, hidden.shape[-1])), hidden], 2)
    return token_logprobs(hidden, model.head_kernel(), tokens, temperature=1.2)


score = jax.jit(logprobs)


@functools.partial(jax.jit, static_argnames="remat")
def update(params, batch, tokens, old, advantages, mask, clip, remat):
    def loss(params):
        new = logprobs(params, batch, tokens, remat)
        loss, metrics = policy_loss(new, old, advantages, mask, clip_low=clip, clip_high=clip)
        return loss, (new, metrics)

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize(("images", "remat"), [((0, 0), False), ((1, 3), False), ((1, 3), True)])
def test_scored_and_trained_logprobs_are_the_same_bits(images, remat):
    rng = np.random.default_rng(0)
    prompts = [example(rng, n, sides=[(56, 84), (140, 112), (28, 112)]) for n in images]
    length = max(len(p.tokens) for p in prompts) + 3
    batch = pack_prompts(prompts, rows=2, length=length, layout=layout(CONFIG, 256, 512))
    tokens = rng.integers(0, VOCAB, (2, R, J)).astype(np.int32)
    mask = np.arange(J) < rng.integers(1, J + 1, (2, R))[..., None]
    advantages = rng.standard_normal((2, R)).astype(np.float32)
    params = tiny_params(CONFIG)
    old = score(params, batch, tokens)
    (_, (new, metrics)), _ = update(params, batch, tokens, old, advantages, mask, np.float32(0.2), remat)
    np.testing.assert_array_equal(old, new)
    assert metrics["ratio_max"] == 1.0 and metrics["approx_kl"] == 0.0 and metrics["clipped"] == 0
