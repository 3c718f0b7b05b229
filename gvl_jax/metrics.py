"""What a run says about itself: metrics.jsonl, TensorBoard, a progress bar, throughput and compile counts.

Only process 0 writes and prints; the checks run on every process, so that all of them stop together.
"""

import functools
import inspect
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

from gvl_jax.run_folder import keep_rows

Item = TypeVar("Item")

COMPILED = "/jax/core/compile/backend_compile_duration"
AT_ONCE = min(8, os.cpu_count() or 1)  # programs compiled ahead, gigabytes of host memory each
LINE_EVERY = 10.0  # seconds between progress lines where there is no terminal


class MetricsWriter:
    """Appends {"step", "time", **scalars} to run_dir/metrics.jsonl and mirrors them in run_dir/tensorboard.

    With `resume_step`, what was logged after that step is dropped: it will be logged again. Without it the log
    starts anew.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        self._log = None
        if jax.process_index() != 0:
            return
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path, last = folder / "metrics.jsonl", -1 if resume_step is None else resume_step
        keep_rows(path, lambda row: row["step"] <= last)
        self._log = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`metrics`: name, such as train/loss → number or 0-d array. A value that is not finite is logged as null.

        Raises:
            FloatingPointError: a loss or a gradient is not finite (after it was logged).
        """
        values = jax.device_get(list(metrics.values()))
        scalars = {name: np.asarray(value).item() for name, value in zip(metrics, values, strict=True)}
        if self._log is not None:
            row = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
            self._log.write(json.dumps({"step": step, "time": time.time(), **row}) + "\n")
            self._log.flush()
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        check_finite(step, scalars)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Into TensorBoard alone."""
        if self._log is not None:
            self._board.add_histogram(name, values, step)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._board.close()


def check_finite(step: int, scalars: Mapping[str, float]) -> None:
    """Raises FloatingPointError when a metric with "loss" or "grad" in its name is not finite."""
    wrong = [f"{k} = {v}" for k, v in scalars.items() if ("loss" in k or "grad" in k) and not math.isfinite(v)]
    if wrong:
        raise FloatingPointError(
            f"step {step}: {', '.join(wrong)}, expected finite numbers; nothing after the last checkpoint is kept: "
            "resume with a lower learning rate or gradient norm, or look at this step's batch"
        )


def throughput(tokens: int, slots: int, flops: float, seconds: float) -> dict[str, float]:
    """Of one step over all processes: `tokens` real ones in `slots` places, padding included; flops: by `cost`, without
    what is computed again. Divide the last number by the device's peak: MFU."""
    return {
        "perf/seconds": seconds,
        "perf/tokens_per_second": tokens / seconds,
        "perf/padding_share": 1 - tokens / slots,
        "perf/tflops_per_device": flops / seconds / jax.device_count() / 1e12,
    }


def timed(items: Iterable[Item]) -> Iterator[tuple[float, Item]]:
    """(seconds waited for it, item): the input of a stage, whose wait is the metric perf/input_seconds."""
    iterator = iter(items)
    while True:
        began = time.monotonic()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield time.monotonic() - began, item


@contextmanager
def progress(total: int, description: str, initial: int = 0) -> Iterator[Callable[..., None]]:
    """Yields `advance(count=1, note="")`. A bar on a terminal; elsewhere (the log of a pod) a line every 10 s.

    `initial`: items done before this process started; they do not count for the rate.
    """
    start, done, shown = time.monotonic(), initial, time.monotonic()

    def timing() -> str:
        elapsed = time.monotonic() - start
        rate = (done - initial) / elapsed if elapsed > 0 else 0.0
        left = str(timedelta(seconds=round((total - done) / rate))) if rate > 0 else "?"
        return f"{rate:.2f}/s, {timedelta(seconds=round(elapsed))} elapsed, {left} left"

    def print_line(note: str) -> None:
        share = f" ({done / total:.0%})" if total else ""
        print(f"{description} {done}/{total}{share}, {timing()}{', ' if note else ''}{note}", flush=True)

    bar = None
    if jax.process_index() == 0 and sys.stdout.isatty():
        text = TextColumn("{task.fields[timing]}", markup=False), TextColumn("{task.fields[note]}", markup=False)
        bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), *text)
        task = bar.add_task(description, total=total, completed=initial, timing="", note="")
        bar.start()
    last_note = ""

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, shown, last_note
        done, last_note = done + count, note
        if bar is not None:
            bar.update(task, completed=done, timing=timing(), note=note)
        elif jax.process_index() == 0 and time.monotonic() - shown >= LINE_EVERY:
            shown = time.monotonic()
            print_line(note)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
        elif jax.process_index() == 0:
            print_line(last_note)


def compile_ahead(calls: Mapping[str, tuple[Any, tuple, dict[str, Any]]]) -> dict[str, Any]:
    """Compile before the first step, so that no later one stalls: what is computed → (jitted function, args, kwargs).

    Arguments are those of a real call, or of the same shape, dtype and sharding. JAX keeps what is compiled here for
    the calls of the function itself. → the executables, whose memory_analysis and cost_analysis can be read.
    """
    compiled = {}
    with progress(len(calls), "compile") as advance, ThreadPoolExecutor(AT_ONCE) as pool:
        ahead = {pool.submit(_compiled, *call): name for name, call in calls.items()}
        for one in as_completed(ahead):
            compiled[ahead[one]] = one.result()
            advance(note=ahead[one])
    return compiled


def _compiled(jitted: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return jitted.lower(*args, **kwargs).compile()


class Recompiled(RuntimeError):
    """A watched function compiled more often than it has shapes: minutes lost at every step, unseen."""


class CompileCounter:
    """Counts XLA compilations by function name, and stops a run whose functions compile more than expected."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # `compile_ahead` compiles in threads
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event == COMPILED:
            with self._lock:
                self.counts[str(details.get("fun_name", "?"))] += 1

    @property
    def total(self) -> int:
        """Compilations since this counter was made, of every function."""
        return self.counts.total()

    def watch(self, jitted: Any, expected: int = 1) -> Any:
        """`jitted`, which may compile `expected` times: once per bucket of its arguments, ahead (`compile_ahead`) or
        when it is called.

        Raises:
            Recompiled: it compiled once more; names the arguments whose shape, dtype or sharding is new.
        """
        name, parameters = f"jit({jitted.__name__})", inspect.signature(jitted)
        seen: list[dict[str, str]] = []

        @functools.wraps(jitted)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.counts[name]
            result = jitted(*args, **kwargs)
            if self.counts[name] > before:
                now = _describe(parameters.bind(*args, **kwargs).arguments)
                if len(seen) == expected:
                    raise Recompiled(_changes(jitted.__name__, seen, now))
                seen.append(now)
            return result

        def lower(*args: Any, **kwargs: Any) -> Any:
            seen.append(_describe(parameters.bind(*args, **kwargs).arguments))
            return jitted.lower(*args, **kwargs)

        watched: Any = call
        watched.lower = lower
        return watched

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


def _describe(arguments: Mapping[str, Any]) -> dict[str, str]:
    """{"batch.tokens": "int32[8, 2048] ..."}: all that decides, but for static values, whether jit compiles."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(arguments))
    names = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return {
        name: f"{leaf.dtype}{list(leaf.shape)}"
        + (" weak" if getattr(leaf, "weak_type", False) else "")
        + (f" {leaf.sharding}" if isinstance(leaf, jax.Array) else "")
        if isinstance(leaf, jax.Array | np.ndarray | np.generic)
        else type(leaf).__name__
        for name, leaf in names.items()
    }


def _changes(function: str, seen: list[dict[str, str]], now: dict[str, str]) -> str:
    """One line: what is new in `now`, against the most similar arguments seen."""
    changes = min(
        ([(k, old.get(k), now.get(k)) for k in {**old, **now} if old.get(k) != now.get(k)] for old in seen), key=len
    )
    what = "; ".join(f"{name} was {was or 'absent'}, is {new or 'absent'}" for name, was, new in changes[:4])
    if len(changes) > 4:
        what += f" and {len(changes) - 4} more"
    return (
        f"{function} compiled {len(seen) + 1} times, expected {len(seen)}: {what or 'a static argument changed'}; "
        "pad to the buckets, keep dtypes and shardings as they were, or expect more compilations"
    )
