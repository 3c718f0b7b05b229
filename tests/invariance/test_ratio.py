"""At the first update after a rollout the policy is the one that was scored: every ratio is 1.0, to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB, continued, example, layout, tiny_config, tiny_params

from gvl_jax.data.packing import pack_prompts
from gvl_jax.rl import Completions, accumulate, score

CONFIG = tiny_config()
INSTRUCTION = tuple(range(3, 9))
R, J = 3, 7


@pytest.mark.parametrize(("images", "remat"), [((0, 0), False), ((1, 3), False), ((1, 3), True)])
def test_the_scoring_pass_and_the_training_pass_agree_to_the_last_bit(images, remat):
    rng = np.random.default_rng(0)
    prompts = [example(rng, n, sides=[(56, 84), (140, 112), (28, 112)]) for n in images]
    prompts = [continued(p._replace(tokens=np.append(INSTRUCTION, p.tokens)), []) for p in prompts]
    length = max(len(p.tokens) for p in prompts)
    batch = pack_prompts(prompts, rows=2, length=length, layout=layout(CONFIG, 256, 512)._replace(shared=INSTRUCTION))
    tokens = rng.integers(0, VOCAB, (2, R, J)).astype(np.int32)
    mask = np.arange(J) < rng.integers(1, J + 1, (2, R))[..., None]
    temperature, banned, params = np.float32(1.2), np.arange(VOCAB) == VOCAB, tiny_params(CONFIG)
    old = score(params, {}, batch, tokens, temperature, banned, model_config=CONFIG)
    # With an empty clip range a ratio above 1 counts as clipped when the advantage is positive, one below when not.
    for advantage in (1.0, -1.0):
        done = Completions(tokens, mask, np.full((2, R), advantage, np.float32), old)
        _, metrics = accumulate(
            params, {}, jax.tree.map(jnp.zeros_like, params), batch, done, temperature, banned, np.float32(0),
            np.float32(2 * R), model_config=CONFIG, remat=remat, mean="sequence",
        )  # fmt: skip
        assert metrics["clipped"] == 0 and metrics["ratio_max"] == 1.0
        assert metrics["ratio"] == metrics["tokens"] == mask.sum()
