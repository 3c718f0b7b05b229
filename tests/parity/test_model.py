"""The model in fp32 against transformers in fp64, on random tiny configs: one table of cases, one tolerance for all."""

import jax
import numpy as np
import pytest
from tiny_models import draw, example, layout, reference_logits

from gvl_jax.data.packing import pack
from gvl_jax.models.qwen_vl.config import from_hf
from gvl_jax.models.qwen_vl.hub import load_params
from gvl_jax.models.qwen_vl.model import bind


@pytest.mark.parametrize("seed", range(24))
def test_logits_equal_transformers_packed_and_with_any_number_of_images(seed, tmp_path):
    reference, raw = draw(seed)
    reference.save_pretrained(tmp_path)
    config = from_hf(raw)
    params = load_params(tmp_path, config)
    rng = np.random.default_rng(seed)
    examples = [example(rng, images) for images in (0, 1, 3)]
    length = max(len(e.tokens) for e in examples) + min(len(e.tokens) for e in examples) + 3
    batches = pack(examples, rows=2, length=length, layout=layout(config, 4096, 8192))
    forward = jax.jit(lambda params, batch: (lambda m: m(batch) @ m.head_kernel())(bind(config, params)))
    seen = set()
    for batch in batches:
        logits = np.asarray(forward(params, batch))
        for i, e in enumerate(examples):
            for row in range(len(batch.tokens)):
                for segment in range(1, batch.segments[row].max() + 1):
                    at = batch.segments[row] == segment
                    if at.sum() == len(e.tokens) and np.array_equal(batch.tokens[row][at], e.tokens):
                        np.testing.assert_allclose(logits[row][at], reference_logits(reference, e), atol=5e-5, rtol=0)
                        seen.add(i)
    assert seen == {0, 1, 2}
