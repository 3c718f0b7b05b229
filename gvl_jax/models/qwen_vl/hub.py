"""Checkpoints on disk to parameters and back, without torch and without pickle. keys.py says what goes where."""

import functools
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from gvl_jax.models.qwen_vl.config import QwenVLConfig, from_hf, to_hf
from gvl_jax.models.qwen_vl.keys import Layout, Weight, from_hub_key, table
from gvl_jax.models.qwen_vl.shards import (
    BLOCK,
    DTYPES,
    HubError,
    Opened,
    Tensor,
    layout_of,
    open_shards,
    raise_if_any,
    read_json,
)
from gvl_jax.types import Array

# Everything a checkpoint carries besides config.json and weights; it travels unchanged.
COMPANIONS = (
    "tokenizer*", "vocab.*", "merges.txt", "*_tokens*.json", "*processor_config.json", "generation_config.json",
    "chat_template*", "additional_chat_templates/*", "LICENSE*", "NOTICE*",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- find


def resolve(name_or_dir: str | Path, revision: str | None = None) -> Path:
    """A local directory as it is; anything else is a hub id: cached, or downloaded (safetensors and companions only).

    Raises:
        HubError: no such directory; or offline, no such repository, no access to it.
    """
    path = Path(name_or_dir).expanduser()
    if path.is_dir() and revision is None:
        return path
    if path.is_dir():
        raise HubError(
            f"{name_or_dir} is a local directory, revision {revision!r} belongs to a hub id; pass one of them"
        )
    if path.is_absolute() or str(name_or_dir).startswith((".", "~")):
        raise HubError(f"{name_or_dir} is not a directory; expected a checkpoint directory or a hub id 'owner/name'")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", "guard_calibration.json", *COMPANIONS]
    try:
        return Path(snapshot_download(str(name_or_dir), revision=revision, allow_patterns=wanted))
    except Exception as error:  # the client raises OSError, ValueError, httpx errors and its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise HubError(
            f"{name_or_dir} is not a local directory and could not be fetched from the hub ({reason}). Check the name, "
            "the network and your access token, or download it elsewhere and pass its directory"
        ) from error


def load_config(directory: str | Path) -> QwenVLConfig:
    """Read `directory`/config.json.

    Raises:
        HubError: no such file, not JSON, or a model this package does not implement.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise HubError(f"{path} does not exist; expected a checkpoint directory, config.json beside the weights")
    raw = read_json(path)
    try:
        return from_hf(raw)
    except ValueError as error:
        raise HubError(f"{path}: {error}") from error


def image_bounds(directory: str | Path) -> tuple[int, int]:
    """(min_pixels, max_pixels) of the checkpoint's preprocessor_config.json; Qwen2.5-VL's own where it says nothing.

    Raises:
        HubError: the file is not JSON, or gives something else than two numbers of pixels.
    """
    path = Path(directory) / "preprocessor_config.json"
    raw = read_json(path) if path.is_file() else {}
    size = raw["size"] if isinstance(raw.get("size"), dict) else {}
    low = raw.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    high = raw.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 16384
    if not (isinstance(low, int) and isinstance(high, int) and 0 < low <= high):
        raise HubError(f"{path}: min_pixels {low!r} and max_pixels {high!r}, expected 0 < min <= max; correct the file")
    return low, high


def companions(directory: Path) -> dict[str, Path]:
    """The files that travel with the weights, by name; a name has a folder where the file is in one."""
    found = [file for pattern in COMPANIONS for file in directory.glob(pattern) if file.is_file()]
    return {file.relative_to(directory).as_posix(): file for file in found}


def detect_layout(directory: str | Path) -> Layout:
    """The key layout of a checkpoint, so that it can be saved in the one it came in."""
    return layout_of(open_shards(Path(directory)).tensors)


# ---------------------------------------------------------------------------------------------------------------- load


def load_params(
    directory: str | Path, config: QwenVLConfig, dtype: Any = None, shardings: dict | None = None
) -> dict[str, Any]:
    """Read the weights of a checkpoint, in either layout, as a nested dict of stacked parameters.

    Rows are read block by block: peak host memory is the parameters, or with shardings the shards of this process's
    devices, and less than one tensor.

    Args:
        dtype: of the result; None keeps what is stored.
        shardings: `jax.sharding.Sharding`s in a dict like the result. Given, the result is jax arrays and a process
            reads only the layers and rows its devices hold; else it is numpy arrays.
    Raises:
        HubError: no safetensors; or the full list of missing, unexpected, duplicate and misshapen tensors.
    """
    directory, weights = Path(directory), table(config)
    opened = open_shards(directory)
    problems = opened.problems | _misfits(opened, weights, config)
    stored = Counter(tensor.dtype for tensor in opened.tensors.values())
    if dtype is None and len(stored) > 1:
        problems["mixed dtype"] = [f"{n} tensors are {name}; pass the dtype to load" for name, n in stored.items()]
    raise_if_any(
        problems,
        f"{directory} does not fit the model of its config.json",
        "Nothing was loaded: take the complete checkpoint, with the config.json that belongs to it",
    )
    as_dtype = DTYPES[next(iter(stored))] if dtype is None else np.dtype(dtype)
    placed = None if shardings is None else flatten(shardings)
    params: dict[str, Any] = {}
    for weight in weights:
        for part, path in enumerate(weight.paths):
            *parents, name = path.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            if placed is None:
                (node[name],) = _read(opened.tensors, weight, part, as_dtype, [tuple(map(range, weight.shape))])
            else:
                node[name] = _read_sharded(opened.tensors, weight, part, as_dtype, placed[path])
    return params


def _misfits(opened: Opened, weights: list[Weight], config: QwenVLConfig) -> dict[str, list[str]]:
    """Where the stored tensors differ from the table."""
    tensors, lost, _ = opened
    layout = layout_of(tensors)
    expected = {key: weight.stored for weight in weights for key in weight.keys}
    problems: dict[str, list[str]] = {
        "missing key": [from_hub_key(key, layout) for key in expected if key not in tensors and key not in lost]
    }
    for kind in ("unexpected key", "wrong shape", "wrong type", "untied head"):
        problems[kind] = []
    embedding = tensors.get("model.embed_tokens.weight")
    for key, tensor in tensors.items():
        if key == "lm_head.weight" and config.text.tie_word_embeddings:
            if embedding and tensor.sha256() != embedding.sha256():
                problems["untied head"].append(f"{key} is not the embedding, config.json says tie_word_embeddings")
        elif key not in expected:
            problems["unexpected key"].append(tensor.name)
        elif tensor.shape != expected[key]:
            problems["wrong shape"].append(f"{tensor.name} is {list(tensor.shape)}, expected {list(expected[key])}")
        elif tensor.dtype not in DTYPES:
            problems["wrong type"].append(f"{tensor.name} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    return problems


def _read(
    tensors: dict[str, Tensor], weight: Weight, part: int, dtype: np.dtype, wanted: list[tuple[range, ...]]
) -> list[np.ndarray]:
    """Pieces of the `part`-th parameter of a weight, each given by the ranges of its axes. A stored row is read once,
    whoever needs it, and only if a piece does."""
    shape, keys = (weight.layers or 1, *weight.inputs, *weight.outputs), weight.keys
    cuts = [piece if weight.layers else (range(1), *piece) for piece in wanted]
    pieces = [np.empty([len(axis) for axis in cut], dtype) for cut in cuts]
    axis = 1 + len(weight.inputs)  # of the first output: a range of it is a range of stored rows
    unit = weight.stored[0] // len(weight.paths) // weight.outputs[0]  # stored rows of one output index
    step = max(1, BLOCK // (unit * prod(weight.stored[1:]) * 4))
    for layers, outputs in dict.fromkeys((cut[0], cut[axis]) for cut in cuts):
        needing = [(p, cut) for p, cut in zip(pieces, cuts, strict=True) if (cut[0], cut[axis]) == (layers, outputs)]
        for i, at in itertools.product(range(len(layers)), range(0, len(outputs), step)):
            block = outputs[at : at + step]
            first, last = (part * weight.outputs[0] + output for output in (block.start, block.stop))
            rows = tensors[keys[layers[i]]].rows(range(first * unit, last * unit))
            matrix = rows.reshape(len(block) * prod(weight.outputs[1:]), -1)
            stored = matrix.T.reshape(*weight.inputs, len(block), *shape[axis + 1 :])
            for piece, cut in needing:
                source, target = [slice(one.start, one.stop) for one in cut], [slice(None)] * len(shape)
                source[axis], target[axis] = slice(None), slice(at, at + step)
                piece[i][tuple(target[1:])] = stored[tuple(source[1:])]
    return pieces if weight.layers else [piece[0] for piece in pieces]


def _read_sharded(
    tensors: dict[str, Tensor], weight: Weight, part: int, dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
    """A parameter on the devices; a piece leaves the host's memory before the next is put."""
    places = {
        device: tuple(range(size)[cut] for size, cut in zip(weight.shape, index or (), strict=True))
        for device, index in sharding.addressable_devices_indices_map(weight.shape).items()
    }
    wanted = list(dict.fromkeys(places.values()))
    pieces, arrays = _read(tensors, weight, part, dtype, wanted), []
    for place in wanted:
        piece = pieces.pop(0)
        put = [jax.device_put(piece, device) for device, its in places.items() if its == place]
        arrays += jax.block_until_ready(put)
    return jax.make_array_from_single_device_arrays(weight.shape, sharding, arrays)


# ---------------------------------------------------------------------------------------------------------------- save


def save_params(
    directory: str | Path,
    params: dict[str, Any],
    config: QwenVLConfig,
    *,
    layout: Layout = "hub",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    max_shard_bytes: int = 5 * 2**30,
    source: str | Path | None = None,
) -> None:
    """Write a checkpoint that transformers loads: weights, config.json, and the companions of `source`.

    All is written beside `directory` and renamed at the end, so a kill leaves no half checkpoint. Peak host memory is
    one tensor beyond the parameters. These may be split over processes, all of which call this; the first one writes.

    Args:
        source: the checkpoint the parameters came from. Its config.json is kept byte for byte, but for the dtype of
            the weights where that changes; without one, a config.json is made from `config`.
    Raises:
        HubError: `directory` is in use, `params` is not the tree of `config`, or `source` is another model.
    """
    directory, weights = Path(directory), table(config)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise HubError(f"{directory} exists and is not empty; save to a new directory, or remove it first")
    leaves = flatten(params)
    expected = {path: weight.shape for weight in weights for path in weight.paths}
    problems = {
        "missing parameter": [path for path in expected if path not in leaves],
        "unexpected parameter": [path for path in leaves if path not in expected],
        "wrong shape": [
            f"{path} is {leaves[path].shape}, expected {shape}"
            for path, shape in expected.items()
            if path in leaves and tuple(leaves[path].shape) != shape
        ],
    }
    raise_if_any(problems, "the parameters do not fit their config", "Nothing was written")
    config_json = _config_json(config, dtype, None if source is None else Path(source))

    unfinished = directory.with_name(f".{directory.name}.unfinished")
    if jax.process_index() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    _write_weights(unfinished, leaves, weights, layout, np.dtype(dtype), max_shard_bytes)
    if jax.process_index():
        return
    (unfinished / "config.json").write_bytes(config_json)
    if source is not None:
        for name, file in companions(Path(source)).items():
            copy = unfinished / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    os.replace(unfinished, directory)


def _config_json(config: QwenVLConfig, dtype: str, source: Path | None) -> bytes:
    if source is None or not (source / "config.json").exists():
        return (json.dumps(to_hf(config, dtype), indent=2) + "\n").encode()
    if replace(load_config(source), dtype=config.dtype) != config:
        raise HubError(f"{source} is another model than the one to save: its config.json gives {load_config(source)}")
    stored = (source / "config.json").read_bytes()
    raw = json.loads(stored)
    # transformers loads weights in the dtype that config.json names, so it must be the one written
    named = [
        (part, field)
        for part in (raw, raw.get("text_config"), raw.get("vision_config"))
        for field in ("dtype", "torch_dtype")
        if part and part.get(field) not in (None, dtype)
    ]
    for part, field in named:
        part[field] = dtype
    return (json.dumps(raw, indent=2) + "\n").encode() if named else stored


def _write_weights(
    directory: Path, leaves: dict[str, Array], weights: list[Weight], layout: Layout, dtype: np.dtype, max_bytes: int
) -> None:
    shards: list[list[tuple[Weight, int]]] = [[]]
    filled = 0
    for weight in weights:
        size = prod(weight.stored) * dtype.itemsize
        for layer in range(weight.layers or 1):
            if shards[-1] and filled + size > max_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((weight, layer))
            filled += size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {from_hub_key(weight.keys[at], layout): (weight, at) for weight, at in shard}
        _write_shard(directory / name, tensors, leaves, dtype)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1 and jax.process_index() == 0:
        total = sum(prod(weight.stored) * len(weight.keys) for weight in weights) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(path: Path, tensors: dict[str, tuple[Weight, int]], leaves: dict[str, Array], dtype: np.dtype) -> None:
    """A safetensors file, tensor by tensor: the same bytes as the library's, which wants all of them in memory."""
    stored_as = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (weight, _) in sorted(tensors.items()):
        start, end = end, end + prod(weight.stored) * dtype.itemsize
        header[name] = {"dtype": stored_as, "shape": weight.stored, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") if jax.process_index() == 0 else nullcontext() as file:
        if file:
            file.write(len(text).to_bytes(8, "little") + text)
        for _, (weight, at) in sorted(tensors.items()):
            for rows in _stored(leaves, weight, at, dtype):
                if file:
                    file.write(rows.view(np.uint8).data)


def _stored(leaves: dict[str, Array], weight: Weight, layer: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """One tensor as the checkpoint stores it, in blocks of rows: the inverse of `_read`. Of a distributed state every
    device gets a copy of the block."""
    outputs, size = weight.outputs[0], prod(weight.inputs) * prod(weight.outputs[1:]) * 4
    step = min(outputs, max(1, BLOCK // size))
    for path in weight.paths:
        for at in range(0, outputs, step):
            block = _block(leaves[path], layer if weight.layers else None, at, step, len(weight.inputs))
            # contiguous: the file gets the buffer, whatever the strides
            yield np.ascontiguousarray(block.reshape(prod(weight.inputs), -1).T, dtype)


def _block(leaf: Array, layer: int | None, at: int, size: int, axis: int) -> np.ndarray:
    """Outputs at … at + size, or to the end, on the host; layer: of a stack."""
    before = (slice(None),) * axis
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        one = leaf if layer is None else leaf[layer]
        return np.asarray(one[(*before, slice(at, at + size))])
    start = min(at, leaf.shape[axis + (layer is not None)] - size)  # of the last block, which has the same shape
    which = None if layer is None else np.int32(layer)
    block = multihost_utils.process_allgather(_cut(leaf, which, np.int32(start), size=size, axis=axis), tiled=True)
    return block[(*before, slice(at - start, None))]


@functools.partial(jax.jit, static_argnames=("size", "axis"))
def _cut(leaf, layer, start, *, size: int, axis: int):
    """A block, split as its array is. Its place is an argument: a program for each would take more memory than it."""
    one = leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return jax.lax.dynamic_slice_in_dim(one, start, size, axis)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": leaf}} → {"a/b": leaf}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
