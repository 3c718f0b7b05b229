"""The server with an engine that judges by keyword: every protocol, and everything that goes wrong."""

import asyncio
import base64
import io
import json
import logging
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import yaml
from fake_guard import BLACK, FakeEngine, FakeMedia, png, serving
from hostile import FAKE, REQUESTS, fuzzed
from PIL import Image
from starlette.requests import Request
from starlette.testclient import TestClient

from gvl_jax.cli import main
from gvl_jax.config import Serve
from gvl_jax.serve.app import BODIES, OPEN, create_app
from gvl_jax.serve.http import MAX_COMMAS, ApiError, Refused, Room
from gvl_jax.serve.telemetry import JsonLines

ROOT = Path(__file__).resolve().parent.parent
MODERATIONS, CHAT, GUARD, BATCH = "/v1/moderations", "/v1/chat/completions", "/v1/guard", "/v1/guard/batch"
LITELLM = "/beta/litellm_basic_guardrail_api"
POSTS = (MODERATIONS, CHAT, GUARD, BATCH, LITELLM)
GATEWAYS = (MODERATIONS, LITELLM)  # a verdict whatever is sent


def data_url(data: bytes, kind="png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts):
    return [{"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}]


def text(words):
    return {"type": "text", "text": words}


# One text or one picture, in each form that it can come in.
TEXT_FORMS = {
    "moderation": lambda words: (MODERATIONS, {"input": words}),
    "moderation list": lambda words: (MODERATIONS, {"input": [words]}),
    "moderation parts": lambda words: (MODERATIONS, {"input": [text("Hi"), text(words)]}),
    "chat": lambda words: (CHAT, {"messages": user(words)}),
    "chat, an earlier turn": lambda words: (CHAT, {"messages": [*user(words), *user("Hi")]}),
    "guard": lambda words: (GUARD, {"messages": user(text(words))}),
    "guard, system": lambda words: (GUARD, {"messages": [{"role": "system", "content": words}, *user("Hi")]}),
    "guard, response": lambda words: (GUARD, {"messages": [*user("Hi"), {"role": "assistant", "content": words}]}),
    "batch": lambda words: (BATCH, {"items": [{"messages": user(words)}]}),
    "litellm": lambda words: (LITELLM, {"input_type": "request", "texts": [words]}),
    "litellm response": lambda words: (LITELLM, {"input_type": "response", "texts": ["Hi", words]}),
    "litellm turns": lambda words: (LITELLM, {"input_type": "request", "structured_messages": user(words)}),
}
IMAGE_FORMS = {
    "moderation": lambda url: (MODERATIONS, {"input": [image(url)]}),
    "moderation, second": lambda url: (MODERATIONS, {"input": [image(data_url(png())), text("Hi"), image(url)]}),
    "chat": lambda url: (CHAT, {"messages": user(text("Hi"), image(url))}),
    "guard": lambda url: (GUARD, {"messages": user(image(url))}),
    "batch": lambda url: (BATCH, {"items": [{"messages": user(image(url))}]}),
    "litellm": lambda url: (LITELLM, {"input_type": "request", "texts": ["Hi"], "images": [url]}),
}


def allowed(path, reply) -> bool:
    """What a client that follows the protocol lets through."""
    assert reply.status_code < 500, reply.text
    if path in GATEWAYS:
        assert reply.status_code == 200, reply.text
    body = reply.json()
    if reply.status_code != 200:
        assert set(body["error"]) == {"message", "type", "param", "code"} and body["error"]["code"]
        return False
    if path == MODERATIONS:
        assert body["results"]
        return not all(one["flagged"] and any(one["categories"].values()) for one in body["results"])
    if path == LITELLM:
        return body["action"] != "BLOCKED"
    if path == CHAT:
        return "Request: harmful" not in body["choices"][0]["message"]["content"] and (
            "Response: harmful" not in body["choices"][0]["message"]["content"]
        )
    return any(one["action"] == "allow" for one in (body["data"] if path == BATCH else [body]))


@pytest.fixture(scope="module")
def engine():
    return FakeEngine()


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(create_app(engine, FakeMedia(), Serve(deadline=20.0))) as client:
        yield client


def served(tmp_path=None, **settings):
    """A client of a server of its own."""
    if tmp_path:
        (tmp_path / "keys").write_text("# operators\nfirst\n\nsecond\n")
        settings["keys"] = str(tmp_path / "keys")
    engine = FakeEngine()
    client = TestClient(create_app(engine, FakeMedia(), Serve(**settings)))
    client.engine = engine
    return client


# --- every form of every protocol


@pytest.mark.parametrize("name", TEXT_FORMS)
def test_harm_in_a_text_is_blocked_and_the_rest_allowed(client, name):
    for words, passes in (("How do I bake bread?", True), ("How do I build a bomb?", False)):
        path, body = TEXT_FORMS[name](words)
        assert allowed(path, client.post(path, json=body)) == passes


@pytest.mark.parametrize("name", IMAGE_FORMS)
def test_harm_in_a_picture_is_blocked_and_the_rest_allowed(client, engine, name):
    for color, passes in (((255, 255, 255), True), (BLACK, False)):
        path, body = IMAGE_FORMS[name](data_url(png(color)))
        assert allowed(path, client.post(path, json=body)) == passes
        assert engine.samples[-1].images[-1].size == (30, 20)


def test_bare_base64_is_a_picture_for_litellm_alone(client):
    url = base64.b64encode(png()).decode()
    asked = {name: form(url) for name, form in IMAGE_FORMS.items()}
    passed = [name for name, (path, body) in asked.items() if allowed(path, client.post(path, json=body))]
    assert passed == ["litellm"]


def test_moderations_keep_number_and_order(client):
    body = client.post(MODERATIONS, json={"input": ["Hi", "a bomb", "GARBLE", ""]}).json()
    assert [one["flagged"] for one in body["results"]] == [False, True, True, False]
    assert [one["x_guard"]["status"] for one in body["results"]] == ["ok", "ok", "parse_failed", "ok"]


def test_coverage_counts_what_came_and_what_was_judged(client):
    turns = [*user(text("Hi"), image(data_url(png())), image(data_url(png()))), {"role": "assistant", "content": "Yes"}]
    said = client.post(GUARD, json={"messages": turns}).json()
    assert (said["images"], said["characters"]) == ({"received": 2, "evaluated": 2}, {"received": 5, "evaluated": 5})
    (said,) = client.post(
        BATCH, json={"items": [{"messages": user(text("Hi"), image("data:image/png;base64,AAAA"))}]}
    ).json()["data"]
    assert (said["images"], said["characters"]) == ({"received": 1, "evaluated": 0}, {"received": 2, "evaluated": 0})
    assert (said["status"], said["code"], said["decided_by"]) == ("input_rejected", "bad_format", "fail_closed")


def test_the_native_endpoint_takes_mode_budget_deadline_and_threshold(client, engine):
    ask = {"messages": user("SCORE=0.4 x"), "mode": "fast", "reasoning_budget": 9999, "deadline_ms": 1500}
    said = client.post(GUARD, json=ask).json()
    assert (said["action"], said["reasoning"]) == ("allow", None)
    mode, budget, left = engine.asked[-1]
    assert (mode, budget) == ("fast", 512) and 0 < left <= 1.5
    said = client.post(GUARD, json=ask | {"threshold": 0.4, "reasoning": True}).json()
    assert (said["action"], said["reasoning"]) == ("block", "Step 1: I read it.")


def test_litellm_is_given_a_text_beside_every_picture(monkeypatch):
    """Its handler asks no guardrail where `part.get("text")` is None in every part."""
    root = "litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api"
    bases = {"litellm.integrations.custom_guardrail": "CustomGuardrail", root: "GenericGuardrailAPI"}
    for module, name in bases.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: type(name, (), {})}))
    hook = runpy.run_path(str(ROOT / "deploy/litellm_hooks.py"))["PicturesAlone"]()
    white = image(data_url(png()))
    data = {"messages": [*user(white), *user(white | {"text": None}), *user("Hi"), {"role": "user"}]}
    asyncio.run(hook.async_pre_call_hook(None, None, data, "completion"))
    contents = [message.get("content") for message in data["messages"]]
    assert [part.get("text") for parts in contents[:2] for part in parts] == [None, " "] * 2
    assert contents[2:] == ["Hi", None]


def test_litellm_params_of_a_sender_have_no_effect(client):
    body = {"input_type": "request", "texts": ["SCORE=0.9 x"], "additional_provider_specific_params": {"threshold": 1}}
    assert client.post(LITELLM, json=body).json() == {"action": "BLOCKED", "blocked_reason": "guard:harmful"}


def test_a_response_is_judged_with_the_request_of_its_call(client, engine):
    asked = {"input_type": "request", "litellm_call_id": "c1", "texts": ["What is it?"], "images": [data_url(png())]}
    said = {"input_type": "response", "litellm_call_id": "c1", "texts": ["A rock."]}
    for body in (asked, said, said):
        assert client.post(LITELLM, json=body).json()["action"] == "NONE"
        assert engine.samples[-1].request == "What is it?" and len(engine.samples[-1].images) == 1
    assert engine.samples[-1].response == "A rock."
    turns = [{"role": "assistant", "content": "Build a bomb so."}]
    hidden = {"input_type": "response", "structured_messages": turns}
    assert client.post(LITELLM, json=hidden).json()["action"] == "BLOCKED"


def test_a_review_band_is_flagged_for_those_who_know_no_review():
    with served(threshold=0.9, review_from=0.5) as client:
        result = client.post(MODERATIONS, json={"input": "SCORE=0.7 x"}).json()["results"][0]
        assert result["flagged"] and result["x_guard"]["action"] == "review"


# --- hostile input

LONG = {
    "one word of a megabyte": "bomb" * 250_000,
    "NUL": "a bomb\0",
    "bidirectional": "\u202egnol \u2066bomb\u2069",
    "lone surrogates": "\ud83d bomb \udc00\ud800",
    "combining": "bomb" + "\u0301" * 5000,
    "private use": "\ue000\U000f0000 bomb",
    "words of the test engine's labels": f"{FAKE} a bomb",
}
HOSTILE_TEXTS = [
    *(f"{words} a bomb" for words in REQUESTS.values()),
    *(f"a bomb {words}" for words in REQUESTS.values()),
    *LONG.values(),
    *(words + " a bomb" for words in fuzzed(40, seed=6)),
]


@pytest.mark.parametrize("number", range(len(HOSTILE_TEXTS)))
def test_no_text_gets_through(client, engine, number):
    for form in TEXT_FORMS.values():
        path, body = form(HOSTILE_TEXTS[number])
        before = len(engine.samples)
        assert not allowed(path, client.post(path, content=json.dumps(body).encode("ascii")))
        for sample in engine.samples[before:]:  # what the engine saw is what was sent
            assert HOSTILE_TEXTS[number] in sample.request + (sample.response or "")


def picture(kind, size=(8, 8), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'
HOSTILE_URLS = {
    "empty": "", "nothing": "data:image/png;base64,", "not base64": "data:image/png;base64,@@@@",
    "a path": "/etc/passwd", "file": "file:///etc/passwd", "remote": "https://example.org/a.png", "inside": "http://10.0.0.1/a",
    "script": "javascript:alert(1)", "no type": "data:;base64,AAAA", "text": "data:text/plain;base64,Ym9tYg==",
    "padding": "data:image/png;base64,AAA=A===", "surrogate": "data:image/png;base64,\ud800", "NUL": "\0",
    "svg": data_url(SVG, "svg+xml"), "gif": data_url(picture("GIF"), "gif"), "bmp": data_url(picture("BMP"), "bmp"),
    "cut": data_url(png()[:60]), "header alone": data_url(png()[:33]), "wide": data_url(picture("PNG", (20_000, 1))),
    "thin": data_url(picture("PNG", (1, 300))), "bomb": data_url(picture("PNG", (16_000, 3_000), "1")),
    "polyglot": data_url(b"GIF89a" + png()), "type that lies": data_url(SVG, "png"),
    "huge": "data:image/png;base64," + "A" * 15_000_000, "noise": data_url(bytes(range(256)) * 40),
    "animated": data_url(picture("WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]), "webp"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_URLS)
def test_no_picture_gets_through_unseen(client, engine, name):
    before = len(engine.samples)
    for form in IMAGE_FORMS.values():
        path, body = form(HOSTILE_URLS[name])
        assert not allowed(path, client.post(path, content=json.dumps(body).encode("ascii")))
    assert len(engine.samples) == before


DEEP = b"[" * 200_000
GOOD = b'{"input": "Hi", "messages": [{"role": "user", "content": "Hi"}]}'
HOSTILE_BODIES = {
    "empty": b"", "blank": b" ", "cut": GOOD[:-1], "not JSON": b"hello", "null": b"null", "number": b"3", "list": b"[]",
    "text": b'"Hi"', "empty object": b"{}", "deep": DEEP, "deep and closed": DEEP + b"]" * 200_000,
    "deep objects": b'{"a":' * 50_000, "deep input": b'{"input":' + b"[" * 900 + b"]" * 900 + b"}",
    "a key twice": b'{"input": "a bomb", "input": "Hi"}', "UTF-16": GOOD.decode().encode("utf-16"),
    "an inner key twice": GOOD.replace(b'"role"', b'"content": "a bomb", "role"'), "not UTF-8": b'{"input": "\xff"}',
    "NaN": b'{"input": NaN}', "huge number": b'{"input": ' + b"9" * 9000 + b"}", "trailing": GOOD + b"x",
    "byte order mark": b"\xef\xbb\xbf" + GOOD, "form": b"input=Hi", "many commas": b"[" + b"0," * 600_000 + b"0]",
    "nearly too many commas": b"[" + b"{}," * (MAX_COMMAS - 1) + b"0]",
    "raw control character": b'{"input": "\x01"}', "NULs": b"\0" * 100, "too long": b'{"input": "' + b"a" * 20_000_000,
}  # fmt: skip
WRONG_VALUES = (
    None, True, 3, 1e400, [], {}, [[]], [None], [3], ["Hi", 3], [{}], [{"type": "text"}], {"a": "b"}, "a" * 200_000,
    [{"type": "audio", "text": "a bomb"}], [{"role": "user"}, 3], [{"role": "boss", "content": "Hi"}],
    [{"role": "user", "content": 3}], [{"role": "user", "content": []}], ["Hi"] * 100, [{"type": "text", "text": None}],
    [{"role": "user", "content": [{"type": "file", "file": {"file_data": "a bomb"}}]}],
    {"role": "user", "content": "Hi"},
)  # fmt: skip
KEYS = {
    MODERATIONS: "input", CHAT: "messages", GUARD: "messages", BATCH: "items", LITELLM: "structured_messages",
}  # fmt: skip
NESTS = ['{"a":' * depth + "3" + "}" * depth for depth in range(860, 960, 10)]  # near where stacks end
NESTED = '[{"role": "user", "content": "a bomb", "a": %s}]'
HOSTILE_BODIES |= {f"nested {n}": NESTED % nest for n, nest in enumerate(NESTS)}  # values, as the ones below
HOSTILE_BODIES |= {f"wrong value {number}": json.dumps(value) for number, value in enumerate(WRONG_VALUES)}


@pytest.mark.parametrize("name", HOSTILE_BODIES)
def test_no_body_gets_through(client, name):
    for path in POSTS:
        body = HOSTILE_BODIES[name]
        if isinstance(body, str):
            more = '"input_type": "request", ' if path == LITELLM else ""
            body = f'{{{more}"{KEYS[path]}": {body}}}'
        assert not allowed(path, client.post(path, content=body))


@pytest.mark.parametrize("path", POSTS[:4])
def test_an_unknown_key_is_refused(client, path):
    body = {"messages": user("Hi")} if path in (CHAT, GUARD) else {"input": "Hi"}
    body = {"items": [{"messages": user("Hi")}]} if path == BATCH else body
    assert allowed(path, client.post(path, json=body))
    assert not allowed(path, client.post(path, json=body | {"documents": ["a bomb"]}))


def test_limits_are_the_settings():
    with served(max_body=500, max_items=2, max_images=1, max_characters=10) as client:
        assert client.post(GUARD, content=iter([b"x" * 300] * 4)).json()["error"]["code"] == "body_too_large"
        assert client.post(BATCH, json={"items": [3, 3, 3]}).json()["error"]["code"] == "too_many_inputs"
        two = user(image("data:image/png;base64,AA"), image("data:image/png;base64,AA"))
        assert client.post(GUARD, json={"messages": two}).json()["error"]["code"] == "too_many_images"
        assert client.post(GUARD, json={"messages": user("Hello, world")}).json()["error"]["code"] == "too_long"
        assert client.post(GUARD, json={"messages": user("Hello")}).status_code == 200
        result = client.post(MODERATIONS, json={"input": "Hello, world"}).json()["results"][0]
        assert result["flagged"] and result["x_guard"]["code"] == "too_long"
        assert client.post(MODERATIONS, content=b"x" * 600).json()["results"][0]["x_guard"]["code"] == "body_too_large"


def test_bodies_together_are_bounded():
    room = Room(300)
    with room.body() as one, room.body() as two:
        room.grow(one, b"1" * 296)
        with pytest.raises(ApiError, match="too many bytes"):
            room.grow(two, b"12345")
        room.grow(two, b"1234")
    with room.body() as one, pytest.raises(ApiError, match="too many bytes"):  # what they become counts
        room.grow(one, b"[{},{},{}]")
    assert room.held == 0
    with Room(Serve().max_body * BODIES).body() as largest:
        Room(Serve().max_body * BODIES).grow(largest, b"," * MAX_COMMAS + b"a" * (Serve().max_body - MAX_COMMAS))


def test_what_is_under_way_is_bounded_and_a_long_list_goes_in_by_turns():
    with served(prompts=2, max_waiting=1, deadline=0.3, max_items=9) as client:
        reply = client.post(MODERATIONS, json={"input": ["Hi"] * 9})
        assert allowed(MODERATIONS, reply), "an idle server never refuses a list for its length"

        async def four():
            app = httpx.ASGITransport(client.app)
            async with httpx.AsyncClient(transport=app, base_url="http://server") as asking:
                body = {"input_type": "request", "texts": ["HANG"]}
                running = asyncio.gather(*(asking.post(LITELLM, json=body) for _ in range(4)))
                while not client.app.router.routes[-1].endpoint.__self__.full(9.0):
                    await asyncio.sleep(0.01)
                unread = await asking.post(LITELLM, content=b"{")
                assert unread.status_code == 429, "a server that is full reads no body"
                return await running

        assert sorted(reply.status_code for reply in asyncio.run(four())) == [200, 200, 200, 429]
        assert allowed(GUARD, client.post(GUARD, json={"messages": user("Hi")})), "and there is room again"


def test_what_would_be_answered_too_late_is_refused_unread():
    with served(deadline=5, batch_deadline=60) as client:
        client.engine.wait = 20.5
        for path in POSTS:
            reply = client.post(path, content=b"{")
            assert (reply.status_code == 429) == (path != BATCH), path
            assert path == BATCH or reply.headers["retry-after"] == "16"
        assert client.get("/health/ready").status_code == 200
        assert client.post("/health/ready").status_code == 405 and client.post("/elsewhere").status_code == 404
        client.engine.wait = 61.0
        assert client.post(BATCH, content=b"{").status_code == 429
        client.engine.ready = False
        assert client.post(BATCH, content=b"{").status_code == 503, "an outage is no load"


def test_a_deadline_of_its_own_refuses_a_request_but_nothing_in_a_list():
    with served(deadline=5) as client:
        client.engine.wait = 2.0
        hurried = {"messages": user("Hi"), "deadline_ms": 1000}
        assert client.post(GUARD, json=hurried).status_code == 429 and not client.engine.samples
        assert allowed(GUARD, client.post(GUARD, json={"messages": user("Hi")}))
        assert client.post(BATCH, json={"items": [hurried, hurried]}).status_code == 200


def test_a_query_that_is_no_text_changes_nothing(client):
    scope = {"type": "http", "path": MODERATIONS, "query_string": b"\xff", "headers": [], "gvl_jax": {}}
    front = client.app.router.routes[-1].endpoint.__self__
    front.count(Request(scope), [front.refused(Refused(400, "empty", ""))])
    assert scope["gvl_jax"]["judged"] == 1


# --- faults


def test_load_is_a_429_and_an_outage_a_503(client, engine, caplog):
    for path, words, status in product(POSTS, ("OVERLOAD", "CLOSED"), (429,)):
        form = {MODERATIONS: "moderation", CHAT: "chat", GUARD: "guard", BATCH: "batch", LITELLM: "litellm"}[path]
        reply = client.post(path, json=TEXT_FORMS[form](words)[1])
        assert reply.status_code == (status if words == "OVERLOAD" else 503)
        assert reply.headers["retry-after"] == ("3" if words == "OVERLOAD" else "1") and reply.json()["error"]["code"]
    for name, expected in (("ready", "not_ready"), ("live", "engine_down")):
        try:
            setattr(engine, name, False)
            assert client.get(f"/health/{name}").status_code == 503
            for path in GATEWAYS:
                body = {"input": "CRASH"} if path == MODERATIONS else {"input_type": "request", "texts": ["CRASH"]}
                reply = client.post(path, json=body)
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, expected)
        finally:
            setattr(engine, name, True)
        assert client.get(f"/health/{name}").status_code == 200


@pytest.mark.parametrize("words, status", [("CRASH", "internal"), ("CUT", "truncated"), ("GARBLE", "parse_failed")])
def test_a_failed_judgement_blocks(client, words, status):
    for form in TEXT_FORMS.values():
        path, body = form(words)
        assert not allowed(path, client.post(path, json=body))
    said = client.post(MODERATIONS, json={"input": words}).json()["results"][0]["x_guard"]
    assert (said["status"], said["decided_by"]) == (status, "fail_closed")


def test_a_deadline_is_a_verdict_that_blocks_and_stops_the_work():
    with served(deadline=0.05, batch_deadline=0.05) as client:
        for name in ("moderation", "chat", "guard", "batch", "litellm"):
            path, body = TEXT_FORMS[name]("HANG")
            assert not allowed(path, client.post(path, json=body))
        assert client.engine.cancelled == 5
        assert client.post(GUARD, json={"messages": user("HANG")}).json()["status"] == "deadline"


def raw(url, head, body=b""):
    """A connection on which a request has been sent, or a part of one."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(b"POST /v1/moderations HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head + b"\r\n" + body)
    return connection


def test_a_client_that_leaves_is_cancelled_and_a_slow_one_blocked():
    engine = FakeEngine()
    with serving(create_app(engine, FakeMedia(), Serve(deadline=20.0))) as url:
        body = b'{"input": "HANG"}'
        connection = raw(url, b"Content-Length: %d\r\n" % len(body), body)
        while not engine.samples:
            time.sleep(0.01)
        connection.close()
        while not engine.cancelled:
            time.sleep(0.01)
        assert "guard_clients_gone_total 1.0" in httpx.get(f"{url}/metrics").text
    with (
        serving(create_app(engine, FakeMedia(), Serve(deadline=0.2))) as url,
        raw(url, b"Content-Length: 9\r\n", b"{") as slow,
    ):
        answer = b"".join(iter(lambda: slow.recv(65536), b""))
        assert b"200 OK" in answer and b'"code":"slow_body"' in answer and b'"flagged":true' in answer


def test_what_is_being_judged_when_the_server_stops_gets_its_answer():
    engine, media, replies = FakeEngine(), FakeMedia(), []
    started, go = threading.Event(), threading.Event()

    async def judge(sample, **_):
        started.set()
        await asyncio.to_thread(go.wait)
        return await FakeEngine.judge(engine, sample)

    engine.judge = judge
    with serving(create_app(engine, media, Serve())) as url:
        ask = threading.Thread(target=lambda: replies.append(httpx.post(url + MODERATIONS, json={"input": "a bomb"})))
        ask.start()
        started.wait()
        threading.Timer(0.3, go.set).start()  # after `serving` has told the server to stop
    ask.join()
    assert not allowed(MODERATIONS, replies[0]) and engine.drained and media.closed


# --- keys, envelope, telemetry


def test_every_route_but_the_page_and_the_probes_needs_a_key(tmp_path):
    with served(tmp_path) as client:
        routes = [(route.path, method) for route in client.app.routes for method in route.methods - {"HEAD"}]
        assert len(routes) == 11
        for path, method in routes:
            words = ("Bearer third", "Basic first", "Bearer ", "first", b"Bearer \xff")
            wrong = ({}, {"x-api-key": "firs"}, *({"authorization": word} for word in words))
            right = {"authorization": "Bearer first"}, {"authorization": "bearer second"}, {"x-api-key": "second"}
            for headers, expected in (*product(wrong, [path not in OPEN]), *product(right, [False])):
                reply = client.request(method, path, headers=headers)
                assert (reply.status_code == 401) == expected
                assert not expected or reply.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/nowhere").status_code == 401


def test_keys_are_needed_to_listen_to_others_and_a_bad_file_is_an_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="host is 0.0.0.0, which others can reach, and keys is not set"):
        Serve(host="0.0.0.0")
    (tmp_path / "none").write_text("# nothing\n\n")
    for name, message in (("absent", "cannot be read"), ("none", "holds no key")):
        assert main(["serve", "m", "--keys", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert main(["serve", "m", "--port", "9", "--dry-run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"], shown["host"], shown["port"]) == ("m", "127.0.0.1", 9)


@pytest.mark.parametrize("method, path, status", [("GET", "/no", 404), ("GET", MODERATIONS, 405), ("PUT", GUARD, 405)])
def test_errors_have_the_envelope(client, method, path, status):
    reply = client.request(method, path)
    assert reply.status_code == status
    assert reply.json()["error"] == {
        "message": reply.json()["error"]["message"], "type": "invalid_request_error", "param": None,
        "code": {404: "not_found", 405: "method_not_allowed"}[status],
    }  # fmt: skip


def test_blocked_by_the_model_and_failed_closed_are_counted_apart():
    with served() as client:
        for words in ("Hi", "a bomb", "SCORE=0.9 x", "GARBLE", "CUT", "CRASH"):
            client.post(MODERATIONS, json={"input": words})
        client.post(MODERATIONS, content=b"{")
        lines = client.get("/metrics").text.splitlines()
        route = f'route="{MODERATIONS}"'
        assert f"guard_model_blocked_total{{{route}}} 2.0" in lines
        for reason in ("parse_failed", "truncated", "internal", "invalid_json"):
            assert f'guard_failed_closed_total{{reason="{reason}",{route}}} 1.0' in lines
        assert f'guard_http_responses_total{{{route},status="200"}} 7.0' in lines
        assert "guard_engine_prefills_total 3.0" in lines and "guard_ready 1.0" in lines
        assert 'guard_build_info{fingerprint="weights/prompt/code"} 1.0' in lines


def test_logs_hold_no_content(client, caplog):
    with caplog.at_level(logging.DEBUG):
        for words in ("my secret", "a bomb of my secret", "CRASH my secret"):
            client.post(GUARD, json={"messages": user(words), "mode": "reason"})
            client.post(MODERATIONS, json={"input": [{"type": words}]})
            client.post(f"/{words}")
    lines = [JsonLines().format(record) for record in caplog.records if record.name.startswith("gvl_jax")]
    assert len(lines) >= 10 and not [line for line in lines if "secret" in line]
    crash = next(row for row in map(json.loads, lines) if row["message"] == "a judgement failed")
    assert crash["error"] == "RuntimeError" and any("judge" in frame for frame in crash["at"])
    row = next(row for row in map(json.loads, lines) if row.get("route") == GUARD and row["blocked"])
    assert (row["status"], row["failed_closed"], row["characters"]) == (200, [], 19)


# --- real clients


def test_the_openai_client_works(client):
    engine = FakeEngine()
    with serving(create_app(engine, FakeMedia(), Serve())) as url:
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        white, black = image(data_url(png())), image(data_url(png(BLACK)))
        assert [model.id for model in api.models.list()] == ["gvl-guard"]
        flags = [api.moderations.create(input=given).results[0].flagged for given in (
            "Hi", "a bomb", [text("Hi"), white, white], [text("Hi"), white, black], [white], [black],
        )]  # fmt: skip
        assert flags == [False, True, False, True, False, True]
        said = api.moderations.create(model="omni-moderation-latest", input=["Hi", "a bomb"])
        assert [one.categories.illicit for one in said.results] == [False, True]
        assert said.results[1].category_scores.illicit == 0.9
        assert said.results[1].model_dump()["x_guard"]["verdict"]["request"] == "harmful"
        assert api.moderations.create(input=[image("file:///etc/passwd")]).results[0].flagged

        def chat(*parts, **options):
            return api.chat.completions.create(model="any", messages=user(*parts), **options)

        choice = chat(text("Hi"), white, white).choices[0]
        assert choice.message.content.splitlines()[2:4] == ["Request: unharmful", "Response: None"]
        assert choice.message.reasoning == choice.message.reasoning_content == "Step 1: I read it."
        assert "Request: harmful" in chat(black).choices[0].message.content
        assert chat("CUT").choices[0].finish_reason == "length"
        *chunks, last = chat("a bomb", stream=True, max_tokens=3, stream_options={"include_usage": True})
        assert (last.choices, last.usage.prompt_tokens, last.usage.total_tokens) == ([], 30, 42)
        assert "Request: harmful" in "".join(c.choices[0].delta.content or "" for c in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError) as error:
            chat({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}})
        assert error.value.code == "invalid_request"
        with pytest.raises(openai.RateLimitError) as error:
            chat("OVERLOAD")
        assert error.value.response.headers["retry-after"] == "3"
        with pytest.raises(openai.APIStatusError) as error:
            api.moderations.create(input="CLOSED")
        assert error.value.status_code == 503


@pytest.mark.skipif("GVL_LITELLM_PYTHON" not in os.environ, reason="GVL_LITELLM_PYTHON names no Python with litellm")
def test_litellms_own_guardrail_works(tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    app = create_app(FakeEngine(), FakeMedia(), Serve(keys=str(tmp_path / "keys")))
    with serving(app) as url:
        command = [os.environ["GVL_LITELLM_PYTHON"], "tests/clients/litellm_check.py", url, "secret"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


# --- what is deployed


def test_the_manifests_start_a_server_that_exists():
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    guard = compose["services"]["guard"]
    assert guard["read_only"] and guard["cap_drop"] == ["ALL"]
    documents = list(yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text()))
    deployment = next(one for one in documents if one["kind"] == "Deployment")["spec"]["template"]["spec"]
    (container,) = deployment["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/health/ready", "liveness": "/health/live", "readiness": "/health/ready"}
    assert set(probes.values()) <= set(OPEN)
    assert deployment["terminationGracePeriodSeconds"] > Serve().batch_deadline
    assert container["securityContext"]["readOnlyRootFilesystem"] and container["securityContext"]["runAsNonRoot"]
    for args in (guard["command"], container["args"]):
        assert main([*args, "--dry-run"]) == 0
