"""What supervised fine-tuning reads, and what it compiles: every shape once, before the first step."""

import threading
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import example, layout, tiny_config, tiny_params

from gvl_jax.data.loader import steps
from gvl_jax.data.packing import blank, pack, tail_rows
from gvl_jax.metrics import CompileCounter, compile_ahead
from gvl_jax.sft import accumulate

ROWS, LENGTH, BUCKETS = 4, 64, (96, 192)


def test_200_random_micro_batches_have_the_shapes_that_are_compiled_before_the_first_step():
    config = tiny_config()
    params, where = tiny_params(config), layout(config, *BUCKETS)
    static = {"model_config": config, "remat": "none"}
    shapes = {(tail_rows(ROWS), 0), *((ROWS, patches) for patches in (0, *BUCKETS))}
    counter = CompileCounter()
    step = counter.watch(accumulate, expected=len(shapes))
    grads = jax.tree.map(jnp.zeros_like, params)
    calls = {
        str(shape): (step, (params, {}, grads, blank(shape[0], LENGTH, shape[1], where), np.float32(1)), static)
        for shape in shapes
    }
    compile_ahead(calls)
    assert counter.counts["jit(accumulate)"] == len(shapes)

    rng = np.random.default_rng(0)
    sides = [(56, 112), (84, 140), (28, 56)]
    text, mixed = ([example(rng, count, sides) for count in images] for images in ([0] * 9, [0, 1, 2] * 9))
    kind = lambda batch: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), batch)  # noqa: E731
    kinds = {shape: kind(blank(shape[0], LENGTH, shape[1], where)) for shape in shapes}
    seen: Counter[tuple[int, int]] = Counter()
    while seen.total() < 200:
        examples, most = (text, 80) if rng.random() < 0.3 else (mixed, 24)
        drawn = [examples[i] for i in rng.integers(len(examples), size=rng.integers(1, most))]
        for batch in pack(drawn, rows=ROWS, length=LENGTH, layout=where, tail=tail_rows(ROWS)):
            shape = len(batch.tokens), len(batch.vision.patches) if batch.vision else 0
            assert kind(batch) == kinds[shape]  # what decides which program it is: two of each are computed
            seen[shape] += 1
            if seen[shape] <= 2:
                grads, loss = step(params, {}, grads, batch, np.float32(rng.integers(1, 99)), **static)
                assert np.isfinite(loss)
    assert set(seen) == shapes and min(seen.values()) >= 2
    assert counter.counts["jit(accumulate)"] == len(shapes)
    counter.close()


def test_a_step_is_a_function_of_its_number_whatever_the_threads():
    read = lambda **options: list(  # noqa: E731
        steps(range(10), str, per_step=4, epochs=2, seed=1, finish=tuple, **options)
    )
    whole = read(workers=1)
    assert [len(step) for step in whole] == [4] * 5
    assert all(sorted(sum(whole, ())[first : first + 10]) == sorted(map(str, range(10))) for first in (0, 10))
    assert read(workers=3) == read() == whole
    assert [read(start=start) for start in range(6)] == [whole[start:] for start in range(6)]
    assert [len(step) for step in steps(range(10), str, per_step=4, epochs=1, seed=1)] == [4, 4, 2]
    assert [len(step) for step in steps(range(10), str, per_step=4, epochs=1, seed=1, whole=True)] == [4, 4]


def test_the_next_step_is_made_while_this_one_is_used():
    made = [threading.Event() for _ in range(3)]

    def finish(built):
        made[built[0]].set()
        return built[0]

    todo = steps([0, 1, 2], lambda x: x, per_step=1, epochs=1, seed=0, finish=finish)
    order = [next(todo)]
    assert all(event.wait(60) for event in made)  # two ahead, without a second call
    assert sorted([*order, *todo]) == [0, 1, 2]


def test_what_fails_in_a_thread_fails_the_reader():
    def finish(built):
        raise ValueError(f"cannot pack {built}")

    with pytest.raises(ValueError, match="cannot pack \\[0\\]"):
        next(steps([0], lambda x: x, per_step=1, epochs=1, seed=0, finish=finish))
