"""Greedy decoding against transformers' `generate`, token for token, on random tiny configs."""

import numpy as np
import pytest
import torch
from tiny_models import IMAGE, VOCAB, draw, example, inputs_of, layout

from gvl_jax.data.packing import pack_prompts
from gvl_jax.decoding import BUDGET, Vocabulary
from gvl_jax.models.qwen_vl.config import from_hf
from gvl_jax.models.qwen_vl.hub import load_params
from gvl_jax.sampler import generate

NEW = 32
SIDES = [(28, 28), (56, 84), (140, 112), (28, 196), (112, 112), (84, 56)]
BANNED = [3, IMAGE]  # one ordinary id, so that a ban has work to do


def reference_generate(reference, prompt):
    """→ tokens i64[NEW] and the log-prob of each over the ids that are not banned."""
    with torch.no_grad():
        out = reference.generate(
            **inputs_of(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            suppress_tokens=BANNED,
            output_scores=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[0, len(prompt.tokens) :]
    logprobs = torch.cat(out.scores).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens.numpy(), logprobs.numpy()


@pytest.mark.parametrize("seed", range(100, 120))
def test_greedy_tokens_and_logprobs_equal_transformers(seed, tmp_path):
    reference, raw = draw(seed)
    reference.save_pretrained(tmp_path)
    config = from_hf(raw)
    rng = np.random.default_rng(seed)
    prompts = [example(rng, images, SIDES) for images in (0, 1, 3)]
    batch = pack_prompts(prompts, rows=3, length=max(len(p.tokens) for p in prompts), layout=layout(config, 256, 1024))
    no_stop = Vocabulary(
        banned=np.isin(np.arange(VOCAB), BANNED),
        end=np.zeros(VOCAB, bool),
        transition=np.zeros((2, VOCAB), np.uint8),
    )
    rollout = generate(
        load_params(tmp_path, config),
        batch,
        np.zeros((3, 1, 2), np.uint32),
        1.0,
        no_stop,
        config=config,
        max_new_tokens=NEW,
        greedy=True,
    )
    for row, prompt in enumerate(prompts):
        tokens, logprobs = reference_generate(reference, prompt)
        np.testing.assert_array_equal(rollout.tokens[row, 0], tokens)
        np.testing.assert_allclose(rollout.logprobs[row, 0], logprobs, atol=1e-4, rtol=0)
    assert (rollout.lengths == NEW).all() and (rollout.stopped == BUDGET).all()
