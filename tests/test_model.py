import functools
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB, example, layout, tiny_config, tiny_params

from gvl_jax.data.packing import pack
from gvl_jax.losses import next_token_logprobs, sft_loss
from gvl_jax.models.qwen_vl.model import abstract_params, bind, init_params
from gvl_jax.types import Remat


def batch_of(config, *images: int):
    rng = np.random.default_rng(0)
    examples = [example(rng, n, [(56, 84), (140, 112)]) for n in images]
    return pack(examples, rows=1, length=64, layout=layout(config, 128))[0]


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradient(params, batch, config):
    def loss(params):
        model = bind(config, params)
        hidden = model(batch)
        logprobs = next_token_logprobs(hidden, model.head_kernel(), batch.tokens)
        return sft_loss(logprobs, batch.loss_mask, batch.loss_mask.sum()), hidden

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("tied", [False, True])
def test_every_layer_of_every_parameter_is_trained(tied):
    config = tiny_config(tied)
    params = tiny_params(config)
    assert ("head" in params) != tied
    _, grads = loss_and_gradient(params, batch_of(config, 1, 0), config)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        stacked = "layers" in name or "blocks" in name
        for layer in gradient if stacked else [gradient]:
            assert np.isfinite(layer).all() and np.abs(layer).max() > 1e-6, name


def test_what_is_computed_again_changes_the_memory_and_no_number():
    config = tiny_config()
    config = replace(config, text=replace(config.text, num_hidden_layers=8))
    params, batch = tiny_params(config), batch_of(config, 1, 0)
    found, memory = {}, {}
    for remat in get_args(Remat):

        def loss(params, remat=remat):
            hidden = bind(config, params)(batch, remat=remat)
            return next_token_logprobs(hidden, params["head"]["kernel"], batch.tokens, batch.loss_mask).sum()

        program = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        found[remat], memory[remat] = program(params), program.memory_analysis().temp_size_in_bytes
    for remat in ("dots", "layers"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), found[remat], found["none"])
    assert memory["layers"] < memory["dots"] < memory["none"]


def test_a_tied_embedding_is_trained_as_head_too():
    config = tiny_config(tied=True)
    batch = batch_of(config, 0)
    _, grads = loss_and_gradient(tiny_params(config), batch, config)
    unread = np.setdiff1d(np.arange(VOCAB), batch.tokens)
    assert np.abs(grads["text"]["embed"]["embedding"][unread]).max(1).min() > 0


def test_a_text_only_batch_does_not_run_the_vision_tower():
    config = tiny_config()
    params, batch = tiny_params(config), batch_of(config, 0, 0)
    assert batch.vision is None
    (loss, _), grads = loss_and_gradient(params, batch, config)
    assert all((g == 0).all() for g in jax.tree.leaves(grads["visual"]))
    broken = params | {"visual": jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params["visual"])}
    assert np.isfinite(loss) and loss_and_gradient(broken, batch, config)[0][0] == loss


def test_bfloat16_computes_in_bfloat16_and_near_float32():
    config, narrow = tiny_config(), tiny_config(dtype="bfloat16")
    params, batch = tiny_params(config), batch_of(config, 1, 0)
    wide, hidden = (jax.jit(lambda p, b, c=c: bind(c, p)(b))(params, batch) for c in (config, narrow))
    assert wide.dtype == jnp.float32 and hidden.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(hidden, np.float32) - wide)
    assert np.isfinite(difference).all() and 1e-4 < difference.mean() < 0.02 * np.abs(wide).mean()

    model = bind(narrow, params)
    last, prompt = jax.eval_shape(model.prefill, batch)
    tokens = np.zeros((1, 2, 3), np.int32)
    extended = jax.eval_shape(model.extend, tokens, prompt)
    dtypes = {x.dtype for x in (last, prompt.k, prompt.v, extended)}
    assert dtypes == {np.dtype(jnp.bfloat16)}


def test_initial_parameters_are_the_seed_s_and_have_the_abstract_tree():
    config = tiny_config()
    params = init_params(config, 0)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))
    jax.tree.map(np.testing.assert_array_equal, params, init_params(config, 0))
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"]
    assert all(np.std(k[0]) > 0 and not np.array_equal(k[0], k[-1]) for k in kernels)


def test_binding_does_not_change_the_parameters_or_the_next_binding():
    config = tiny_config()
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), abstract_params(config))
    first = bind(config, ones)
    second = bind(config, jax.tree.map(jnp.zeros_like, ones))
    assert (first.head_kernel() == 1).all() and (second.head_kernel() == 0).all()
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract_params(config)))
