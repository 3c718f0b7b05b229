"""How cost grows, by formula: with the picture, the prompt, the group and the devices. Nothing runs."""

from collections.abc import Sequence

from gvl_jax import cost
from gvl_jax.bench.inputs import Workload, parameters
from gvl_jax.models.qwen_vl.config import QwenVLConfig


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def tables(config: QwenVLConfig, work: Workload) -> str:
    """Markdown tables for a model."""
    text = work.prompt - work.side**2 - 2
    parts = [f"By formula, {config.dtype}. Prompt {work.prompt} tokens with a picture of {work.side**2}, group of "
             f"{work.group_size}, completions of {work.answer}."]  # fmt: skip
    sides = (8, 16, 18, 24, 32)
    parts += [
        "By picture:\n\n"
        + _group_table(
            config, work, "picture tokens", [(side**2, text + 2 + side**2, side, work.group_size) for side in sides]
        )
    ]
    prompts = (500, 1000, 2000, 4000)
    parts += [
        "By prompt:\n\n"
        + _group_table(
            config, work, "prompt tokens", [(prompt, prompt, work.side, work.group_size) for prompt in prompts]
        )
    ]
    groups = (1, 4, 8, 16, 32)
    parts += [
        "By group:\n\n"
        + _group_table(config, work, "group", [(group, work.prompt, work.side, group) for group in groups])
    ]
    return "\n\n".join([*parts, "By devices:\n\n" + _device_table(config)])


def _group_table(config: QwenVLConfig, work: Workload, name: str, points: list[tuple[int, int, int, int]]) -> str:
    """points: (value, prompt, side of the picture, group). Both ways of each, and how many times less ours computes."""
    head = (name, "vision TFLOP", "rollout TFLOP", "repeated", "ratio", "update TFLOP", "repeated", "ratio", "KV MiB",
            "repeated")  # fmt: skip
    rows: list[Sequence[str]] = [head]
    for value, prompt, side, group in points:
        patches = (4 * side**2,)
        rollouts = [cost.rollout(config, prompt, patches, group, work.answer, shared=way) for way in (True, False)]
        updates = [
            cost.update(config, prompt, patches, group, work.answer, shared=way, remat=False) for way in (True, False)
        ]
        cells = [f"{cost.vision_flops(config.vision, patches[0]) / 1e12:.3g}"]
        for shared, repeated in (rollouts, updates):
            cells += [f"{shared.flops / 1e12:.3g}", f"{repeated.flops / 1e12:.3g}"]
            cells += [f"{repeated.flops / shared.flops:.2f}"]
        kept = [f"{one.kv_bytes / 2**20:,.1f}" for one in rollouts]
        rows.append((str(value), *cells, *kept))
    return markdown(rows)


def _device_table(config: QwenVLConfig) -> str:
    rows: list[Sequence[str]] = [
        ("devices", "weights, gradient, moments: GiB a device", "received a step: GiB a device")
    ]
    for devices in (1, 4, 16, 64, 256):
        one = cost.sharded(config, sum(parameters(config)), devices)
        rows.append((str(devices), f"{one['state'] / 2**30:.3g}", f"{one['received'] / 2**30:.3g}"))
    return markdown(rows)
