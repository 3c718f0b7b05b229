"""The sampler on a model whose logits are a table (next token given this one), and on one with pictures."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from tiny_models import VOCAB as TINY_VOCAB
from tiny_models import example, layout, tiny_config, tiny_params

from gvl_jax.data import tiny
from gvl_jax.data.packing import pack_prompts
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.decoding import BUDGET, END_TOKEN, IDLE, VERDICT, Vocabulary, truncate, vocabulary
from gvl_jax.models.qwen_vl.config import TextConfig
from gvl_jax.models.qwen_vl.model import abstract_params
from gvl_jax.sampler import generate, score
from gvl_jax.types import Batch

VERDICT_END = b"</result>"
TAG = VERDICT_END.decode()
SPLITS = sorted({TAG[i:j] for i in range(len(TAG)) for j in range(i + 1, len(TAG) + 1)})
PIECES = ["<|im_end|>", "<|endoftext|>", "<|image_pad|>", "", "a", " ", "x</result>y", "<</", "</res</", "t> ", *SPLITS]
TOKENIZER = SimpleNamespace(
    token_bytes=lambda: [piece.encode() for piece in PIECES], im_end=0, end_of_text=1, banned_ids=[2, 3]
)
V = 64  # of the table model: more rows than PIECES has
assert len(PIECES) < V


def ids(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def read(table, tokens) -> list[bool]:
    """After each token: has the automaton reached its end?"""
    state, seen = 0, []
    for token in tokens:
        state = table.transition[state, token]
        seen.append(state == len(VERDICT_END))
    return seen


# ------------------------------------------------------------------------------------------------------------- the stop


def test_the_tag_is_seen_however_it_is_split_over_tokens():
    table = vocabulary(TOKENIZER, V)
    for cuts in range(2 ** (len(TAG) - 1)):
        inner = [i for i in range(1, len(TAG)) if cuts >> (i - 1) & 1]
        pieces = [TAG[a:b] for a, b in zip([0, *inner], [*inner, len(TAG)], strict=True)]
        assert read(table, ids("a", *pieces)) == [False] * len(pieces) + [True]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(3, len(PIECES) - 1), max_size=24))
def test_the_automaton_is_a_search_in_the_bytes(tokens):
    text = [PIECES[t].encode() for t in tokens]
    found = [VERDICT_END in b"".join(text[: n + 1]) for n in range(len(text))]
    assert read(vocabulary(TOKENIZER, V), tokens) == found


def test_near_misses_and_true_tags_with_a_real_tokenizer(tmp_path):
    tiny.write_tiny(tmp_path, ["<result> Request: harmful </result>"], vocab_size=300)
    tokenizer = load_tokenizer(tmp_path)
    table = vocabulary(tokenizer, 384)
    for text in ("</resul>", "</ result>", "<result>", "</result", "/result>", "</Result>", "</re\nsult>", "é</res"):
        assert not any(read(table, tokenizer.encode_text(text + " and more"))), text
        assert sum(read(table, tokenizer.encode_text(text + TAG))) == 1, text
        assert not table.banned[tokenizer.encode_text(text)].any()
    allowed = np.flatnonzero(~table.banned)
    assert set(np.flatnonzero(table.end)) == {tokenizer.im_end, tokenizer.end_of_text} <= set(allowed)
    assert tokenizer.image_pad not in allowed and tokenizer.im_start not in allowed and allowed.max() < 384


# ------------------------------------------------------------------------------------------------------ the table model


def table_config():
    """A vocabulary of V one-hot embeddings of width V, and one layer that adds nothing."""
    config = tiny_config()
    text = TextConfig(
        vocab_size=V, hidden_size=V, intermediate_size=8, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, mrope_section=(2, 1, 1),
        tie_word_embeddings=False,
    )  # fmt: skip
    vision = config.vision.__class__(**vars(config.vision) | {"out_hidden_size": V})
    return config.__class__(**vars(config) | {"text": text, "vision": vision})


CONFIG = table_config()


def table_params(logits):
    """Parameters that give logits[token] after `token`."""
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), abstract_params(CONFIG))
    params["text"]["embed"]["embedding"] = jnp.eye(V) * V**0.5  # of mean square 1: the norm leaves them
    params["text"]["norm"]["scale"] = jnp.ones(V)
    params["head"]["kernel"] = jnp.asarray(logits, jnp.float32) / V**0.5
    return params


def prompts(*last: int, rows: int | None = None) -> Batch:
    """Rows of two tokens, of which the last one matters; `rows` beyond them are empty."""
    rows = len(last) if rows is None else rows
    filled = np.arange(rows)[:, None] < np.full((1, 2), len(last))
    tokens = np.zeros((rows, 2), np.int32)
    tokens[: len(last)] = np.array([(4, token) for token in last]).reshape(-1, 2)
    positions = np.broadcast_to(np.arange(2, dtype=np.int32), (3, rows, 2))
    return Batch(tokens, np.zeros_like(filled), positions, filled.astype(np.int32), np.full_like(tokens, -1), None)


def keys_of(seed, *shape):
    return jax.random.key_data(jax.random.split(jax.random.key(seed), shape))


def run(logits, last, *, rollouts=1, seed=0, temperature=1.0, rows=None, new=12, table=None, **options):
    params, batch = table_params(logits), prompts(*last, rows=rows)
    keys = keys_of(seed, len(batch.tokens), rollouts)
    table = vocabulary(TOKENIZER, V) if table is None else table
    rollout = generate(
        params, batch, keys, np.float32(temperature), table, config=CONFIG, max_new_tokens=new, **options
    )
    return jax.device_get(rollout)


def chain(*paths: list[int]) -> np.ndarray:
    """Logits under which each path is followed for certain."""
    logits = np.zeros((V, V), np.float32)
    for path in paths:
        for token, following in zip(path, path[1:], strict=False):
            logits[token, following] = 50.0
    return logits


def test_completions_stop_at_the_tag_an_end_token_or_the_budget():
    verdict = ids("a", "</res", "u", "lt>")
    inside = ids(" ", "x</result>y")
    ended = ids("r", "e", "<|im_end|>")
    paths = [verdict, inside, ended, ids("s", "<|endoftext|>"), ids("<", "</", "<")]
    got = run(chain(*paths), [path[0] for path in paths], rows=6, greedy=True)
    assert got.stopped[:, 0].tolist() == [VERDICT, VERDICT, END_TOKEN, END_TOKEN, BUDGET, IDLE]
    assert got.lengths[:, 0].tolist() == [3, 1, 2, 1, 12, 0]  # the token that ends is kept; the last row is empty
    for row, path in enumerate(paths[:4]):
        assert got.tokens[row, 0].tolist() == path[1:] + [0] * (13 - len(path))
    assert got.tokens[4, 0].tolist() == ids("</", "<") * 6
    after = np.arange(12) >= got.lengths[..., None]
    assert (got.tokens[after] == 0).all() and (got.logprobs[after] == 0).all()
    assert np.isfinite(got.logprobs).all() and (got.logprobs[~after] <= 0).all()


def test_a_budget_too_short_for_the_tag_is_the_budget():
    path = ids("a", "</res", "u", "lt>")
    cut = run(chain(path), path[:1], new=2, greedy=True)
    assert cut.stopped[0, 0] == BUDGET and cut.lengths[0, 0] == 2


def test_banned_ids_are_never_drawn():
    logits = np.where(np.isin(np.arange(V), [2, 3, *range(len(PIECES), V)]), 30.0, 0.0)[None].repeat(V, 0)
    for options in (dict(temperature=100.0), dict(temperature=1.0), dict(greedy=True), dict(top_p=0.9, top_k=9)):
        got = run(logits, [4, 5], rollouts=50, rows=2, **options)
        used = np.arange(12) < got.lengths[..., None]
        drawn = set(got.tokens[used].tolist())
        assert drawn.isdisjoint({2, 3}) and max(drawn) < len(PIECES) and np.isfinite(got.logprobs).all()
        if "greedy" not in options:
            assert len(drawn) > 3


def no_stop(banned=()):
    return Vocabulary(np.isin(np.arange(V), banned), np.zeros(V, bool), np.zeros((len(VERDICT_END) + 1, V), np.uint8))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax_at_each_temperature(temperature):
    row = np.random.default_rng(0).standard_normal(V)
    got = run(np.tile(row, (V, 1)), [4], rollouts=2000, new=1, temperature=temperature, table=no_stop([7, 8]))
    weights = np.where(np.isin(np.arange(V), [7, 8]), 0, np.exp(row / temperature))
    expected = weights / weights.sum()
    counts = np.bincount(got.tokens.ravel(), minlength=V)
    assert (counts[[7, 8]] == 0).all()
    common = expected * 2000 > 5  # the chi-square law needs a few expected draws in each bin; the rest is one bin
    observed = np.append(counts[common], counts[~common].sum())
    wanted = 2000 * np.append(expected[common], expected[~common].sum())
    filled = wanted > 0
    statistic = ((observed - wanted)[filled] ** 2 / wanted[filled]).sum()
    assert statistic < chi2.ppf(0.999, filled.sum() - 1)
    np.testing.assert_allclose(got.logprobs.ravel(), np.log(expected[got.tokens.ravel()]), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- top-p


def plain_truncate(logits, top_p, top_k):
    """One row, in words: keep what is not below the k-th; then go down until the kept probability reaches top_p."""
    kept = np.isfinite(logits)
    if top_k:
        kept &= logits >= np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
    weights = np.where(kept, np.exp(logits - logits.max()), 0)
    probabilities, total = weights / weights.sum(), 0.0
    if top_p < 1:
        for i in np.argsort(-logits, kind="stable"):
            if total >= top_p:
                break
            total, least = total + probabilities[i], logits[i]
        kept &= logits >= least
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, 10, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.6, 0.3, 1e-6])
def test_truncation_equals_a_plain_one(top_p, top_k):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 3, 10)).astype(np.float32) * 2
    logits[1] = np.round(logits[1])  # ties: all of them stay or go together
    logits[2, :, 4:] = -np.inf  # banned ids
    logits[3] = 1.5
    got = np.asarray(truncate(jnp.asarray(logits), top_p, top_k))
    for row, found in zip(logits.reshape(-1, 10), got.reshape(-1, 10), strict=True):
        kept = plain_truncate(row.astype(np.float64), top_p, top_k)
        np.testing.assert_array_equal(found, np.where(kept, row, -np.inf))


def test_truncation_by_hand():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for top_p, top_k, kept in [(0.49, 0, 1), (0.51, 0, 2), (0.79, 0, 2), (0.81, 0, 3), (1.0, 3, 3), (0.6, 2, 1)]:
        assert np.isfinite(truncate(logits, top_p, top_k)).sum() == kept, (top_p, top_k)


@pytest.mark.parametrize("options", [dict(top_k=3), dict(top_p=0.4)])
def test_truncated_draws_keep_the_log_probs_of_the_whole_distribution(options):
    row = np.random.default_rng(1).standard_normal(V) * 2
    got = run(np.tile(row, (V, 1)), [4], rollouts=500, new=1, temperature=1.5, table=no_stop(), **options)
    kept = plain_truncate(row / 1.5, options.get("top_p", 1.0), options.get("top_k", 0))
    assert set(got.tokens.ravel()) == set(np.flatnonzero(kept))
    expected = row / 1.5 - np.log(np.exp(row / 1.5).sum())
    np.testing.assert_allclose(got.logprobs.ravel(), expected[got.tokens.ravel()], atol=1e-5)


# ------------------------------------------------------------------------------------------- a model that sees pictures


TINY = tiny_config()
PARAMS = tiny_params(TINY)
SIDES = [(56, 84), (140, 112)]
R, J, TEMPERATURE = 3, 8, np.float32(1.3)
BANNED = np.isin(np.arange(TINY_VOCAB), [1, 2, 90])
TABLE = Vocabulary(BANNED, np.arange(TINY_VOCAB) % 9 == 5, np.zeros((len(VERDICT_END) + 1, TINY_VOCAB), np.uint8))


def tiny_prompts():
    rng = np.random.default_rng(0)
    return [example(rng, images, SIDES) for images in (0, 1, 2)]


def tiny_batch(examples, rows):
    return pack_prompts(examples, rows=rows, length=80, layout=layout(TINY, 256, 1024))


def sample(batch, keys):
    return jax.device_get(generate(PARAMS, batch, keys, TEMPERATURE, TABLE, config=TINY, max_new_tokens=J))


def same(a, b):
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5, rtol=0)


def test_a_group_equals_its_prompt_repeated_and_each_draw_its_own_alone():
    examples = tiny_prompts()
    keys = keys_of(3, 3, R)
    group = sample(tiny_batch(examples, 3), keys)
    assert len({tuple(t) for t in group.tokens.reshape(-1, J)}) == 3 * R, "rollouts must differ"
    assert {END_TOKEN, BUDGET} == set(group.stopped.ravel()), "some must stop while others go on"

    repeated = sample(tiny_batch([e for e in examples for _ in range(R)], 3 * R), keys.reshape(3 * R, 1, 2))
    same(jax.tree.map(lambda x: x.reshape(3, R, *x.shape[2:]), repeated), group)

    for row, e in enumerate(examples[1:], start=1):  # alone, in the first row
        alone = sample(tiny_batch([e], 3), jnp.roll(keys, -row, 0))
        same(jax.tree.map(lambda x: x[0], alone), jax.tree.map(lambda x, r=row: x[r], group))
        assert (alone.lengths[1:] == 0).all() and (alone.stopped[1:] == IDLE).all()
        assert (alone.tokens[1:] == 0).all() and (alone.logprobs[1:] == 0).all()


def test_the_sampler_s_log_probs_are_those_of_the_training_forward():
    batch = tiny_batch(tiny_prompts(), 3)
    rollout = sample(batch, keys_of(3, 3, R))

    used = np.arange(J) < rollout.lengths[..., None]
    scored = np.asarray(score(PARAMS, batch, rollout.tokens, TEMPERATURE, BANNED, config=TINY))
    np.testing.assert_allclose(scored[used], rollout.logprobs[used], atol=1e-5, rtol=0)
