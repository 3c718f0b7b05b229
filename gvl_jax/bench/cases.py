"""The measured pairs: the same work by this package and by another way, what each must compute, and the proof that
both give the same."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from gvl_jax import cost
from gvl_jax.bench import elsewhere, inputs, ours
from gvl_jax.bench.inputs import World
from gvl_jax.cost import Work
from gvl_jax.data.packing import pack_queue
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.types import Example

Build = Callable[
    [], Callable[[], Any]
]  # weights, inputs, compiled functions → one repetition, finished when it returns
OURS, PEER, REPEATED, TUNIX = "ours", "transformers", "ours, repeated", "google-tunix"


class Side(NamedTuple):
    """One way of doing the work."""

    build: Build
    work: Work
    proof: Build | None = None  # what is compared instead, where repetitions are random
    padding: float = 0.0  # share of the decoder's tokens
    peak: Callable[[], int] | None = None  # bytes; where it runs in a process of its own anyway


class Difference(NamedTuple):
    what: str
    value: float
    tolerance: float


class Case(NamedTuple):
    """sides: ours first; the others are compared with it."""

    what: str
    sides: dict[str, Side]
    compare: Callable[[World, Any, Any], list[Difference]]
    new: int = 0  # tokens that a repetition samples, where they are counted by the second


def _theirs() -> Any:
    """Imported when it is built: torch is optional, and would count for the memory of our side."""
    from gvl_jax.bench import theirs

    return theirs


def forward(world: World) -> Case:
    size, config, rows = world.work, world.config, world.work.forward_rows
    examples = inputs.prompts(world, rows)
    pictures = (size.patches,) * rows
    head = Work(0, cost.head_flops(config.text, rows), 0, 0.0)
    shared = cost.prefill(config, rows, size.prompt - size.instruction, pictures, size.instruction)
    return Case(
        f"{rows} prompts of {size.prompt} tokens, a picture in each; logits of the last token",
        {
            OURS: Side(lambda: ours.forward(world, examples), shared + head),
            PEER: Side(
                lambda: _theirs().forward(world, examples), _rows_of_a_peer(config, rows, size.prompt, pictures) + head
            ),
        },
        lambda world, a, b: [_close(world, "logits", a, b)],
    )


def rollout(world: World) -> Case:
    size, config = world.work, world.config
    examples = inputs.prompts(world, 1)
    drawn: dict[str, Any] = {"group_size": size.group_size, "temperature": ours.TEMPERATURE}
    one: dict[str, Any] = {"rows": 1, "lengths": (size.prompt,)}
    many = one | {"rows": size.group_size, "temperature": ours.TEMPERATURE}
    pictures = (size.patches,) * size.group_size
    decoded = cost.decode(config, size.group_size, 1, size.prompt, size.new)
    return Case(
        f"{size.group_size} completions of {size.new} tokens at temperature {ours.TEMPERATURE} on a prompt of "
        f"{size.prompt}; compared: greedy ones",
        {
            OURS: Side(
                lambda: ours.generate(world, examples, size.new, **drawn, **one),
                cost.rollout(config, size.prompt, (size.patches,), size.group_size, size.new, shared=True),
                lambda: ours.generate(world, examples, size.new, **one),
            ),
            PEER: Side(
                lambda: _theirs().generate(world, examples, size.new, **drawn),
                _rows_of_a_peer(config, size.group_size, size.prompt, pictures) + decoded,
                lambda: _theirs().generate(world, examples, size.new, ban=True),
            ),
            REPEATED: Side(
                lambda: ours.generate(world, examples * size.group_size, size.new, **many),
                cost.prefill(config, size.group_size, size.prompt - size.instruction, pictures, size.instruction)
                + decoded,
                lambda: ours.generate(world, examples, size.new, **one | {"rows": 4}),
            ),
        },
        _same_tokens,
    )  # fmt: skip


def text_rollout(world: World, *, python: str, versions: str, temperature: float) -> Case:
    """Against google-tunix's sampler: it repeats the prompt for each completion, computes the logits of all tokens, and
    every token attends to the whole cache. At temperature 0 the repetitions themselves are compared."""
    size, config = world.work, world.config
    prompt = inputs.example(world, 0, size.prompt, picture=False)
    one: dict[str, Any] = {"rows": 1, "lengths": (size.prompt,)}
    drawn = one | {"group_size": size.group_size, "temperature": temperature}
    job = elsewhere.job(world, prompt, size.group_size, temperature)
    greedy = elsewhere.job(world, prompt, 1, 0.0)
    slots = size.prompt + size.new
    tokens = size.group_size * slots
    flops = cost.decoder_flops(config.text, tokens, tokens * slots) + cost.head_flops(config.text, tokens)
    kept = cost.kv_bytes(config, tokens)
    return Case(
        f"{size.group_size} completions of {size.new} tokens at temperature {temperature} on a prompt of {size.prompt} "
        f"without pictures; {versions}",
        {
            OURS: Side(
                lambda: ours.generate(world, [prompt], size.new, **drawn),
                cost.rollout(config, size.prompt, (), size.group_size, size.new, shared=True),
                (lambda: ours.generate(world, [prompt], size.new, **one)) if temperature else None,
            ),
            TUNIX: Side(
                lambda: elsewhere.generate(python, job),
                Work(tokens, flops, kept, size.new * (cost.decode_weight_bytes(config) + kept)),
                (lambda: elsewhere.generate(python, greedy)) if temperature else None,
                peak=lambda: elsewhere.peak_bytes(python, job),
            ),
        },
        _same_tokens,
        size.group_size * size.new,
    )


def update(world: World) -> Case:
    size, config = world.work, world.config
    (prompt,) = inputs.prompts(world, 1)

    def side(shared: bool) -> Side:
        work = cost.update(
            config, size.prompt, (size.patches,), size.group_size, size.answer, shared=shared, remat=False
        )
        return Side(lambda: ours.update(world, prompt, shared=shared), work)

    def compare(world: World, a: Any, b: Any) -> list[Difference]:
        gradients = [jax.tree.leaves(tree) for tree in (a[1], b[1])]
        worst = max((_close(world, "gradient", np.asarray(x), np.asarray(y)) for x, y in zip(*gradients, strict=True)),
                    key=lambda difference: difference.value)  # fmt: skip
        return [_close(world, "loss", a[0], b[0]), worst]

    return Case(
        f"loss and gradient of a group of {size.group_size}, prompt {size.prompt}, completions of {size.answer}",
        {OURS: side(True), REPEATED: side(False)},
        compare,
    )


def sft(world: World) -> Case:
    size, config, rate = world.work, world.config, 1e-5
    samples = inputs.sft_samples(world)
    targets = sum(int(e.loss_mask.sum()) for e in samples)
    batches = ours.packed(world, samples)
    length = batches[0].tokens.shape[1]
    forward = [cost.prefill(config, len(b.tokens), length, (), size.instruction) for b in batches]
    pictures = sum(cost.vision_flops(config.vision, len(e.patches)) for e in samples if len(e.grids))
    mine = Work(sum(w.tokens for w in forward), sum(w.flops for w in forward) + pictures, 0, 0.0)
    count = size.trainer_batch
    padded = [(len(part), max(len(e.tokens) for e in part)) for part in _parts(samples, count)]
    their_forward = [_rows_of_a_peer(config, rows, longest) for rows, longest in padded]
    other = Work(sum(w.tokens for w in their_forward), sum(w.flops for w in their_forward) + pictures, 0, 0.0)
    real = sum(len(e.tokens) for e in samples)
    return Case(
        f"AdamW on {len(samples)} samples, {real} tokens, of which {targets} are learned; peer: batches of {count}",
        {
            OURS: Side(
                lambda: ours.sft_step(world, samples, rate),
                cost.train(config, mine, targets, remat=False),
                padding=1 - sum(int((b.segments > 0).sum()) for b in batches) / (len(batches) * batches[0].tokens.size),
            ),
            PEER: Side(
                lambda: _theirs().sft(world, samples, rate),
                cost.train(config, other, other.tokens, remat=False, head_passes=cost.TRAIN),
                padding=1 - real / other.tokens,
            ),
        },
        lambda world, a, b: [_close(world, "loss", a[0], b[0]), _close(world, "gradient norm", a[1], b[1])],
    )


def moderate(world: World) -> Case:
    size, config = world.work, world.config
    examples = inputs.requests(world)
    longest = max(len(e.tokens) for e in examples)
    rows, bucket = len(examples), -(-longest // 128) * 128
    mine, slots, own = cost.prefill(config, 1, size.instruction), 0, bucket - size.instruction
    for places, batch in pack_queue(examples, rows=max(1, rows // 8), length=own, layout=world.layout):
        waiting = [examples[place.prompt] for place in places]
        pictures = tuple(len(e.patches) for e in waiting if len(e.grids))
        mine += cost.rows(config, len(batch.tokens), own, pictures, size.instruction)
        slots += batch.tokens.size
    mine += cost.decode(config, rows, 1, bucket, size.verdict)
    real = sum(len(e.tokens) for e in examples)
    pictures = tuple(len(e.patches) for e in examples if len(e.grids))
    other = _rows_of_a_peer(config, len(examples), longest, pictures)
    other += cost.decode(config, len(examples), 1, longest, size.verdict)
    return Case(
        f"{len(examples)} requests of {min(len(e.tokens) for e in examples)} to {longest} tokens, {len(pictures)} "
        f"with a picture; {size.verdict} greedy tokens each",
        {
            OURS: Side(
                lambda: ours.generate(world, examples, size.verdict, rows=rows, lengths=(bucket,)),
                mine,
                padding=1 - (real - len(examples) * size.instruction) / slots,
            ),
            PEER: Side(
                lambda: _theirs().generate(world, examples, size.verdict),
                other,
                lambda: _theirs().generate(world, examples, size.verdict, ban=True),
                padding=1 - real / (len(examples) * longest),
            ),
        },
        _same_tokens,
    )


CASES: dict[str, Callable[[World], Case]] = {
    "forward": forward, "rollout": rollout, "update": update, "sft": sft, "moderate": moderate,
}  # fmt: skip


def text_cases(python: str) -> dict[str, Callable[[World], Case]]:
    """The cases that need this interpreter. Raises ValueError if its environment has no google-tunix."""
    case = partial(text_rollout, python=python, versions=elsewhere.versions(python))
    return {"rollout_text": partial(case, temperature=ours.TEMPERATURE), "greedy_text": partial(case, temperature=0.0)}


def _rows_of_a_peer(config: QwenVLConfig, count: int, length: int, patches: tuple[int, ...] = ()) -> Work:
    """Padded rows, whose attention is computed whole."""
    return cost.rows(config, count, length, patches, block=length)


def _parts(samples: list[Example], size: int) -> list[list[Example]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _close(world: World, what: str, a: Any, b: Any) -> Difference:
    """The largest difference, as a share of the largest value of b. bfloat16 keeps 8 bits."""
    tolerance = 1e-4 if world.config.dtype == "float32" else 5e-2
    scale = max(float(np.max(np.abs(b))), 1e-9)
    return Difference(what, float(np.max(np.abs(np.asarray(a, np.float64) - b))) / scale, tolerance)


def _same_tokens(world: World, a: np.ndarray, b: np.ndarray) -> list[Difference]:
    """Sequences that differ. bfloat16: the first tokens only, as one rounding sends all later ones another way."""
    if world.config.dtype != "float32":
        return [Difference("first tokens that differ", float(np.mean(a[:, 0] != b[:, 0])), 0.25)]
    return [Difference("sequences that differ", float((a != b).any(1).sum()), 0)]
