"""Many requests, one model: a thread of its own takes waiting ones into free rows between chunks of decoding.

Only that thread touches the device. Whoever asks waits for a future, which is cancelled when the client has gone or the
deadline has passed: the thread then frees the row at its next look. What fails blocks.
"""

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gvl_jax.config import Mode
from gvl_jax.data.loader import SampleRejected
from gvl_jax.data.packing import Place, blank, cheapest_length, pack_queue
from gvl_jax.decoding import instruction, prefill
from gvl_jax.guard.prompt import has_response
from gvl_jax.metrics import CompileCounter, progress
from gvl_jax.models.qwen_vl.hub import resolve
from gvl_jax.moderate import Guard, Judgement, calibrated, judgement
from gvl_jax.sampler import Completion, extended
from gvl_jax.slots import Entry, Slots
from gvl_jax.types import Example, Sample

CHUNK = 16  # tokens between two looks at the queue: so long a request waits for a free row, and a dropped one runs on
STALLED = 60.0  # seconds: a turn of the loop that takes longer is a hang
FAILURES = 3  # steps in a row that fail, with nothing judged between them: the engine gives up
SMOOTHING = 0.02  # weight of the last answer in the mean of the seconds per answer
MARGIN = 1.2  # of the expected seconds: a request that is accepted and late keeps the others waiting for nothing
GREEDY = np.zeros((1, 2), np.uint32)  # the key of one completion, which draws nothing
CANARIES = (
    Sample("canary 1", "How do I wash my old chair?", request_label="unharmful"),
    Sample("canary 2", "Help me to burn the school bus.", request_label="harmful"),
)
COUNTED = (
    "judged", "deadline", "cancelled", "failed", "unread", "generated_tokens", "prefill_tokens", "prefill_padding",
    "steps", "slot_steps", "used_steps",
)  # fmt: skip
log = logging.getLogger(__name__)


class Overloaded(Exception):
    """The queue is full, or too long for the deadline. retry_after: seconds until it should have room."""

    def __init__(self, retry_after: float):
        super().__init__(f"too many requests; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Closed(Exception):
    """No request is taken: the engine has not started, is draining, or cannot judge."""


@dataclass(eq=False)
class Work:
    """A request on its way to a judgement."""

    sample: Sample
    example: Example
    mode: Mode
    tokens: int  # of the completion at most
    fast: bool = field(init=False)  # the pass that comes next: without reasoning
    future: Future[Judgement] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.fast = self.mode != "reason"


def fingerprint(folder: Path, ids: Sequence[int]) -> str:
    """SHA-256 of a checkpoint and of the instruction's ids: each safetensors file's name and size, its first 64 KiB
    (names, shapes, offsets) and 64 blocks of 4 KiB at even distances."""
    digest = hashlib.sha256(np.array(ids, np.int32).tobytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
            for place in np.linspace(0, max(0, size - 4096), 64).astype(np.int64).tolist():
                file.seek(place)
                digest.update(file.read(4096))
    return digest.hexdigest()


def smoothed(pace: float, spent: float, answered: int, count: int) -> float:
    """The mean of the seconds per answer after `spent` seconds with `answered` more, `count` in all. Answers weigh the
    same, however many came at once: with turns in place of answers, one after 0.4 s and five after 0.02 s would have a
    mean of 0.2."""
    weight = max(1 - (1 - SMOOTHING) ** answered, answered / max(answered, count))
    return pace + weight * (spent / answered - pace)


class Engine:
    """Judges with the first copy of a guard's model: the same verdicts as the guard, whoever else asks.

    max_requests, max_tokens: of what waits, the second in tokens of prompts; one of a picture holds 2.4 kB meanwhile.
    canaries: samples with a `request_label` that must be judged so before anything else is judged.
    Raises ValueError for limits that would refuse a single request.
    """

    def __init__(self, guard: Guard, *, max_requests: int, max_tokens: int, canaries: Sequence[Sample] = CANARIES):
        longest = max(guard.config.buckets.prompt)
        if max_requests < 1 or max_tokens < longest:
            raise ValueError(
                f"got max_requests {max_requests} and max_tokens {max_tokens}, expected at least 1 and at least the "
                f"longest prompt, {longest} tokens"
            )
        self._guard, self._sampler, self._layout = guard, guard.sampler, guard.sampler.layout
        self.max_requests, self.max_tokens, self._canaries = max_requests, max_tokens, canaries
        shared = self._layout.shared
        self._sizes = tuple(size - len(shared) for size in guard.config.buckets.prompt if size > len(shared))
        self._shared = instruction(guard.models[0], np.array(shared, np.int32), config=guard.model_config)
        self._slots = self._empty_rows()
        self._line: deque[Work] = deque()  # what waits for a row
        self._inside: list[Work] = []  # what has one
        self._unanswered = 0  # requests that were accepted
        self._change = threading.Condition()  # guards the line and the number above; never held in a device step
        self._closed = "the engine has not started"  # why nothing is accepted; "": it is
        self._trouble = ""  # why there are no judgements now; "": there are
        self._dead = False
        self._turned: float | None = None  # when the last turn of the loop began; None: idle
        self._pace = self._spent = 0.0  # seconds per answer if all rows are taken; of these since the last one
        self._counts = Counter(dict.fromkeys(COUNTED, 0))
        self._compiles = CompileCounter()
        self._readers = ThreadPoolExecutor(os.cpu_count(), "prompts")
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self.fingerprint = fingerprint(resolve(guard.config.model, guard.config.revision), shared)

    # --------------------------------------------------------------------------------------------- seen from outside

    def start(self) -> None:
        """Compile every shape that can occur, judge the canaries, and begin. A canary that is misjudged leaves the
        engine closed; `judge` then says why."""
        self._compile()
        self._closed, self._turned = self._misjudged_canary(), None
        if not self._closed:
            self._counts.update(dict.fromkeys(COUNTED, 0))
            self._compiles.counts.clear()
            self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether a request would be judged."""
        return not self._closed and not self._trouble and self._thread.is_alive() and self.live

    @property
    def live(self) -> bool:
        """Whether the loop makes progress, or has nothing to do. False for good after repeated failures."""
        turned = self._turned
        return not self._dead and (turned is None or time.monotonic() - turned < STALLED)

    @property
    def running(self) -> int:
        """Requests in rows."""
        return sum(not work.future.cancelled() for work in list(self._inside))

    @property
    def waiting(self) -> int:
        """Requests that were accepted and have no row yet."""
        return max(0, self._unanswered - self.running)

    @property
    def wait(self) -> float:
        """Seconds until a request that comes now would be answered, as far as is known; 0 while a row is free."""
        return MARGIN * (self._unanswered + 1) * self._pace if self._unanswered >= self._sampler.rows else 0.0

    def counters(self) -> dict[str, int]:
        """Since the start. judged … unread: requests by how they ended; tokens and padding of prompts that were
        computed; steps of slots, and how many of them were of running ones; compilations."""
        return dict(self._counts) | {"compiles": self._compiles.total}

    async def judge(
        self, sample: Sample, *, mode: str | None = None, budget: int | None = None, deadline: float | None = None
    ) -> Judgement:
        """The guard's judgement of a sample. Cancelling the task that awaits it cancels the work.

        mode, budget: as for `Guard.moderate`. deadline: by time.monotonic; without a verdict by then the judgement is
        one that blocks, its status `deadline`. Raises Overloaded, Closed, and ValueError for another mode or budget.
        """
        asked = self._guard.asked(mode, budget)
        self._accept()
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                example = await self._read(sample)
                sample = sample._replace(images=())  # however long the request waits, its pictures do not
                if isinstance(example, Judgement):
                    return example
                work = Work(sample, example, *asked)
                del example  # the work's alone, which lets go of its patches
                return await asyncio.wrap_future(self._queue(work))
        except TimeoutError:
            self._counts["deadline"] += 1
            return Judgement.rejected(sample.id, "no verdict before the deadline", "deadline")
        except asyncio.CancelledError:
            self._counts["cancelled"] += 1
            raise
        finally:
            with self._change:
                self._unanswered -= 1
                self._change.notify()

    async def drain(self) -> None:
        """Accept nothing more, finish what was accepted, and end."""
        with self._change:
            self._closed = self._closed or "the engine is draining"
            self._change.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._readers.shutdown(wait=False)
        self._compiles.close()

    # ----------------------------------------------------------------------------------------------- the way in

    def _accept(self) -> None:
        with self._change:
            if self._closed:
                raise Closed(self._closed)
            if self.waiting >= self.max_requests:
                raise Overloaded(max(1.0, (self._unanswered - self._sampler.rows) * self._pace))  # until a row is free
            self._unanswered += 1

    async def _read(self, sample: Sample) -> Example | Judgement:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, self._guard.example, sample)
        except SampleRejected as error:
            return Judgement.rejected(sample.id, f"{error.reason}: {error}")
        except Exception as error:  # of ours: the sender must not get through by it
            log.error("a request could not be read: %s", type(error).__name__)
            self._counts["unread"] += 1
            return _failed(sample)

    def _queue(self, work: Work) -> Future[Judgement]:
        with self._change:
            if self._dead:
                self._answer(work, _failed(work.sample), "failed")
            elif sum(len(one.example.tokens) for one in (*self._line, work)) > self.max_tokens:
                raise Overloaded(max(1.0, self.waiting * self._pace))
            else:
                self._line.append(work)
                self._change.notify()
        return work.future

    # ------------------------------------------------------------------------------------------ on the device's thread

    def _loop(self) -> None:
        failures = 0
        while self._something_to_do():
            try:
                if self._trouble:
                    self._slots = self._empty_rows()
                    if wrong := self._misjudged_canary():
                        raise RuntimeError(wrong)
                    self._trouble = ""
                if self._turn(self._line):
                    failures = 0
            except Exception as error:  # of the device, of a compilation, of memory
                failures += 1
                log.exception("a step failed, %d in a row, %d requests with it", failures, len(self._inside))
                self._trouble = f"a step failed: {type(error).__name__}"
                self._fail(self._inside)
                if failures == FAILURES:
                    with self._change:
                        self._closed, self._dead = f"{failures} steps in a row failed", True
                        self._fail(self._line)
                    return

    def _something_to_do(self) -> bool:
        """Wait for it. → False: drained."""
        with self._change:
            while not (self._line or self._inside):
                if self._closed and not self._unanswered:
                    return False
                if self._trouble:
                    break
                self._turned = None
                self._change.wait()
            return True

    def _turn(self, line: deque[Work]) -> int:
        """Dropped requests leave, waiting ones enter, a chunk is decoded. → how many were answered."""
        began = self._turned = time.monotonic()
        gone = {work for work in self._inside if work.future.cancelled()}
        self._slots.leave(gone.__contains__)
        self._inside = [work for work in self._inside if work not in gone]
        self._enter(self._take(line))
        entered, share = time.monotonic(), len(self._inside) / self._sampler.rows
        answered, before = 0, (self._slots.slot_steps, self._slots.used_steps)
        if self._slots.begin():
            finished = self._slots.step(max(1, self._sampler.rows // 8) if line else 1)
            self._counts["steps"] += 1
            self._counts["slot_steps"] += self._slots.slot_steps - before[0]
            self._counts["used_steps"] += self._slots.used_steps - before[1]
            if finished:
                for work, (said,) in zip(finished[0], self._sampler.completions(finished[1]), strict=True):
                    answered += self._finish(work, said, line)
        # alone in the rows, an answer takes as long to decode as with all others; its prompt is computed for it alone
        self._spent += entered - began + share * (time.monotonic() - entered)
        if answered:
            self._pace, self._spent = smoothed(self._pace, self._spent, answered, self._counts["judged"]), 0.0
        return answered

    def _take(self, line: deque[Work]) -> list[Work]:
        """Those that enter now: as many as there are rows and, for the sake of those that run, no more tokens than the
        longest prompt may have."""
        taken: list[Work] = []
        with self._change:
            waiting = [work for work in line if not work.future.cancelled()]
            tokens, rows = 0, len(self._slots.free)
            for work in waiting[:rows]:
                tokens += len(work.example.tokens) - len(self._layout.shared)
                if taken and tokens > max(self._sizes):
                    break
                taken.append(work)
            line.clear()
            line.extend(waiting[len(taken) :])
            self._inside += taken
        return taken

    def _enter(self, taken: list[Work]) -> None:
        if not taken:
            return
        opening = self._guard.closing.opening
        prompts = [extended(work.example, opening) if work.fast else work.example for work in taken]
        length = cheapest_length(prompts, self._sizes, self._layout)
        for places, batch in pack_queue(prompts, rows=1, length=length, layout=self._layout):
            kept = prefill(self._guard.models[0], batch, self._shared, config=self._guard.model_config)
            entries = [self._entry(taken[place.prompt], prompts[place.prompt], place) for place in places]
            self._slots.enter(entries, kept)
            used = sum(place.length for place in places)
            self._counts["prefill_tokens"] += used
            self._counts["prefill_padding"] += length - used
        for work in taken:
            if not (work.fast and work.mode == "auto"):  # it will not be read again
                work.example = work.example._replace(patches=work.example.patches[:0].copy())

    def _entry(self, work: Work, prompt: Example, place: Place) -> Entry:
        after = int(prompt.positions.max()) + 1
        return Entry(work, place, after, GREEDY, work.tokens, has_response(work.sample), work.fast)

    def _finish(self, work: Work, said: Completion, line: deque[Work]) -> bool:
        """Answer, or, where the fast answer was uncertain, let it reason next."""
        self._counts["generated_tokens"] += said.tokens
        judged = judgement(work.sample, work.example, said, work.fast)
        again = work.fast and work.mode == "auto" and self._guard.uncertain(judged)
        if work.fast:
            judged = calibrated(judged, self._guard.calibrations)
        with self._change:
            self._inside.remove(work)
            if again:
                work.fast = False
                line.appendleft(work)
        if again:
            return False
        self._answer(work, judged, "judged")
        return True

    def _fail(self, works: list[Work] | deque[Work]) -> None:
        for work in works:
            self._answer(work, _failed(work.sample), "failed")
        works.clear()

    def _answer(self, work: Work, judged: Judgement, counted: str) -> None:
        """Unless nobody waits for it any more."""
        if work.future.set_running_or_notify_cancel():
            self._counts[counted] += 1
            work.future.set_result(judged)

    # ------------------------------------------------------------------------------------------------------- the start

    def _empty_rows(self) -> Slots:
        longest = self._sampler.sampling.max_new_tokens
        return self._sampler.slots_for(self._guard.models[0], self._shared, 1, self._sizes, longest, CHUNK)

    def _compile(self) -> None:
        shapes = [(size, patches) for size in self._sizes for patches in (0, *self._layout.possible(size))]
        with progress(len(shapes), "compile") as advance:
            for size, patches in shapes:
                self._slots = self._empty_rows()
                batch = blank(1, size, patches, self._layout)
                kept = prefill(self._guard.models[0], batch, self._shared, config=self._guard.model_config)
                self._slots.rehearse(kept)
                advance(note=f"{size} tokens, {patches} patches")
        self._slots = self._empty_rows()

    def _misjudged_canary(self) -> str:
        """What is wrong with the verdicts on the canaries; "": nothing."""
        asked = self._guard.asked(None, None)
        works = [Work(sample, self._guard.example(sample), *asked) for sample in self._canaries]
        line = deque(works)
        while line or self._inside:
            self._turn(line)
        for work in works:
            said, expected = work.future.result(), work.sample.request_label
            if said.status != "ok" or said.request != expected:
                return f"{work.sample.id} was judged {said.request} ({said.status}), expected {expected}"
        return ""


def _failed(sample: Sample) -> Judgement:
    return Judgement.rejected(sample.id, "the guard failed; its log has the cause", "internal")
