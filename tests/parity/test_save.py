"""What we train and save is what transformers computes: our own parameters → checkpoint → transformers → logits."""

import jax
import numpy as np
import pytest
from tiny_models import example, layout, reference_logits, tiny_config, tiny_params
from transformers import Qwen2_5_VLForConditionalGeneration

from gvl_jax.data.packing import pack
from gvl_jax.models.qwen_vl.hub import save_params
from gvl_jax.models.qwen_vl.model import bind


@pytest.mark.parametrize("tied", [False, True])
def test_saved_parameters_give_the_same_logits_in_transformers(tied, tmp_path):
    config = tiny_config(tied)
    params = tiny_params(config)
    rng = np.random.default_rng(0)
    logits = jax.jit(lambda params, batch: (lambda m: m(batch) @ m.head_kernel())(bind(config, params)))
    examples = [example(rng, images, [(56, 84), (140, 112)]) for images in (0, 2)]
    batch = pack(examples, rows=1, length=96, layout=layout(config, 256))[0]
    ours = np.asarray(logits(params, batch))[0]
    for saved in ("hub", "transformers5"):
        save_params(tmp_path / saved, params, config, layout=saved, dtype="float32")
        reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / saved).eval()
        for segment, e in enumerate(sorted(examples, key=lambda e: len(e.grids) == 0), start=1):
            at = batch.segments[0] == segment
            np.testing.assert_array_equal(batch.tokens[0][at], e.tokens)
            np.testing.assert_allclose(ours[at], reference_logits(reference, e), atol=1e-5, rtol=0)
