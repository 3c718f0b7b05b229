"""What a running `gvl serve` bears: clients that wait for their answer, then requests that come whatever it does.

    load.py http://127.0.0.1:8000 --modes fast reason --clients 1 16 128 --offered 0.5 1 4 --pid PID --json load.json

An offered load is a multiple of the highest rate of the clients before it, at random moments. An answer is good if the
model decided it, and within the deadline: one that failed closed, was refused or did not come counts as an error.
lag: the 95th percentile of how late a request left; where it is not small, this program is the limit, not the server.
Needs the test extra.
--transformers CHECKPOINT: after that the same requests, one by one, through `generate` of transformers in this process,
in fp32; of mode fast the labels alone.
"""

import argparse
import asyncio
import base64
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from gvl_jax.data.embedded import generate
from gvl_jax.types import Sample

COLUMNS = ("mode", "load", "sent", "answers/s", "good/s", "p50 ms", "p95 ms", "p99 ms", "lag ms", "MB", "errors")


class Answer(NamedTuple):
    seconds: float  # since it was due
    lag: float  # of them before it was sent
    error: str  # empty: good


def samples() -> list[Sample]:
    """What is judged, in turn: four records of the demo's world, which its guard decides. Two have pictures, one has a
    response."""
    return [sample for sample, _ in generate("heldout", 2, 1, 1)]


def bodies(mode: str, deadline_ms: int) -> list[bytes]:
    requests = []
    for sample in samples():
        parts: list[dict[str, Any]] = [{"type": "text", "text": sample.request}] if sample.request else []
        for image in sample.images:
            assert isinstance(image, bytes)
            url = "data:image/png;base64," + base64.b64encode(image).decode("ascii")
            parts.append({"type": "image_url", "image_url": {"url": url}})
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        messages += [{"role": "assistant", "content": sample.response}] if sample.response else []
        requests.append(json.dumps({"messages": messages, "mode": mode, "deadline_ms": deadline_ms}).encode())
    return requests


class Server:
    """Where the requests go."""

    def __init__(self, session: aiohttp.ClientSession, deadline_ms: int) -> None:
        self.session, self.deadline = session, deadline_ms / 1000

    async def ask(self, body: bytes, due: float | None = None) -> Answer:
        """due: on the clock of time.monotonic; none given: now."""
        sent = time.monotonic()
        due = sent if due is None else due
        try:
            async with self.session.post("/v1/guard", data=body) as reply:
                said = await reply.json()
            error = str(reply.status) if reply.status != 200 else ""
            if not error and said["decided_by"] != "model":
                error = said["status"]
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as problem:
            error = type(problem).__name__
        seconds = time.monotonic() - due
        return Answer(seconds, sent - due, error or ("late" if seconds > self.deadline else ""))


async def closed(server: Server, requests: list[bytes], clients: int, seconds: float) -> list[Answer]:
    """`clients` at once, each of which asks again as soon as it is answered."""
    answers: list[Answer] = []
    end = time.monotonic() + seconds

    async def one(client: int) -> None:
        count = client
        while time.monotonic() < end:
            answers.append(await server.ask(requests[count % len(requests)]))
            count += 1

    await asyncio.gather(*map(one, range(clients)))
    return answers


async def opened(server: Server, requests: list[bytes], rate: float, seconds: float) -> list[Answer]:
    """`rate` requests a second on average, at random moments, however long the answers take."""
    gaps = np.random.default_rng(0).exponential(1 / rate, int(rate * seconds) + 1)
    due = time.monotonic() + np.cumsum(gaps)

    async def one(number: int) -> Answer:
        await asyncio.sleep(max(0.0, due[number] - time.monotonic()))
        return await server.ask(requests[number % len(requests)], float(due[number]))

    return await asyncio.gather(*map(one, range(len(due))))


def one_by_one(checkpoint: str, modes: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """→ rows of what `generate` needs for the same requests."""
    from gvl_jax.bench import theirs
    from gvl_jax.bench.inputs import Workload, World
    from gvl_jax.config import Images
    from gvl_jax.data.loader import to_example
    from gvl_jax.data.tokenizer import load_tokenizer
    from gvl_jax.guard.closing import closing
    from gvl_jax.models.qwen_vl.hub import image_bounds, load_config, resolve
    from gvl_jax.sampler import extended

    source = resolve(checkpoint)
    tokenizer, config = load_tokenizer(source), replace(load_config(source), dtype="float32")
    world, close = World(config, source, Workload()), closing(tokenizer, config.text.vocab_size)
    prompts = [to_example(sample, tokenizer, Images(*image_bounds(source)), 4096) for sample in samples()]
    model, label, node = theirs.load(world), 0, int(close.fast[1])
    while node:
        label, node = label + 1, int(close.next[node][0])
    for mode in modes:
        reads = [extended(prompt, close.opening) for prompt in prompts] if mode == "fast" else prompts
        batches = [theirs.inputs(world, [prompt], left=True) for prompt in reads]
        new = label if mode == "fast" else 512 + int(close.length)

        def ask(number: int, batches: list = batches, new: int = new) -> None:
            model.generate(**batches[number % len(batches)], max_new_tokens=new, do_sample=False)

        def each(ask: Callable[[int], None] = ask, batches: list = batches) -> None:
            for number in range(len(batches)):
                ask(number)

        threads, answers, began = theirs.settle(each), list[Answer](), time.monotonic()
        while time.monotonic() - began < seconds:
            since = time.monotonic()
            ask(len(answers))
            answers.append(Answer(time.monotonic() - since, 0.0, ""))
        yield row(mode, f"transformers, {threads} threads", answers, time.monotonic() - began, None)


def megabytes(pid: int | None) -> float | None:
    """Memory that a process holds now."""
    if pid is None:
        return None
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


async def measured(mode: str, load: str, pid: int | None, answering: Awaitable[list[Answer]]) -> dict[str, Any]:
    began = time.monotonic()
    answers = await answering
    return row(mode, load, answers, time.monotonic() - began, megabytes(pid))


def row(mode: str, load: str, answers: list[Answer], seconds: float, memory: float | None) -> dict[str, Any]:
    """Of the table."""
    good = [answer.seconds * 1000 for answer in answers if not answer.error]
    p50, p95, p99 = np.percentile(good, (50, 95, 99)).tolist() if good else (None, None, None)
    errors = Counter(answer.error for answer in answers if answer.error)
    rates = {"answers/s": len(answers) / seconds, "good/s": len(good) / seconds}
    lag = float(np.percentile([answer.lag * 1000 for answer in answers], 95))
    times = {"p50 ms": p50, "p95 ms": p95, "p99 ms": p99, "lag ms": lag}
    return {"mode": mode, "load": load, "sent": len(answers), **rates, **times, "MB": memory, "errors": errors}


async def run(args: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    """→ the rows of the table, each when it is measured."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {args.key}"} if args.key else {})
    patience = aiohttp.ClientTimeout(total=args.deadline_ms / 1000 + 30)
    connections = aiohttp.TCPConnector(limit=0)  # as many as there are requests
    async with aiohttp.ClientSession(args.url, headers=headers, timeout=patience, connector=connections) as session:
        server = Server(session, args.deadline_ms)
        for mode in args.modes:
            requests = bodies(mode, args.deadline_ms)
            for body in requests:
                await server.ask(body)  # the first answer of a server may take longer
            capacity = 0.0
            for clients in args.clients:
                answering = closed(server, requests, clients, args.seconds)
                one = await measured(mode, f"{clients} clients", args.pid, answering)
                capacity = max(capacity, one["good/s"])
                yield one
            for factor in args.offered if capacity else ():
                answering = opened(server, requests, factor * capacity, args.seconds)
                yield await measured(mode, f"{factor:g}x, {factor * capacity:.1f}/s", args.pid, answering)


def line(cells: list[Any]) -> str:
    texts = [f"{cell:.1f}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in cells]
    return f"{texts[0]:7} {texts[1]:18} " + " ".join(f"{text:>9}" for text in texts[2:-1]) + f"  {texts[-1]}"


async def report(args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []

    def show(one: dict[str, Any]) -> None:
        rows.append(one)
        errors = ", ".join(f"{count} {error}" for error, count in one["errors"].most_common())
        print(line([one[name] for name in COLUMNS[:-1]] + [errors]), flush=True)
        if args.json:
            part = args.json.with_name(args.json.name + ".part")
            part.write_text(json.dumps({"seconds": args.seconds, "rows": rows}, indent=1), encoding="utf-8")
            part.replace(args.json)

    print(line(list(COLUMNS)))
    async for one in run(args):
        show(one)
    if args.transformers:
        modes = [mode for mode in args.modes if mode != "auto"]  # it has no such mode
        for one in one_by_one(args.transformers, modes, args.seconds):
            show(one)
    return 0 if any(one["good/s"] for one in rows) else 1


def main(argv: list[str] | None = None) -> int:
    """→ the exit code: 0 done, 1 no good answer at all; SystemExit 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, without a path")
    parser.add_argument("--modes", nargs="+", default=["fast", "reason", "auto"])
    parser.add_argument("--clients", nargs="*", type=int, default=[1, 16, 128])
    parser.add_argument("--offered", nargs="*", type=float, default=[0.5, 1, 4], help="multiples of the capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--deadline-ms", type=int, default=10_000)
    parser.add_argument("--key", help="bearer key")
    parser.add_argument("--pid", type=int, help="of the server, to see its memory")
    parser.add_argument("--transformers", metavar="CHECKPOINT", help="what the server serves; needs the test extra")
    parser.add_argument("--json", type=Path, help="file to write")
    return asyncio.run(report(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
