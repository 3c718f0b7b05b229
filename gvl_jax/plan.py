"""`gvl plan`: does a configuration fit on a TPU slice? The stage's own jitted functions are compiled, without a TPU.

libtpu's compiler runs on an ordinary machine against the description of a topology; nothing is allocated, all arguments
are shapes. It knows memory and communication exactly. It does not know time: the bound here is arithmetic.
"""

import argparse
import functools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax

from gvl_jax.bench.inputs import SIZES
from gvl_jax.config import ConfigError, Rl, Sft
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.guard.prompt import instruction_ids
from gvl_jax.hlo import Collective, collectives
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.models.qwen_vl.hub import load_config
from gvl_jax.programs import Program, Stage, bytes_of, rl_programs, sft_programs, stage_of
from gvl_jax.settings import load
from gvl_jax.sharding import AXES, make_mesh, replicated

GIB = 2**30
INSTRUCTION = 108  # tokens of the instruction, where no tokenizer is at hand to count them
LANES = 128  # a TPU's tile: with parts narrower than this XLA sums whole matrices in place of gathering them


class Chip(NamedTuple):
    """A generation. Source: Cloud TPU's pages of each; HBM: what the compiler lets a program use."""

    hbm: float  # GiB
    flops: float  # per second, bfloat16
    hbm_rate: float  # bytes per second
    ici_rate: float  # bytes per second, all links of a chip together


CHIPS = {
    "v5e": Chip(15.75, 197e12, 819e9, 200e9),
    "v5p": Chip(95.74, 459e12, 2765e9, 600e9),
    "v6e": Chip(31.25, 918e12, 1640e9, 448e9),
}
REACHED = Chip(1.0, 0.5, 0.8, 0.5)  # shares of these rates that the bound assumes


class Plan(NamedTuple):
    """What the compiler says of one program, in bytes per chip."""

    name: str
    held: int
    arguments: int
    temporaries: int
    peak: int  # of the program, and what is held
    limit: int
    donated: int
    to_donate: int  # bytes whose donation was asked for
    compile_seconds: float
    flops: float
    bound: tuple[float, float]  # seconds: all at once, one after the other
    collectives: list[Collective]
    problem: str = ""  # why it cannot be used
    advice: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------- what they need


def compiled(program: Program, chip: Chip, matrix: int) -> Plan:
    """Compile one program. matrix: elements of the smallest weight that fsdp splits, of one layer."""
    mesh = jax.tree.leaves(program.args)[0].sharding.mesh
    limit, arguments, began = int(chip.hbm * GIB), bytes_of(program.args), time.monotonic()
    try:
        executable = program.function.lower(*program.args, **program.static).compile()
    except jax.errors.JaxRuntimeError as error:
        peak = out_of_memory(str(error), arguments) + program.held
        return Plan(
            program.name, program.held, arguments, peak - program.held - arguments, peak, limit, 0,
            bytes_of(program.donated), time.monotonic() - began, program.flops, (0.0, 0.0), [], "does not fit",
        )  # fmt: skip
    seconds, memory = time.monotonic() - began, executable.memory_analysis()
    temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    temporaries += memory.output_size_in_bytes - memory.alias_size_in_bytes
    arguments = memory.argument_size_in_bytes
    peak = program.held + arguments + temporaries
    found = collectives(executable.as_text(), AXES, tuple(mesh.shape[axis] for axis in AXES))
    sent = sum(one.sent * one.times for one in found)
    needs = (
        program.flops / (chip.flops * REACHED.flops),
        program.reads / (chip.hbm_rate * REACHED.hbm_rate),
        sent / (chip.ici_rate * REACHED.ici_rate),
    )
    problem = "does not fit" if peak > limit else refused(found, matrix)
    return Plan(
        program.name, program.held, arguments, temporaries, peak, limit, memory.alias_size_in_bytes,
        bytes_of(program.donated), seconds, program.flops, (max(needs), sum(needs)), found, problem,
    )  # fmt: skip


def out_of_memory(message: str, arguments: int) -> int:
    """Bytes that the compiler wanted, with `arguments` where it speaks of temporaries alone. Raises RuntimeError if it
    failed for another reason."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? (?:of )?hbm", message)
    alone = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds", message)
    if not (found := found or alone):
        raise RuntimeError(f"the compiler failed: {message.splitlines()[0]}")
    wanted = int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
    return wanted + arguments if found is alone else wanted


def refused(found: Sequence[Collective], matrix: int) -> str:
    """Which collective moves whole matrices that fsdp has split, or nothing."""
    whole = [one for one in found if one.kind == "all-reduce" and "fsdp" in one.axes and one.largest >= matrix]
    if not whole:
        return ""
    one = max(whole, key=lambda one: one.largest)
    times = sum(one.times for one in whole)
    return (
        f"{times} all-reduces over {' and '.join(one.axes)} of whole matrices, the largest {one.largest:,} values: "
        "every chip receives all of the gradient, not its part"
    )


def smallest_matrix(stage: Stage) -> int:
    """Elements of the smallest weight matrix of a layer."""
    leaves = jax.tree_util.tree_leaves_with_path(stage.params)
    kernels = [(path, leaf) for path, leaf in leaves if str(getattr(path[-1], "key", "")) == "kernel"]
    text, vision = stage.model.text, stage.model.vision
    stacked = {text.num_hidden_layers, vision.depth}
    return min(math.prod(leaf.shape[1:] if leaf.shape[0] in stacked else leaf.shape) for _, leaf in kernels)


def advice(config: Sft | Rl, plan: Plan, size: str | None, chips: int, widths: Sequence[int]) -> list[str]:
    """What to change so that it fits, the most effective first. widths: of the towers, that fsdp must divide."""
    said, fixed, mesh = [], plan.held + plan.arguments, config.mesh
    larger = [
        n for n in range(mesh.fsdp + 1, chips // mesh.tensor + 1)
        if not chips // mesh.tensor % n and not any(width % n for width in widths) and max(widths) // n >= LANES
    ]  # fmt: skip
    if fixed > 0.5 * plan.limit and larger:
        enough = [n for n in larger if fixed * mesh.fsdp / n <= 0.5 * plan.limit]
        said.append(
            f"--mesh.fsdp {(enough or larger[-1:])[0]}: weights and optimizer take {fixed / GIB:.1f} GiB a chip"
        )
    if config.remat != "layers" and plan.name.startswith("accumulate"):
        said.append("--remat layers: less is kept for the backward pass")
    room = max(0, plan.limit - (plan.limit // 2 if said and fixed > 0.5 * plan.limit else fixed))
    rows = getattr(config, size, 1) if size in ("rows", "prompts") else 1
    fitting = int(rows * room / max(1, plan.temporaries))
    if rows > 1:
        whole = [n for n in range(1, rows) if isinstance(config, Sft) or config.prompts_per_update % n == 0]
        best = max((n for n in whole if n <= max(1, fitting)), default=1)
        said.append(f"--{size} {best}: {plan.temporaries / GIB:.1f} GiB of temporaries grow with {size}, now {rows}")
    if not fitting or rows == 1:
        if isinstance(config, Rl) and ("decode" in plan.name or "accumulate" in plan.name or "score" in plan.name):
            said.append(f"--sampling.max-new-tokens below {config.sampling.max_new_tokens}, and buckets.completion")
        if isinstance(config, Rl) and "decode" in plan.name and (config.slots or config.group_size) > 1:
            said.append(f"--slots {max(1, (config.slots or config.group_size) // 2)}: fewer completions at a time")
        if size and len(config.buckets.patches) > 1:
            smaller = " ".join(map(str, config.buckets.patches[:-1]))
            said.append(
                f"--buckets.patches {smaller}: pictures of a micro-batch, now up to {config.buckets.patches[-1]}"
            )
    return said or ["a slice with more chips, or a generation with more memory"]


# ------------------------------------------------------------------------------------------------------------- printing


def line(plan: Plan) -> str:
    verdict = plan.problem or "fits"
    held = f" + {plan.held / GIB:.2f} held" if plan.held else ""
    text = (
        f"{plan.name}: {plan.arguments / GIB:.2f} arguments + {plan.temporaries / GIB:.2f} temporaries{held} = "
        f"{plan.peak / GIB:.2f} of {plan.limit / GIB:.2f} GiB: {verdict}"
    )
    text += f"; {plan.flops / 1e12:,.2f} TFLOP; compiled in {plan.compile_seconds:.0f} s"
    if plan.problem == "does not fit" and not plan.bound[1]:
        return text
    text += f"; donated {plan.donated / GIB:.2f} of {plan.to_donate / GIB:.2f}; "
    count: Counter[tuple] = Counter()
    sizes: Counter[tuple] = Counter()
    for one in plan.collectives:
        key = (one.kind, " and ".join(one.axes) or "nothing")
        count[key] += one.times
        sizes[key] += one.times * one.size
    said = [f"{kind} over {axes} {count[kind, axes]} x, {sizes[kind, axes] / GIB:.2f} GiB" for kind, axes in count]
    return text + ("; ".join(said) or "no collectives") + f"; {plan.bound[0]:.3g} to {plan.bound[1]:.3g} s"


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Descriptions of the chips of v5p:4x4x4. Raises RuntimeError without libtpu, ConfigError for no such topology."""
    from importlib.util import find_spec

    from jax.experimental import topologies

    if topology.split(":")[0] not in CHIPS:
        raise ConfigError(f"topology {topology!r}: expected {', '.join(f'{name}:…' for name in CHIPS)}, as v5p:4x4x4")
    if find_spec("libtpu") is None:
        raise RuntimeError("libtpu, the compiler for TPUs, is not installed; it needs no TPU: pip install 'jax[tpu]'")
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5p-8"), ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("TPU_STDERR_LOG_LEVEL", "3"), ("TPU_MIN_LOG_LEVEL", "3"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)  # no search for a TPU, no lock on one, no log
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"topology {topology!r}: {str(error).splitlines()[0]}") from error


def model_of(config: Sft | Rl) -> tuple[QwenVLConfig, int]:
    """The model's shape and the tokens of its instruction; of a model that is not on this disk, by its name."""
    folder = Path(config.model).expanduser()
    if config.model and folder.is_dir():
        found = (folder / "tokenizer.json").is_file()
        shared = len(instruction_ids(load_tokenizer(folder))) if found else INSTRUCTION
        return replace(load_config(folder), dtype=config.dtype), shared
    size = re.search(r"(?<![\d.])([37])b(?![a-z])", config.model.lower())
    if not size:
        raise ConfigError(f"model {config.model!r} is no directory, and its name says neither 3B nor 7B; set --model")
    return replace(SIZES[f"{size[1]}B"], dtype=config.dtype), INSTRUCTION


def run(config: Sft | Rl, topology: str, only: Sequence[str] = ()) -> tuple[dict, list[Plan]]:
    """Compile the programs whose names begin with one of `only` (none given: all). → (what all share, the plans)"""
    devices = topology_devices(topology)
    generation = topology.split(":")[0]
    chip, (model, shared) = CHIPS[generation], model_of(config)
    mesh = make_mesh(config.mesh, devices)
    if mesh.size != len(devices):
        raise ConfigError(f"the mesh has {mesh.size} chips, {topology} {len(devices)}; leave mesh.data out")
    stage = stage_of(config, model, mesh, shared)
    every = sft_programs(stage) if isinstance(config, Sft) else rl_programs(stage)
    programs = [one for one in every if one.name.startswith(tuple(only))] if only else every
    if not programs:
        names = ", ".join(one.name.split()[0] for one in every)
        raise ConfigError(f"--only {' '.join(only)}: no program of this config begins so; expected some of {names}")
    whole = replicated(mesh, stage.params)
    head = {
        "topology": topology,
        "mesh": dict(mesh.shape),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(stage.params)),
        "replicated": sum(count for _, count, _ in whole),
        "largest_replicated": max(whole, key=lambda one: one[1], default=None),
        "assumed": {
            "peak_flops": chip.flops, "hbm_rate": chip.hbm_rate, "ici_rate": chip.ici_rate,
            "reached": dict(REACHED._asdict()),
        },
    }  # fmt: skip
    say = functools.partial(print, file=sys.stderr, flush=True)
    plans = []
    for program in programs:
        say(f"# compiling {program.name} …")
        plan = compiled(program, chip, smallest_matrix(stage))
        if plan.problem == "does not fit":
            widths = (model.text.hidden_size, model.vision.hidden_size)
            plan = plan._replace(advice=tuple(advice(config, plan, program.size, mesh.size, widths)))
        elif plan.problem:
            plan = plan._replace(
                advice=(f"a smaller --mesh.fsdp: parts of whole tiles of {LANES}, and more of mesh.data",)
            )
        plans.append(plan)
    return head, plans


def main(args: list[str]) -> int:
    """`gvl plan`. → 0: everything fits; 1: something does not, or is refused."""
    kinds = {"sft": Sft, "rl": Rl}
    named = args[:1] if args[:1] and args[0] in kinds else []
    args = args[len(named) :]
    path = args.pop(0) if args and not args[0].startswith("-") else ""  # argparse would take the value of a flag
    parser = argparse.ArgumentParser(
        "gvl plan",
        usage="gvl plan [sft|rl] CFG --topology TOPOLOGY [--only NAME …] [--json FILE]",
        description="CFG: a config file of gvl sft or gvl rl; `gvl plan rl FILE` says which it is",
        epilog="any field of the config is a flag, as --mesh.fsdp 16",
    )
    parser.add_argument("--topology", required=True, help="generation and chips along each axis, as v5p:4x4x4")
    parser.add_argument("--only", nargs="+", default=[], help="programs whose names begin so: accumulate, decode, …")
    parser.add_argument("--json", type=Path, help="write the plan for machines to this file")
    options, flags = parser.parse_known_args(args)
    if not path:
        parser.error("CFG, the config file, comes first")
    kind = named[0] if named else re.split(r"[_.]", Path(path).name)[0]
    if kind not in kinds:
        raise ConfigError(f"{path}: which stage is it? gvl plan sft {path} or gvl plan rl …")
    config: Sft | Rl = load(kinds[kind], path, flags)  # type: ignore[type-var]
    head, plans = run(config, options.topology, options.only)
    shape = " x ".join(f"{axis} {size}" for axis, size in head["mesh"].items())
    print(f"{path} on {head['topology']}, {math.prod(head['mesh'].values())} chips, {shape}")
    path, count, why = head["largest_replicated"] or ("nothing", 0, "")
    print(
        f"{head['parameters'] / 1e9:.2f} B parameters; on every chip {head['replicated'] / 1e6:.2f} M of them, "
        f"most of all {path} ({count / 1e6:.2f} M{': ' + why if why else ''})"
    )
    for plan in plans:
        print(line(plan))
        for one in plan.advice:
            print(f"    change: {one}")
    rates = head["assumed"]
    print(
        f"Per chip. held: alive meanwhile, not an argument. Seconds: from all at once to one after the other, if "
        f"{REACHED.flops:.0%} of {rates['peak_flops'] / 1e12:.0f} TFLOP/s, {REACHED.hbm_rate:.0%} of "
        f"{rates['hbm_rate'] / 1e9:.0f} GB/s of HBM (weights, state and caches; activations left out) and "
        f"{REACHED.ici_rate:.0%} of {rates['ici_rate'] / 1e9:.0f} GB/s between chips are reached. A collective in a "
        "scan counts as often as the scan turns, one in the sampler's loop once."
    )
    if options.json:
        options.json.write_text(json.dumps({**head, "programs": [plan_json(plan) for plan in plans]}, indent=1) + "\n")
    return 1 if any(plan.problem for plan in plans) else 0


def plan_json(plan: Plan) -> dict:
    return plan._asdict() | {"collectives": [one._asdict() for one in plan.collectives]}
