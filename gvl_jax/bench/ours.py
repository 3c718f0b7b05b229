"""The work by this package, by the functions its stages call."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gvl_jax import rl, sft
from gvl_jax.bench.inputs import Ids, World
from gvl_jax.config import Buckets, Optim, Sampling
from gvl_jax.data.packing import pack, pack_prompts
from gvl_jax.models.qwen_vl.hub import load_params
from gvl_jax.models.qwen_vl.model import bind
from gvl_jax.optim import apply_updates, optimizer
from gvl_jax.sampler import Sampler
from gvl_jax.types import Batch, Example

TEMPERATURE = 1.2  # the paper's


def load(world: World, *, train: bool = False) -> dict:
    """The checkpoint's parameters; training keeps fp32 ones."""
    dtype = jnp.dtype("float32" if train else world.config.dtype)
    return jax.tree.map(jnp.asarray, load_params(world.checkpoint, world.config, dtype=dtype))


def forward(world: World, examples: Sequence[Example]) -> Callable[[], np.ndarray]:
    """→ step: logits of the last tokens f32[B, V]."""
    params, work = load(world), world.work
    batch = pack_prompts(examples, rows=len(examples), length=work.prompt - work.instruction, layout=world.layout)

    @jax.jit
    def logits(params, batch: Batch):
        model = bind(world.config, params)
        last, _ = model.prefill(batch)
        return jnp.matmul(last, model.head_kernel().astype(last.dtype), preferred_element_type=jnp.float32)

    return lambda: np.asarray(logits(params, batch))


def generate(
    world: World,
    examples: Sequence[Example],
    new: int,
    *,
    group_size: int = 1,
    temperature: float = 0.0,
    rows: int,
    lengths: tuple[int, ...],
) -> Callable[[], np.ndarray]:
    """→ step: new tokens [B · group_size, new], by the sampler of all stages."""
    params = load(world)
    sampling = Sampling(temperature=temperature, max_new_tokens=new)
    buckets = Buckets(prompt=lengths, patches=world.layout.patch_buckets)
    sampler = Sampler(Ids(world.config, world.work.instruction), world.config, buckets, sampling, rows)

    def step() -> np.ndarray:
        tokens = np.zeros((len(examples), group_size, new), np.int32)
        for indices, rollout in sampler(params, examples, group_size=group_size):
            tokens[indices] = rollout.tokens
        return tokens.reshape(-1, new)

    return step


def update(world: World, prompt: Example, *, shared: bool) -> Callable[[], tuple[float, dict]]:
    """→ step: (loss, gradient) of one group. Not shared: a row of its own, with its picture, for each completion, two
    rows at a time: all at once take 28 GB at 20M."""
    params, work, rng = load(world, train=True), world.work, np.random.default_rng(3)
    vocab_size, rows = world.config.text.vocab_size, 1 if shared or work.group_size % 2 else 2
    layout = world.layout if shared else world.layout._replace(shared=())
    batch = pack_prompts([prompt] * rows, rows=rows, length=work.prompt - len(layout.shared), layout=layout)
    tokens = rng.integers(0, 1000, (work.group_size, work.answer)).astype(np.int32)
    advantages = rng.standard_normal(work.group_size).astype(np.float32)
    old = np.full(tokens.shape, -np.log(vocab_size), np.float32)  # near what random weights give
    everywhere = np.ones(tokens.shape, bool)

    def part(start: int, stop: int) -> rl.Completions:
        def cut(values):
            return values[start:stop].reshape(rows, -1, *values.shape[1:])

        return rl.Completions(cut(tokens), cut(everywhere), cut(advantages), cut(old), cut(old), np.asarray(False))

    size = work.group_size if shared else rows
    parts = [part(start, start + size) for start in range(0, work.group_size, size)]
    zeros = jax.jit(functools.partial(jax.tree.map, jnp.zeros_like))

    def step() -> tuple[float, dict]:
        grads, loss = zeros(params), 0.0
        for done in parts:
            grads, metrics = rl.accumulate(
                params, {}, grads, batch, done, np.float32(TEMPERATURE), np.zeros(vocab_size, bool),
                np.float32(10), np.float32(work.group_size),  # the clip: so wide that no token stands at its edge
                model_config=world.config, remat="none", mean="sequence",
            )  # fmt: skip
            loss += float(metrics["loss"][0])
        return loss, jax.block_until_ready(grads)

    return step


def packed(world: World, samples: Sequence[Example]) -> list[Batch]:
    """The micro-batches of an SFT step: single rows of two prompts' length."""
    work, layout = world.work, world.layout
    return pack(samples, rows=1, length=2 * work.prompt - len(layout.shared), layout=layout)


def sft_step(world: World, samples: Sequence[Example], rate: float) -> Callable[[], tuple[float, float]]:
    """→ step: one update of AdamW. → (loss, gradient norm)"""
    params = load(world, train=True)
    optim = Optim(peak_lr=rate)
    state = [params, optimizer(optim).init(params), jax.tree.map(jnp.zeros_like, params)]

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def apply(params, opt_state, grads, rate):
        return *apply_updates(optim, params, opt_state, grads, rate), jax.tree.map(jnp.zeros_like, grads)

    batches = packed(world, samples)
    total = np.float32(sum(int(batch.loss_mask.sum()) for batch in batches))

    def step() -> tuple[float, float]:
        params, moments, grads = state
        loss = jnp.zeros(())
        for batch in batches:
            grads, share = sft.accumulate(params, {}, grads, batch, total, model_config=world.config, remat="none")
            loss = loss + share
        params, moments, norm, grads = apply(params, moments, grads, np.float32(rate))
        state[:] = jax.block_until_ready([params, moments, grads])
        return float(loss), float(norm)

    return step


def matmul(size: int, dtype: str) -> Callable[[], None]:
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda a: a @ a)
    return lambda: multiply(a).block_until_ready()


def copy(values: int) -> Callable[[], None]:
    held = [jnp.zeros(values)]
    shift = jax.jit(lambda a: a + 1, donate_argnums=0)  # in place: no fresh pages

    def step() -> None:
        held[0] = shift(held[0]).block_until_ready()

    return step


def peak_device_bytes() -> int:
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else 0
