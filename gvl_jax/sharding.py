"""Where arrays live: the mesh (data, fsdp, tensor), and the one table of axes for every parameter and input.

Rows of a batch are split over data and fsdp. Each device works on its own part as if it were alone (`value_and_grad`):
its rows, its pictures, its loops. fsdp splits every weight matrix and what the optimizer keeps of it; a layer's
weights are put together when the layer is computed (`whole`), and their gradient is summed into the parts again. tensor
splits heads, feed-forward and vocabulary; there the compiler finds the communication from the weights' placement.
"""

import math
import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from gvl_jax.config import ConfigError
from gvl_jax.config import Mesh as MeshShape

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what the rows of a batch are split over

# Logical axis → mesh axis.
RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}

# The last two names of a parameter → its logical axes, without the leading axis of stacked layers. What has no rule
# (width, head) is on every device: biases and scales, which are 0.02 % of the weights.
PARAMETERS = {
    "embed/embedding": ("vocab", "embed"),
    "head/kernel": ("embed", "vocab"),
    "q/kernel": ("embed", "heads", "head"),
    "q/bias": ("heads", "head"),
    **{f"{name}/kernel": ("embed", "kv_heads", "head") for name in ("k", "v")},
    **{f"{name}/bias": ("kv_heads", "head") for name in ("k", "v")},
    "o/kernel": ("heads", "head", "embed"),
    **{f"{name}/kernel": ("embed", "mlp") for name in ("gate", "up", "fc1")},
    **{f"{name}/bias": ("mlp",) for name in ("gate", "up", "fc1")},
    **{f"{name}/kernel": ("mlp", "embed") for name in ("down", "fc2")},
    "patch_embed/kernel": ("patch", "embed"),
    **{f"{name}/bias": ("width",) for name in ("o", "down", "fc2")},
    **{f"{name}/scale": ("width",) for name in ("norm", "norm1", "norm2")},
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the devices


def start() -> None:
    """Join the other processes of a run, before JAX is used.

    GVL_DISTRIBUTED=1: JAX finds them by itself (Cloud TPU, GKE, Slurm). JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID name them. Raises ConfigError if some of the three are missing."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if os.environ.get(name)]
    if given and len(given) < len(names):
        raise ConfigError(f"{', '.join(given)} without {', '.join(sorted(set(names) - set(given)))}; set all, or none")
    if given and not jax.distributed.is_initialized():
        address, count, number = (os.environ[name] for name in names)
        jax.distributed.initialize(address, int(count), int(number), heartbeat_timeout_seconds=30)
    elif os.environ.get("GVL_DISTRIBUTED", "0") != "0" and not jax.distributed.is_initialized():
        jax.distributed.initialize()


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes as (data, fsdp, tensor); of one process the first ones, if `data` says so.

    Raises ConfigError if they do not make that shape."""
    devices = jax.devices() if devices is None else devices
    split = shape.fsdp * shape.tensor
    sizes = (shape.data or len(devices) // split, shape.fsdp, shape.tensor)
    if shape.data and jax.process_count() == 1:
        devices = devices[: math.prod(sizes)]
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh.data {shape.data or 'not set'}, mesh.fsdp {shape.fsdp} and mesh.tensor {shape.tensor} do not make "
            f"{len(devices)} {devices[0].platform} devices; their product must be the number of devices"
        )
    mesh = Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)
    for group in mesh.devices.reshape(-1, shape.tensor):
        if len({device.process_index for device in group}) > 1:
            raise ConfigError(f"mesh.tensor {shape.tensor} spans hosts; lower it to the devices of one, and raise fsdp")
    return mesh


def own_parts(mesh: Mesh) -> list[int]:
    """Which of the data · fsdp parts of the rows are on this process's devices."""
    first = mesh.devices.reshape(-1, mesh.shape["tensor"])[:, 0]
    return [part for part, device in enumerate(first) if device.process_index == jax.process_index()]


# ------------------------------------------------------------------------------------------------------- the parameters


def _names(path) -> str:
    """The last two names of a path in a tree of parameters: q/kernel."""
    return "/".join([str(entry.key) for entry in path if hasattr(entry, "key")][-2:])


def _logical(path) -> tuple[str, ...]:
    name = _names(path)
    if name not in PARAMETERS:
        raise ValueError(f"parameter {jax.tree_util.keystr(path)} has no line in sharding.PARAMETERS; add its axes")
    return PARAMETERS[name]


def spec(mesh: Mesh, path, shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter is split. An axis that `tensor` does not divide (two key heads over four) stays whole.

    Raises ValueError: no line in the table, or two axes of it on one mesh axis; ConfigError: fsdp does not divide."""
    if not shape:
        return PartitionSpec()
    logical = _logical(path)
    mapped = [RULES.get(axis) for axis in logical]
    if len(set(filter(None, mapped))) < len(list(filter(None, mapped))):
        raise ValueError(f"{_names(path)}: {logical} puts two axes on one of the mesh: {mapped}; change RULES")
    sizes = shape[len(shape) - len(logical) :]
    for i, (axis, size) in enumerate(zip(mapped, sizes, strict=True)):
        if axis and size % mesh.shape[axis]:
            if axis == "fsdp":
                raise ConfigError(
                    f"{_names(path)}: an axis of {size} does not divide by mesh.fsdp {mesh.shape[axis]}; take a divisor"
                )
            mapped[i] = None
    return _canonical(mesh, [None] * (len(shape) - len(logical)) + mapped)


def _canonical(mesh: Mesh, axes: Sequence[str | None]) -> PartitionSpec:
    """As JAX writes it in what a jitted function returns: with another form of the same jit would compile again."""
    axes = [axis if axis and mesh.shape[axis] > 1 else None for axis in axes]
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedSharding of every leaf of parameters, gradients, or an optimizer's state; numbers are everywhere."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(mesh, path, tuple(leaf.shape))), tree
    )


def replicated(mesh: Mesh, tree: Any) -> list[tuple[str, int, str]]:
    """Parameters that are not split over fsdp or tensor: (path, number of values, why)."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        axes = set(filter(None, spec(mesh, path, tuple(leaf.shape))))
        for axis in ("fsdp", "tensor"):
            if mesh.shape[axis] == 1 or axis in axes:
                continue
            named = [name for name in _logical(path) if RULES.get(name) == axis]
            why = f"{named[0]} does not divide by {axis}" if named else f"no axis for {axis}"
            found.append((jax.tree_util.keystr(path, simple=True, separator="/"), math.prod(leaf.shape), why))
    return found


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight, axis: int, dtype):
    return lax.all_gather(weight.astype(dtype), "fsdp", axis=axis % weight.ndim, tiled=True)


def _gather_backward(axis: int, dtype, like, gradient):
    # Summed in fp32, whatever the layer computes in. Not by psum_scatter: XLA makes of it an all-reduce of the whole
    # matrix on v5e, and on v5p where the parts are no multiple of a tile (docs/log.md).
    parts = lax.all_to_all(gradient.astype(like.dtype), "fsdp", axis % like.ndim, 0, tiled=True)
    count = lax.axis_size("fsdp")
    return (parts.reshape(count, parts.shape[0] // count, *parts.shape[1:]).sum(0),)


_gather.defvjp(lambda weight, axis, dtype: (_gather(weight, axis, dtype), jnp.zeros((0,) * weight.ndim, weight.dtype)),
               _gather_backward)  # fmt: skip


def _embed_axis(path) -> int | None:
    """Which axis of a parameter fsdp splits, from the end."""
    mapped = [RULES.get(axis) for axis in _logical(path)]
    return mapped.index("fsdp") - len(mapped) if "fsdp" in mapped else None


def whole(tree: Any, dtype) -> Any:
    """Inside `value_and_grad`: the weights of a layer put together in `dtype`; stacked layers stay split until it is
    their turn. Elsewhere: the tree as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if "fsdp" not in mesh.manual_axes or mesh.shape["fsdp"] == 1:
        return tree

    def gathered(path, weight):
        axis = _embed_axis(path)
        if axis is None or weight.ndim > len(_logical(path)):
            return weight
        return _gather(weight, axis, dtype)

    return jax.tree_util.tree_map_with_path(gathered, tree)


def apart(params: dict) -> dict:
    """The decoder's layers one by one, under their numbers: decoding has no loop over them, and would hold a second
    copy of what it cuts out of a stack."""
    text = params["text"]
    count = len(jax.tree.leaves(text["layers"])[0])
    layers = {i: jax.tree.map(lambda stacked, i=i: stacked[i], text["layers"]) for i in range(count)}
    return params | {"text": text | {"layers": layers}}


@partial(jax.jit, static_argnames=("dtype", "mesh"))
def _spread(params: dict, *, dtype, mesh: Mesh) -> dict:
    def without_fsdp(path, leaf):
        axes = _canonical(mesh, [None if axis == "fsdp" else axis for axis in spec(mesh, path, leaf.shape)])
        return lax.with_sharding_constraint(leaf.astype(dtype), NamedSharding(mesh, axes))

    return jax.tree_util.tree_map_with_path(without_fsdp, apart(params))


def copies(mesh: Mesh, params: dict, dtype) -> list[dict]:
    """The parameters whole and `apart`, in `dtype`, for each of `own_parts`, on its devices: what a sampler reads."""
    spread, found = _spread(params, dtype=dtype, mesh=mesh), []
    for part in own_parts(mesh):
        devices = mesh.devices.reshape(-1, mesh.shape["tensor"])[part]
        alone = Mesh(devices.reshape(1, 1, -1), AXES)

        def local(array, alone=alone):
            pieces = {shard.device: shard.data for shard in array.addressable_shards}
            where = NamedSharding(alone, array.sharding.spec)
            return jax.make_array_from_single_device_arrays(
                array.shape, where, [pieces[device] for device in alone.devices.flat]
            )

        found.append(jax.tree.map(local, spread))
    return found


def on_copy(function: Any) -> Any:
    """A jitted function of one of `copies`, its first argument, that may know of the mesh: see `alone_on_tpu`."""

    def there(params: dict):
        where = getattr(jax.tree.leaves(params)[0], "sharding", None)
        return use_abstract_mesh(where.mesh.abstract_mesh) if isinstance(where, NamedSharding) else nullcontext()

    def run(params: dict, *args, **options):
        with there(params):
            return function(params, *args, **options)

    def lower(params: dict, *args, **options):
        with there(params):
            return function.lower(params, *args, **options)

    run.lower = lower  # type: ignore[attr-defined]
    return wraps(function, updated=())(run)


def alone_on_tpu() -> bool:
    """With nothing left to the compiler, which cannot split a kernel: inside `value_and_grad` on TPUs, or on one."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.size == 1 or set(mesh.manual_axes) == set(AXES)
    return not mesh.empty and alone and mesh.abstract_device.platform == "tpu"


# ------------------------------------------------------------------------------------------------------------- the rows


def _row_axis(path, leaf) -> int | None:
    """Which axis of a batch's array counts rows, patches or windows; None: the array is the same for all."""
    name = jax.tree_util.keystr(path[-1:], simple=True)
    if np.ndim(leaf) == 0 or name == "shared":
        return None
    return 1 if name == "positions" else 0


def _row_spec(path, leaf) -> PartitionSpec:
    axis = _row_axis(path, leaf)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, ROWS)


def place(mesh: Mesh, parts: Sequence[Any]) -> Any:
    """One micro-batch (of the same shapes) for each of `own_parts` → one of global arrays. One device: its own."""
    if mesh.size == 1:
        return parts[0]
    own, count = own_parts(mesh), mesh.size // mesh.shape["tensor"]

    def put(path, *leaves):
        axis = _row_axis(path, leaves[0])
        sharding = NamedSharding(mesh, _row_spec(path, leaves[0]))
        if axis is None:
            return jax.make_array_from_callback(leaves[0].shape, sharding, lambda index: leaves[0][index])
        size = leaves[0].shape[axis]
        shape = list(leaves[0].shape)
        shape[axis] = size * count
        return jax.make_array_from_callback(
            tuple(shape), sharding, lambda index: leaves[own.index((index[axis].start or 0) // size)]
        )

    return jax.tree_util.tree_map_with_path(put, parts[0], *parts[1:])


def abstract(mesh: Mesh, part: Any) -> Any:
    """What `place` makes of micro-batches like this one, one for each part of the rows, as shapes."""
    count = mesh.size // mesh.shape["tensor"]

    def shaped(path, leaf):
        axis, shape = _row_axis(path, leaf), list(leaf.shape)
        if axis is not None:
            shape[axis] *= count
        sharding = NamedSharding(mesh, _row_spec(path, leaf)) if mesh.size > 1 else None
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(shaped, part)


def value_and_grad(
    loss_of: Callable, mesh: Mesh | None, trained: dict, frozen: dict, rows: Any, rest: Any
) -> tuple[Any, dict, dict]:
    """Loss, metrics and gradient of loss_of(params, rows, rest) → (loss, metrics), summed over the parts of the rows.

    rows: a pytree whose arrays are split (`place`); rest: one that all devices have. metrics: arrays of numbers, one
    for each part. mesh None, or rows that are not split: the plain function."""

    def local(trained, frozen, rows, rest):
        return jax.value_and_grad(lambda trained: loss_of(trained | frozen, rows, rest), has_aux=True)(trained)

    if mesh is None or mesh.size == mesh.shape["tensor"]:
        alone = mesh is not None and mesh.size == 1
        with use_abstract_mesh(mesh.abstract_mesh) if alone else nullcontext():  # type: ignore[union-attr]
            (loss, metrics), grads = local(trained, frozen, rows, rest)
        if mesh is not None and mesh.size > 1:
            grads = lax.with_sharding_constraint(grads, shardings(mesh, grads))
        return loss, jax.tree.map(lambda m: jnp.asarray(m)[None], metrics), grads

    def manual(path, leaf):
        axes = spec(mesh, path, tuple(leaf.shape))
        return _canonical(mesh, [axis if axis == "fsdp" else None for axis in axes])

    def summed(path, grad):
        # what is split over fsdp has been summed over it by `_gather_backward`
        return lax.psum(grad, "data" if _embed_axis(path) is not None and mesh.shape["fsdp"] > 1 else ROWS)

    def of_part(trained, frozen, rows, rest):
        (loss, metrics), grads = local(trained, frozen, rows, rest)
        grads = jax.tree_util.tree_map_with_path(summed, grads)
        return lax.psum(loss, ROWS), jax.tree.map(lambda m: lax.all_gather(m, ROWS), metrics), grads

    specs = [jax.tree_util.tree_map_with_path(manual, tree) for tree in (trained, frozen)]
    row_specs = jax.tree_util.tree_map_with_path(_row_spec, rows)
    everywhere = jax.tree.map(lambda _: PartitionSpec(), rest)
    loss, metrics, grads = jax.shard_map(
        of_part, mesh=mesh, axis_names=set(ROWS if mesh.shape["tensor"] > 1 else AXES), check_vma=False,
        in_specs=(*specs, row_specs, everywhere), out_specs=(PartitionSpec(), PartitionSpec(), specs[0]),
    )(trained, frozen, rows, rest)  # fmt: skip
    return loss, metrics, lax.with_sharding_constraint(grads, shardings(mesh, grads))


# -------------------------------------------------------------------------------------------------------- the processes


def exchange(values: np.ndarray) -> np.ndarray:
    """An array of the same shape from every process → [processes, ...], on all of them."""
    if jax.process_count() == 1:
        return np.asarray(values)[None]
    return np.asarray(multihost_utils.process_allgather(np.asarray(values)))


def gather(items: list) -> list:
    """The items of all processes, in the order of the processes. Plain objects and numpy arrays."""
    if jax.process_count() == 1:
        return items
    data = np.frombuffer(pickle.dumps(items), np.uint8)
    sizes = exchange(np.array(len(data)))
    everything = exchange(np.pad(data, (0, int(sizes.max()) - len(data))))
    return [item for row, size in zip(everything, sizes, strict=True) for item in pickle.loads(row[:size].tobytes())]


def agree(shapes: Sequence[Sequence[int]], bound: int, *sums: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """The shapes that all processes compute, one after the other, and the sums over processes.

    shapes: what this process needs, at most `bound` of them, the largest first: each becomes the largest that any
    process needs in its place."""
    width = len(shapes[0]) if len(shapes) else 0
    widths = exchange(np.array([width, *sums], np.int64))
    width = int(widths[:, 0].max())
    needs = np.zeros((bound, width), np.int64)
    needs[: len(shapes)] = np.array(shapes, np.int64).reshape(len(shapes), width)
    largest = exchange(needs).max(0)
    return [tuple(map(int, row)) for row in largest if row.any()], [int(total) for total in widths[:, 1:].sum(0)]
