"""Refilled slots, caches that grow, and the forced close, on a random model with a real tokenizer."""

import copy
import json
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_config, tiny_params

from gvl_jax import sampler as module
from gvl_jax import slots
from gvl_jax.config import Buckets, Images, Sampling
from gvl_jax.data import tiny
from gvl_jax.data.loader import to_example
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.decoding import BUDGET, END_TOKEN, empty_state, grow
from gvl_jax.guard.closing import closing
from gvl_jax.guard.prompt import answer_text, result_block
from gvl_jax.guard.verdict import parse
from gvl_jax.metrics import CompileCounter
from gvl_jax.sampler import Sampler
from gvl_jax.types import Sample

VOCAB, BUDGET_TOKENS = 512, 21
LABELS = [(a, b) for a in ("harmful", "unharmful") for b in ("harmful", "unharmful", None)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tiny(folder, [answer_text("It is a car.", *labels) for labels in LABELS], vocab_size=400)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model():
    config = tiny_config()
    config = replace(config, text=replace(config.text, vocab_size=VOCAB))
    return config, tiny_params(config)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    rng = np.random.default_rng(0)

    def picture():
        return Image.fromarray(rng.integers(0, 256, (56, 28 * rng.integers(1, 4), 3), np.uint8))

    samples = [
        Sample(str(n), "car " * int(rng.integers(1, 9)), None, tuple(picture() for _ in range(n % 3))) for n in range(7)
    ]
    return [to_example(sample, tokenizer, Images(28 * 28, 10**5), 700) for sample in samples]


def make(tokenizer, config, rows, slots=None, **options) -> Sampler:
    buckets = Buckets(prompt=(640, 700), completion=(32,), patches=(256,))
    sampler = Sampler(tokenizer, config, buckets, Sampling(max_new_tokens=BUDGET_TOKENS), rows, slots=slots, **options)
    ends = np.arange(VOCAB) % 9 == 5  # a random model ends by chance
    if not options:
        sampler.vocabulary = sampler.vocabulary._replace(end=ends & ~sampler.vocabulary.banned)
    return sampler


def collected(sampler, params, prompts, **options) -> dict[int, tuple]:
    got = {}
    for indices, rollout in sampler(params, prompts, **options):
        for row, index in enumerate(indices):
            assert index not in got
            got[index] = tuple(array[row] for array in rollout)
    assert sorted(got) == list(range(len(prompts)))
    return got


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5)


@pytest.fixture(scope="module")
def alone(tokenizer, model, prompts):
    """Three completions of seven prompts, one prompt and one completion at a time; and the steps that they used."""
    config, params = model
    sampler = make(tokenizer, config, rows=1, slots=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", 5)
        expected = collected(sampler, params, prompts, group_size=3, seed=4)
    assert sampler.used_steps == sum(int(lengths.sum()) for _, _, lengths, *_ in expected.values())
    stops = np.concatenate([stopped for _, _, _, stopped, _ in expected.values()])
    assert {END_TOKEN, BUDGET} == set(stops.tolist()), "some must end while others go on"
    return sampler.used_steps, expected


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(("rows", "slots"), [(2, 2), (4, 1), (8, None)])
def test_refilled_slots_equal_one_prompt_and_one_completion_at_a_time(rows, slots, tokenizer, model, prompts, alone):
    """... in fewer slots, whose caches grow and whose columns wrap around."""
    config, params = model
    used, expected = alone
    sampler = make(tokenizer, config, rows, slots)
    for index, group in collected(sampler, params, prompts, group_size=3, seed=4).items():
        for name, ours, theirs in zip(
            ("tokens", "logprobs", "lengths", "stopped"), group, expected[index], strict=False
        ):
            if name == "logprobs":
                np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
            else:
                np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert sampler.used_steps == used <= sampler.slot_steps


def test_caches_grow_layer_by_layer_and_keep_what_is_in_the_ring(model):
    config, _ = model
    state = empty_state(config, 2, 3, 8, 4, 16)
    wrapped = jax.tree.map(lambda a: jnp.arange(a.size, dtype=a.dtype).reshape(a.shape), state.caches)
    state = state._replace(caches=wrapped, clock=jnp.int32(6))  # columns 2 and 3 are the oldest, then 0 and 1
    before = jax.device_get(wrapped)
    longer = grow(state, columns=7)
    assert all(array.is_deleted() for array in jax.tree.leaves(wrapped)), "both would not fit side by side"
    assert int(longer.clock) == 4
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(longer.caches), strict=True):
        np.testing.assert_array_equal(new[:, :, :, :4], old[:, :, :, [2, 3, 0, 1]])
        assert new.shape[3] == 7 and not new[:, :, :, 4:].any()


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("count, budget, caches", [(1, BUDGET_TOKENS, 4), (2, BUDGET_TOKENS, 4), (1, 9, 2)])
def test_a_stage_compiles_ahead_what_its_rollouts_need(
    count, budget, caches, tokenizer, model, prompts, monkeypatch, capsys
):
    config, params = model
    sampler = make(tokenizer, config, rows=3 if budget > 9 else 5, slots=2)  # shapes that no other test has
    sampler.ahead, rehearse, compiles = True, sampler._compile, CompileCounter()

    def compile_ahead(*args):
        rehearse(*args)
        compiles.counts.clear()

    monkeypatch.setattr(sampler, "_compile", compile_ahead)
    copies = [jax.device_put(params, device) for device in jax.devices()[:count]]
    for pictured in (False, True):  # the second call needs some more
        some = [prompt for prompt in prompts if pictured or not len(prompt.grids)]
        collected(sampler, copies if count > 1 else params, some, group_size=3, seed=4, budgets=[budget] * len(some))
        compiles.close()
        assert not compiles.counts
        compiles = CompileCounter()
    compiles.close()
    said = capsys.readouterr().out
    assert f"compile {(1 + caches) * count}/{(1 + caches) * count}" in said and f"compile {count}/{count}" in said


def test_prompts_of_like_length_are_computed_together_where_they_fill_the_rows(tokenizer, model, prompts, monkeypatch):
    config, params = model
    widths, prefill = [], module.prefill

    def seen(params, batch, *rest, **options):
        widths.append(batch.tokens.shape[1])
        return prefill(params, batch, *rest, **options)

    monkeypatch.setattr(module, "prefill", seen)
    lengths = sorted(len(prompt.tokens) for prompt in prompts)
    short, long = lengths[3], lengths[-1]
    assert lengths[2] < short < lengths[4] < long
    for rows, expected in ((2, {short, long}), (4, {long})):
        sampler, one_size = make(tokenizer, config, rows), make(tokenizer, config, rows)
        sampler.buckets, one_size.buckets = (
            replace(sampler.buckets, prompt=sizes) for sizes in ((short, long), (long,))
        )
        whole = one_size.complete(params, prompts, group_size=2, seed=3)
        widths.clear()
        assert sampler.complete(params, prompts, group_size=2, seed=3) == whole
        assert set(widths) == {size - len(sampler.layout.shared) for size in expected}


def test_columns_wrap_around_for_ever(tokenizer, model, prompts, monkeypatch):
    """The clock of a server's caches never stops: after 2^31 steps it must not jump."""
    config, params = model
    monkeypatch.setattr(module, "CHUNK", BUDGET_TOKENS)  # the caches do not grow, and 21 columns do not divide 2^32
    expected = collected(make(tokenizer, config, rows=2), params, prompts, group_size=3, seed=4)

    def aged(*args):
        return empty_state(*args)._replace(clock=jax.numpy.int32(2**31 - 2))

    monkeypatch.setattr(slots, "empty_state", aged)
    found = collected(make(tokenizer, config, rows=2), params, prompts, group_size=3, seed=4)
    for index, group in found.items():
        np.testing.assert_array_equal(group[0], expected[index][0])
        np.testing.assert_allclose(group[1], expected[index][1], atol=1e-5, rtol=0)


@pytest.mark.usefixtures("short_chunks")
def test_one_long_answer_does_not_hold_up_the_others(tokenizer, model, prompts):
    """Of eight completions one runs to the budget: with refill, slots are idle only at the very end."""
    config, params = model
    sampler = make(tokenizer, config, rows=2)
    groups = collected(sampler, params, [prompts[0]] * 24, group_size=1)
    refilled = sampler.used_steps / sampler.slot_steps
    lengths = [int(group[2][0]) for _, group in sorted(groups.items())]
    pairs = np.array(lengths).reshape(-1, 2)
    assert refilled > pairs.sum() / (2 * pairs.max(1).sum()), "no better than waiting for the longest of each batch"


def test_keys_and_values_take_the_bytes_that_the_design_says(model):
    config, _ = model
    B, R, S, J = 3, 4, 50, 7
    state = empty_state(config, B, R, S, J, 20)
    text = config.text
    a_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    assert sum(a.nbytes for a in jax.tree.leaves(state.prompts)) == B * S * a_token  # not B * R * S
    assert sum(a.nbytes for a in jax.tree.leaves(state.caches)) == B * R * J * a_token


# ----------------------------------------------------------------------------------------------------- the forced close


def test_every_way_through_the_trees_is_the_encoding_of_a_block(tokenizer):
    tree = closing(tokenizer, VOCAB)

    def ways(node, done=(), sides=()):
        if node == 0:
            yield list(done), list(sides)
            return
        forked = tree.ids[node][0] != tree.ids[node][1]
        assert (tree.task[node] >= 0) == forked and tree.task[node] == (len(sides) if forked else -1)
        for side in (0, 1) if forked else (0,):
            yield from ways(tree.next[node][side], (*done, tree.ids[node][side]), (*sides, side) if forked else sides)

    for has_response in (0, 1):
        pairs = [(a, b) for a, b in LABELS if (b is None) == (not has_response)]
        starts = {tree.cut[has_response]: "\n</think>\n"}
        for token, piece in enumerate(tokenizer.token_bytes()):
            starts[tree.closed[has_response, token]] = "" if piece.endswith(b"\n") else "\n"
        assert len(starts) == 3
        for root, before in starts.items():
            expected = [tokenizer.encode_text(before + result_block(*pair)) for pair in pairs]
            assert sorted(way for way, _ in ways(root)) == sorted(expected)
            assert max(map(len, expected)) <= tree.length
        for way, sides in ways(tree.fast[has_response]):  # ends with the last label's first own token
            pair = [
                pair for pair in pairs if [label == "unharmful" for label in pair if label] == [bool(s) for s in sides]
            ]
            whole = tokenizer.encode_text(answer_text(None, *pair[0]))
            assert [*tree.opening, *way] == whole[: len(tree.opening) + len(way)]


def test_a_forced_close_gives_every_completion_a_block_and_its_scores(tokenizer, model, prompts):
    config, params = model
    tree = closing(tokenizer, VOCAB)
    sampler = make(tokenizer, config, rows=4, closing=tree)
    sampler.sampling = Sampling(max_new_tokens=int(tree.length) + 6, temperature=1.0)
    responses = [n % 2 == 0 for n in range(len(prompts))]
    for n, (said,) in enumerate(sampler.complete(params, prompts, has_response=responses)):
        assert said.cut and said.finished and said.tokens <= sampler.sampling.max_new_tokens
        block = said.text[said.text.index("<result>") :]
        labels = [
            label if score >= 0.5 else "un" + label for label, score in zip(("harmful",) * 2, said.scores, strict=True)
        ]
        assert block == result_block(labels[0], labels[1] if responses[n] else None)
        assert parse("<think>\n" + said.text.replace("<think>", "")).status == "ok"
        assert 0 < said.scores[0] < 1 and (said.scores[1] > 0) == responses[n]


def test_reasoning_that_ends_by_itself_is_not_cut(tokenizer, model, prompts):
    config, params = model
    tree = closing(tokenizer, VOCAB)
    sampler = make(tokenizer, config, rows=4, closing=tree)
    sampler.sampling = Sampling(max_new_tokens=int(tree.length) + 30, temperature=0.0)
    tag = tokenizer.encode_text("</think>\n")
    params = copy.deepcopy(params)
    # the head after token t prefers t's follower in "<tag>": the model closes its reasoning at once
    embedding = np.zeros((VOCAB, config.text.hidden_size), np.float32)
    width = config.text.hidden_size
    embedding[:, 0] = 1.0
    for place, token in enumerate(tag):
        embedding[token] = 0
        embedding[token, place + 1] = 1.0
    head = np.zeros((width, VOCAB), np.float32)
    for place, token in enumerate(tag):
        head[place, token] = 9.0
    params["text"]["embed"]["embedding"], params["head"]["kernel"] = embedding, head
    params["text"]["layers"] = jax.tree.map(np.zeros_like, params["text"]["layers"])
    ((said,),) = sampler.complete(params, prompts[:1], has_response=[True])
    assert said.text.startswith("</think>\n<result>\nAnswers:") and not said.cut and said.finished
    assert json.dumps(said.scores) == "[0.5, 0.5]"


def test_fast_decides_in_as_many_tokens_as_stand_between_the_labels(tokenizer, model, prompts):
    config, params = model
    tree = closing(tokenizer, VOCAB)
    sampler = make(tokenizer, config, rows=4, closing=tree)
    fast = sampler.complete(params, prompts[:4], has_response=[False, True, False, True], fast=True)
    whole = tokenizer.encode_text(answer_text(None, "harmful", "harmful"))
    assert [said.tokens for (said,) in fast[::2]] == [1, 1]
    assert all(1 < said.tokens < len(whole) - len(tree.opening) for (said,) in fast[1::2])
    assert all(0 < said.scores[0] < 1 and said.finished for (said,) in fast)
    sampler.complete(params, prompts[:1], fast=True)
    assert sampler.slot_steps == 4  # one token in four rows: idle ones do not keep the loop going


def test_a_rollout_that_is_left_leaves_no_thread_behind(tokenizer, model, prompts):
    config, params = model
    models = [jax.device_put(params, device) for device in jax.devices()[:2]]
    before = threading.active_count()
    rollout = make(tokenizer, config, rows=1)(models, prompts[:6])
    next(rollout)
    rollout.close()
    assert threading.active_count() == before
