"""Checkpoints with Orbax: state (arrays) and meta (counters, loader position) under run_dir/checkpoints/STEP.

Arrays are stored under their dotted path (opt_state.0.mu.w), so the tree's own types (optax's named tuples) come
back from the tree that `restore` is given. A sum of each array's bits stands in the checkpoint too: storage finds
truncated files by itself, but not flipped bits.
"""

import io
import logging
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from gvl_jax.sharding import exchange

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: missing, damaged, or of another model or optimizer."""


class CheckpointMismatch(CheckpointError):
    """The state on disk has not the paths, shapes or dtypes of the run's state; lists every difference."""


class Checkpoints:
    """The `keep` newest checkpoints of a run, and with `keep_best` the one of the highest score, on a disk that all
    processes see. Saving goes on in the background.

    folder: where, if not in run_dir/checkpoints; also gs://bucket/path.
    read_only: nothing there is removed or renamed; the run itself may be saving at this moment."""

    def __init__(
        self, run_dir: str | Path, folder: str = "", keep: int = 2, keep_best: bool = False, read_only: bool = False
    ) -> None:
        self.folder = epath.Path(folder or Path(run_dir).absolute() / "checkpoints")
        kept = [policy.LatestN(n=keep), policy.BestN(get_metric_fn=lambda saved: saved["score"], n=int(keep_best))]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(kept), cleanup_tmp_directories=not read_only
        )
        # beside them: in a bucket Orbax takes what it has not written for a save that was not finished, and removes it
        self._parts = self.folder.with_name(f"{self.folder.name}.parts")
        self._read_only = read_only
        handlers = {name: ocp.JsonCheckpointHandler() for name in ("meta", "metrics")}
        self._manager = ocp.CheckpointManager(
            self.folder, item_handlers={"state": ocp.StandardCheckpointHandler(), **handlers}, options=options
        )

    def save(self, step: int, state: Any, meta: dict[str, Any], score: float = 0.0) -> None:
        """Returns when `state` is copied: it may be donated then. `meta` must be JSON. score: the higher the better.

        Raises:
            CheckpointError: the folder has a checkpoint of this or a later step, or the last one could not be written.
        """
        latest = self.latest()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"step {step} comes not after {self.folder / str(latest)}; resume from there or use another folder"
            )
        leaves = _leaves(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave({"meta": meta, "bits": _bits(leaves)})
        )
        with _disk_full(self.folder):
            self._manager.save(step, args=items, metrics={"score": score}, force=True)

    def latest(self) -> int | None:
        """The newest step, counting one that is being saved; None without any."""
        return self._manager.latest_step()

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """State and meta of `step`, or of the newest checkpoint that can be read.

        like: a state of the same structure, of arrays or jax.ShapeDtypeStruct; arrays come back with its shardings.
        A damaged checkpoint is named in a warning and (unless read_only) renamed to damaged-STEP; the one before is
        used.

        Raises:
            CheckpointMismatch: paths, shapes or dtypes differ from those of `like`.
            CheckpointError: there is no checkpoint, or none can be read.
        """
        self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        damaged: dict[int, str] = {}
        for candidate in steps:
            try:
                found = self._read(candidate, like)
            except CheckpointMismatch:
                raise
            except Exception as error:  # whatever a damaged file makes of the readers below
                damaged[candidate] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                continue
            for bad, reason in damaged.items():
                log.warning("%s is damaged (%s); using step %d", self.folder / str(bad), reason, candidate)
            if not self._read_only:
                self._set_aside(list(damaged))
            return found
        reasons = "; ".join(f"{self.folder / str(s)}: {reason}" for s, reason in damaged.items())
        raise CheckpointError(
            f"no checkpoint in {self.folder} can be read ({reasons or 'there is none'}); start anew in another folder"
        )

    def keep_part(self, step: int, first: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep what this process has finished of `step`, which is not done. first: an item of it, in no other part."""
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type]
        self._parts.mkdir(parents=True, exist_ok=True)
        name = f"{step}-{first}.npz"
        (self._parts / f"{name}.unfinished").write_bytes(file.getvalue())
        (self._parts / f"{name}.unfinished").replace(self._parts / name)

    def parts(self, step: int) -> list[dict[str, np.ndarray]]:
        """What all processes, of whatever number, have kept of `step`; what they have kept of others is removed."""
        found: list[dict[str, np.ndarray]] = []
        for path in sorted(self._parts.iterdir()) if self._parts.exists() else []:
            if path.name.startswith(f"{step}-") and path.suffix == ".npz":
                try:
                    with np.load(io.BytesIO(path.read_bytes())) as arrays:
                        found.append(dict(arrays))
                except (EOFError, ValueError, zipfile.BadZipFile) as error:  # lost before it was on disk
                    log.warning("%s is damaged (%s); what it held is made again", path, error)
            elif jax.process_index() == 0 and not path.name.startswith(f"{step}-"):
                path.unlink(missing_ok=True)
        return found

    def close(self) -> None:
        """Waits until the last save is on disk. Raises CheckpointError: it could not be written."""
        with _disk_full(self.folder):
            self._manager.wait_until_finished()
            self._manager.close()

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        expected = {path: _abstract(leaf) for path, leaf in _leaves(like).items()}
        stored = self._manager.item_metadata(step).state
        if stored is None:
            raise CheckpointError("no state in it")
        _check_fits(self.folder / str(step), {path: _shape(leaf) for path, leaf in stored.items()}, expected)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(expected), meta=ocp.args.JsonRestore())
        restored, failed = None, None
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # perhaps of this process's part alone
            failed = error
        if exchange(np.array([restored is None])).any():  # all of them go on to the one before, or none
            raise failed or CheckpointError("another process cannot read its part")
        assert restored is not None
        bits = _bits(restored.state)
        wrong = [path for path in bits if bits[path] != restored.meta["bits"][path]]
        if wrong:
            raise CheckpointError(f"the bits of {', '.join(wrong)} are not those that were saved")
        leaves = [_free_as(leaf, restored.state[path]) for path, leaf in _leaves(like).items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored.meta["meta"]

    def _set_aside(self, steps: list[int]) -> None:
        if steps and jax.process_index() == 0:
            for step in steps:
                (self.folder / str(step)).rename(self.folder / f"damaged-{step}")
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()


@contextmanager
def _disk_full(folder: Path) -> Iterator[None]:
    """In one line what storage says of a full disk: of the last save, in the background."""
    try:
        yield
    except (OSError, ValueError) as error:
        if "No space left" not in str(error):
            raise
        raise CheckpointError(
            f"{folder}: the disk is full, and the last checkpoint is not whole; make room, then the same command goes "
            "on from the one before"
        ) from error


def _leaves(state: Any) -> dict[str, Any]:
    """{"opt_state.0.mu.w": array, ...}, in the order of the tree's leaves."""
    found = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}
    arrays = jax.Array | jax.ShapeDtypeStruct
    return {path: leaf if isinstance(leaf, arrays) else np.asarray(leaf) for path, leaf in named.items()}


def _abstract(leaf: Any) -> Any:
    """What to read: host arrays for host arrays, else shape, dtype and sharding (default: this process's device 0)."""
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _free_as(like: Any, restored: Any) -> Any:
    """Orbax commits arrays to their devices. Where `like` is not committed the restored one must not be either: jit
    tells them apart, and a resumed run would compile everything once more."""
    return jnp.array(np.asarray(restored)) if isinstance(like, jax.Array) and not like.committed else restored


def _shape(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def _check_fits(folder: Path, got: dict[str, str], expected: dict[str, Any]) -> None:
    """Raises CheckpointMismatch with a line for every path that differs."""
    wanted = {path: _shape(leaf) for path, leaf in expected.items()}
    lines = [
        f"  {path}: got {got.get(path, 'nothing')}, expected {wanted.get(path, 'nothing')}"
        for path in {**wanted, **got}
        if got.get(path) != wanted.get(path)
    ]
    if lines:
        raise CheckpointMismatch(
            f"{folder} does not fit this run, {len(lines)} of {len(wanted)} arrays differ:\n" + "\n".join(lines) + "\n"
            "It was written with other model or optimizer settings: take those of "
            f"{folder.parents[1] / 'config.yaml'}, or start anew in another folder"
        )


@jax.jit
def _sums_of_bits(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums modulo 2^32 of the elements' bits: the same for every sharding. One program: many small ones, each with a
    sum over processes, stand still on CPUs now and then."""

    def total(array: jax.Array) -> jax.Array:
        if array.dtype == jnp.bool_:
            array = array.astype(jnp.uint8)
        words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}"))
        return jnp.sum(words, dtype=jnp.uint32)

    return jax.tree.map(total, arrays)


def _bits(leaves: dict[str, Any]) -> dict[str, int]:
    """A checksum of every array."""
    sums = _sums_of_bits({path: leaf for path, leaf in leaves.items() if isinstance(leaf, jax.Array)})
    on_host = {path: zlib.crc32(leaf.tobytes()) for path, leaf in leaves.items() if isinstance(leaf, np.ndarray)}
    return on_host | {path: int(value) for path, value in jax.device_get(sums).items()}
