"""At the first update after a rollout the policy is the one that sampled: every ratio is 1.0, to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB, continued, example, layout, tiny_config, tiny_params

from gvl_jax.data.packing import pack_prompts
from gvl_jax.rl import Completions, accumulate
from gvl_jax.sampler import score

INSTRUCTION = tuple(range(3, 9))
R, J = 3, 7
TEMPERATURE, BANNED = np.float32(1.2), np.arange(VOCAB) == 5


@pytest.mark.parametrize(("images", "remat", "dtype"), [((0, 0), "layers", "bfloat16"), ((1, 3), "none", "float32")])
def test_the_ratio_is_exactly_one_before_the_first_update(images, remat, dtype):
    config = tiny_config(dtype=dtype)
    rng = np.random.default_rng(0)
    prompts = [example(rng, n, sides=[(56, 84), (140, 112), (28, 112)]) for n in images]
    prompts = [continued(p._replace(tokens=np.append(INSTRUCTION, p.tokens)), []) for p in prompts]
    length = max(len(p.tokens) for p in prompts)
    batch = pack_prompts(prompts, rows=2, length=length, layout=layout(config, 256, 512)._replace(shared=INSTRUCTION))
    tokens = rng.choice(np.flatnonzero(~BANNED), (2, R, J)).astype(np.int32)
    mask = np.arange(J) < rng.integers(1, J + 1, (2, R))[..., None]
    params = tiny_params(config)
    scored = np.asarray(score(params, batch, tokens, TEMPERATURE, BANNED, config=config))

    def update(sign, old, on_policy):
        advantages = np.full((2, R), sign, np.float32)
        done = Completions(tokens, mask, advantages, scored, old, np.asarray(on_policy))
        return accumulate(
            params, {}, jax.tree.map(jnp.zeros_like, params), batch, done, TEMPERATURE, BANNED, np.float32(0),
            np.float32(2 * R), model_config=config, remat=remat, mean="sequence",
        )  # fmt: skip

    # With an empty clip range a ratio above 1 counts as clipped when the advantage is positive, one below when not.
    for sign in (1, -1):
        grads, metrics = update(sign, np.full_like(scored, np.nan), on_policy=True)
        assert metrics["clipped"] == 0 and metrics["ratio_max"] == 1.0 and metrics["approx_kl"] == 0
        assert metrics["ratio"] == metrics["tokens"] == mask.sum() and metrics["loss"] == -sign
        assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads["text"]))
    if dtype == "float32":
        # The scoring pass is another program, compiled otherwise: equal up to rounding, not to the last bit.
        assert metrics["gap"] / mask.sum() < 1e-5
        _, metrics = update(1, scored, on_policy=False)
        np.testing.assert_allclose([metrics["ratio"] / mask.sum(), metrics["ratio_max"]], 1.0, atol=1e-5)
        _, metrics = update(1, scored - np.log(2).astype(np.float32), on_policy=False)
        np.testing.assert_allclose(metrics["ratio"] / mask.sum(), 2.0, atol=1e-4)
