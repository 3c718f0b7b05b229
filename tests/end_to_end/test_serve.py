"""`gvl serve` as a process of its own, with a real engine and real decoders: hostile input, signals, memory.

The model has random weights that find every text unharmful when they judge without reasoning, and no verdict when they
reason. So whatever blocks has failed closed, and whatever cannot be judged and is allowed shows.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import hostile_media
import httpx
import pytest
from fake_guard import png
from hostile import REQUESTS
from test_app import (
    GUARD,
    HOSTILE_BODIES,
    HOSTILE_URLS,
    IMAGE_FORMS,
    KEYS,
    LITELLM,
    LONG,
    MODERATIONS,
    POSTS,
    TEXT_FORMS,
    allowed,
    data_url,
    image,
    text,
    user,
)
from tiny_models import write_checkpoint

from gvl_jax.models.qwen_vl.hub import load_config, save_params
from gvl_jax.models.qwen_vl.model import init_params

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]  # Pillow on broken EXIF
ROOT = Path(__file__).resolve().parents[2]
MILD = 5  # the seed of weights whose P(harmful) is about 0.1, whatever the text
DEADLINE = 20.0
SETTINGS = (
    f"--deadline {DEADLINE} --batch-deadline {DEADLINE} --mode fast --dtype float32 --prompts 4 --reasoning-budget 8 "
    "--max-pixels 7056 --buckets.prompt 640 --buckets.patches 256"
)
# Weights like these can judge the harmless canary alone.
LAUNCH = """
import sys
from gvl_jax.cli import main
from gvl_jax.serve.engine import CANARIES, Engine
Engine.__init__.__kwdefaults__["canaries"] = CANARIES[:1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    model = write_checkpoint(folder, "Is it harmful or unharmful? The user wants to wash a car.", 320)
    config = load_config(model)
    save_params(folder / "mild", init_params(config, MILD), config, dtype="float32", source=folder / "files")
    return folder / "mild"


class Server:
    def __init__(self, model, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-c", LAUNCH, "serve", str(model), "--port", str(port), *SETTINGS.split()]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def wait_until_ready(self):
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)

    def memory(self, key="VmRSS"):
        """MB"""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1]) / 1000


@contextmanager
def serving(model, log):
    server = Server(model, log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving(model, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


# --- hostile input


def test_a_head_without_an_end_is_not_read(server):
    sent, host = 0, server.url.removeprefix("http://").split(":")
    with socket.create_connection((host[0], int(host[1])), timeout=20) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: here\r\nx: ")
        with pytest.raises(OSError):
            while sent < 100_000_000:
                sent += connection.send(b"a" * 65_536)
    assert sent < 20_000_000, "what the kernels hold, and 64 kB"


def cases():
    """(path, body, whether it may be allowed)"""
    for name, words in (REQUESTS | LONG).items():
        for form in ("moderation", "chat", "guard, response", "batch", "litellm"):
            path, body = TEXT_FORMS[form](words)
            yield path, json.dumps(body).encode("ascii"), name != "one word of a megabyte"
    urls = [(data_url(data), False) for data, _ in hostile_media.rejected().values()]
    urls += [(url, False) for url in HOSTILE_URLS.values()]
    urls += [(data_url(data), True) for data in hostile_media.opened().values()]
    forms = list(IMAGE_FORMS.values())
    for number, (url, good) in enumerate(urls):
        for form in (forms[number % len(forms)], forms[(number + 3) % len(forms)]):
            path, body = form(url)
            yield path, json.dumps(body).encode("ascii"), good
    for body in HOSTILE_BODIES.values():
        for path in POSTS:
            more = '"input_type": "request", ' if path == LITELLM else ""
            wrapped = f'{{{more}"{KEYS[path]}": {body}}}'.encode() if isinstance(body, str) else body
            yield path, wrapped, False


def test_nothing_that_cannot_be_judged_is_allowed(server):
    before = server.memory()
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak begins here
    count, passed = 0, 0
    late, wrong = [], []

    async def one(client, rows, path, body, good):
        nonlocal passed
        async with rows:
            began = time.monotonic()
            reply = await client.post(path, content=body)
            late.append(time.monotonic() - began)
        through = allowed(path, reply)
        passed += through
        if through and not good:
            wrong.append((path, body[:200], reply.text[:300]))
        if path == GUARD and through:
            said = reply.json()
            assert said["status"] == "ok" and all(
                said[part]["received"] == said[part]["evaluated"] for part in ("images", "characters")
            )

    async def all_of_them():
        nonlocal count
        rows, tasks = asyncio.Semaphore(2), set()  # more of the largest are too much at a time: 429
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            for case in cases():
                count += 1
                while len(tasks) >= 8:
                    done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    [task.result() for task in done]
                tasks.add(asyncio.create_task(one(client, rows, *case)))
            await asyncio.gather(*tasks)

    asyncio.run(all_of_them())
    assert count >= 300 and not wrong
    assert passed > 100, "what can be judged is allowed by this model, so that what is allowed tells something"
    assert max(late) <= 1.1 * DEADLINE
    assert server.memory("VmHWM") - before <= 500
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    assert '"status": 500' not in server.log.read_text()


# --- memory

MIXED = [
    (MODERATIONS, {"input": ["How do I bake bread?", "Hi " * 5, "Hi"]}),
    (MODERATIONS, {"input": [image(data_url(png(size=(90, 80)))), text("What is this?")]}),
    (GUARD, {"messages": user("Hi"), "mode": "reason"}),
    (GUARD, {"messages": user("a" * 50_000)}),
    (LITELLM, {"input_type": "request", "texts": ["Hi"], "litellm_call_id": "same"}),
    (LITELLM, {"input_type": "request", "texts": ["Hi"], "images": ["data:image/png;base64,AAAA"]}),
]


def ask_for(server, seconds, stop=None, pause=0.0):
    """Mixed requests by four clients, each with a pause after an answer. → status codes, and paths with replies that
    came."""
    replies, until = [], time.monotonic() + seconds

    def client(offset):
        with httpx.Client(base_url=server.url, timeout=60) as client:
            number = offset
            while time.monotonic() < until and not (stop and stop.is_set()):
                path, body = MIXED[number % len(MIXED)]
                number += 1
                try:
                    replies.append((path, body, client.post(path, json=body)))
                    time.sleep(pause)
                except httpx.TransportError:  # a closed connection is no answer
                    replies.append((path, body, None))
                    time.sleep(0.02)

    threads = [threading.Thread(target=client, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    return replies, threads


def test_memory_stays_flat(server):
    """GVL_SOAK: seconds, 1800 by hand. After the first half there is nothing left to be loaded or cached."""
    parts = max(2, int(os.environ.get("GVL_SOAK", "120")) // 30)
    held = []
    for _ in range(parts):
        replies, threads = ask_for(server, 30, pause=0.05)  # the suite's other worker needs a core
        for thread in threads:
            thread.join()
        assert replies and all(reply is not None and reply.status_code in (200, 400) for *_, reply in replies)
        held.append(round(server.memory()))
    print(f"{held} MB")
    assert max(held[parts // 2 :]) - held[parts // 2 - 1] < 50


# --- signals


def unearned(replies):
    """Replies that allow what no model can have judged."""
    judged = [MIXED[0][1], MIXED[1][1], MIXED[4][1]]
    return [reply.text for path, body, reply in replies if reply is not None and reply.status_code == 200
            and body not in judged and allowed(path, reply)]  # fmt: skip


def test_a_server_that_ends_under_load_allows_nothing_unearned_and_starts_again(model, tmp_path):
    for how, expected in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):  # the second one is the restart
        with serving(model, tmp_path / "log") as server:
            stop = threading.Event()
            replies, threads = ask_for(server, 30, stop)
            while len(replies) < 12:
                time.sleep(0.01)
            server.process.send_signal(how)
            code = server.process.wait(DEADLINE + 10)
            stop.set()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive(), "an answer or a closed connection"
        assert code == expected, server.log.read_text()[-3000:]
        assert {reply.status_code for *_, reply in replies if reply is not None} <= {200, 400, 503}
        assert any(reply is not None for *_, reply in replies) and not unearned(replies)
