"""At the first update after a rollout the policy is the one that sampled: every ratio is 1.0, to the last bit."""

import functools

import jax
import numpy as np
import pytest
from tiny_models import VOCAB, continued, example, layout, tiny_config, tiny_params

from gvl_jax.data.packing import pack_prompts
from gvl_jax.losses import policy_loss
from gvl_jax.models.qwen_vl.model import bind
from gvl_jax.sampler import completion_logprobs, score

INSTRUCTION = tuple(range(3, 9))
R, J = 3, 7
TEMPERATURE, BANNED = np.float32(1.2), np.arange(VOCAB) == 5


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def update(params, batch, tokens, old, advantages, mask, temperature, config, remat):
    def loss(params):
        new = completion_logprobs(bind(config, params), batch, tokens, temperature, BANNED, remat=remat)
        loss, metrics = policy_loss(new, old, advantages, mask, clip_low=np.float32(0), clip_high=np.float32(0))
        return loss, (metrics, new)

    return jax.value_and_grad(loss, has_aux=True)(params)


def group_of(images, config):
    rng = np.random.default_rng(0)
    prompts = [example(rng, n, sides=[(56, 84), (140, 112), (28, 112)]) for n in images]
    prompts = [continued(p._replace(tokens=np.append(INSTRUCTION, p.tokens)), []) for p in prompts]
    length = max(len(p.tokens) for p in prompts)
    batch = pack_prompts(prompts, rows=2, length=length, layout=layout(config, 256, 512)._replace(shared=INSTRUCTION))
    tokens = rng.choice(np.flatnonzero(~BANNED), (2, R, J)).astype(np.int32)
    mask = np.arange(J) < rng.integers(1, J + 1, (2, R))[..., None]
    return batch, tokens, mask


@pytest.mark.parametrize(("images", "remat", "dtype"), [((0, 0), True, "bfloat16"), ((1, 3), False, "float32")])
def test_the_ratio_is_exactly_one_before_the_first_update(images, remat, dtype):
    config = tiny_config(dtype=dtype)
    params = tiny_params(config)
    batch, tokens, mask = group_of(images, config)
    # With an empty clip range a ratio above 1 counts as clipped when the advantage is positive, one below when not.
    for sign in (1, -1):
        advantages = np.full((2, R), sign, np.float32)
        (loss, (metrics, new)), grads = update(
            params, batch, tokens, None, advantages, mask, TEMPERATURE, config=config, remat=remat
        )
        assert metrics["clipped"] == 0 and metrics["ratio_max"] == 1.0 and loss == -sign
        assert metrics["ratio"] == metrics["tokens"] == mask.sum() and metrics["approx_kl"] == 0
        assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads["text"]))
    if dtype == "float32":
        # The scoring pass is another program, compiled otherwise: equal up to rounding, not to the last bit.
        old = score(params, batch, tokens, TEMPERATURE, BANNED, config=config)
        np.testing.assert_allclose(old, new, atol=1e-5, rtol=0)
