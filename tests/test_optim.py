import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gvl_jax.config import Optim
from gvl_jax.optim import apply_updates, learning_rate, optimizer, split_trained


def test_cosine_starts_at_the_peak_and_ends_at_zero():
    optim = Optim(peak_lr=0.4)
    rates = [learning_rate(optim, step, 8) for step in range(9)]
    half = 2**0.5 / 2
    np.testing.assert_allclose(rates[::2], [0.4, 0.2 * (1 + half), 0.2, 0.2 * (1 - half), 0], atol=1e-12)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_warm_up_is_a_line_to_the_peak(schedule):
    optim = Optim(peak_lr=0.3, warmup_steps=3, schedule=schedule)
    np.testing.assert_allclose([learning_rate(optim, step, 9) for step in range(4)], [0.1, 0.2, 0.3, 0.3])
    np.testing.assert_allclose(learning_rate(optim, 6, 9), 0.15 if schedule == "cosine" else 0.3)


def test_constant_stays():
    assert {learning_rate(Optim(peak_lr=1e-6, schedule="constant"), step, 5) for step in range(5)} == {1e-6}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [0.01, 5.0])  # gradients below and above the clip
def test_steps_equal_torch_adamw_with_clipping(weight_decay, size):
    optim = Optim(peak_lr=1e-2, weight_decay=weight_decay, b1=0.8, b2=0.95, clip_norm=1.0)
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 3), "b": (5,)}
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(np.asarray(value))) for name, value in params.items()}
    adamw = torch.optim.AdamW(theirs.values(), betas=(0.8, 0.95), weight_decay=weight_decay)
    state = optimizer(optim).init(params)
    update = jax.jit(lambda *args: apply_updates(optim, *args))
    for step in range(6):
        grads = {name: size * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        rate = learning_rate(optim, step, 6)
        params, state, norm = update(params, state, grads, np.float32(rate))
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        their_norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        np.testing.assert_allclose(norm, their_norm.item(), rtol=1e-6)
        for name in shapes:
            np.testing.assert_allclose(params[name], theirs[name].detach().numpy(), atol=1e-6, rtol=0)
    assert update._cache_size() == 1


def test_moments_are_fp32_and_an_update_keeps_the_parameters_type():
    params = {"a": jnp.ones(3)}
    state = optimizer(Optim()).init(params)
    new, state, _ = apply_updates(Optim(), params, state, {"a": jnp.ones(3)}, 1e-3)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) == 2 and {leaf.dtype for leaf in floats} == {new["a"].dtype} == {np.dtype(np.float32)}


def test_split_keeps_every_parameter_and_freezes_the_vision_tower_only():
    params = {"visual": {"merger": 1}, "text": {"norm": 2}, "head": {"kernel": 3}}
    assert split_trained(params, "all") == (params, {})
    trained, frozen = split_trained(params, "language")
    assert set(trained) == {"text", "head"} and set(frozen) == {"visual"}
    assert trained | frozen == params
