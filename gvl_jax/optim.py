"""AdamW as the paper uses it. The learning rate is an argument of the update, so a compiled step sees each new one."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gvl_jax.config import Optim
from gvl_jax.sharding import shardings


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """The rate of step 0 … total_steps - 1: a linear warm-up, then the schedule; a cosine reaches 0 at total_steps."""
    if step < optim.warmup_steps:
        return optim.peak_lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.peak_lr
    done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return optim.peak_lr * 0.5 * (1 + math.cos(math.pi * done))


def optimizer(optim: Optim) -> optax.GradientTransformation:
    """Clipped gradient → direction; `apply_updates` scales it by the learning rate. Moments in fp32."""
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.scale_by_adam(optim.b1, optim.b2),
        optax.add_decayed_weights(optim.weight_decay),
    )


def apply_updates(optim: Optim, params: dict, opt_state, grads: dict, rate):
    """One AdamW step on `params`. → (params, opt_state, gradient norm before clipping)."""
    updates, opt_state = optimizer(optim).update(grads, opt_state, params)
    params = jax.tree.map(lambda p, u: p - jnp.asarray(rate, p.dtype) * u, params, updates)
    return params, opt_state, optax.tree.norm(grads)


def begin(optim: Optim, trained: dict, mesh: Mesh) -> tuple[dict, dict]:
    """→ ({"trained", "opt_state"}, gradients of zero), placed like the parameters."""
    init = optimizer(optim).init
    opt_state = jax.jit(init, out_shardings=shardings(mesh, jax.eval_shape(init, trained)))(trained)
    zeros = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), out_shardings=shardings(mesh, trained))
    return {"trained": trained, "opt_state": opt_state}, zeros(trained)


@functools.partial(jax.jit, static_argnames=("optim", "mesh"), donate_argnames=("trained", "opt_state", "grads"))
def update(trained: dict, opt_state, grads: dict, rate, *, optim: Optim, mesh: Mesh):
    """`apply_updates`, compiled. → also zeros, in the memory of the gradients, for the next step's."""
    trained, opt_state, norm = apply_updates(optim, trained, opt_state, grads, rate)
    trained, opt_state, zeros = jax.lax.with_sharding_constraint(
        (trained, opt_state, jax.tree.map(jnp.zeros_like, grads)),
        (shardings(mesh, trained), shardings(mesh, opt_state), shardings(mesh, grads)),
    )
    return trained, opt_state, norm, zeros


def split_trained(params: dict, trained: str) -> tuple[dict, dict]:
    """params → (trained, frozen) by their first key: "language" keeps the vision tower and its merger as they are."""
    frozen = {"visual"} if trained == "language" else set()
    return {k: v for k, v in params.items() if k not in frozen}, {k: v for k, v in params.items() if k in frozen}
