import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gvl_jax.checkpoint import CheckpointError, CheckpointMismatch, Checkpoints

# Readers that Orbax leaves behind after a damaged file report it once more when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10)))


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "head": {"w": jax.random.normal(keys[0], (16, 64))},
        "norm": jax.random.normal(keys[1], (64,), jnp.bfloat16).at[0].set(jnp.nan),
    }
    return {
        "params": params,
        "opt_state": OPTIMIZER.update(params, OPTIMIZER.init(params), params)[1],
        "rng": jax.random.key_data(keys),
        "mask": jnp.array([True, False]),
        "order": np.arange(5, dtype=np.int64) << 40,
        "count": np.int32(seed),
    }


def save_steps(folder, *steps):
    checkpoints = Checkpoints(folder, keep=len(steps))
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.close()


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def checkpoints(tmp_path):
    save_steps(tmp_path, 1, 2)
    checkpoints = Checkpoints(tmp_path)
    yield checkpoints
    checkpoints.close()


def test_state_comes_back_bit_equal_in_its_own_tree_types(tmp_path):
    state = make_state(seed=3)
    meta = {"step": 30, "loader": {"position": [1, 2]}, "config": "3f2a", "best": None}
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.save(30, state, meta)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 30
    restored, restored_meta = checkpoints.restore(like=make_state(seed=4))
    assert_same(restored, state)
    assert type(restored["opt_state"][1][0]) is optax.ScaleByAdamState
    assert isinstance(restored["order"], np.ndarray) and isinstance(restored["rng"], jax.Array)
    assert restored_meta == meta
    checkpoints.close()


def test_the_newest_is_restored_unless_a_step_is_named(checkpoints):
    assert_same(checkpoints.restore(make_state())[0], make_state(2))
    assert_same(checkpoints.restore(make_state(), step=1)[0], make_state(1))


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {})
    checkpoints.close()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["2", "3"]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=True)
    for step, score in ((1, -0.5), (2, -0.1), (3, -0.2), (4, -0.3)):
        checkpoints.save(step, make_state(step), {}, score)
    checkpoints.close()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["2", "4"]


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})

    def full(*args, **kwargs):  # what tensorstore says of it
        raise ValueError(f'RESOURCE_EXHAUSTED: Error writing "w/0" to "{tmp_path}": No space left on device')

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="the disk is full.* the one before"):
        patch.setattr(checkpoints._manager, "wait_until_finished", full)
        checkpoints.close()


def test_shapes_alone_are_enough_and_their_shardings_are_used(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec(None, "data")), NamedSharding(mesh, PartitionSpec())
    weights = {"w": jax.random.normal(jax.random.key(0), (16, 64))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jax.device_put(weights, split), {})
    for sharding in (split, whole, None):
        like = {"w": jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=sharding)}
        restored, _ = checkpoints.restore(like)
        assert_same(restored, weights)
        assert restored["w"].sharding == (sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    checkpoints.close()


def test_the_state_may_be_donated_once_save_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"w": jnp.zeros((1000, 1000))}
    checkpoints.save(1, state, {})
    jax.block_until_ready(add(state))
    restored, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)})
    assert not np.asarray(restored["w"]).any()
    checkpoints.close()


def test_every_difference_is_listed_before_anything_is_used(checkpoints):
    like = make_state()
    like["params"]["head"] = {"w": jnp.zeros((16, 32)), "b": jnp.zeros(32)}
    like["params"]["norm"] = like["params"]["norm"].astype(jnp.float32)
    del like["mask"]
    with pytest.raises(CheckpointMismatch) as error:
        checkpoints.restore(like)
    first, *lines, advice = str(error.value).splitlines()
    assert first.startswith(str(checkpoints.folder / "2")) and "4 of " in first
    assert sorted(lines) == [
        "  mask: got bool[2], expected nothing",
        "  params.head.b: got nothing, expected float32[32]",
        "  params.head.w: got float32[16, 64], expected float32[16, 32]",
        "  params.norm: got bfloat16[64], expected float32[64]",
    ]
    assert "config.yaml" in advice and "start anew" in advice
    assert (checkpoints.folder / "2").is_dir()  # a mismatch is not damage


def delete_state(step):
    shutil.rmtree(step / "state")


def delete_meta(step):
    (step / "meta" / "metadata").unlink()


def truncate_arrays(step):
    for path in (step / "state").glob("ocdbt.process_0/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bits_of_an_array(step):
    path = max((step / "state").glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [delete_state, delete_meta, truncate_arrays, flip_bits_of_an_array])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, damage):
    save_steps(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "2")
    checkpoints = Checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING, logger="gvl_jax.checkpoint"):
        state, meta = checkpoints.restore(make_state())
    assert_same(state, make_state(1))
    assert meta == {"step": 1}
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "gvl_jax.checkpoint"]
    assert str(checkpoints.folder / "2") in warning and "using step 1" in warning and "\n" not in warning

    checkpoints.save(2, state, {"step": 2})  # the run goes on and saves that step again
    checkpoints.close()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["1", "2", "damaged-2"]
    assert Checkpoints(tmp_path).restore(make_state())[1] == {"step": 2}


def test_when_all_are_damaged_the_error_names_each_and_nothing_is_renamed(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        delete_meta(tmp_path / "checkpoints" / str(step))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoints/2: .*checkpoints/1: "):
        checkpoints.restore(make_state())
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["1", "2"]
    checkpoints.close()


def test_a_save_that_was_killed_before_its_commit_does_not_count(tmp_path):
    save_steps(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")
    for name in ("commit_success.txt", "state/_METADATA"):
        (folder / "2.orbax-checkpoint-tmp" / name).unlink(missing_ok=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 1
    state, _ = checkpoints.restore(make_state())
    assert_same(state, make_state(1))
    checkpoints.save(2, make_state(2), {"step": 2})
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="there is none"):
        checkpoints.restore(make_state())
    with pytest.raises(CheckpointError, match="checkpoints/7"):
        checkpoints.restore(make_state(), step=7)
    checkpoints.close()


@pytest.mark.parametrize("step", [1, 2])
def test_steps_only_go_up(checkpoints, step):
    with pytest.raises(CheckpointError, match=f"^step {step} comes not after .*checkpoints/2; resume"):
        checkpoints.save(step, make_state(), {})


def test_parts_of_a_step_come_back_and_a_damaged_one_is_named(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    for first in (0, 4, 8):
        checkpoints.keep_part(3, first, {"index": np.arange(first, first + 4)})
    checkpoints.keep_part(2, 0, {"index": np.arange(4)})
    (tmp_path / "checkpoints.parts" / "3-4.npz").write_bytes(b"")  # the machine was lost before it was on disk
    with caplog.at_level(logging.WARNING, logger="gvl_jax.checkpoint"):
        parts = checkpoints.parts(3)
    assert sorted(part["index"].tolist() for part in parts) == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert "3-4.npz is damaged (No data left in file)" in caplog.text
    assert sorted(path.name for path in (tmp_path / "checkpoints.parts").iterdir()) == ["3-0.npz", "3-4.npz", "3-8.npz"]
    checkpoints.close()
