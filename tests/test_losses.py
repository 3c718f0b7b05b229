"""The losses on values worked out by hand, for their gradients, under masks, and against plain formulas."""

from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads

from gvl_jax import losses
from gvl_jax.losses import (
    clip_schedule,
    group_advantages,
    next_token_logprobs,
    policy_loss,
    sft_loss,
    token_logprobs,
)

F32 = np.float32


def close(a, b, atol=1e-6):
    np.testing.assert_allclose(a, b, atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------------------- log-probabilities


def plain_logprobs(hidden, head, targets, temperature, banned):
    logits = jnp.where(banned[None], -jnp.inf, hidden @ head / temperature)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]


N, D, V = 13, 8, 19
BANNED = np.isin(np.arange(V), [0, 5, 18])
MASK = np.random.default_rng(3).random(N) < 0.5


def some_tokens(seed=0):
    """hidden, head, targets that are allowed, and what each log-prob weighs in the sum that is differentiated."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.standard_normal((N, D)).astype(F32), rng.standard_normal((D, V)).astype(F32)
    return hidden, head, rng.choice(np.flatnonzero(~BANNED), N).astype(np.int32), rng.standard_normal(N).astype(F32)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("banned", [np.zeros(V, bool), BANNED], ids=["all_ids", "banned"])
def test_only_tokens_under_the_mask_count(banned, chunk):
    """Values, entropies and the gradient written by hand against autodiff of the formula over the whole vocabulary."""
    hidden, head, targets, weights = some_tokens()

    def ours(hidden, head, temperature, mask):
        options = dict(temperature=temperature, banned=banned if banned.any() else None, entropy=True, chunk=chunk)
        found, entropies = token_logprobs(hidden, head, targets, mask, **options)
        return (found * weights).sum(), (found, entropies)

    def plain(hidden, head, temperature, mask):
        found = jnp.where(mask, plain_logprobs(hidden, head, targets, temperature, banned), 0.0)
        return (found * weights).sum(), found

    ours, plain = (jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)) for f in (ours, plain))
    for mask in (np.zeros(N, bool), np.ones(N, bool), MASK):
        (_, (found, entropies)), grads = ours(hidden, head, F32(1.2), mask)
        (_, expected), expected_grads = plain(hidden, head, F32(1.2), mask)
        close(found, expected, 5e-6)
        close(grads[0], expected_grads[0], 5e-6)
        close(grads[1], expected_grads[1], 5e-6)
        table = np.asarray(jax.nn.log_softmax((hidden @ head / 1.2)[:, ~banned]), np.float64)
        close(entropies, np.where(mask, -(np.exp(table) * table).sum(1), 0), 5e-6)
        assert (found[~mask] == 0).all() and (entropies[~mask] == 0).all() and (grads[0][~mask] == 0).all()
        assert (grads[1][:, banned] == 0).all(), "a banned id takes no part"
    assert ours._cache_size() == 1


@pytest.mark.parametrize("chunk", [4, 64])
def test_the_gradient_agrees_with_finite_differences(chunk):
    hidden, head, targets, _ = some_tokens()
    options = dict(temperature=1.2, banned=BANNED, chunk=chunk)
    check_grads(lambda *x: token_logprobs(*x, targets, MASK, **options), (hidden, head), 1, ["rev"])


def test_an_entropy_has_no_gradient():
    hidden, head, targets, _ = some_tokens()
    loss = lambda *x: token_logprobs(*x, targets, entropy=True, chunk=4)[1].sum()  # noqa: E731
    assert all((g == 0).all() for g in jax.grad(loss, (0, 1))(hidden, head))


def test_masked_tokens_are_not_computed():
    """NaN there, in the input and in the gradient that comes back, reaches nothing."""
    hidden, head, targets, weights = some_tokens()

    def run(hidden, weights):
        value, back = jax.vjp(lambda *x: token_logprobs(*x, targets, MASK, banned=BANNED, chunk=4), hidden, head)
        return value, *back(weights)

    clean = run(hidden, weights)
    spoilt = run(np.where(MASK[:, None], hidden, np.nan), np.where(MASK, weights, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, spoilt)
    assert all(np.isfinite(x).all() for x in clean)


def test_the_loop_takes_as_many_rounds_as_the_targets_need(monkeypatch):
    """... in the forward and in the backward pass, in one program for any number of targets."""
    hidden, head, targets, weights = some_tokens()
    rounds, logits = [], losses._logits

    def counted(*args):
        jax.debug.callback(lambda: rounds.append(1))
        return logits(*args)

    monkeypatch.setattr(losses, "_logits", counted)
    loss = lambda hidden, head, mask: (token_logprobs(hidden, head, targets, mask, chunk=4) * weights).sum()  # noqa: E731
    step = jax.jit(jax.grad(loss, (0, 1)))
    for count, expected in ((0, 0), (1, 1), (4, 1), (5, 2), (13, 4)):
        jax.block_until_ready(step(hidden, head, np.arange(N) < count))
        jax.effects_barrier()
        assert len(rounds) == 2 * expected
        rounds.clear()
    assert step._cache_size() == 1


def arrays_of(jaxpr):
    """Shapes of everything a program computes, loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def test_no_array_has_all_tokens_and_the_whole_vocabulary():
    hidden, head, targets, weights = some_tokens()
    loss = lambda *x: (token_logprobs(*x, targets, MASK, chunk=4) * weights).sum()  # noqa: E731
    shapes = set(arrays_of(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head).jaxpr))
    assert (4, V) in shapes and (D, V) in shapes
    assert max(np.prod(shape, dtype=int) for shape in shapes if V in shape) == D * V


def test_the_gradient_goes_through_a_scan_with_bfloat16_hidden_states():
    """Rounding to bfloat16 is the formula's: of hidden and head, and of what goes back to hidden. Sums are fp32."""
    hidden, head, targets, weights = some_tokens()
    narrow = jnp.asarray(hidden, jnp.bfloat16)

    def ours(hidden, head):
        def body(total, mask):
            return total + (token_logprobs(hidden, head, targets, mask, chunk=4) * weights).sum(), None

        return jax.lax.scan(body, jnp.zeros(()), np.stack([MASK, ~MASK]))[0]

    def plain(hidden, head):
        wide = hidden.astype(F32), head.astype(jnp.bfloat16).astype(F32)
        return (plain_logprobs(*wide, targets, 1.0, np.zeros(V, bool)) * weights).sum()

    value, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(narrow, head)
    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(narrow, head)
    close(value, expected, 1e-5)
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert np.abs(np.asarray(got - wanted, F32)).max() < 2**-7 * np.abs(np.asarray(wanted, F32)).max()


def test_next_token_logprobs_of_targets_alone():
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((2, 5, D)).astype(F32), rng.standard_normal((D, V)).astype(F32)
    tokens, mask = rng.integers(0, V, (2, 5)).astype(np.int32), rng.random((2, 5)) < 0.5
    mask[:, 0] = True  # the first token is predicted by nothing, whatever the mask says
    found, whole = next_token_logprobs(hidden, head, tokens, mask, chunk=3), next_token_logprobs(hidden, head, tokens)
    close(found, np.where(mask, whole, 0), 1e-6)


def test_next_token_logprobs_shift_by_one():
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((2, 5, 8)).astype(F32), rng.standard_normal((8, 11)).astype(F32)
    tokens = rng.integers(0, 11, (2, 5)).astype(np.int32)
    found = next_token_logprobs(hidden, head, tokens, chunk=3)
    table = jax.nn.log_softmax(hidden @ head)
    assert (found[:, 0] == 0).all()
    for b in range(2):
        for t in range(1, 5):
            close(found[b, t], table[b, t - 1, tokens[b, t]], 5e-6)


def test_logprobs_of_bfloat16_are_summed_in_float32():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((6, 8)), jnp.bfloat16)
    head = rng.standard_normal((8, 300)).astype(F32)
    targets = rng.integers(0, 300, 6).astype(np.int32)
    found = token_logprobs(hidden, head, targets)
    assert found.dtype == jnp.float32
    wide = hidden.astype(F32), np.asarray(jnp.asarray(head, jnp.bfloat16), F32)
    close(found, plain_logprobs(*wide, targets, 1.0, np.zeros(300, bool)), 1e-5)


def test_sft_loss_is_the_mean_over_answer_tokens_of_the_whole_batch():
    logprobs = np.array([[0.0, -1.0, -2.0], [-4.0, -8.0, -np.inf]], F32)
    mask = np.array([[False, True, True], [False, True, False]])
    close(sft_loss(logprobs, mask, 3), (1 + 2 + 8) / 3)
    close(sft_loss(logprobs, mask, 22), 0.5)
    gradient = jax.grad(lambda x: sft_loss(x, mask, F32(4)))(logprobs)
    close(gradient, [[0, -0.25, -0.25], [0, -0.25, 0]])


# ----------------------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    # rewards 1, 2, 3, 4: mean 2.5, unbiased variance 5/3; rewards 0, -3: mean -1.5, variance 4.5
    close(group_advantages(np.array([[1.0, 2.0, 3.0, 4.0]], F32), 0.0), [np.array([-1.5, -0.5, 0.5, 1.5]) / 1.2909944])
    close(group_advantages(np.array([[0.0, -3.0]], F32), 0.0), [[0.7071068, -0.7071068]])
    close(group_advantages(np.array([[0.0, 2.0]], F32), 1.0), [[-1 / (1 + 2**0.5), 1 / (1 + 2**0.5)]])


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e4, 1e4, width=32), st.sampled_from([2, 3, 7, 12, 16]))
def test_a_group_of_equal_rewards_has_no_advantage(reward, size):
    assert (group_advantages(np.full((1, size), reward, F32)) == 0).all()


def test_groups_do_not_mix():
    rewards = np.random.default_rng(0).standard_normal((3, 5)).astype(F32)
    together = group_advantages(rewards)
    close(together.sum(1), np.zeros(3))
    close(np.std(together, axis=1, ddof=1), np.ones(3), 1e-5)
    for row in range(3):
        close(together[row], group_advantages(rewards[row : row + 1])[0])


# ----------------------------------------------------------------------------------------------------------------- clip


# Eq. 7 for 23 steps, rounded once (step 20 is 6.5495e-8)
PRINTED = (
    ".191 .175 .152 .125 .0982 .0726 .0505 .0329 .0200 .0113 .0059 .0028 .0012 4.8e-4 1.7e-4 5e-5 1.3e-5 2.9e-6 5e-7 "
    "6.5e-8 5.7e-9 2.5e-10 0"
).split()


def test_clip_schedule_has_the_paper_s_values():
    values = [float(clip_schedule(step, 23, 0.2)) for step in range(1, 24)]
    exact = Fraction(1, 5)
    for step, (value, printed) in enumerate(zip(values, PRINTED, strict=True), start=1):
        exact *= Fraction(23 - step, 23)
        np.testing.assert_allclose(value, float(exact), rtol=2e-6)
        last_digit = 10.0 ** Decimal(printed).as_tuple().exponent if printed != "0" else 0.0
        assert abs(value - float(printed)) <= last_digit / 2, f"step {step}: {value} is not {printed}"
    assert all(a > b for a, b in pairwise(values)) and values[-1] == 0.0


def test_clip_schedule_is_traced():
    compiled = jax.jit(clip_schedule, static_argnums=1)
    for step in (1, 5, 22):
        np.testing.assert_allclose(compiled(step, 23, 0.2), clip_schedule(step, 23, 0.2), rtol=1e-6)
    close(compiled(3, 23, 0.1), clip_schedule(3, 23, 0.2) / 2)
    assert compiled._cache_size() == 1


# ---------------------------------------------------------------------------------------------------------- policy loss


def one(ratio, advantage, low=0.2, high=0.2):
    """Loss and gradient by the log-prob of a single token."""
    old = np.array([[-1.5]], F32)
    new = old + np.log(np.array([[ratio]], F32))
    advantage = np.array([advantage], F32)
    loss = lambda new: policy_loss(new, old, advantage, old < 0, clip_low=F32(low), clip_high=F32(high))[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(new)
    return float(value), float(gradient[0, 0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: -K·A, and its gradient by log p is the same
        (0.9, 2.0, -1.8, -1.8),
        (1.5, 2.0, -2.4, 0.0),  # above, good: cut at 1.2
        (0.5, 2.0, -1.0, -1.0),  # below, good: the lower of K·A and 0.8·A is K·A
        (1.1, -2.0, 2.2, 2.2),
        (0.9, -2.0, 1.8, 1.8),
        (1.5, -2.0, 3.0, 3.0),  # above, bad: not cut
        (0.5, -2.0, 1.6, 0.0),  # below, bad: cut at 0.8
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_each_branch_of_the_clip(ratio, advantage, loss, gradient):
    value, slope = one(ratio, advantage)
    close(value, loss, 2e-6)
    close(slope, gradient, 2e-6)


def test_low_and_high_clip_are_their_own():
    close(one(1.5, 1.0, low=0.2, high=0.3), (-1.3, 0.0))
    close(one(0.5, -1.0, low=0.4, high=0.3), (0.6, 0.0))


@pytest.mark.parametrize("clip", [0.2, 1e-9, 0.0])
@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_at_ratio_one_the_gradient_is_the_policy_gradient_for_any_clip(clip, mean):
    rng = np.random.default_rng(0)
    logprobs = -rng.random((2, 3, 5)).astype(F32)
    mask = rng.random((2, 3, 5)) < 0.7
    mask[..., 0] = True
    advantages = rng.standard_normal((2, 3)).astype(F32)

    def surrogate(new):
        return policy_loss(new, logprobs, advantages, mask, clip_low=F32(clip), clip_high=F32(clip), mean=mean)[0]

    def policy_gradient(new):
        per_token = new * advantages[..., None] * mask
        if mean == "token":
            return -per_token.sum() / mask.sum()
        return -(per_token.sum(-1) / mask.sum(-1)).mean()

    close(jax.grad(surrogate)(logprobs), jax.grad(policy_gradient)(logprobs))


def test_sequence_and_token_mean_by_hand():
    # one sequence of one token with A = 1, one of three with A = -2; every ratio is 1
    logprobs = np.zeros((2, 3), F32)
    mask = np.array([[True, False, False], [True, True, True]])
    advantages = np.array([1.0, -2.0], F32)
    options = dict(clip_low=F32(0.2), clip_high=F32(0.2))
    close(policy_loss(logprobs, logprobs, advantages, mask, **options)[0], -(1 - 2) / 2)
    close(policy_loss(logprobs, logprobs, advantages, mask, mean="token", **options)[0], -(1 - 6) / 4)
    with pytest.raises(ValueError, match="'batch', expected 'sequence' or 'token'"):
        policy_loss(logprobs, logprobs, advantages, mask, mean="batch", **options)


def random_update(seed=0):
    rng = np.random.default_rng(seed)
    old = -rng.random((4, 2, 6)).astype(F32)
    new = old + 0.4 * rng.standard_normal(old.shape).astype(F32)
    mask = np.arange(6) < rng.integers(1, 7, (4, 2))[..., None]
    mask[1, 1] = False  # a completion of which nothing is trained
    return new, old, rng.standard_normal((4, 2)).astype(F32), mask


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_what_is_masked_counts_for_nothing(mean):
    new, old, advantages, mask = random_update()
    filled = lambda x, value: np.where(mask, x, value).astype(F32)  # noqa: E731
    pairs = [(new, -np.inf), (-np.inf, -np.inf), (np.nan, 0.0), (90.0, -90.0), (-np.inf, old)]

    @jax.jit
    def run(new, old):
        loss = lambda new: policy_loss(new, old, advantages, mask, clip_low=0.2, clip_high=0.2, mean=mean)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(new)

    expected = run(new, old)
    for hostile, hostile_old in pairs:
        got = run(filled(new, hostile), filled(old, hostile_old))
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert np.isfinite(expected[0][0]) and (expected[1][~mask] == 0).all()


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_micro_batches_with_the_whole_s_total_add_up_to_the_whole(mean):
    new, old, advantages, mask = random_update()
    options = dict(clip_low=F32(0.2), clip_high=F32(0.1), mean=mean)
    total = mask.any(-1).sum() if mean == "sequence" else mask.sum()
    whole, metrics = policy_loss(new, old, advantages, mask, **options)
    halves = [
        policy_loss(new[half], old[half], advantages[half], mask[half], total=total, **options)
        for half in (slice(2), slice(2, 4))
    ]
    close(halves[0][0] + halves[1][0], whole)
    for name in ("tokens", "ratio", "clipped", "approx_kl"):
        close(halves[0][1][name] + halves[1][1][name], metrics[name], 1e-5)
    empty = policy_loss(new[:2], old[:2], advantages[:2], np.zeros_like(mask[:2]), total=total, **options)
    assert empty[0] == 0 and empty[1]["tokens"] == 0


def test_metrics_by_hand():
    ratios = np.array([[1.5, 0.5, 1.0, 7.0]], F32)
    mask = np.array([[True, True, True, False]])
    _, metrics = policy_loss(
        np.log(ratios), np.zeros_like(ratios), np.ones(1, F32), mask, clip_low=F32(0.2), clip_high=F32(0.3)
    )
    close(metrics["tokens"], 3)
    close(metrics["ratio"], 3.0)
    close(metrics["ratio_max"], 1.5)
    close(metrics["clipped"], 1)  # 1.5 alone: with A > 0 the low end never cuts
    close(metrics["approx_kl"], (0.5 - np.log(1.5)) + (-0.5 - np.log(0.5)))
    close(metrics["clip_low"], 0.2)
    close(metrics["clip_high"], 0.3)


def test_a_compiled_update_sees_a_new_clip():
    new, old, advantages, mask = random_update()

    @jax.jit
    def update(new, clip):
        loss = lambda new: policy_loss(new, old, advantages, mask, clip_low=clip, clip_high=clip)[0]  # noqa: E731
        return jax.value_and_grad(loss)(new)

    wide, wide_gradient = update(new, F32(0.2))
    narrow, narrow_gradient = update(new, F32(0.01))
    assert update._cache_size() == 1
    assert abs(wide - narrow) > 1e-3 and np.abs(wide_gradient - narrow_gradient).max() > 1e-3
    close(narrow, policy_loss(new, old, advantages, mask, clip_low=F32(0.01), clip_high=F32(0.01))[0])
