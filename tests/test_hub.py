"""Checkpoints against transformers' own files: conversion loses nothing, and a bad checkpoint never loads."""

import json
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from gvl_jax.config import Mesh as MeshShape
from gvl_jax.models.qwen_vl import hub
from gvl_jax.models.qwen_vl.config import from_hf, to_hf
from gvl_jax.models.qwen_vl.hub import HubError, load_config, load_params, save_params
from gvl_jax.models.qwen_vl.keys import table
from gvl_jax.models.qwen_vl.model import abstract_params
from gvl_jax.sharding import make_mesh, shardings
from gvl_jax.verify import compare_tensors

LAYOUTS = ("hub", "transformers5")

# The published config.json of Qwen2.5-VL-3B-Instruct, and what the 7B changes.
PUBLISHED_3B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
PUBLISHED_7B = PUBLISHED_3B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vision_config": PUBLISHED_3B["vision_config"] | {"out_hidden_size": 3584},
    "vocab_size": 152064,
}


def tiny_model(tied: bool, dtype: torch.dtype, vocab_size: int = 96) -> Qwen2_5_VLForConditionalGeneration:
    """Every parameter random (transformers leaves biases 0 and scales 1), every width different from the others."""
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
            bos_token_id=None,
            eos_token_id=None,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=24,
            intermediate_size=20,
            num_heads=2,
            out_hidden_size=32,
            fullatt_block_indexes=[1],
            window_size=56,
        ),
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(tied, dtype, layout, sharded) → a directory that transformers saved, with companions."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(tied=False, dtype="float32", layout="hub", sharded=False):
        directory = root / f"{tied}-{dtype}-{layout}-{sharded}"
        if not directory.exists():
            tiny_model(tied, getattr(torch, dtype)).save_pretrained(
                directory, save_original_format=layout == "hub", max_shard_size="20KB" if sharded else "1GB"
            )
            for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "added_tokens.json"):
                (directory / name).write_text(f"é {name}\r\n")
            (directory / "additional_chat_templates").mkdir()
            (directory / "additional_chat_templates" / "tool.jinja").write_text("tool")
            (directory / "optimizer.pt").write_bytes(b"not part of a checkpoint")
        return directory

    return get


def stored(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes())


# -------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_byte_equal_in_both_layouts(checkpoint, tmp_path, tied, layout, dtype, sharded):
    source = checkpoint(tied, dtype, layout, sharded)
    config = load_config(source)
    params = load_params(source, config)
    limit = 20_000 if sharded else 2**30
    for target_layout in LAYOUTS:
        target = tmp_path / target_layout
        save_params(target, params, config, layout=target_layout, dtype=dtype, max_shard_bytes=limit, source=source)
        assert_same_bytes(stored(target), stored(checkpoint(tied, dtype, target_layout)))
        assert compare_tensors(source, target)[1] == []
        assert hub.detect_layout(target) == target_layout
        assert (len(list(target.glob("*.safetensors"))) > 1) == sharded
        assert (target / "model.safetensors.index.json").exists() == sharded
        for shard in map(load_file, target.glob("*.safetensors")):
            assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= limit


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_we_save(checkpoint, tmp_path, tied, layout, sharded, with_source):
    source = checkpoint(tied)
    config = load_config(source)
    save_params(
        tmp_path / "saved",
        load_params(source, config),
        config,
        layout=layout,
        dtype="float32",
        max_shard_bytes=20_000 if sharded else 2**30,
        source=source if with_source else None,
    )
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    expected = tiny_model(tied, torch.float32).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_tree_is_the_model_s(checkpoint, tied):
    config = load_config(checkpoint(tied))
    loaded = hub.flatten(load_params(checkpoint(tied), config))
    expected = hub.flatten(abstract_params(config))
    assert {path: leaf.shape for path, leaf in loaded.items()} == {path: leaf.shape for path, leaf in expected.items()}


def test_loaded_kernels_compute_what_torch_s_do(checkpoint):
    model, params = tiny_model(False, torch.float32), load_params(checkpoint(), load_config(checkpoint()))
    block, layer = model.model.visual.blocks[1], model.model.language_model.layers[2]
    x, y = torch.randn(5, 24), torch.randn(5, 32)
    with torch.no_grad():
        qkv = block.attn.qkv(x).reshape(5, 3, 2, 12).numpy()
        out = layer.self_attn.o_proj(y).numpy()
        patches = torch.randn(5, 3 * 2 * 14 * 14)
        embedded = model.model.visual.patch_embed(patches).numpy()
    for i, name in enumerate("qkv"):
        ours = params["visual"]["blocks"][name]
        got = np.einsum("te,enh->tnh", x.numpy(), ours["kernel"][1]) + ours["bias"][1]
        np.testing.assert_allclose(got, qkv[:, i], atol=1e-5)
    got = np.einsum("tnh,nhd->td", y.numpy().reshape(5, 4, 8), params["text"]["layers"]["o"]["kernel"][2])
    np.testing.assert_allclose(got, out, atol=1e-5)
    np.testing.assert_allclose(patches.numpy() @ params["visual"]["patch_embed"]["kernel"], embedded, atol=1e-4)


def test_parameters_of_one_shape_are_not_confused(checkpoint):
    """Norms, gate and up, k and v: a swap would keep every shape and every round trip."""
    params = hub.flatten(load_params(checkpoint(), load_config(checkpoint())))
    tensors = stored(checkpoint())
    for ours, theirs in {
        "visual/blocks/norm1/scale": "visual.blocks.1.norm1.weight",
        "visual/blocks/norm2/scale": "visual.blocks.1.norm2.weight",
        "visual/blocks/gate/kernel": "visual.blocks.1.mlp.gate_proj.weight",
        "visual/blocks/gate/bias": "visual.blocks.1.mlp.gate_proj.bias",
        "visual/blocks/up/kernel": "visual.blocks.1.mlp.up_proj.weight",
        "visual/blocks/up/bias": "visual.blocks.1.mlp.up_proj.bias",
        "visual/blocks/o/bias": "visual.blocks.1.attn.proj.bias",
        "visual/blocks/down/bias": "visual.blocks.1.mlp.down_proj.bias",
        "text/layers/norm1/scale": "model.layers.1.input_layernorm.weight",
        "text/layers/norm2/scale": "model.layers.1.post_attention_layernorm.weight",
        "text/layers/k/kernel": "model.layers.1.self_attn.k_proj.weight",
        "text/layers/k/bias": "model.layers.1.self_attn.k_proj.bias",
        "text/layers/v/kernel": "model.layers.1.self_attn.v_proj.weight",
        "text/layers/v/bias": "model.layers.1.self_attn.v_proj.bias",
        "text/layers/gate/kernel": "model.layers.1.mlp.gate_proj.weight",
        "text/layers/up/kernel": "model.layers.1.mlp.up_proj.weight",
    }.items():
        leaf = params[ours][1]
        leaf = leaf.reshape(len(leaf), -1).T if ours.endswith("kernel") else leaf
        np.testing.assert_array_equal(leaf.ravel(), tensors[theirs].ravel(), err_msg=ours)


@pytest.mark.parametrize(("published", "count"), [(PUBLISHED_3B, 3_754_622_976), (PUBLISHED_7B, 8_292_166_656)])
def test_table_has_the_published_number_of_parameters(published, count):
    weights = table(from_hf(published))
    assert sum(int(np.prod(weight.stored)) * len(weight.keys) for weight in weights) == count
    assert sum(int(np.prod(weight.shape)) * len(weight.paths) for weight in weights) == count


def test_dtype_is_cast_on_load_and_on_save(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BLOCK", 1000)  # a few rows at a time, also of a layer
    source = checkpoint(dtype="bfloat16")
    config = load_config(source)
    kept, wide = load_params(source, config), load_params(source, config, "float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype(ml_dtypes.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, kept, wide)
    save_params(tmp_path / "narrow", jax.tree.map(jax.numpy.asarray, wide), config, source=source)
    assert compare_tensors(source, tmp_path / "narrow")[1] == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reading_a_slice_equals_slicing_the_whole(checkpoint, data):
    source = checkpoint()
    whole = hub.flatten(load_params(source, load_config(source)))
    weight = data.draw(st.sampled_from(table(load_config(source))))
    part = data.draw(st.integers(0, len(weight.paths) - 1))
    cuts = []
    for size in weight.shape:
        first = data.draw(st.integers(0, size - 1))
        cuts.append(range(first, data.draw(st.integers(first + 1, size))))
    tensors, everything = hub.open_shards(source).tensors, [range(size) for size in weight.shape]
    wanted = [tuple(cuts), (everything[0], *cuts[1:])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "BLOCK", data.draw(st.sampled_from([1, 1000, 2**20])))
        pieces = hub._read(tensors, weight, part, np.dtype(np.float32), wanted)
    for got, cut in zip(pieces, wanted, strict=True):
        np.testing.assert_array_equal(got, whole[weight.paths[part]][tuple(slice(r.start, r.stop) for r in cut)])


def test_sharded_arrays_equal_numpy(checkpoint):
    source = checkpoint(layout="transformers5", sharded=True)
    config = load_config(source)
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    by_last_axis = {
        path: NamedSharding(mesh, PartitionSpec(*[None] * (len(leaf.shape) - 1), "fsdp"))
        for path, leaf in hub.flatten(abstract_params(config)).items()
    }
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, _: by_last_axis["/".join(key.key for key in path)], abstract_params(config)
    )
    placed = load_params(source, config, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, load_params(source, config))
    assert placed["text"]["layers"]["q"]["kernel"].sharding == by_last_axis["text/layers/q/kernel"]


def test_host_memory_is_the_parameters_and_one_tensor(tmp_path):
    tiny_model(True, torch.bfloat16, vocab_size=40_000).save_pretrained(tmp_path / "source")
    config = load_config(tmp_path / "source")
    largest = 40_000 * 32 * 2
    load_params(tmp_path / "source", config)  # imports and caches
    tracemalloc.start()
    params = load_params(tmp_path / "source", config)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    _, peak = tracemalloc.get_traced_memory()
    assert size > largest and peak < size + largest + 200_000

    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    save_params(tmp_path / "saved", params, config, max_shard_bytes=100_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < held + largest + 200_000


def test_a_host_reads_the_rows_of_its_devices_once_and_holds_its_shards_and_one_tensor(tmp_path, monkeypatch):
    """Four of eight devices, as of the first of two processes. Counted: bytes read, and what numpy allocates."""
    tiny_model(False, torch.float32, vocab_size=20_000).save_pretrained(tmp_path)
    config, block, read = load_config(tmp_path), 100_000, []
    placed = shardings(make_mesh(MeshShape(fsdp=8)), abstract_params(config))

    class FirstHost:
        def __init__(self, sharding):
            self.sharding = sharding

        def addressable_devices_indices_map(self, shape):
            everywhere = self.sharding.devices_indices_map(shape).items()
            return {device: index for device, index in everywhere if device.id < 4}

    def fromfile(file, dtype, count, offset):
        read.append((file, offset, offset + count))
        return numpys(file, dtype, count, offset=offset)

    numpys = np.fromfile
    monkeypatch.setattr(np, "fromfile", fromfile)
    monkeypatch.setattr(hub, "BLOCK", block)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, sharding, arrays: arrays)
    tracemalloc.start()
    arrays = hub.flatten(load_params(tmp_path, config, shardings=jax.tree.map(FirstHost, placed)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    needed, flat = 0, hub.flatten(placed)
    for weight in table(config):
        for path in weight.paths:
            axes = (*flat[path].spec, *[None] * len(weight.shape))
            share = 2 if axes[bool(weight.layers) + len(weight.inputs)] else 1  # are stored rows split?
            needed += int(np.prod(weight.shape)) * 4 // share
    assert (
        sum(last - first for _, first, last in read) == needed < 0.99 * (tmp_path / "model.safetensors").stat().st_size
    )
    assert len(set(read)) == len(read) and max(last - first for _, first, last in read) <= block
    shards = sum(array.nbytes for leaf in arrays.values() for array in leaf)
    assert peak < shards + 20_000 * 32 * 4 + 200_000


def test_saving_takes_a_few_rows_of_an_embedding_at_a_time(checkpoint, monkeypatch):
    config, tensors, block = load_config(checkpoint()), stored(checkpoint()), 2000
    monkeypatch.setattr(hub, "BLOCK", block)
    leaves = hub.flatten(load_params(checkpoint(), config))
    for weight in table(config):
        blocks = list(hub._stored(leaves, weight, 0, np.dtype(np.float32)))
        if weight.key in ("model.embed_tokens.weight", "lm_head.weight"):
            assert len(blocks) > 1 and max(some.nbytes for some in blocks) <= block
        content = np.concatenate([some.ravel() for some in blocks])
        np.testing.assert_array_equal(content, tensors[weight.keys[0]].ravel())


# ---------------------------------------------------------------------------------------------------------- strictness


def test_every_misfit_is_listed_at_once(checkpoint, tmp_path):
    directory = tmp_path / "broken"
    shutil.copytree(checkpoint(layout="transformers5", sharded=True), directory)
    config = load_config(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    owner = index["weight_map"]
    shards = sorted(set(owner.values()))

    def rewrite(shard, change):
        tensors = load_file(directory / shard)
        change(tensors)
        save_file(tensors, directory / shard)

    visual = "model.visual.blocks.0.norm1.weight"
    missing, reshaped, quantized = (f"model.language_model.layers.{i}.input_layernorm.weight" for i in range(3))
    rewrite(owner[missing], lambda tensors: tensors.pop(missing))
    rewrite(owner[reshaped], lambda tensors: tensors.update({reshaped: np.zeros((4, 8), np.float32)}))
    rewrite(owner[quantized], lambda tensors: tensors.update({quantized: np.zeros(32, np.int8)}))
    twice = next(shard for shard in shards if shard != owner[visual])
    rewrite(twice, lambda tensors: tensors.update({visual: np.zeros(24, np.float32)}))
    rewrite(owner[visual], lambda tensors: tensors.update({"model.visual.extra": np.zeros(1, np.float32)}))
    lost = owner["lm_head.weight"]
    (directory / lost).unlink()
    owner["model.language_model.norm.weight"] = "../elsewhere.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(HubError) as error:
        load_params(directory, config)
    text = str(error.value)
    headline, *lines = text.splitlines()
    assert "1 missing key," in headline and "1 wrong shape," in headline and "2 unreadable shards" in headline
    for line in (
        f"  missing key: {missing}",
        "  unexpected key: model.visual.extra",
        f"  wrong shape: {reshaped} is [4, 8], expected [32]",
        f"  wrong type: {quantized} is I8, expected one of F32, BF16, F16",
        f"  misindexed key: {missing} is not in {owner[missing]}, index says {owner[missing]}",
    ):
        assert line in lines
    assert any(line.startswith("  duplicate key:") and line.count(visual) == 2 for line in lines)
    assert any(line.startswith(f"  unreadable shard: {lost}, ") and "No such file" in line for line in lines)
    assert any("../elsewhere.safetensors, 1 tensors (not a plain file name)" in line for line in lines)


def test_checkpoint_of_another_size_lists_every_shape(checkpoint):
    config = load_config(checkpoint())
    smaller = from_hf(to_hf(config, "float32") | {"num_hidden_layers": 2, "intermediate_size": 40})
    with pytest.raises(HubError, match=r"12 unexpected keys, 6 wrong shapes\."):
        load_params(checkpoint(), smaller)


def test_the_same_tensor_under_both_names_is_a_duplicate(checkpoint, tmp_path):
    tensors = stored(checkpoint())
    tensors["model.visual.merger.ln_q.weight"] = tensors["visual.merger.ln_q.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HubError, match="1 duplicate key"):
        load_params(tmp_path, load_config(checkpoint()))


def test_a_tied_head_may_be_stored_only_as_a_copy(checkpoint, tmp_path):
    source = checkpoint(tied=True)
    config, tensors = load_config(source), stored(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "head" not in load_params(tmp_path, config)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HubError, match="1 untied head"):
        load_params(tmp_path, config)


def test_an_untied_head_must_be_stored(checkpoint):
    config = load_config(checkpoint(tied=False))
    with pytest.raises(HubError, match="missing key: lm_head.weight"):
        load_params(checkpoint(tied=True), config)


def test_mixed_dtypes_need_a_dtype(checkpoint, tmp_path):
    config, tensors = load_config(checkpoint()), stored(checkpoint())
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HubError, match="1 tensors are BF16; pass the dtype"):
        load_params(tmp_path, config)
    assert load_params(tmp_path, config, "float32")["text"]["norm"]["scale"].dtype == np.float32


def test_a_truncated_file_is_named(checkpoint, tmp_path):
    data = (checkpoint() / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(HubError, match=r"unreadable shard: model\.safetensors"):
        load_params(tmp_path, load_config(checkpoint()))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "found: no weights"),
        (["pytorch_model.bin"], r"found: pytorch_model\.bin.*save_pretrained"),
        (["adapter_model.safetensors"], r"found: adapter_model\.safetensors.*merge an adapter"),
        (["model.safetensors", "model.safetensors.index.json"], "either .* delete whichever"),
        (["model.safetensors.index.json"], r"index\.json is not JSON: got 0 bytes.*Fetch the file again"),
    ],
)
def test_a_directory_without_one_set_of_safetensors_says_what_it_holds(checkpoint, tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(HubError, match=message):
        load_params(tmp_path, load_config(checkpoint()))


def test_a_missing_or_foreign_config_is_named(tmp_path):
    with pytest.raises(HubError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HubError, match=r"config\.json is not JSON: got 1 bytes, Expecting"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(HubError, match="model_type is 'qwen3_vl'; only 'qwen2_5_vl'"):
        load_config(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"min_pixels": 3136,', r"preprocessor_config\.json is not JSON: got 20 bytes.*Fetch the file again"),
        ("[]", "got a JSON list, expected an object"),
        ('{"size": {"shortest_edge": "3136"}}', "min_pixels '3136' and max_pixels .* correct the file"),
        ('{"min_pixels": 100, "max_pixels": 10}', "expected 0 < min <= max"),
    ],
)
def test_bad_image_bounds_name_the_file_and_what_to_do(tmp_path, content, message):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(HubError, match=message):
        hub.image_bounds(tmp_path)


def test_companions_travel_unchanged_and_nothing_else_does(checkpoint, tmp_path):
    source = checkpoint()
    config = load_config(source)
    save_params(tmp_path / "out", load_params(source, config), config, dtype="float32", source=source)

    def files(directory):
        return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}

    assert files(tmp_path / "out") == files(source) - {"optimizer.pt"}
    assert len({file.stat().st_mode for file in (tmp_path / "out").glob("*.*")}) == 1  # readable by the same people
    for name in files(tmp_path / "out") - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_config_keeps_everything_but_the_dtype(checkpoint, tmp_path):
    source = checkpoint(dtype="bfloat16")
    config = load_config(source)
    save_params(tmp_path / "out", load_params(source, config), config, dtype="float32", source=source)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out"))
    assert before["dtype"] == "bfloat16" and after["dtype"] == "float32"
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == torch.float32
    for part in (before, before["text_config"], before["vision_config"]):
        part.update({"dtype": "float32"} if "dtype" in part else {})
    assert before == after


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shard_has_the_bytes_that_the_library_writes(checkpoint, tmp_path, dtype):
    source = checkpoint()
    config = load_config(source)
    save_params(tmp_path / "out", load_params(source, config), config, dtype=dtype, max_shard_bytes=20_000)
    for file in (tmp_path / "out").glob("*.safetensors"):
        save_file(load_file(file), tmp_path / "theirs", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_an_interrupted_save_leaves_no_checkpoint_and_can_be_repeated(checkpoint, tmp_path, monkeypatch):
    source = checkpoint()
    config = load_config(source)
    params = load_params(source, config)
    write, written = hub._write_shard, []

    def die_at_the_third(path, *what):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(path, *what)

    monkeypatch.setattr(hub, "_write_shard", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        save_params(tmp_path / "out", params, config, max_shard_bytes=20_000)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    save_params(tmp_path / "out", params, config, dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert compare_tensors(source, tmp_path / "out")[1] == []


def test_saving_refuses_a_used_directory_a_wrong_tree_and_another_model(checkpoint, tmp_path):
    source = checkpoint()
    config = load_config(source)
    params = load_params(source, config)
    with pytest.raises(HubError, match="exists and is not empty"):
        save_params(source, params, config)
    wrong = params | {"head": {"kernel": params["head"]["kernel"].T}, "extra": np.zeros(1)}
    del wrong["visual"]
    with pytest.raises(HubError) as error:
        save_params(tmp_path / "out", wrong, config)
    assert "1 unexpected parameter, 1 wrong shape" in str(error.value)
    assert "missing parameter: visual/merger/fc2/bias" in str(error.value)
    assert "head/kernel is (96, 32), expected (32, 96)" in str(error.value)
    with pytest.raises(HubError, match="another model"):
        save_params(tmp_path / "out", params, config, source=checkpoint(tied=True))
    assert not list(tmp_path.iterdir())


def test_verify_names_every_difference(checkpoint, tmp_path):
    tensors = stored(checkpoint())
    tensors["model.norm.weight"][3] = -0.0 if tensors["model.norm.weight"][3] == 0 else 0
    tensors["more"] = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    _, (first, second, third) = compare_tensors(checkpoint(layout="transformers5", sharded=True), tmp_path)
    assert first.startswith("lm_head.weight: only in") and second.startswith("more: only in")
    assert third.startswith("model.norm.weight: F32 [32] sha256 ")


def test_resolve_takes_directories_and_explains_what_it_cannot_fetch(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name, revision, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert hub.resolve(tmp_path) == tmp_path
    with pytest.raises(HubError, match="is not a directory; expected"):
        hub.resolve(tmp_path / "none")
    with pytest.raises(HubError, match="belongs to a hub id"):
        hub.resolve(tmp_path, revision="main")
    with pytest.raises(HubError, match=r"LocalEntryNotFoundError: no network\).*pass its directory"):
        hub.resolve("owner/name")


# --------------------------------------------------------------------------------------------------------------- config


def test_published_flat_config_and_transformers_nested_one_agree(tmp_path):
    for published in (PUBLISHED_3B, PUBLISHED_7B):
        flat = from_hf(published)
        Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(published))).save_pretrained(tmp_path)
        nested = json.loads((tmp_path / "config.json").read_text())
        assert "text_config" in nested and "rope_parameters" in nested["text_config"]
        assert from_hf(nested) == flat
    assert from_hf(PUBLISHED_3B).text.head_dim == 128
    assert from_hf(PUBLISHED_3B).vision.patch_dim == 1176
    assert from_hf(PUBLISHED_7B).text.tie_word_embeddings is False


def test_fields_that_older_writers_left_out_have_transformers_defaults():
    sparse = {"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl", "tokens_per_second": 2}
    assert from_hf(PUBLISHED_7B | {"vision_config": sparse}) == from_hf(PUBLISHED_7B)


def test_written_config_reads_back(checkpoint):
    config = from_hf(PUBLISHED_3B)
    assert from_hf(to_hf(config, "bfloat16")) == config
    theirs = Qwen2_5_VLConfig.from_dict(to_hf(config, "bfloat16"))
    assert theirs.dtype == torch.bfloat16
    assert from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"hidden_act": "gelu"}, "text.hidden_act is 'gelu', implemented: 'silu'"),
        ({"vision_config": PUBLISHED_3B["vision_config"] | {"hidden_act": "quick_gelu"}}, "vision_config.hidden_act"),
        ({"vision_config": PUBLISHED_3B["vision_config"] | {"patch_size": [14, 14]}}, "vision_config.patch_size"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"use_sliding_window": True, "max_window_layers": 20}, "use_sliding_window"),
        ({"layer_types": ["full_attention"] * 35 + ["sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"head_dim": 64}, "head_dim is 64, implemented: 128"),
        ({"num_hidden_layers": "36"}, "num_hidden_layers is '36'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}}, "rope factor is 4.0"),
        ({"rope_scaling": {"rope_type": "linear", "mrope_section": [16, 24, 24]}}, "rope_type is 'linear'"),
        ({"rope_scaling": None}, "mrope_section is missing"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 16]}}, "half of head_dim 128"),
        ({"num_key_value_heads": 3}, "cannot share 3 key heads"),
        ({"num_attention_heads": 15}, "is not hidden_size 2048"),
        ({"vision_config": PUBLISHED_3B["vision_config"] | {"out_hidden_size": 1024}}, "out_hidden_size 1024"),
        ({"vision_config": PUBLISHED_3B["vision_config"] | {"window_size": 100}}, "window_size 100"),
        ({"vision_config": PUBLISHED_3B["vision_config"] | {"depth": 16}}, "outside the 16 blocks"),
        ({"vision_config": PUBLISHED_3B["vision_config"] | {"num_heads": 15}}, "vision hidden_size 1280"),
    ],
)
def test_what_the_model_does_not_implement_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf(PUBLISHED_3B | change)


def test_all_unsupported_fields_are_named_together():
    with pytest.raises(ValueError, match="hidden_act.*mlp_bias.*sliding_attention"):
        from_hf(PUBLISHED_3B | {"hidden_act": "gelu", "mlp_bias": True, "layer_types": ["sliding_attention"]})


def test_sliding_window_beyond_the_last_layer_is_full_attention():
    assert from_hf(PUBLISHED_3B | {"use_sliding_window": True}) == from_hf(PUBLISHED_3B)
