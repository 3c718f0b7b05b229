"""Eight devices compute what one does: loss and every gradient, with pictures, on meshes of every kind."""

import jax
import numpy as np
import pytest
from tiny_models import VOCAB, continued, example, layout, tiny_config, tiny_params

from gvl_jax import rl, sft, sharding
from gvl_jax.config import ConfigError, Optim
from gvl_jax.config import Mesh as Shape
from gvl_jax.data.packing import fitted, in_rounds, pack, pack_prompts, shape_of
from gvl_jax.models.qwen_vl.model import abstract_params
from gvl_jax.optim import begin, update
from gvl_jax.sharding import apart, copies, make_mesh, own_parts, place, replicated, shardings, spec

MESHES = [Shape(8, 1, 1), Shape(2, 2, 2), Shape(1, 4, 2), Shape(1, 1, 8)]
SIDES = [(56, 112), (84, 140), (28, 56)]
INSTRUCTION = tuple(range(3, 9))
R, J = 3, 7


def names(shape: Shape) -> str:
    return f"{shape.data}x{shape.fsdp}x{shape.tensor}"


def largest_difference(a, b) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))


def sft_gradient(config, mesh):
    """(loss, gradients, the parameters after an update) of 24 samples in packed rows."""
    rng, where = np.random.default_rng(0), layout(config, 192)._replace(shared=INSTRUCTION)
    examples = [example(rng, count, SIDES) for count in [0, 1, 2] * 8]
    examples = [continued(e._replace(tokens=np.append(INSTRUCTION, e.tokens)), []) for e in examples]
    examples = [e._replace(loss_mask=np.arange(len(e.tokens)) > len(INSTRUCTION)) for e in examples]
    batches = pack(examples, rows=2, length=96, layout=where, tail=1)
    total = np.float32(sum(batch.loss_mask.sum() for batch in batches))
    params = jax.tree.map(jax.device_put, tiny_params(config), shardings(mesh, abstract_params(config)))
    state, grads = begin(Optim(peak_lr=1e-3), params, mesh)
    loss, parts = 0.0, len(own_parts(mesh))
    for shape, some in in_rounds(batches, parts, shape_of):
        padded = [fitted(batch, shape, where) for batch in some]
        batch = place(mesh, padded + [fitted(None, shape, where)] * (parts - len(some)))
        static = {"model_config": config, "remat": "layers", "mesh": mesh}
        grads, share = sft.accumulate(state["trained"], {}, grads, batch, total, **static)
        loss += float(share)
    kept = jax.tree.map(np.asarray, grads)
    after, _, _, grads = update(state["trained"], state["opt_state"], grads, np.float32(1e-3), optim=Optim(), mesh=mesh)
    for step in (after, grads):  # what comes out of a step goes into the next one without compiling it again
        assert jax.tree.leaves(jax.tree.map(lambda a: a.sharding, step)) == jax.tree.leaves(shardings(mesh, step))
    return loss, kept, after


def rl_gradient(config, mesh):
    """(loss, gradients) of a clipped update on 8 prompts, some of them text, with 3 completions each."""
    rng, where = np.random.default_rng(0), layout(config, 512)._replace(shared=INSTRUCTION)
    prompts = [example(rng, count, SIDES) for count in [0, 2, 1, 0, 1, 3, 0, 1]]
    prompts = [continued(p._replace(tokens=np.append(INSTRUCTION, p.tokens)), []) for p in prompts]
    length = max(len(p.tokens) for p in prompts)
    tokens = rng.integers(0, 80, (8, R, J)).astype(np.int32)
    mask = np.arange(J) < rng.integers(1, J + 1, (8, R))[..., None]
    old = (-4 + rng.standard_normal((8, R, J))).astype(np.float32)
    advantages = rng.standard_normal((8, R)).astype(np.float32)
    params = jax.tree.map(jax.device_put, tiny_params(config), shardings(mesh, abstract_params(config)))
    state, grads = begin(Optim(), params, mesh)
    parts, sums = len(own_parts(mesh)), []
    own = [pack_prompts([prompt], rows=1, length=length, layout=where) for prompt in prompts]
    for first in range(0, 8, parts):
        some = range(first, first + parts)
        shape = tuple(np.max([shape_of(own[i]) for i in some], axis=0))
        rows = []
        for i in some:
            at = slice(i, i + 1)
            done = rl.Completions(tokens[at], mask[at], advantages[at], old[at], old[at], np.asarray(False))
            rows.append((fitted(own[i], shape, where), done))
        grads, metrics = rl.accumulate(
            state["trained"], {}, grads, *place(mesh, rows), np.float32(1.2), np.arange(VOCAB) == 5, np.float32(0.2),
            np.float32(8 * R), model_config=config, remat="dots", mean="sequence", mesh=mesh,
        )  # fmt: skip
        sums.append(jax.device_get(metrics))
    totals = {name: sum(one[name].sum() for one in sums) for name in ("loss", "tokens", "ratio", "clipped", "entropy")}
    return totals | {"ratio_max": max(one["ratio_max"].max() for one in sums)}, jax.tree.map(np.asarray, grads)


@pytest.fixture(scope="module")
def sft_alone():
    return sft_gradient(tiny_config(), make_mesh(Shape(1, 1, 1)))


@pytest.fixture(scope="module")
def rl_alone():
    return rl_gradient(tiny_config(tied=True), make_mesh(Shape(1, 1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=names)
def test_sft_on_eight_devices_has_the_loss_and_gradients_of_one(sft_alone, shape):
    loss, grads, after = sft_alone
    got = sft_gradient(tiny_config(), make_mesh(shape))
    assert got[0] == pytest.approx(loss, abs=1e-5)
    assert largest_difference(got[1], grads) < 1e-5 and largest_difference(got[2], after) < 1e-5
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=names)
def test_an_rl_update_on_eight_devices_has_the_loss_and_gradients_of_one(rl_alone, shape):
    metrics, grads = rl_alone
    got = rl_gradient(tiny_config(tied=True), make_mesh(shape))
    assert got[0] == pytest.approx(metrics, abs=1e-5, rel=1e-5)
    assert largest_difference(got[1], grads) < 1e-5


@pytest.mark.parametrize("shape", [Shape(2, 2, 2), Shape(1, 4, 2)], ids=names)
def test_copies_of_a_split_model_are_the_model(shape):
    mesh, params = make_mesh(shape), tiny_params(tiny_config())
    split = jax.tree.map(jax.device_put, params, shardings(mesh, params))
    models = copies(mesh, split, "float32")
    assert len(models) == shape.data * shape.fsdp
    assert all(largest_difference(model, apart(params)) == 0 for model in models)
    devices = [leaf.devices() for model in models for leaf in jax.tree.leaves(model)]
    assert all(len(some) == shape.tensor for some in devices) and len(set.union(*devices)) == 8


def test_what_is_not_split_is_named_with_its_reason():
    params = abstract_params(tiny_config())
    found = {path: why for path, _, why in replicated(make_mesh(Shape(1, 2, 4)), params)}
    assert found["text/layers/k/kernel"] == "kv_heads does not divide by tensor"  # 2 heads over 4
    assert found["text/layers/norm1/scale"].startswith("no axis for") and "text/layers/q/kernel" not in found
    assert found["head/kernel"] == "vocab does not divide by tensor"  # 97 ids
    values = sum(count for _, count, why in replicated(make_mesh(Shape(1, 8, 1)), params) if "no axis" not in why)
    assert values == 0


def test_a_mesh_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="do not make 8 cpu devices"):
        make_mesh(Shape(None, 3, 1))
    mesh = make_mesh(Shape(1, 8, 1))
    with pytest.raises(ConfigError, match="q/kernel: an axis of 36 does not divide by mesh.fsdp 8"):
        spec(mesh, _path("text", "layers", "q", "kernel"), (2, 36, 4, 8))
    with pytest.raises(ValueError, match="no line in sharding.PARAMETERS"):
        spec(mesh, _path("text", "surprise", "kernel"), (2, 32))


def test_two_axes_of_a_parameter_on_one_of_the_mesh_are_refused(monkeypatch):
    monkeypatch.setitem(sharding.RULES, "mlp", "fsdp")
    with pytest.raises(ValueError, match="two axes on one"):
        spec(make_mesh(Shape(1, 8, 1)), _path("gate", "kernel"), (2, 32, 48))


def _path(*keys: str):
    return tuple(jax.tree_util.DictKey(key) for key in keys)
