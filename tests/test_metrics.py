import json
import struct
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gvl_jax import metrics
from gvl_jax.metrics import (
    CompileCounter,
    MetricsWriter,
    Recompiled,
    check_finite,
    compile_ahead,
    progress,
    throughput,
    timed,
)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """TensorBoard's files as (step, tag, value), in the order of writing. A record: length, crc, data, crc."""
    found, starts = [], []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.session_log.status == SessionLog.START:
                starts.append(event.step)
    return found, starts


def test_a_row_holds_step_time_and_scalars_and_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    writer.write(3, {"train/loss": jnp.float32(0.5), "train/rows": 8, "perf/share": np.float64(0.25)})
    (row,) = rows(tmp_path / "run")
    assert row.pop("time") > 0
    assert row == {"step": 3, "train/loss": 0.5, "train/rows": 8, "perf/share": 0.25}
    writer.close()
    assert events(tmp_path / "run")[0] == [(3, "train/loss", 0.5), (3, "train/rows", 8.0), (3, "perf/share", 0.25)]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(5):
        writer.write(step, {"reward": step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 1, "rew')  # the kill came in the middle of a line
    writer = MetricsWriter(tmp_path, resume_step=2)
    writer.write(3, {"reward": 30})
    writer.close()
    assert [(row["step"], row["reward"]) for row in rows(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert events(tmp_path)[1] == [3]  # TensorBoard hides its own steps from 3 on


def test_a_new_run_starts_a_new_log(tmp_path):
    for value in (1, 2):
        writer = MetricsWriter(tmp_path)
        writer.write(0, {"reward": value})
        writer.close()
    assert [row["reward"] for row in rows(tmp_path)] == [2]


@pytest.mark.parametrize("name", ["train/loss", "grad_norm", "kl_loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_after_it_was_logged(tmp_path, name, value):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(FloatingPointError, match=f"^step 7: {name} = {value}, expected finite"):
        writer.write(7, {name: jnp.float32(value), "reward": 1.0})
    assert rows(tmp_path)[0][name] is None  # NaN is not JSON
    writer.close()


def test_other_metrics_may_be_undefined(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"train/loss": 1.0, "reward/useful_groups": float("nan")})
    assert rows(tmp_path)[0]["reward/useful_groups"] is None
    writer.close()
    check_finite(1, {"reward": float("nan")})


def test_only_the_first_process_writes_but_every_process_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = MetricsWriter(tmp_path / "run")
    with pytest.raises(FloatingPointError):
        writer.write(0, {"loss": float("nan")})
    writer.close()
    assert not (tmp_path / "run").exists()


def test_throughput():
    assert throughput(tokens=300, slots=400, flops=32e12, seconds=2.0) == {
        "perf/seconds": 2.0,
        "perf/tokens_per_second": 150.0,
        "perf/padding_share": 0.25,
        "perf/tflops_per_device": 2.0,  # eight devices
    }


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(capsys, clock):
    with progress(100, "sft", initial=20) as advance:
        for _ in range(5):
            clock[0] += 4.0
            advance(4, note=f"loss {clock[0]:.1f}")
    assert capsys.readouterr().out.splitlines() == [
        "sft 32/100 (32%), 1.00/s, 0:00:12 elapsed, 0:01:08 left, loss 12.0",
        "sft 40/100 (40%), 1.00/s, 0:00:20 elapsed, 0:01:00 left, loss 20.0",
    ]


def test_progress_ends_with_where_it_stood_even_after_an_error(capsys, clock):
    with pytest.raises(KeyError), progress(0, "mine"):
        raise KeyError
    assert capsys.readouterr().out == "mine 0/0, 0.00/s, 0:00:00 elapsed, ? left\n"


def test_on_a_terminal_progress_is_a_bar(capsys, clock, monkeypatch):
    monkeypatch.setattr(metrics.sys.stdout, "isatty", lambda: True)
    with progress(10, "[rl]") as advance:
        clock[0] += 2.0
        advance(5, note="[reward] 0.5")
    out = capsys.readouterr().out
    assert "[rl]" in out and "5/10" in out and "2.50/s" in out and "[reward] 0.5" in out


def test_the_wait_for_each_item_is_measured_and_not_the_work_on_it(clock):
    def slow():
        for item in "ab":
            clock[0] += 3.0
            yield item

    seen = []
    for waited, item in timed(slow()):
        seen.append((waited, item))
        clock[0] += 50.0
    assert seen == [(3.0, "a"), (3.0, "b")]


class Inputs(NamedTuple):
    tokens: jax.Array
    mask: jax.Array


def inputs(width, dtype=jnp.int32):
    return Inputs(jnp.zeros((2, width), dtype), jnp.ones((2, width), bool))


@pytest.fixture
def counter():
    counter = CompileCounter()
    yield counter
    counter.close()


@pytest.fixture
def a_step():
    """A new function for every test: jit remembers, for the life of the process, what it compiled."""

    def a_step(state, batch):
        return {"w": state["w"] + batch.tokens.sum()}

    return a_step


def test_compilations_are_counted_by_function_name(counter, a_step):
    step = jax.jit(a_step)
    state = {"w": jnp.zeros(3)}
    for width in (4, 8, 4, 8):
        step(state, inputs(width))
    assert counter.counts["jit(a_step)"] == 2
    assert counter.total >= 2
    counter.close()
    step(state, inputs(16))
    assert counter.counts["jit(a_step)"] == 2
    jax.monitoring.register_event_duration_secs_listener(counter._listen)  # the fixture closes again


def test_a_watched_function_runs_as_before_and_may_compile_once_per_bucket(counter, a_step):
    step = counter.watch(jax.jit(a_step, donate_argnums=0), expected=2)
    state = {"w": jnp.zeros(3)}
    for width in (4, 8, 4, 8):
        state = step(state, inputs(width)._replace(tokens=jnp.ones((2, width), jnp.int32)))
    np.testing.assert_array_equal(state["w"], [48.0, 48.0, 48.0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": inputs(6)}, r"batch.tokens was int32\[2, 4\].*, is int32\[2, 6\].*; batch.mask was bool\[2, 4\]"),
        ({"batch": inputs(4, jnp.int16)}, r"expected 1: batch.tokens was int32\[2, 4\] .*, is int16\[2, 4\]"),
        ({"batch": Inputs(inputs(4).tokens, None)}, r"expected 1: batch.mask was bool\[2, 4\].*, is absent;"),
        ({"state": {"w": jnp.zeros(3), "ema": jnp.zeros(3)}}, r"; state.ema was absent, is float32\[3\]"),
        ({"state": {"w": np.zeros(3, np.float32)}}, r"expected 1: state.w was float32\[3\] NamedS.*, is float32\[3\];"),
    ],
)
def test_an_unexpected_recompile_names_the_argument_that_changed(counter, a_step, change, message):
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
    state = jax.device_put({"w": jnp.zeros(3)}, everywhere)
    step = counter.watch(jax.jit(a_step, donate_argnames="state"))
    state = step(state=state, batch=inputs(4))
    with pytest.raises(Recompiled, match="^a_step compiled 2 times, expected 1: ") as error:
        step(**{"state": state, "batch": inputs(4), **change})
    assert "\n" not in str(error.value)
    assert error.match(message)


def test_the_difference_is_told_from_the_most_similar_arguments(counter, a_step):
    step = counter.watch(jax.jit(a_step), expected=2)
    for width in (4, 8):
        step({"w": jnp.zeros(3)}, inputs(width))
    with pytest.raises(Recompiled, match="expected 2: state.w was float32.3. .*, is float32.5."):
        step({"w": jnp.zeros(5)}, inputs(8))


def test_a_static_argument_is_named_as_such(counter):
    step = counter.watch(jax.jit(lambda x, scale: x * scale, static_argnums=1))
    step(jnp.ones(3), 2)
    with pytest.raises(Recompiled, match="expected 1: a static argument changed"):
        step(jnp.ones(3), 3)


def test_what_is_compiled_ahead_is_not_compiled_by_a_call(counter, a_step, capsys):
    step = counter.watch(jax.jit(a_step, donate_argnums=0), expected=2)
    state = {"w": jnp.zeros(3)}
    calls = {f"{width} tokens": (step, (state, jax.tree.map(np.asarray, inputs(width))), {}) for width in (4, 8)}
    compiled = compile_ahead(calls)
    assert counter.counts["jit(a_step)"] == 2
    assert compiled["8 tokens"].memory_analysis().argument_size_in_bytes > 0
    assert capsys.readouterr().out.startswith("compile 2/2 (100%)")
    for width in (4, 8, 4):
        state = step(state, jax.tree.map(np.asarray, inputs(width)))
    assert counter.counts["jit(a_step)"] == 2
    with pytest.raises(
        Recompiled, match=r"compiled 3 times, expected 2: batch.tokens was int32\[2, 4\], is int32\[2, 6\];"
    ):
        step(state, jax.tree.map(np.asarray, inputs(6)))
