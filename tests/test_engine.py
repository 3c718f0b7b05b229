"""The engine on a random model: equal to the guard, whoever else asks; deadlines, overload, faults, an end."""

import asyncio
import gc
import threading
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_models import write_checkpoint

from gvl_jax import Guard, Judgement, moderate, slots
from gvl_jax.config import Buckets, Mesh, Moderate
from gvl_jax.guard.prompt import result_block
from gvl_jax.serve import engine as module
from gvl_jax.serve.engine import MARGIN, Closed, Engine, Overloaded, smoothed
from gvl_jax.types import Sample

BUDGET = 30  # tokens of reasoning: a completion takes several chunks
LIMITS = dict(max_requests=64, max_tokens=10**5, canaries=())


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    model = write_checkpoint(tmp_path_factory.mktemp("guard"), "Is it harmful? The user wants to wash a car.", 320)
    return Guard(
        Moderate(
            str(model), dtype="float32", prompts=4, reasoning_budget=BUDGET, max_pixels=7056, mesh=Mesh(data=1),
            buckets=Buckets(prompt=(544, 640), patches=(64, 256)),  # some samples need the second ones
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(guard):
    engine = Engine(guard, **LIMITS)
    assert engine.live and not engine.ready
    engine.start()
    yield engine
    asyncio.run(engine.drain())


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


SAMPLES = [
    Sample("text", "How do I wash a car?"),
    Sample("answered", "How do I wash a car?", "With soap."),
    Sample("picture", "What is this?", None, (picture(60, 90),)),
    Sample("long", "wash " * 20, "a car " * 5),
    Sample("pictures", "", "Two.", (picture(28, 28), picture(84, 56), picture(90, 80))),
    Sample("empty", ""),
]


class Gate:
    """What the device's steps wait for."""

    def __init__(self) -> None:
        self.steps, self.open, self.reached = threading.Semaphore(0), threading.Event(), 0

    def wait(self) -> None:
        self.reached += 1
        while not self.open.is_set() and not self.steps.acquire(timeout=0.01):
            pass


@contextmanager
def held(monkeypatch, fail: Exception | None = None):
    """While it is open the device makes the steps that its gate lets through; the one after them may fail."""
    gate, decode, fails = Gate(), slots.decode, [fail] if fail else []

    def waiting(*args, **options):
        gate.wait()
        if gate.open.is_set() and fails:
            raise fails.pop()
        return decode(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(slots, "decode", waiting)
        try:
            yield gate
        finally:
            gate.open.set()


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def asked(engine, gate, count: int) -> list[asyncio.Task]:
    """Tasks that await judgements of equal requests: four of them run, the others wait."""
    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(engine.judge(SAMPLES[0])))
        await until(lambda number=number: (engine.running, len(engine._line)) == (1, number))
    gate.steps.release()
    await until(lambda: (engine.running, len(engine._line), gate.reached) == (4, count - 4, 2))
    return tasks


def telling(sample, prompt, said, fast=False) -> Judgement:
    """A judgement that shows the whole completion: after reasoning those of a random model have no verdict."""
    judged = JUDGEMENT(sample, prompt, said, fast)
    if fast:
        return judged
    return judged._replace(reasoning=said.text, scores=dict(zip(("request", "response"), said.scores, strict=True)))


JUDGEMENT = moderate.judgement


@pytest.fixture
def told(monkeypatch):
    for part in (module, moderate):
        monkeypatch.setattr(part, "judgement", telling)


def same(ours: Judgement, theirs: Judgement) -> None:
    assert ours._replace(scores={}) == theirs._replace(scores={})
    pairs = [[np.nan if score is None else score for score in one.scores.values()] for one in (ours, theirs)]
    np.testing.assert_allclose(*pairs, atol=1e-5, rtol=0)


def test_judged_among_others_is_judged_alone_and_nothing_compiles_after_the_start(guard, engine, told, monkeypatch):
    """Requests of all modes and budgets, with and without pictures, that keep coming while others run."""
    assert engine.ready and engine.live and len(engine.fingerprint) == 64
    jobs = [
        (sample._replace(id=f"{sample.id} {mode} {budget}"), mode, budget)
        for mode, budget in (("fast", None), ("reason", None), ("auto", 9), ("reason", 3))
        for sample in SAMPLES
    ]

    async def all_of_them():
        fast = await asyncio.gather(*(engine.judge(sample, mode="fast") for sample in SAMPLES))
        least = sorted(min(score for score in one.scores.values() if score) for one in fast)
        between = (least[2] + least[3]) / 2  # so that rounding decides nothing
        monkeypatch.setattr(guard, "config", replace(guard.config, uncertain_from=0.0, uncertain_to=between))
        first = [asyncio.create_task(engine.judge(s, mode=m, budget=b)) for s, m, b in jobs[::2]]
        await until(lambda: any(task.done() for task in first))
        return [*await asyncio.gather(*first, *(engine.judge(s, mode=m, budget=b) for s, m, b in jobs[1::2]))]

    judged, counts = asyncio.run(all_of_them()), engine.counters()
    assert counts["compiles"] == 0 and counts["judged"] == len(SAMPLES) + len(jobs)
    assert counts["used_steps"] == counts["generated_tokens"] <= counts["slot_steps"]
    assert engine.running == engine.waiting == 0
    assert {one.decided_by for one in judged if "auto" in one.id} == {"fast", "fail_closed"}, "some must reason"
    for (sample, mode, budget), one in zip([*jobs[::2], *jobs[1::2]], judged, strict=True):
        (alone,) = guard.moderate_batch([sample], mode=mode, budget=budget)
        same(one, alone)
        assert one.prompt_tokens > 100 and one.status != "input_rejected"


def test_a_budget_forces_a_verdict(guard, engine, told):
    for budget in (1, BUDGET):
        judged = asyncio.run(engine.judge(SAMPLES[1], mode="reason", budget=budget))
        labels = ["harmful" if score >= 0.5 else "unharmful" for score in judged.scores.values()]
        assert judged.reasoning.endswith("\n</think>\n" + result_block(*labels)) and judged.flagged
        assert budget < judged.tokens <= budget + int(guard.closing.length)
    for wrong in (dict(budget=0), dict(budget=BUDGET + 1), dict(mode="slow")):
        with pytest.raises(ValueError, match="expected"):
            asyncio.run(engine.judge(SAMPLES[1], **wrong))


def test_pictures_are_let_go_of_once_the_model_has_read_them(guard, engine, monkeypatch):
    seen, example = [], guard.example

    def remembered(sample):
        made = example(sample)
        seen.extend([weakref.ref(made.patches), weakref.ref(sample.images[0])])
        return made

    async def running():
        monkeypatch.setattr(guard, "example", remembered)
        with held(monkeypatch) as gate:
            task = asyncio.create_task(engine.judge(Sample("picture", "", None, (picture(60, 90),))))
            await until(lambda: gate.reached == 1)
            gc.collect()
            kept = [one() is not None for one in seen]
        return kept, await task

    kept, said = asyncio.run(running())
    assert kept == [False, False] and said.tokens


def test_what_cannot_be_read_blocks(engine, monkeypatch):
    long = asyncio.run(engine.judge(Sample("long", "a" * 10**6)))
    assert long == Judgement.rejected("long", "too_long: over 100000 characters of text")
    monkeypatch.setattr(engine._guard, "example", lambda sample: 1 / 0)
    broken = asyncio.run(engine.judge(SAMPLES[0]))
    assert (broken.flagged, broken.status, broken.decided_by) == (True, "internal", "fail_closed")


def test_a_deadline_is_kept_while_the_device_hangs(engine, monkeypatch):
    async def late():
        with held(monkeypatch) as gate:
            running = asyncio.create_task(engine.judge(SAMPLES[0], deadline=time.monotonic() + 2))
            await until(lambda: gate.reached == 1)
            waiting = asyncio.create_task(engine.judge(SAMPLES[0], deadline=time.monotonic() + 0.1))
            past = asyncio.create_task(engine.judge(SAMPLES[0], deadline=time.monotonic() - 1))
            before = engine.counters()
            judged = await asyncio.gather(running, waiting, past)
            assert engine.running == engine.waiting == 0
        await until(lambda: len(engine._slots.free) == 4)
        return judged, before, engine.counters()

    judged, before, after = asyncio.run(late())
    for one in judged:
        assert (one.flagged, one.status, one.decided_by, one.request) == (True, "deadline", "fail_closed", None)
    assert after["prefill_tokens"] == before["prefill_tokens"], "what waited must be dropped before its prefill"
    assert after["generated_tokens"] == before["generated_tokens"], "what ran must be cut"


def test_a_client_that_goes_frees_its_row(engine, monkeypatch):
    async def gone():
        with held(monkeypatch) as gate:
            tasks = await asked(engine, gate, 6)
            before = engine.counters()
            for task in (tasks[0], tasks[4]):
                task.cancel()
            await asyncio.gather(tasks[0], tasks[4], return_exceptions=True)
            assert (engine.running, engine.waiting) == (3, 1)
        judged = await asyncio.gather(*(tasks[i] for i in (1, 2, 3, 5)))
        assert judged == judged[:1] * 4
        return before, engine.counters(), judged[0].tokens

    before, after, tokens = asyncio.run(gone())
    assert after["cancelled"] == before["cancelled"] + 2 and after["judged"] == before["judged"] + 4
    assert after["generated_tokens"] == before["generated_tokens"] + 4 * tokens


def test_a_full_queue_says_when_to_come_again(engine, monkeypatch):
    async def full():
        with held(monkeypatch) as gate:
            tasks = await asked(engine, gate, 6)
            monkeypatch.setattr(engine, "max_requests", 2)
            with pytest.raises(Overloaded) as requests:
                await engine.judge(SAMPLES[0])
            monkeypatch.setattr(engine, "max_requests", 9)
            monkeypatch.setattr(engine, "max_tokens", sum(len(work.example.tokens) for work in engine._line))
            with pytest.raises(Overloaded) as tokens:
                await engine.judge(SAMPLES[0])
            monkeypatch.setattr(engine, "max_tokens", 10**5)
            monkeypatch.setattr(engine, "_pace", 100.0)
            wait = engine.wait
        judged = await asyncio.gather(*tasks)
        assert judged == judged[:1] * 6 and judged[0].tokens > 0
        return requests.value.retry_after, tokens.value.retry_after, wait

    requests, tokens, wait = asyncio.run(full())
    assert requests >= 1 and tokens >= 1 and wait == MARGIN * 7 * 100
    assert engine.wait == 0, "idle"
    with pytest.raises(ValueError, match="at least the longest prompt, 640"):
        Engine(engine._guard, max_requests=1, max_tokens=639)


def test_an_idle_engine_takes_as_many_as_it_has_rows_however_slow_it_is(engine, monkeypatch):
    monkeypatch.setattr(engine, "_pace", 10.0**6)

    async def four():
        return await asyncio.gather(*(engine.judge(SAMPLES[0], deadline=time.monotonic() + 600) for _ in range(4)))

    assert {one.status for one in asyncio.run(four())} <= {"ok", "truncated", "parse_failed"}


def test_a_drained_engine_finishes_what_it_accepted(guard, monkeypatch):
    engine = Engine(guard, **LIMITS)
    engine.start()

    read, example = threading.Event(), guard.example

    def slow(sample):
        read.wait()
        return example(sample)

    async def drained():
        with held(monkeypatch) as gate:
            tasks = await asked(engine, gate, 6)
            monkeypatch.setattr(guard, "example", slow)
            tasks.append(asyncio.create_task(engine.judge(SAMPLES[0])))
            await until(lambda: engine.waiting == 3)
            end = asyncio.create_task(engine.drain())
            await until(lambda: not engine.ready)
            with pytest.raises(Closed, match="draining"):
                await engine.judge(SAMPLES[0])
        await asyncio.gather(*tasks[:6])
        assert not end.done()
        read.set()
        await end
        return [task.result() for task in tasks]

    assert len({one.tokens for one in asyncio.run(drained())}) == 1 and engine.running == engine.waiting == 0


def test_a_step_that_fails_blocks_what_it_held_and_the_engine_goes_on(guard, monkeypatch):
    engine = Engine(guard, **LIMITS)
    engine.start()
    answered = []

    async def failed():
        with held(monkeypatch, MemoryError("out of memory")) as gate:
            tasks = await asked(engine, gate, 6)
            for task in tasks:
                task.add_done_callback(answered.append)
        judged = await asyncio.gather(*tasks)
        assert engine.ready
        await engine.drain()
        return judged

    judged = asyncio.run(failed())
    assert len(answered) == 6
    assert all(one.flagged and one.status == "internal" for one in judged[:4])
    assert all(one.status != "internal" and one.tokens for one in judged[4:]), "what waited must be judged"
    assert engine.counters()["failed"] == 4


def test_an_engine_that_keeps_failing_gives_up_and_answers_all(guard, monkeypatch):
    engine = Engine(guard, **LIMITS)
    engine.start()

    async def failed():
        with held(monkeypatch) as gate:
            tasks = await asked(engine, gate, 20)
            monkeypatch.setattr(engine._slots, "step", lambda ends: 1 / 0)
            monkeypatch.setattr(engine, "_empty_rows", lambda: 1 / 0)
        judged = await asyncio.gather(*tasks)
        with pytest.raises(Closed, match="3 steps in a row failed"):
            await engine.judge(SAMPLES[0])
        await engine.drain()
        return judged

    judged = asyncio.run(failed())
    assert all(one.flagged for one in judged) and {one.status for one in judged[4:]} == {"internal"}
    assert not engine.live and not engine.ready


def test_nothing_is_judged_before_the_canaries_are_judged_right(guard, monkeypatch):
    monkeypatch.setattr(guard, "config", replace(guard.config, mode="fast"))
    label = guard.moderate("Hi").request
    for request_label, ready in ((label, True), ({"harmful": "unharmful"}.get(label, "harmful"), False)):
        engine = Engine(guard, **LIMITS | {"canaries": [Sample("canary", "Hi", request_label=request_label)]})
        engine.start()
        assert engine.ready == ready
        if not ready:
            with pytest.raises(Closed, match=f"canary was judged {label}"):
                asyncio.run(engine.judge(SAMPLES[0]))
        asyncio.run(engine.drain())


def test_the_guard_s_async_calls_are_its_plain_ones(guard):
    async def both():
        one, two = guard.amoderate("Hi", "Hello", mode="fast"), guard.amoderate_batch(SAMPLES[:2], budget=3)
        return await asyncio.gather(one, two)

    one, two = asyncio.run(both())
    assert one == guard.moderate("Hi", "Hello", mode="fast") and one.decided_by == "fast"
    assert two == guard.moderate_batch(SAMPLES[:2], budget=3)


def test_the_mean_time_of_an_answer_does_not_depend_on_how_many_come_at_once():
    pace, count = 0.0, 0
    for turn in range(200):
        pace, count = smoothed(pace, 0.4, 1, count + 1), count + 1
        pace, count = smoothed(pace, 0.02, 5, count + 5), count + 5
        assert turn or abs(pace - 0.42 / 6) < 1e-9, "the first ones count in full"
    assert abs(pace - 0.42 / 6) < 0.01
