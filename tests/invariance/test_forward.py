"""Settings that must not change the result: each is compared with its plain counterpart, fp32, 1e-5."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import IMAGE, VOCAB, continued, example, layout, tiny_config, tiny_params

from gvl_jax import rl
from gvl_jax.data.packing import pack, pack_prompts
from gvl_jax.losses import next_token_logprobs, sft_loss, token_logprobs
from gvl_jax.models.qwen_vl import attention
from gvl_jax.models.qwen_vl.model import bind
from gvl_jax.sampler import score

CONFIG = tiny_config()
PARAMS = tiny_params(CONFIG)
SIDES = [(56, 112), (84, 140), (140, 84), (112, 56)]  # pixels; windows of 56, so some are cut at the edge
R, J = 2, 5
INSTRUCTION = tuple(range(3, 13))
SHARING = layout(CONFIG, 512)._replace(shared=INSTRUCTION)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


def trees_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=0, err_msg=jax.tree_util.keystr(path))


def examples_of(*images: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [example(rng, n, SIDES) for n in images]


def after_instruction(e):
    return continued(e._replace(tokens=np.append(INSTRUCTION, e.tokens)), [])


forward = jax.jit(lambda params, batch: bind(CONFIG, params)(batch))


@functools.partial(jax.jit, static_argnames="remat")
def sft(params, batch, total, remat="none"):
    """Loss and gradient, as supervised training has them."""

    def loss(params):
        model = bind(CONFIG, params)
        logprobs = next_token_logprobs(model(batch, remat=remat), model.head_kernel(), batch.tokens)
        return sft_loss(logprobs, batch.loss_mask, total)

    return jax.value_and_grad(loss)(params)


def by_text(batches, hidden):
    """tokens → hidden, of every example in packed batches."""
    found = {}
    for batch, h in zip(batches, hidden, strict=True):
        for row, segments in enumerate(batch.segments):
            for segment in range(1, segments.max() + 1):
                at = segments == segment
                found[batch.tokens[row][at].tobytes()] = np.asarray(h)[row][at]
    return found


def test_packed_with_others_equals_alone_in_exact_shapes():
    examples = examples_of(0, 2, 1, 0)
    batches = pack(examples, rows=4, length=64, layout=layout(CONFIG, 512))
    assert len(batches) == 1 and batches[0].segments.max() > 1
    packed = by_text(batches, [forward(PARAMS, batches[0])])
    assert len(packed) == len(examples)
    for e in examples[:3]:
        alone = pack([e], rows=1, length=len(e.tokens), layout=layout(CONFIG, len(e.patches)))[0]
        close(packed[e.tokens.tobytes()], forward(PARAMS, alone)[0])


def test_padding_is_finite_and_its_content_is_never_read():
    examples = examples_of(2, 0)
    batch = pack(examples, rows=4, length=64, layout=layout(CONFIG, 512))[0]
    real, patch = batch.segments > 0, batch.vision.image > 0
    assert not real[3].any() and not patch.all()
    rng = np.random.default_rng(0)
    other = batch._replace(
        tokens=np.where(real, batch.tokens, rng.integers(0, VOCAB, real.shape)).astype(np.int32),
        positions=np.where(real, batch.positions, rng.integers(0, 99, (3, *real.shape))).astype(np.int32),
        vision=batch.vision._replace(patches=np.where(patch[:, None], batch.vision.patches, 255).astype(np.uint8)),
    )
    hidden, changed = forward(PARAMS, batch), forward(PARAMS, other)
    assert np.isfinite(hidden).all() and np.isfinite(changed).all()
    np.testing.assert_array_equal(hidden[real], changed[real])
    for b in (batch, other):
        loss, grads = sft(PARAMS, b, np.float32(9))
        assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    tower = jax.jit(lambda params, vision: bind(CONFIG, params).visual(vision, "float32"))
    assert np.isfinite(tower(PARAMS, other.vision)).all()


def test_micro_batches_add_up_to_the_whole_batch():
    examples = examples_of(1, 0, 2, 1, 0, 0)
    whole = pack(examples, rows=4, length=64, layout=layout(CONFIG, 512))
    assert len(whole) == 1
    total = np.float32(whole[0].loss_mask.sum())
    loss, grads = sft(PARAMS, whole[0], total)
    parts = [pack([e], rows=4, length=64, layout=layout(CONFIG, 512))[0] for e in examples]
    assert {part.vision is None for part in parts} == {True, False}
    losses, all_grads = zip(*[sft(PARAMS, part, total) for part in parts], strict=True)
    close(sum(losses), loss)
    trees_close(jax.tree.map(lambda *g: sum(g), *all_grads), grads)


def test_remat_and_an_instruction_computed_once_change_nothing():
    examples = [continued(after_instruction(e), [5, 6, 7]) for e in examples_of(1, 0, 2)]
    once = pack(examples, rows=4, length=64, layout=SHARING)[0]
    each = pack(examples, rows=4, length=64, layout=layout(CONFIG, 512))[0]
    saved = len(INSTRUCTION) * len(examples)
    assert (once.segments > 0).sum() == (each.segments > 0).sum() - saved
    shortened, whole = by_text([once], [forward(PARAMS, once)]), by_text([each], [forward(PARAMS, each)])
    for e in examples:
        own = e.tokens[len(INSTRUCTION) :]
        close(shortened[own.tobytes()], whole[e.tokens.tobytes()][len(INSTRUCTION) :])
    loss, grads = sft(PARAMS, once, np.float32(9), remat="layers")
    plain, plain_grads = sft(PARAMS, each, np.float32(9))
    close(loss, plain)
    trees_close(grads, plain_grads)


def groups():
    """Prompts with 0, 1 and 2 images, R completions of each, the prompts' batch and the same as packed rows."""
    prompts = [after_instruction(e) for e in examples_of(0, 1, 2, seed=1)]
    tokens = np.random.default_rng(1).integers(0, 80, (3, R, J)).astype(np.int32)
    shared = pack_prompts(prompts, rows=3, length=44, layout=SHARING)
    plain = [continued(p, t) for p, ts in zip(prompts, tokens, strict=True) for t in ts]
    rows = pack_prompts(plain, rows=3 * R, length=60, layout=layout(CONFIG, 1024))
    starts = np.repeat([len(p.tokens) for p in prompts], R)
    return shared, tokens, rows, starts[:, None] + np.arange(J)


def test_prefill_and_decode_with_a_cache_equal_the_forward_pass():
    shared, tokens, rows, at = groups()
    hidden = np.asarray(forward(PARAMS, rows))
    expected = np.take_along_axis(hidden, at[..., None], 1).reshape(3, R, J, -1)
    last, prompt = jax.jit(lambda params, batch: bind(CONFIG, params).prefill(batch))(PARAMS, shared)
    close(last, [hidden[R * row, at[R * row, 0] - 1] for row in range(3)])

    @jax.jit
    def decode(params, tokens, prompt, caches, column, step):
        model = bind(CONFIG, params)
        before = [
            ((prompt.k[i], prompt.v[i], prompt.mask), (prompt.instruction[0][i], prompt.instruction[1][i]))
            for i in range(CONFIG.text.num_hidden_layers)
        ]
        seen = (column - jnp.arange(J)[None, None]) % J <= step[..., None]
        layers, positions = model.text.each(), prompt.length[:, None] + step
        return model.text.decode(model.embed(tokens), layers, before, positions, seen, caches, column)

    text = CONFIG.text
    empty = jnp.full((text.num_key_value_heads, 3, R, J, text.head_dim), 7.0, jnp.float32)  # what no completion may see
    caches = [(empty, empty)] * text.num_hidden_layers
    for step in range(J):  # the columns are a ring: begin in its middle
        steps = jnp.full((3, R), step)
        hidden, caches = decode(PARAMS, tokens[:, :, step], prompt, caches, jnp.asarray((step + 2) % J), steps)
        close(hidden, expected[:, :, step])
    assert decode._cache_size() == 1


def test_completions_on_a_shared_prompt_equal_prompt_and_completion_rows():
    shared, tokens, rows, at = groups()
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((3, R, J)).astype(np.float32) / (3 * R * J)

    def by_sharing(params):
        model = bind(CONFIG, params)
        last, prompt = model.prefill(shared, remat="layers")
        hidden = model.extend(tokens, prompt, remat="layers")
        before = jnp.concatenate([jnp.broadcast_to(last[:, None, None], hidden[:, :, :1].shape), hidden[:, :, :-1]], 2)
        return (token_logprobs(before, model.head_kernel(), tokens) * weights).sum(), hidden

    def by_repeating(params):
        model = bind(CONFIG, params)
        hidden = model(rows)
        logprobs = next_token_logprobs(hidden, model.head_kernel(), rows.tokens)
        taken = jnp.take_along_axis(logprobs, at, 1).reshape(weights.shape)
        return (taken * weights).sum(), jnp.take_along_axis(hidden, at[..., None], 1).reshape(3, R, J, -1)

    (ours, hidden), grads = jax.jit(jax.value_and_grad(by_sharing, has_aux=True))(PARAMS)
    (plain, plain_hidden), plain_grads = jax.jit(jax.value_and_grad(by_repeating, has_aux=True))(PARAMS)
    close(hidden, plain_hidden)
    close(ours, plain)
    trees_close(grads, plain_grads)
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(plain_grads)), "too small to compare"


def test_pictures_that_a_frozen_tower_has_seen_equal_their_patches(monkeypatch):
    """Rollout, scoring and updates of a step then read the same features: one vision pass a prompt."""
    prompts = [after_instruction(e) for e in examples_of(0, 1, 2, 1, seed=1)]
    settings = SimpleNamespace(rows=2, buckets=SimpleNamespace(prompt=(52,)))
    sampler = SimpleNamespace(layout=SHARING, model_config=CONFIG)
    passes = []
    monkeypatch.setattr(rl, "look", lambda *args, look=rl.look, **more: passes.append(1) or look(*args, **more))
    named = {number: (None, prompt) for number, prompt in enumerate(prompts)}
    seen = [prompt for _, prompt in rl.looked_at(settings, sampler, [PARAMS], named).values()]
    assert len(passes) == 2 and [len(e.merged) if len(e.grids) else e.merged for e in seen] == [
        len(e.patches) // 4 or None for e in prompts
    ]
    tokens = np.random.default_rng(1).integers(0, 80, (4, R, J)).astype(np.int32)
    batches = [pack_prompts(some, rows=4, length=44, layout=SHARING) for some in (prompts, seen)]
    assert batches[1].vision.shape == (len(batches[0].vision.patches) // 4, CONFIG.text.hidden_size)
    expected, got = (score(PARAMS, batch, tokens, np.float32(1), None, config=CONFIG) for batch in batches)
    close(got, expected)


def test_full_attention_in_blocks_of_queries_equals_one_block(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v, weights = rng.standard_normal((4, 13, 2, 8)).astype(np.float32)
    segments = np.array([1] * 6 + [2] * 5 + [0] * 2, np.int32)
    run = lambda: jax.value_and_grad(  # noqa: E731
        lambda qkv: (attention.attend_in_segments(*qkv, segments) * weights).sum()
    )((q, k, v))
    loss, grads = run()
    monkeypatch.setattr(attention, "QUERIES", 5)
    blocked, blocked_grads = run()
    close(blocked, loss)
    trees_close(blocked_grads, grads)


def test_an_image_placeholder_needs_its_picture():
    """The comparisons above would hold for a model that ignores pictures: this one sees them."""
    e = examples_of(1)[0]
    batch = pack([e], rows=1, length=64, layout=layout(CONFIG, 512))[0]
    darker = batch._replace(vision=batch.vision._replace(patches=batch.vision.patches // 2))
    assert np.abs(np.asarray(forward(PARAMS, batch) - forward(PARAMS, darker)))[0, e.tokens.size - 1].max() > 1e-3
    assert (e.tokens == IMAGE).sum() == len(e.patches) // 4
