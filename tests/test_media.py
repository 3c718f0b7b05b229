import asyncio
import io
import os
import signal
import time
from pathlib import Path

import hostile_media
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_images import encoded, noise

from gvl_jax.config import Images
from gvl_jax.data.images import ImageRejected, open_image, to_patches
from gvl_jax.serve.decoder import bounded
from gvl_jax.serve.media import MediaPool

BOUNDS = Images(min_pixels=3136, max_pixels=200_704)
SMALL = encoded(noise(60, 40), "PNG")


def run(body, **settings):
    """`await body(pool)`, with the pool closed whatever happens."""

    async def main():
        pool = MediaPool(BOUNDS, **settings)
        try:
            return await body(pool)
        finally:
            pool.close()

    return asyncio.run(main())


async def reason(pool, source, **options):
    with pytest.raises(ImageRejected) as caught:
        await pool.open(source, **options)
    return caught.value.reason


def resident(worker):
    """kB of memory that a worker holds."""
    status = Path(f"/proc/{worker.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


async def child_of(pool):
    """The process that decodes a picture now."""
    while True:
        for worker in list(pool._running):
            children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
            if children:
                return worker.pid, int(children[0])
        await asyncio.sleep(0.01)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on broken EXIF
def test_the_hostile_corpus_gets_a_picture_or_a_reason_and_costs_no_worker():
    good, bad = hostile_media.opened(), hostile_media.rejected()
    assert len(good) + len(bad) >= 60

    async def body(pool):
        await pool.open(SMALL)
        (worker,) = pool._running
        before = resident(worker)
        tasks = {name: pool.open(data) for name, data in (good | {n: data for n, (data, _) in bad.items()}).items()}
        outcomes = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
        assert pool._running == {worker} and worker.poll() is None
        return outcomes, resident(worker) - before

    outcomes, growth = run(body, workers=1)
    assert growth < 64 * 1024  # kB; the corpus holds 10 MB files and 80 MB bombs
    for name, data in good.items():
        assert isinstance(outcomes[name], Image.Image), (name, outcomes[name])
        assert outcomes[name].tobytes() == bounded(data, BOUNDS.min_pixels, BOUNDS.max_pixels).tobytes(), name
    for name, (_, reasons) in bad.items():
        assert isinstance(outcomes[name], ImageRejected) and outcomes[name].reason in reasons, (name, outcomes[name])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(784, 10**5), st.integers(1, 40))
def test_patches_of_what_the_pool_gives_are_those_of_the_picture(width, height, low, times):
    if max(width, height) > 200 * min(width, height):
        return
    source = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(source, "PNG", compress_level=0)
    given_image = bounded(source.getvalue(), low, low * times)
    wanted, got = (to_patches(image, low, low * times) for image in (open_image(source.getvalue()), given_image))
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])


def test_a_picture_that_takes_too_long_is_given_up_and_the_worker_lives_on():
    slow = hostile_media.many_scans(6000, 3000)

    async def body(pool):
        assert await reason(pool, slow) == "timeout"
        for source, left in ((slow, 0.2), (SMALL, -1)):  # then it is not the picture's fault
            with pytest.raises(TimeoutError):
                await pool.open(source, deadline=time.monotonic() + left)
        (worker,) = pool._running
        assert (await pool.open(SMALL)).size and pool._running == {worker}

    run(body, workers=1, seconds=1.0)


def test_a_picture_that_takes_too_much_memory_is_given_up():
    big = encoded(Image.new("RGBA", (6000, 6000)), "PNG", compress_level=1)

    async def body(pool):
        assert await reason(pool, big) == "too_much_memory"
        assert (await pool.open(SMALL)).size

    run(body, workers=1, memory=400 * 2**20)


@pytest.mark.parametrize(
    "whom, how, code",
    [
        ("child", signal.SIGSEGV, "crashed"),
        ("worker", signal.SIGKILL, "crashed"),
        ("worker", signal.SIGSTOP, "timeout"),
    ],
)
def test_a_decoder_that_dies_or_hangs_costs_one_picture_and_no_other(whom, how, code):
    slow = hostile_media.many_scans(6000, 3000)

    async def body(pool):
        victim = asyncio.create_task(reason(pool, slow))
        worker, child = await child_of(pool)
        others = [asyncio.create_task(pool.open(SMALL)) for _ in range(4)]
        await asyncio.wait_for(others[0], 30)  # the other worker goes on
        os.kill(child if whom == "child" else worker, how)
        lost = await victim
        assert {(await other).tobytes() for other in others} == {(await pool.open(SMALL)).tobytes()}
        return lost

    assert run(body, seconds=1.0 if code == "timeout" else 30.0) == code


def test_a_decoder_that_ended_while_it_was_idle_is_forgotten():
    async def body(pool):
        await pool.open(SMALL)
        (dead,) = pool._running
        dead.kill()
        dead.wait()
        assert (await pool.open(SMALL)).size
        assert dead not in pool._running and dead.stdin.closed, "it would be killed at the end by a number of another's"

    run(body, workers=1)


def test_who_goes_away_frees_the_decoder():
    slow = hostile_media.many_scans(6000, 3000)

    async def body(pool):
        gone = asyncio.create_task(pool.open(slow))
        worker, child = await child_of(pool)
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
        assert (await pool.open(SMALL)).size
        assert not Path(f"/proc/{worker}").exists() and not _runs(child)

    run(body, workers=1, seconds=60.0)


def _runs(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_workers_know_no_secret_of_the_server(monkeypatch):
    monkeypatch.setenv("GVL_KEY", "secret")

    async def body(pool):
        await pool.open(SMALL)
        (worker,) = pool._running
        assert b"secret" not in Path(f"/proc/{worker.pid}/environ").read_bytes()

    run(body, workers=1)
