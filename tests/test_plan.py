"""Plans for TPU slices: reading HLO, advice, shapes in place of arrays, and a small model through the real compiler."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from gvl_jax import plan, programs
from gvl_jax.bench.inputs import _shape
from gvl_jax.config import ConfigError, Mesh, Rl, Sft
from gvl_jax.data.packing import Layout, blank
from gvl_jax.hlo import Collective, collectives
from gvl_jax.models.qwen_vl.config import to_hf
from gvl_jax.sharding import abstract, make_mesh, place, shardings

AXES, SIZES = ("data", "fsdp", "tensor"), (2, 4, 1)
GIB = 2**30

HLO = """\
HloModule jit_accumulate, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %splash.1 = f32[256,128]{1,0} custom-call(%x), frontend_attributes={kernel_metadata={
"block_q":"512"
}}, metadata={op_name="splash"}
  %all-gather.1 = bf16[1,2048,11008]{2,1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}
  %reduce_scatter.1 = f32[512,11008]{1,0} reduce-scatter(%y), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add.1
}

%condition.1 (p: (s32[], f32[4])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(36)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.7), direction=LT
}

%open (p: (s32[], f32[4])) -> pred[] {
  %constant.8 = s32[] constant(64)
  ROOT %and = pred[] and(%lt, %ne)
}

%drawing (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce-start.3 = f32[10]{0} all-reduce-start(%z), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add.1
}

%fused (q: f32[4]) -> f32[4] {
  %all-gather-start.2 = (f32[4]{0}, f32[16]{0}) all-gather-start(%q), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%nobody (q: f32[4]) -> f32[4] {
  %all-reduce.9 = f32[99]{0} all-reduce(%q), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add.1
}

ENTRY %main.1 (p0: f32[4]) -> f32[4] {
  %while.1 = (s32[], f32[4]) while(%t), condition=%condition.1, body=%body.1
  %while.2 = (s32[], f32[4]) while(%t), condition=%open, body=%drawing
  %fusion.1 = f32[4] fusion(%q), kind=kCustom, calls=%fused
  %all-reduce.2 = (f32[2048,32]{1,0}, f32[]) all-reduce(%g, %l), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add.1
}
"""  # noqa: E501


def found(kind: str, times: int) -> Collective:
    (one,) = [one for one in collectives(HLO, AXES, SIZES) if (one.kind, one.times) == (kind, times)]
    return one


def test_a_collective_counts_as_often_as_its_scan_turns():
    assert len(collectives(HLO, AXES, SIZES)) == 5  # %nobody is not called
    weight = found("all-gather", 36)
    assert weight == Collective("all-gather", ("fsdp",), 2048 * 11008 * 2, 2048 * 11008, 36, 0.75 * 2048 * 11008 * 2)


def test_a_reduce_scatter_is_measured_by_what_goes_in():
    gradient = found("reduce-scatter", 36)
    assert (gradient.axes, gradient.size, gradient.largest) == (("fsdp",), 2048 * 11008 * 4, 2048 * 11008)


def test_an_asynchronous_gather_is_measured_by_its_result():
    assert found("all-gather", 1).size == 16 * 4


def test_groups_in_either_notation_name_the_axes_of_the_mesh():
    both = [one.axes for one in collectives(HLO, AXES, SIZES) if one.kind == "all-reduce"]
    assert sorted(both) == [("data",), ("data", "fsdp")]


def test_a_loop_that_ends_when_the_slots_are_done_counts_once():
    assert [one.times for one in collectives(HLO, AXES, SIZES) if one.size == 40] == [1]


def test_all_reduces_of_whole_matrices_over_fsdp_are_refused_and_those_over_data_are_not():
    def over(*axes: str, largest: int) -> Collective:
        return Collective("all-reduce", axes, 4 * largest, largest, 36, 1.0)

    assert not plan.refused([over("data", largest=10**7), over("data", "fsdp", largest=99)], 100)
    assert "36 all-reduces over fsdp of whole matrices, the largest 100 values" in plan.refused(
        [over("fsdp", largest=100)], 100
    )
    assert plan.refused([over("data", "fsdp", largest=100)], 100)


def test_the_compilers_out_of_memory_gives_bytes_and_another_error_is_raised():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.50G of 15.75G hbm. Exceeded …"
    assert plan.out_of_memory("XLA:TPU compile permanent error. " + message, GIB) == int(33.5 * GIB)
    message = (
        "RESOURCE_EXHAUSTED: … the total memory required for HLO temporaries (42.50G) exceeds available HBM (15.75G)."
    )
    assert plan.out_of_memory(message, GIB) == int(43.5 * GIB)
    with pytest.raises(RuntimeError, match="the compiler failed: INTERNAL: Mosaic"):
        plan.out_of_memory("INTERNAL: Mosaic failed\nmore", 0)


def short_of(arguments: float, temporaries: float, held: float = 0, name: str = "accumulate", limit: float = 16):
    sizes = [int(size * GIB) for size in (held, arguments, temporaries, arguments + temporaries + held, limit)]
    return plan.Plan(name, *sizes, 0, 0, 1.0, 1.0, (0.0, 0.0), [], "does not fit")


def test_advice_names_flags_with_values_that_fit():
    said = plan.advice(Sft(rows=8), short_of(4, 24), "rows", 16, (2048, 1280))
    assert said == ["--rows 4: 24.0 GiB of temporaries grow with rows, now 8"]
    said = plan.advice(Sft(rows=2, remat="none"), short_of(20, 4, 8), "rows", 16, (2048, 1280))
    assert said[0] == "--mesh.fsdp 4: weights and optimizer take 28.0 GiB a chip"
    assert said[1].startswith("--remat layers")


def test_advice_takes_divisors_of_the_prompts_of_an_update():
    said = plan.advice(Rl(rows=32), short_of(2, 40), "rows", 4, (2048, 1280))
    assert said[0].startswith("--rows 8:")


def test_advice_for_one_row_is_smaller_buckets_and_at_last_a_larger_slice():
    said = plan.advice(Sft(rows=1), short_of(4, 40), "rows", 1, (2048, 1280))
    assert said == ["--buckets.patches 4096 16384: pictures of a micro-batch, now up to 65536"]
    said = plan.advice(Sft(), short_of(20, 1, name="update"), None, 1, (2048, 1280))
    assert said == ["a slice with more chips, or a generation with more memory"]


def test_fsdp_is_never_proposed_wider_than_a_tile_or_what_does_not_divide():
    said = plan.advice(Sft(), short_of(100, 1, name="update"), None, 64, (2048, 1280))
    assert said[0].startswith("--mesh.fsdp 16:")


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_abstract_rows_are_placed_as_real_ones(shape):
    mesh = make_mesh(Mesh(*shape))
    batch = blank(2, 16, 64, Layout(90, (64,), 112, (1, 2, 3)))
    parts = mesh.size // mesh.shape["tensor"]
    real, shapes = place(mesh, [batch] * parts), abstract(mesh, batch)
    assert jax.tree.structure(real) == jax.tree.structure(shapes)
    for array, shape_of_it in zip(jax.tree.leaves(real), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype) == (shape_of_it.shape, shape_of_it.dtype)
        assert array.sharding == shape_of_it.sharding


def test_bytes_of_one_chip_are_those_of_its_shards():
    mesh = make_mesh(Mesh(1, 4, 2))
    tree = {"q": {"kernel": np.zeros((3, 16, 4, 8), np.float32)}, "norm": {"scale": np.zeros((3, 16), np.float32)}}
    placed = jax.tree.map(jax.device_put, tree, shardings(mesh, tree))
    expected = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(placed))
    assert programs.bytes_of(programs.shaped(mesh, tree)) == expected == 3 * 16 * 4 * 8 * 4 // 8 + 3 * 16 * 4


def test_a_model_that_is_not_here_is_known_by_its_name():
    assert plan.model_of(Sft(model="Qwen/Qwen2.5-VL-3B-Instruct"))[0].text.num_hidden_layers == 36
    assert plan.model_of(Rl(model="runs/7b/sft/model"))[0].text.hidden_size == 3584
    with pytest.raises(ConfigError, match="neither 3B nor 7B"):
        plan.model_of(Sft(model="Qwen/Qwen2.5-VL-72B-Instruct"))


def test_a_topology_is_checked_before_anything_is_compiled(monkeypatch):
    with pytest.raises(ConfigError, match="expected v5e:…, v5p:…, v6e:…"):
        plan.topology_devices("h100:8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'jax\[tpu\]'"):
        plan.topology_devices("v5e:2x2")


def test_a_program_that_is_not_there_is_no_plan_that_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "topology_devices", lambda topology: jax.devices())
    file = tmp_path / "sft.yaml"
    file.write_text("model: some-3B\n")
    with pytest.raises(ConfigError, match="--only acumulate: .* expected some of accumulate, update"):
        plan.main([str(file), "--topology", "v5e:2x4", "--only", "acumulate"])
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--topology", "v5e:2x4", "--mesh.fsdp", "8", str(file)])
    assert "CFG, the config file, comes first" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- with the compiler for TPUs

COMPILED = {
    "sft": ["--rows", "2", "--max-length", "512", "--only", "accumulate"],
    "rl": ["--prompts", "2", "--rows", "2", "--group-size", "2", "--buckets.prompt", "256",
           "--buckets.completion", "128", "--sampling.max-new-tokens", "128",
           "--only", "prefill", "decode", "accumulate"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'")
@pytest.mark.parametrize("stage", COMPILED)
def test_two_layers_on_four_chips_fit_donate_and_sum_no_whole_matrix(stage, tmp_path):
    shape = _shape(512, 1024, 2, (4, 2), (2, 256, 512, 4), vocabulary=4096)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(replace(shape, dtype="bfloat16"), "bfloat16")))
    (tmp_path / f"{stage}.yaml").write_text("train: [none.jsonl]\n")
    written = tmp_path / "plan.json"
    command = [sys.executable, "-m", "gvl_jax.cli", "plan", str(tmp_path / f"{stage}.yaml"), "--topology", "v5e:2x2"]
    command += ["--model", str(tmp_path), "--mesh.fsdp", "2", "--buckets.patches", "256", "--json", str(written)]
    done = subprocess.run([*command, *COMPILED[stage]], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    programs = {one["name"].split()[0]: one for one in json.loads(written.read_text())["programs"]}
    assert set(programs) == ({"accumulate"} if stage == "sft" else {"prefill", "decode", "accumulate"})
    for name, one in programs.items():
        assert one["peak"] < GIB // 2, (name, one["peak"])
        assert one["donated"] >= one["to_donate"], name
        assert (one["to_donate"] > 0) == (name != "prefill")
    gathered = [one for one in programs["accumulate"]["collectives"] if one["kind"] == "all-gather"]
    assert sum(one["times"] for one in gathered) >= 2 * (7 + 7)  # seven matrices of each layer of each tower
    assert not plan.refused([Collective(**one) for one in programs["accumulate"]["collectives"]], 256 * 128)
