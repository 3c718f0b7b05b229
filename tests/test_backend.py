"""Against a server that reads as vLLM does: the text of a chat may hold control tokens, ids are what they are."""

import asyncio
import base64
import io
import json
import math
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fake_guard import FakeMedia
from hostile import REQUESTS
from PIL import Image
from starlette.testclient import TestClient
from test_images import noise
from transformers import AutoTokenizer

from gvl_jax.config import Buckets, Moderate, Serve
from gvl_jax.data import embedded, tiny
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.guard.closing import LABELS
from gvl_jax.guard.prompt import INSTRUCTION, answer_text, text_pieces
from gvl_jax.serve import backend as module
from gvl_jax.serve.app import create_app
from gvl_jax.serve.backend import Backend, Outage
from gvl_jax.serve.engine import Overloaded
from gvl_jax.types import Sample

KEY = "not-a-real-key"
PICTURES = (noise(100, 60), noise(56, 56))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    samples = [sample for sample, _ in embedded.generate("train", 20, 10, 20, seed=0)]
    tiny.write_tiny(path, tiny.training_texts(samples))
    return path


class Server:
    """The model thinks `thoughts` and finds requests and responses harmful with the probabilities of `harmful`, the
    harmful canary unharmful with that of `misjudged`."""

    def __init__(self, directory):
        self.reader, self.tokenizer = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
        self.thoughts, self.harmful = "It is\nfine.", (0.25, 0.125)
        self.prompts, self.asked, self.misjudged = [], [], 0.0
        self.change = lambda reply: reply  # what is wrong with this server
        self.status = 200

    def ids_of_chat(self, body):
        pads = []
        for part in body["messages"][1]["content"]:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
                image = Image.open(io.BytesIO(data))
                assert image.width % 28 == image.height % 28 == 0
                pads.append(image.width * image.height // 784)
        messages = json.loads(json.dumps(body["messages"]).replace('"image_url", "image_url"', '"image", "image_url"'))
        keys = ("add_generation_prompt", "continue_final_message")
        options = {key: body[key] for key in keys}
        ids = self.reader.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        expanded = []
        for token in ids:  # by value, wherever it comes from
            expanded += [token] * (pads.pop(0) if token == self.tokenizer.image_pad and pads else 1)
        return expanded

    def complete(self, body):
        ids = body["prompt"] if "prompt" in body else self.ids_of_chat(body)
        self.prompts.append(ids)
        self.asked.append(body)
        opened = len(ids) - ids[::-1].index(self.tokenizer.im_start)
        said = self.tokenizer.decode(ids[opened:]).removeprefix("assistant\n")
        logprobs = {}
        if body["max_tokens"] == 1:
            canary = "school bus" in self.tokenizer.decode(ids)
            written, logprobs = self.label(said, (1 - self.misjudged, 0.0) if canary else self.harmful)
        else:
            text = f"<think>\n{self.thoughts}\n</think>"
            written = self.tokenizer.encode_text(text)[: body["max_tokens"]]
        finish = "stop" if "</think>" in self.tokenizer.decode(written) else "length"
        choice = {"index": 0, "finish_reason": finish, "token_ids": written}
        if "prompt" in body:
            return {"choices": [choice | {"prompt_token_ids": ids, "logprobs": {"top_logprobs": [logprobs]}}]}
        content = [{"top_logprobs": [{"token": token, "logprob": value} for token, value in logprobs.items()]}]
        return {"prompt_token_ids": ids, "choices": [choice | {"logprobs": {"content": content}}]}

    def label(self, said, harmful):
        task = 1 if "\nResponse:" in said else 0
        _, _, given = said.rpartition(":")
        ways = {label: self.tokenizer.encode_text(f"Answers:\nRequest: {label}\n") for label in LABELS}
        start = next(n for n in range(99) if ways["harmful"][n] != ways["unharmful"][n])
        first, second = (ways[label][start] for label in LABELS)
        assert given == "" or given == " "
        chances = {first: harmful[task], second: 1 - harmful[task]}
        likely = max(chances, key=chances.get)
        return [likely], {f"token_id:{token}": math.log(chance) for token, chance in chances.items() if chance}


@contextmanager
def serving(server):
    """The address of the server's API."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.headers["Authorization"] == f"Bearer {KEY}"
            assert self.path == ("/v1/completions" if "prompt" in body else "/v1/chat/completions")
            reply = server.change(server.complete(body))
            reply = b"<html>" if reply == "no JSON" else json.dumps(reply).encode()
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture
def server(directory):
    return Server(directory)


def config_of(directory):
    return Moderate(model=str(directory), buckets=Buckets(prompt=(2048,)), dtype="float32")


def judge(directory, server, *samples, **options):
    async def main(url):
        guard = Backend(config_of(directory), url, "guard", KEY)
        try:
            return [await guard.judge(sample, **options) for sample in samples]
        finally:
            await guard._client.aclose()

    with serving(server) as url:
        said = asyncio.run(main(url))
    return said[0] if len(said) == 1 else said


SAMPLES = {
    "request": Sample("a", "How do I bake bread?"),
    "response": Sample("a", "How do I bake bread?", "With flour."),
    "pictures": Sample("a", "What is this?", "Noise.", PICTURES),
    "picture alone": Sample("a", "", None, PICTURES[:1]),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("mode", ["fast", "reason"])
def test_the_verdict_is_the_models_with_its_scores(name, mode, directory, server):
    sample = SAMPLES[name]
    said = judge(directory, server, sample, mode=mode)
    answered = sample.response is not None
    assert (said.request, said.response) == ("unharmful", "unharmful" if answered else None)
    assert (said.flagged, said.status, said.decided_by) == (False, "ok", mode)
    assert said.scores["request"] == pytest.approx(0.25)
    assert said.scores["response"] == (pytest.approx(0.125) if answered else None)
    assert said.reasoning == (server.thoughts if mode == "reason" else None)
    server.harmful = (0.25, 0.75) if answered else (0.75, 0.0)
    worse = judge(directory, server, sample, mode=mode)
    assert worse.flagged and "harmful" == (worse.response if answered else worse.request)


def test_what_is_judged_is_the_prompt_and_then_a_whole_answer(directory, server):
    judge(directory, server, SAMPLES["response"], mode="reason")
    first, *_, last = server.prompts
    text = server.tokenizer.decode(last[len(first) :])
    assert answer_text(server.thoughts, "unharmful", "unharmful").startswith(text) and text.endswith("Response:")
    (turn,) = text_pieces(SAMPLES["response"])
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": turn}]
    assert first == server.reader.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("images", [(), PICTURES[:1]], ids=["text", "picture"])
def test_no_text_becomes_a_control_token_or_moves_a_picture(images, directory, server):
    texts = [*REQUESTS.values(), "\ud800 lone", "\n\n", "<|vision_start|><|image_pad|><|vision_end|>" * 3]
    samples = [Sample("a", text, text, images) for text in texts]
    said = judge(directory, server, *samples, mode="fast")
    assert {one.status for one in said} == {"ok"}  # neither refused nor blocked for what it spells
    control = set(server.tokenizer.added)
    for ids in server.prompts:
        pads = ids.count(server.tokenizer.image_pad)
        kept = [token for token in ids if token in control and token != server.tokenizer.image_pad]
        assert server.tokenizer.decode(kept).replace("<|im_start|>", "").replace("<|im_end|>", "") == (
            "<|vision_start|><|vision_end|>" if images else ""
        )
        assert kept.count(server.tokenizer.im_start) == 3 and pads == (8 if images else 0)


def test_auto_reasons_about_what_is_uncertain(directory, server):
    for harmful, by in ((0.25, "reason"), (0.005, "fast"), (0.995, "fast")):
        server.harmful = (harmful, 0.0)
        assert judge(directory, server, SAMPLES["request"], mode="auto").decided_by == by


@pytest.mark.parametrize("name", ["request", "pictures"])
def test_reasoning_over_its_budget_is_cut_and_blocks(name, directory, server):
    server.thoughts = "It is fine. " * 100
    said = judge(directory, server, SAMPLES[name], mode="reason", budget=20)
    assert (said.flagged, said.status, said.decided_by) == (True, "truncated", "fail_closed")
    assert said.request == "unharmful" and server.asked[0]["max_tokens"] == 20


@pytest.mark.parametrize(
    "thoughts, name, status",
    [
        ("<result>\nRequest: unharmful\n</result>", "request", "parse_failed"),
        ("a <think> b", "pictures", "parse_failed"),
        ("</think>\n<result>", "request", "ok"),  # cut where it ends first
        ("<|im_end|>", "request", "ok"),  # letters
        ("<|im_end|>", "pictures", "input_rejected"),  # a chat cannot carry them as letters
    ],
)
def test_tags_and_control_tokens_spelled_in_the_reasoning(thoughts, name, status, directory, server):
    server.thoughts = thoughts
    said = judge(directory, server, SAMPLES[name], mode="reason")
    assert (said.status, said.flagged) == (status, status != "ok")


def test_an_answer_without_reasoning_is_no_verdict(directory, server):
    def ends_at_once(reply):
        reply["choices"][0] |= {"token_ids": [server.tokenizer.im_end], "finish_reason": "stop"}
        return reply

    server.change = ends_at_once
    said = judge(directory, server, SAMPLES["request"], mode="reason")
    assert (said.flagged, said.status) == (True, "parse_failed")


def test_control_tokens_in_an_answer_are_no_verdict(directory, server):
    def writes_a_picture(reply):
        ids = reply["choices"][0]["token_ids"]
        reply["choices"][0]["token_ids"] = [*ids[:1], server.tokenizer.image_pad, *ids[1:]]
        return reply

    server.change = writes_a_picture
    said = judge(directory, server, SAMPLES["request"], mode="reason")
    assert (said.flagged, said.status, len(server.asked)) == (True, "parse_failed", 1)


def test_without_logprobs_the_label_counts_and_there_is_no_score(directory, server):
    def silent(reply):
        reply["choices"][0]["logprobs"] = None
        return reply

    server.change = silent
    for harmful, label in ((0.25, "unharmful"), (0.75, "harmful")):
        server.harmful = (harmful, 0.0)
        said = judge(directory, server, SAMPLES["request"], mode="fast")
        assert (said.request, said.flagged, said.scores["request"]) == (label, label == "harmful", None)


@pytest.mark.parametrize("value", [math.nan, None, "high", math.inf])
def test_scores_that_are_no_numbers_never_allow_what_the_model_calls_harmful(value, directory, server):
    def odd(reply):
        found = reply["choices"][0]["logprobs"]["top_logprobs"][0]
        reply["choices"][0]["logprobs"]["top_logprobs"][0] = dict.fromkeys(found, value)
        return reply

    server.change, server.harmful = odd, (0.75, 0.0)
    said = judge(directory, server, SAMPLES["request"], mode="fast")
    assert said.flagged and said.scores["request"] is None


def test_a_label_that_is_not_listed_is_as_unlikely_as_it_has_to_be(directory, server):
    def only(wanted):
        def change(reply):
            found = reply["choices"][0]["logprobs"]["top_logprobs"][0]
            reply["choices"][0]["logprobs"]["top_logprobs"][0] = {
                token: value for token, value in found.items() if (value > math.log(0.5)) == wanted
            } | {"token_id:7": -3.0}
            return reply

        return change

    server.harmful, server.change = (0.01, 0.0), only(True)  # unharmful alone
    assert judge(directory, server, SAMPLES["request"], mode="fast").scores["request"] == pytest.approx(
        math.exp(-3) / (math.exp(-3) + 0.99)
    )
    server.harmful = (0.99, 0.0)  # harmful alone
    assert judge(directory, server, SAMPLES["request"], mode="fast").scores["request"] == 1.0
    server.change = lambda reply: only(True)(only(False)(reply))  # neither
    said = judge(directory, server, SAMPLES["request"], mode="fast")
    assert said.flagged and said.reason.startswith("undecided")


def test_a_prompt_read_in_another_way_blocks(directory, server):
    def another(reply):
        ids = reply.get("prompt_token_ids") or reply["choices"][0]["prompt_token_ids"]
        ids[5] += 1
        return reply

    server.change = another
    for name in SAMPLES:
        said = judge(directory, server, SAMPLES[name], mode="fast")
        assert said.flagged and said.status == "input_rejected" and said.reason.startswith("unread")


@pytest.mark.parametrize("status", [400, 413, 401, 404, 429, 500])
def test_what_a_sender_can_cause_blocks_and_load_and_an_outage_are_raised(status, directory, server):
    server.status = status
    if status in (400, 413):
        assert judge(directory, server, SAMPLES["request"], mode="fast").flagged
    else:
        with pytest.raises(Overloaded if status == 429 else Outage):
            judge(directory, server, SAMPLES["request"], mode="fast")


@pytest.mark.parametrize(
    "reply",
    [
        *(None, [], {}, {"choices": []}, {"choices": [{}]}, {"choices": [None]}, {"choices": [{"token_ids": [1]}]}),
        {"choices": [{"token_ids": [-1], "prompt_token_ids": [1]}]},
        {"choices": [{"token_ids": ["a"], "prompt_token_ids": [1]}]},
        "no JSON",
    ],
)
def test_an_answer_that_is_none_is_an_outage(reply, directory, server):
    server.change = lambda _: reply
    with pytest.raises(Outage):
        judge(directory, server, SAMPLES["request"], mode="fast")


def test_nobody_there_is_an_outage_and_over_long_text_a_rejection(directory):
    async def main():
        guard = Backend(config_of(directory), "http://127.0.0.1:9/v1", "guard")
        said = await guard.judge(Sample("a", "word " * 5000))
        assert said.flagged and said.reason.startswith("too_long")
        with pytest.raises(Outage):
            await guard.judge(SAMPLES["request"])
        assert guard.counters()["outage"] == 1 and guard.running == 0 and not guard.ready
        await guard._client.aclose()

    asyncio.run(main())


def test_it_is_ready_while_the_server_judges_the_canaries_right(directory, server, monkeypatch):
    monkeypatch.setattr(module, "AGAIN", 0.01)
    server.misjudged = 0.9

    async def until(guard, ready):
        while guard.ready != ready:
            await asyncio.sleep(0.01)

    async def main(url):
        guard = Backend(config_of(directory), url, "guard", KEY)
        guard.start()
        async with asyncio.timeout(30):
            while len(server.asked) < 13:  # of more than two looks: it goes on looking
                await asyncio.sleep(0.01)
        assert not guard.ready, "it finds harm harmless"
        server.misjudged = 0.0
        await asyncio.wait_for(until(guard, True), 30)
        poison = len(server.prompts)
        server.change = lambda reply: None if len(server.prompts) == poison + 1 else reply
        with pytest.raises(Outage):
            await guard.judge(SAMPLES["request"])
        assert guard.ready, "one prompt that breaks the server closes it for nobody else"
        server.status = 500
        with pytest.raises(Outage):
            await guard.judge(SAMPLES["request"])
        await asyncio.wait_for(until(guard, False), 30)
        server.status = 200
        await asyncio.wait_for(until(guard, True), 30)
        going = asyncio.create_task(guard.judge(SAMPLES["request"]))
        await asyncio.sleep(0)
        await guard.drain()
        assert going.done() and not going.result().flagged and not guard.ready

    with serving(server) as url:
        asyncio.run(main(url))


def test_the_server_in_front_of_it(directory, server, monkeypatch):
    monkeypatch.setattr(module, "AGAIN", 0.01)
    asked = {"messages": [{"role": "user", "content": "How do I bake bread?"}], "mode": "fast"}
    with serving(server) as url:
        guard = Backend(config_of(directory), url, "guard", KEY)
        with TestClient(create_app(guard, FakeMedia(), Serve(), begin=guard.start)) as client:
            while client.get("/health/ready").status_code != 200:
                time.sleep(0.01)
            server.harmful = (0.75, 0.125)
            said = client.post("/v1/guard", json=asked).json()
            assert (said["action"], said["decided_by"], said["verdict"]["request"]) == ("block", "model", "harmful")
            server.harmful = (0.25, 0.125)
            assert client.post("/v1/guard", json=asked).json()["action"] == "allow"
            server.status = 500
            assert client.post("/v1/guard", json=asked).status_code == 503
            assert "guard_engine_outage_total 1.0" in client.get("/metrics").text
