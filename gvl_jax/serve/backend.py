"""The guard on another server: vLLM or SGLang running the exported weights, through their OpenAI-compatible API.

Those servers find control tokens in the text of a chat and put pictures where a user writes `<|image_pad|>`
(vllm#57740). So a prompt without pictures goes as ids; one with pictures, which they take in a chat only, goes with the
names of control tokens broken up in its text; and each answer has to say which ids the model has read: those of
`build_prompt`, or the answer does not count. The verdict is forced as by the sampler, label by label.
"""

import asyncio
import base64
import hashlib
import io
import logging
import math
import re
import time
from collections import Counter
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image

from gvl_jax.config import Images, Moderate
from gvl_jax.data.images import PATCH, open_image
from gvl_jax.data.loader import SampleRejected, to_example
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.guard.calibration import load_calibrations
from gvl_jax.guard.closing import LABELS, closing
from gvl_jax.guard.prompt import INSTRUCTION, has_response, text_pieces
from gvl_jax.models.qwen_vl.hub import image_bounds, load_config, resolve
from gvl_jax.moderate import Judgement, calibrated, judgement
from gvl_jax.sampler import Completion
from gvl_jax.serve.engine import CANARIES, Closed, Overloaded
from gvl_jax.types import Example, Label, Sample

LOG = logging.getLogger(__name__)
END = b"</think>"
TOP = 20  # tokens whose log-probability is asked for: what vLLM gives by default at most
AGAIN = 5.0  # seconds between two looks at a server that did not answer
PICTURE = Sample("picture", "Hi", "Hello", (Image.new("RGB", (56, 84)),))  # to be read; its verdict does not count


class Outage(Closed):
    """The model server gives no answer, or none that can be used: the front answers 503."""


class Unread(ValueError):
    """The model server does not take this prompt, or has read another one."""


class Undecided(ValueError):
    """Where a label has to stand, the model wants to write something else, and no scores are offered."""


class Asked(NamedTuple):
    example: Example
    tokens: list[int]  # of it
    messages: list[dict[str, Any]]  # the same as a chat; empty without pictures
    has_response: int


class Backend:
    """Judges as the Engine does. `url`: with its /v1. `model`: the name it is served under.

    The server must know `return_token_ids`, as both do. The checkpoint of `config.model` gives the tokenizer and the
    bounds of pictures, which must be the server's too; its weights are not read.
    """

    live = True  # what does not answer is another process
    waiting, wait = 0, 0.0  # the queue is there too

    def __init__(self, config: Moderate, url: str, model: str, key: str | None = None) -> None:
        source = resolve(config.model, config.revision)
        self.config, self.model, self.tokenizer = config, model, load_tokenizer(source)
        low, high = image_bounds(source)
        self.images = Images(config.min_pixels or low, config.max_pixels or high)
        self.closing = closing(self.tokenizer, load_config(source).text.vocab_size)
        self.calibrations = load_calibrations(source)  # of fast scores, by task
        self.fingerprint = f"{model}/{hashlib.sha256(INSTRUCTION.encode()).hexdigest()[:12]}"
        self._counts: Counter[str] = Counter()
        self.ready, self.running = False, 0
        self._doubted = asyncio.Event()  # there was an outage since the last look
        self._control = re.compile("(?=" + "|".join(map(re.escape, self.tokenizer.added.values())) + ")(.)", re.DOTALL)
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(60.0, connect=5.0, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    def start(self) -> None:
        """Look at the server now and after each outage; it is ready while it reads and judges the canaries right."""
        self._watcher = asyncio.create_task(self._watch())

    def counters(self) -> dict[str, int]:
        """Calls that gave no judgement, by kind."""
        return dict(self._counts)

    async def drain(self) -> None:
        """Wait for what is being judged, then hang up."""
        self._watcher.cancel()
        self.ready = False
        while self.running:
            await asyncio.sleep(0.05)
        await self._client.aclose()

    async def judge(
        self, sample: Sample, *, mode: str | None = None, budget: int | None = None, deadline: float | None = None
    ) -> Judgement:
        """deadline: on the clock of time.monotonic. Raises Overloaded, Outage, and TimeoutError at the deadline."""
        self.running += 1
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                return await self._judge(sample, mode or self.config.mode, budget or self.config.reasoning_budget)
        except SampleRejected as error:
            return Judgement.rejected(sample.id, f"{error.reason}: {error}")
        except ValueError as error:  # Unread, Undecided: a sender can cause them, so they block
            self._counts[type(error).__name__.lower()] += 1
            return Judgement.rejected(sample.id, f"{type(error).__name__.lower()}: {error}")
        except Outage:
            self._doubted.set()  # one prompt may have caused it: whether others are judged is seen by the canaries
            self._counts["outage"] += 1
            raise
        finally:
            self.running -= 1

    async def _watch(self) -> None:
        while True:
            self._doubted.clear()
            try:
                await self._fast(PICTURE, await asyncio.to_thread(self._asked, PICTURE))
                for canary in CANARIES:
                    said = await self._judge(canary, self.config.mode, self.config.reasoning_budget)
                    if (said.status, said.request) != ("ok", canary.request_label):
                        raise ValueError(f"{canary.id} was judged {said.request} ({said.status})")
                self.ready = True
            except Overloaded:  # so it answers: as it was
                self._doubted.set()
            except Exception as error:  # whatever it is, the next look comes
                self.ready = False
                LOG.warning("%s is not ready: %s", self.model, error)
            await asyncio.sleep(AGAIN)
            if self.ready:
                await self._doubted.wait()

    async def _judge(self, sample: Sample, mode: str, budget: int) -> Judgement:
        asked = await asyncio.to_thread(self._asked, sample)
        if mode != "reason":
            said = await self._fast(sample, asked)
            scores = [score for score in said.scores.values() if score is not None]
            band = (self.config.uncertain_from, self.config.uncertain_to)
            if mode == "fast" or (scores and not any(band[0] <= score <= band[1] for score in scores)):
                return calibrated(said, self.calibrations)
        return await self._reason(sample, asked, budget)

    def _asked(self, sample: Sample) -> Asked:
        """Raises SampleRejected, ValueError."""
        answered = int(has_response(sample))
        longest = max(self.config.buckets.prompt) - len(self.closing.opening)
        if not sample.images:
            example = to_example(sample, self.tokenizer, self.images, longest)
            return Asked(example, example.tokens.tolist(), [], answered)

        sample = self._without_control(sample)
        example = to_example(sample, self.tokenizer, self.images, longest)
        first, *others = text_pieces(sample)
        parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
        for source, grid, text in zip(sample.images, example.grids, others, strict=True):
            parts.append({"type": "image_url", "image_url": {"url": _data_url(open_image(source), grid)}})
            parts.append({"type": "text", "text": text})
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": parts},
        ]
        return Asked(example, example.tokens.tolist(), messages, answered)

    def _without_control(self, sample: Sample) -> Sample:
        """Its texts with a zero-width space in each name of an added token, and no lone surrogate, which JSON as
        UTF-8 cannot carry. Readers see no difference."""

        def plain(text: str | None) -> str | None:
            if text is None:
                return None
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._control.sub("\\1\u200b", text)

        request, response, turn = map(plain, (sample.request, sample.response, sample.user_turn))
        return sample._replace(request=request or "", response=response, user_turn=turn)

    async def _fast(self, sample: Sample, asked: Asked) -> Judgement:
        """No reasoning: the labels and their scores."""
        answer = self.closing.opening.tolist()
        labels, scores = await self._close(asked, answer, int(self.closing.fast[asked.has_response]))
        blocks = labels[: 1 + asked.has_response] != ["unharmful"] * (1 + asked.has_response)
        return Judgement(
            sample.id, labels[0], labels[1], blocks, "ok", "fast", None, None, (),
            dict(zip(("request", "response"), scores, strict=True)), len(answer) - len(self.closing.opening),
        )  # fmt: skip

    async def _reason(self, sample: Sample, asked: Asked, budget: int) -> Judgement:
        """Reasoning up to `</think>` or the budget, then the result block, which is the only way on."""
        choice = await self._next(
            asked, [], max_tokens=budget, stop=[END.decode()], include_stop_str_in_output=True, no_stop_trim=True
        )
        answer, cut, root = choice["token_ids"], False, 0
        if thoughts := self._thoughts(answer):
            answer, root = thoughts, int(self.closing.closed[asked.has_response, thoughts[-1]])
        elif choice.get("finish_reason") == "length":
            cut, root = True, int(self.closing.cut[asked.has_response])
        scores: list[float | None] = [None, None]
        if root and not set(answer) & set(self.tokenizer.banned_ids):  # which the sampler cannot write
            _, scores = await self._close(asked, answer, root)
        said = judgement(sample, asked.example, Completion(self.tokenizer.decode(answer), True, len(answer), cut))
        return said._replace(scores=dict(zip(said.scores, scores, strict=True))) if said.request else said

    def _thoughts(self, ids: list[int]) -> list[int]:
        """The ids up to the one that completes `</think>`; none if none does."""
        table, read = self.tokenizer.token_bytes(), b""
        for count, token in enumerate(ids, start=1):
            read += table[token]
            if END in read:
                return ids[:count]
        return []

    async def _close(self, asked: Asked, answer: list[int], node: int) -> tuple[list[Label | None], list[float | None]]:
        """Write the closing's tree from `node` on into `answer` → labels and P(harmful) of request and response."""
        labels: list[Label | None] = [None, None]
        scores: list[float | None] = [None, None]
        while node:
            way, task = 0, int(self.closing.task[node])
            if task >= 0:
                way, scores[task] = await self._fork(asked, answer, self.closing.ids[node].tolist())
                labels[task] = LABELS[way]
            answer.append(int(self.closing.ids[node][way]))
            node = int(self.closing.next[node][way])
        return labels, scores

    async def _fork(self, asked: Asked, answer: list[int], ids: list[int]) -> tuple[int, float | None]:
        """Which of two ids comes next, and the share of the first; None if the server gives no log-probabilities.

        One that is not among the TOP counts as the last of them if it is the harmful one, else as impossible.
        """
        chat = bool(asked.messages)
        wanted = {"logprobs": True, "top_logprobs": TOP} if chat else {"logprobs": TOP}
        choice = await self._next(asked, answer, max_tokens=1, return_tokens_as_token_ids=True, **wanted)
        listed = _logprobs(choice)
        # vLLM names a token by its id if asked to, SGLang by its text.
        first, second = (listed.get(f"token_id:{i}", listed.get(self.tokenizer.decode([i]))) for i in ids)
        if first is None and second is None:
            if listed or choice["token_ids"][:1] not in ([ids[0]], [ids[1]]):
                raise Undecided("the model wrote something else where the label has to stand")
            return ids.index(choice["token_ids"][0]), None
        if second is None:
            return 0, 1.0
        first = min(listed.values()) if first is None else first
        score = 1 / (1 + math.exp(min(second - first, 700.0)))
        return (1 if score < 0.5 else 0), score

    async def _next(self, asked: Asked, answer: list[int], **sampling: Any) -> dict[str, Any]:
        """The choice that the server returns for prompt and answer so far. Raises Overloaded, Outage, Unread."""
        body = {"model": self.model, "temperature": 0.0, "repetition_penalty": 1.0, "return_token_ids": True} | sampling
        expected = asked.tokens + answer
        if asked.messages:
            text = self.tokenizer.decode(answer)
            turn = [{"role": "assistant", "content": text}] if answer else []
            body |= {"messages": asked.messages + turn, "return_prompt_token_ids": True}
            body |= {"add_generation_prompt": not answer, "continue_final_message": bool(answer)}
            opened = len(self.tokenizer.encode_text("assistant\n"))
            expected = asked.tokens[:-opened] + self.tokenizer.encode_text("assistant\n" + text)
        else:
            body |= {"prompt": expected}
        answered = await self._post("chat/completions" if asked.messages else "completions", body)
        try:
            reply = answered.json()
            (choice,) = reply["choices"]
            read = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
            written = choice["token_ids"]
            if not all(type(ids) is list and all(type(i) is int for i in ids) for ids in (read, written)):
                raise TypeError("no lists of token ids")
            self.tokenizer.decode(written)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Outage(f"not an answer with token ids ({type(error).__name__}: {error}); see Backend") from error
        if read != expected:
            raise Unread(f"the model has read {len(read)} ids that are not the prompt's {len(expected)}")
        return choice

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        try:
            answered = await self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise Outage(f"the model server does not answer: {type(error).__name__}") from error
        if answered.status_code == 429:
            raise Overloaded(1.0)
        if answered.status_code in (400, 413, 422):
            raise Unread(f"the model server answered {answered.status_code}")
        if answered.status_code != 200:
            raise Outage(f"the model server answered {answered.status_code}")
        return answered


def _data_url(image: Image.Image, grid: np.ndarray) -> str:
    """The picture in the size that the model sees; a server with the same bounds leaves it so."""
    file = io.BytesIO()
    size = (int(grid[2]) * PATCH, int(grid[1]) * PATCH)
    image.resize(size, Image.Resampling.BICUBIC).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _logprobs(choice: dict[str, Any]) -> dict[str, float]:
    """{token: log-probability} at the first generated token; empty if there are none, or what is there is no number."""
    try:
        found = choice["logprobs"]
        if "content" in found:
            pairs = [(entry["token"], entry["logprob"]) for entry in found["content"][0]["top_logprobs"]]
        else:
            pairs = list(found["top_logprobs"][0].items())
        return {str(token): float(value) for token, value in pairs if math.isfinite(value)}
    except (KeyError, IndexError, TypeError, AttributeError):
        return {}
