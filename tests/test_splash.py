"""The kernel for TPUs, interpreted: what XLA computes, with gradients, fp32, 1e-5."""

import importlib.util
from dataclasses import replace

import jax
import numpy as np
import pytest

from gvl_jax import plan, programs
from gvl_jax.bench.inputs import _shape
from gvl_jax.config import Buckets, Mesh, Rl, Sampling, Sft
from gvl_jax.models.qwen_vl import attention, splash
from gvl_jax.sharding import make_mesh

N, K, H = 4, 2, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", 128)


def run(function, arrays, weights):
    """Output, and the gradient of its weighted sum by every array."""

    def loss(arrays):
        out = function(*arrays)
        return (out * weights).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return [out, *jax.tree.leaves(grads)]


def same(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        assert np.abs(b).max() > 0.1, "nothing to compare"
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("B, R, prompted", [(3, 1, False), (2, 2, True)])
def test_rows_after_an_instruction_and_their_prompts(B, R, prompted, monkeypatch):
    """Packed rows of several blocks, one of them padding alone; completions on padded prompts of different length."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    J, S, shared = 200, 70, 21
    q, k, v, weights = draw(B, R, J, N, H), draw(K, B, R, J, H), draw(K, B, R, J, H), draw(B, R, J, N, H)
    prompt = (draw(K, B, S, H), draw(K, B, S, H)) if prompted else None
    seen = np.arange(S)[None] < np.array([[S], [30]])
    segments = np.zeros((B, R, J), np.int32)
    segments[0, 0] = np.repeat([1, 2, 3, 0], [5, 140, 30, 25])
    segments[1, -1] = np.repeat([1, 2], [128, 72])

    def of(function, given, **more):
        def attend(q, k, v, prompt, instruction):
            return function(q, k, v, given, None if prompt is None else (*prompt, seen), instruction, **more)

        return run(attend, (q, k, v, prompt, (draw_k, draw_v)), weights)

    draw_k, draw_v = draw(K, shared, H), draw(K, shared, H)
    plain = of(attention.attend_after, attention.packed_mask(segments))
    same(of(splash.attend_after, segments, interpret=True), plain)
    monkeypatch.setattr(attention, "BLOCK", 64)  # the last one is smaller
    same(of(lambda q, k, v, given, *before: attention.in_rows(given)(q, k, v, *before), segments), plain)


def test_pictures_in_one_buffer():
    """Pictures smaller than a block and larger, in one block and in several, and blocks of padding alone."""
    rng = np.random.default_rng(0)
    segments = np.repeat([1, 2, 3, 4, 0], [30, 300, 60, 140, 270]).astype(np.int32)
    arrays = tuple(rng.standard_normal((4, len(segments), N, H), np.float32))
    real = (segments > 0)[:, None, None]
    plain = run(lambda *qkv: attention.attend_in_segments(*qkv, segments), arrays[:3], arrays[3] * real)
    ours = run(lambda *qkv: splash.attend_in_segments(*qkv, segments, interpret=True), arrays[:3], arrays[3] * real)
    assert np.isfinite(ours[0]).all()
    same([a * real for a in ours], [b * real for b in plain])
    assert not any((a * ~real).any() for a in ours[1:]), "padding has a gradient"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'")
@pytest.mark.parametrize("fsdp, tensor, kernels", [(2, 1, 3 * 4), (2, 2, 0), (1, 1, 3 * 4)])
def test_training_on_tpus_has_the_kernels_where_the_compiler_splits_no_heads(fsdp, tensor, kernels):
    """Forward, again for the gradient, by queries, by keys: in layers of the decoder, of instruction and rows, and in
    full vision blocks."""
    shape = replace(_shape(512, 1024, 2, (4, 2), (2, 256, 512, 4), vocabulary=4096), dtype="bfloat16")
    devices = plan.topology_devices("v5e:2x2")[: 1 if fsdp == 1 else None]
    config = Sft(mesh=Mesh(fsdp=fsdp, tensor=tensor), buckets=Buckets(patches=(256,)), rows=1, max_length=256)
    stage = programs.stage_of(config, shape, make_mesh(config.mesh, devices), 10)
    step = programs.sft_programs(stage)[0]
    lowered = step.function.lower(*step.args, **step.static).as_text()
    assert lowered.count('kernel_name = "splash') == kernels


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'")
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_samplers_copy_on_one_chip_has_the_kernels_too(tensor):
    """In prompts, their completions' log-probs and full vision blocks; a token alone is decoded without."""
    shape = replace(_shape(512, 1024, 2, (4, 2), (2, 256, 512, 4), vocabulary=4096), dtype="bfloat16")
    buckets = Buckets(prompt=(256,), completion=(128,), patches=(256,))
    config = Rl(mesh=Mesh(fsdp=4 // tensor, tensor=tensor), buckets=buckets, sampling=Sampling(max_new_tokens=128))
    stage = programs.stage_of(config, shape, make_mesh(config.mesh, plan.topology_devices("v5e:2x2")), 10)
    found = {}
    for step in programs.rl_programs(stage):
        lowered = step.function.lower(*step.args, **step.static).as_text()
        found[step.name.split()[0]] = lowered.count('kernel_name = "splash')
    # prompts: two layers and the vision tower's loop; completions: two more; the instruction, of whose last layer only
    # keys and values are needed: one
    kernels = {"prefill": 3, "decode": 0, "score": 6} if tensor == 1 else {"prefill": 0, "decode": 0, "score": 0}
    assert {name: found[name] for name in kernels} == kernels
