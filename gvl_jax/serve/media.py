"""Untrusted pictures, decoded in other processes: what they do to a decoder, they do to nobody else."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from PIL import Image

import gvl_jax
from gvl_jax.config import Images
from gvl_jax.data.images import LIMITS, ImageRejected
from gvl_jax.serve.decoder import REPLY, REQUEST

GRACE = 1.0  # seconds after its time limit at which a worker that has not answered is killed

Worker = subprocess.Popen[bytes]


class MediaPool:
    """`workers` processes that live long, of about 35 MB and the last picture each. Each picture gets a child of one.

    seconds: of wall time for one picture. memory: bytes of address space for one, its decoder's 150 MB included; the
    largest picture allowed takes 1.25 GB as WebP with an alpha channel.
    """

    def __init__(self, images: Images, workers: int = 2, *, seconds: float = 5.0, memory: int = 1536 * 2**20) -> None:
        self.images, self.seconds, self.memory = images, seconds, memory
        self._idle: asyncio.LifoQueue[Worker | None] = asyncio.LifoQueue()
        for _ in range(workers):
            self._idle.put_nowait(None)  # started by its first picture
        self._running: set[Worker] = set()

    async def open(self, source: bytes, *, deadline: float | None = None) -> Image.Image:
        """The picture upright in RGB and in the size of its smart resize, see `decoder.bounded`.

        At most `workers` pictures are decoded at a time, the others wait. deadline: on the clock of time.monotonic.
        Raises TimeoutError at the deadline; ImageRejected: what `open_image` refuses, `timeout` (of its own) and
        `crashed`.
        """
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            worker = await self._idle.get()
        reply = None
        try:
            if worker is not None and worker.poll() is not None:
                self._forget(worker)
                worker = None
            if worker is None:
                worker = self._start()
            seconds = self.seconds if deadline is None else min(self.seconds, deadline - time.monotonic())
            seconds = max(seconds, 0.001)
            async with asyncio.timeout(seconds + GRACE):
                reply = await asyncio.to_thread(_ask, worker, source, seconds)
        except TimeoutError as error:
            if seconds < self.seconds:
                raise
            raise ImageRejected("timeout", f"no answer of the decoder after {seconds + GRACE:.1f} s") from error
        except (OSError, EOFError) as error:
            raise ImageRejected("crashed", "the decoder ended") from error
        finally:  # a worker that has not answered is of no use, also when the caller has gone
            if reply is None and worker is not None:
                self._kill(worker)
            self._idle.put_nowait(None if reply is None else worker)
        if isinstance(reply, ImageRejected):
            if reply.reason == "timeout" and seconds < self.seconds:
                raise TimeoutError("the deadline passed before the picture was decoded")
            raise reply
        return reply

    def close(self) -> None:
        """End all workers, and reject what they are decoding."""
        for worker in list(self._running):
            self._kill(worker)

    def _start(self) -> Worker:
        command = [sys.executable, "-m", "gvl_jax.serve.decoder"]
        limits = (self.images.min_pixels, self.images.max_pixels, self.memory)
        # The environment holds no secrets; one BLAS thread, because the worker forks. A session of its own: it is
        # killed with its child, and a Ctrl-C at the terminal does not end it before the server has drained.
        environment = {"PYTHONPATH": str(Path(gvl_jax.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
        worker = subprocess.Popen(
            [*command, *map(str, limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self._running.add(worker)
        return worker

    def _kill(self, worker: Worker) -> None:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
        self._forget(worker)

    def _forget(self, worker: Worker) -> None:
        """One that has ended: its number may be another's by now."""
        self._running.discard(worker)
        for pipe in _pipes(worker):
            with suppress(OSError):  # what was not written yet
                pipe.close()


def _pipes(worker: Worker) -> tuple[IO[bytes], IO[bytes]]:
    assert worker.stdin is not None and worker.stdout is not None
    return worker.stdin, worker.stdout


def _ask(worker: Worker, source: bytes, seconds: float) -> Image.Image | ImageRejected:
    """The worker's answer. Raises OSError or EOFError if it has none."""
    requests, replies = _pipes(worker)
    requests.write(REQUEST.pack(len(source), seconds))
    requests.write(source)
    requests.flush()
    width, height = REPLY.unpack(_read(replies, REPLY.size))
    if width == 0:
        return ImageRejected(*json.loads(_read(replies, height)))
    if width * height > LIMITS.max_pixels:
        raise EOFError("a picture that is larger than any allowed")
    return Image.frombytes("RGB", (width, height), _read(replies, 3 * width * height))


def _read(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise EOFError("the worker ended")
    return data
