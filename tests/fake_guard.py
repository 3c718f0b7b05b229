"""An engine that judges by keyword and a pool that decodes in this process, for tests of what stands around them."""

import asyncio
import contextlib
import threading
import time
from io import BytesIO

import uvicorn
from PIL import Image

from gvl_jax.data.images import open_image
from gvl_jax.moderate import Judgement
from gvl_jax.serve.engine import Closed, Overloaded

KEYWORD = "bomb"
BLACK, WHITE = (0, 0, 0), (255, 255, 255)  # a picture is harmful if its first pixel is black


def png(color=WHITE, size=(30, 20)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def judged(sample, request, response, *, status="ok", scores=None, reasoning="Step 1: I read it.") -> Judgement:
    labels = ["harmful" if harm else "unharmful" for harm in (request, response)]
    if not sample.response:
        labels[1] = None
    if status == "parse_failed":
        labels = [None, None]
    scores = scores or {"request": 0.9 if request else 0.1, "response": None}
    flagged = status != "ok" or "harmful" in labels
    by = "reason" if status == "ok" else "fail_closed"
    return Judgement(sample.id, *labels, flagged, status, by, None, reasoning, (), scores, 12, 30)


class FakeEngine:
    """`samples` are those judged. A text OVERLOAD, CLOSED, CRASH, HANG, CUT, GARBLE or SCORE=0.x does what it says."""

    def __init__(self):
        self.ready = self.live = True
        self.waiting = self.running = 0
        self.wait = 0.0
        self.fingerprint = "weights/prompt/code"
        self.samples, self.asked, self.cancelled, self.drained = [], [], 0, False

    def counters(self):
        return {"prefills": 3}

    async def drain(self):
        self.drained = True

    async def judge(self, sample, *, mode=None, budget=None, deadline=None):
        self.samples.append(sample)
        self.asked.append((mode, budget, deadline and deadline - time.monotonic()))
        words = f"{sample.request} {sample.response or ''}"
        if "OVERLOAD" in words:
            raise Overloaded(2.5)
        if "CLOSED" in words:
            raise Closed
        if "CRASH" in words:
            raise RuntimeError(f"failed on {words}")
        if "HANG" in words:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if "CUT" in words:
            return judged(sample, False, False, status="truncated")
        if "GARBLE" in words:
            return judged(sample, False, False, status="parse_failed")
        if "SCORE=" in words:
            score = float(words.partition("SCORE=")[2].split()[0])
            return judged(sample, False, False, scores={"request": score, "response": None})
        dark = any(image.getpixel((0, 0)) == BLACK for image in sample.images)
        return judged(sample, dark or KEYWORD in sample.request.lower(), KEYWORD in (sample.response or "").lower())


class FakeMedia:
    closed = False

    async def open(self, source, *, deadline=None):
        return open_image(source)

    def close(self):
        self.closed = True


@contextlib.contextmanager
def serving(app):
    """The URL of a real server of the app, in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
