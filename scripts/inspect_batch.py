"""A packed row as the model reads it, decoded: what SFT learns in its first step.

inspect_batch.py [CFG] [--model MODEL] [--records FILE] [--row N], and every flag of `gvl sft`
"""

import argparse
import functools
import sys
from itertools import groupby

import numpy as np

from gvl_jax.config import Sft
from gvl_jax.data.loader import SampleRejected, steps
from gvl_jax.data.packing import Layout, pack, tail_rows
from gvl_jax.data.prepared import load_samples
from gvl_jax.data.tokenizer import Tokenizer, load_tokenizer
from gvl_jax.guard.prompt import instruction_ids
from gvl_jax.models.qwen_vl.hub import load_config, resolve
from gvl_jax.settings import load
from gvl_jax.sft import build
from gvl_jax.types import Example


def show(example: Example, tokenizer: Tokenizer) -> str:
    """Its text with control tokens, an image's placeholders as one, what is learned in ⟦ ⟧."""
    grids, text = iter(example.grids), ""
    for (token, learned), run in groupby(
        zip(example.tokens, example.loss_mask, strict=True), lambda t: (t[0] == tokenizer.image_pad, t[1])
    ):
        ids = [int(t) for t, _ in run]
        said = f"<|image_pad|>×{len(ids)} (grid {'×'.join(map(str, next(grids)))})" if token else tokenizer.decode(ids)
        text += f"⟦{said}⟧" if learned else said
    return text


def report(config: Sft, number: int) -> str:
    """Row `number` of the first step, counted through its micro-batches. Raises ValueError if there is none."""
    source = resolve(config.model)
    tokenizer = load_tokenizer(source)
    samples = load_samples(config.train, config.limit)
    mixture = list(zip(samples.parts, config.train_weights, strict=False))
    learned = functools.partial(build, config, tokenizer)
    built = next(steps(samples, learned, per_step=config.global_batch, epochs=config.epochs, seed=config.seed,
                       mixture=mixture))  # fmt: skip
    examples = [one for one in built if isinstance(one, Example)]
    rejected = [one for one in built if isinstance(one, SampleRejected)]
    shared = tuple(instruction_ids(tokenizer))
    layout = Layout(tokenizer.image_pad, config.buckets.patches, load_config(source).vision.window_size, shared)
    length, tail = config.max_length - len(shared), tail_rows(config.rows)
    batches = pack(examples, rows=config.rows, length=length, layout=layout, tail=tail)
    used = [(batch, row) for batch in batches for row in range(len(batch.tokens)) if batch.segments[row].any()]
    if not 0 <= number < len(used):
        raise ValueError(f"row {number}: the first step has {len(used)} rows, from 0; rejected: {rejected[:1]}")
    batch, row = used[number]
    padding = np.mean(batch.segments[row] == 0)
    lines = [
        f"row {number} of {len(used)}, {padding:.1%} of it padding; samples rejected: {len(rejected)} {rejected[:1]}"
    ]
    lines += [f"\n── before each segment, computed once: {len(shared)} tokens\n{tokenizer.decode(shared)}"]
    for segment in range(1, batch.segments[row].max() + 1):
        at = batch.segments[row] == segment
        tokens, mask, positions = batch.tokens[row, at], batch.loss_mask[row, at], batch.positions[:, row, at]
        example = next(e for e in examples if np.array_equal(e.tokens[len(shared) :], tokens))
        spans = [f"{axis} {p.min()}–{p.max()}" for axis, p in zip(("time", "height", "width"), positions, strict=True)]
        lines += [f"\n── segment {segment}: {len(tokens)} tokens, {mask.sum()} learned; positions: {', '.join(spans)}"]
        lines += [show(example._replace(tokens=tokens, loss_mask=mask), tokenizer)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    path = argv.pop(0) if argv and not argv[0].startswith("-") else None  # argparse would take the value of a flag
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--records", nargs="+", default=[])
    parser.add_argument("--row", type=int, default=0)
    args, flags = parser.parse_known_args(argv)
    try:
        config = load(Sft, path, [*flags, *(["--train", *args.records] if args.records else [])])
        if not (config.model and config.train):
            parser.error("give CFG, or --model and --records")
        print(report(config, args.row))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"inspect_batch.py: {error}")


if __name__ == "__main__":
    main()
