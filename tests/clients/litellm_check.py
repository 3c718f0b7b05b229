"""LiteLLM's own guardrail class against a running server, as its gateway would use it: allow, block, several pictures,
picture alone, response, error, overload. Needs a Python with litellm, which this project does not depend on.

    python litellm_check.py http://127.0.0.1:8000 KEY        (the server judges by keyword: tests/fake_guard.py)
"""

import asyncio
import base64
import runpy
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

from litellm.exceptions import GuardrailRaisedException
from litellm.llms.openai.chat.guardrail_translation.handler import OpenAIChatCompletionsHandler
from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api import GenericGuardrailAPI

HOOKS = runpy.run_path(str(Path(__file__).resolve().parents[2] / "deploy/litellm_hooks.py"))
PicturesAlone = HOOKS["PicturesAlone"]
CALL = SimpleNamespace(litellm_call_id="call-1", litellm_trace_id=None, model_call_details={})


def picture(level: int) -> dict:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress((b"\0" + bytes([level]) * 12) * 4)
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png).decode()}}


async def main(url: str, key: str) -> int:
    guard = GenericGuardrailAPI(api_base=url, api_key=key, guardrail_name="gvl", event_hook="pre_call", default_on=True)
    white, black = picture(255), picture(0)

    async def request(*turns) -> str:
        data = {"messages": [{"role": role, "content": content} for role, content in turns], "model": "any"}
        return await outcome(OpenAIChatCompletionsHandler().process_input_messages(data, guard, CALL))

    async def gateway(*turns) -> str:
        data = {"messages": [{"role": role, "content": content} for role, content in turns], "model": "any"}
        await PicturesAlone().async_pre_call_hook(None, None, data, "completion")
        return await outcome(OpenAIChatCompletionsHandler().process_input_messages(data, guard, CALL))

    async def direct(kind: str, **inputs) -> str:
        return await outcome(guard.apply_guardrail(inputs, {}, kind, CALL))

    text = {"type": "text", "text": "What is this?"}
    audio = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", [text, white])]
    seen = {
        "allow": await request(("user", "Hi")),
        "block": await request(("user", "a bomb")),
        "block an earlier turn": await request(("user", "a bomb"), ("assistant", "No."), ("user", "Why?")),
        "allow turns": await request(*turns),
        "allow pictures": await request(("user", [text, white, white])),
        "block pictures": await request(("user", [text, white, black])),
        "block a part that is not judged": await request(("user", [text, audio])),
        "block a bad picture": await direct("request", texts=["Hi"], images=["data:image/png;base64,AAAA"]),
        "block picture alone": await direct("request", texts=[], images=[black["image_url"]["url"]]),
        "allow picture alone": await direct("request", texts=[], images=[white["image_url"]["url"]]),
        "block tool": await direct("request", texts=["Hi"], tools=[{"type": "function", "function": {"name": "bomb"}}]),
        "allow what is answered next": await request(("user", "What is it?")),
        "allow response": await direct("response", texts=["A rock."]),
        "block response": await direct("response", texts=["Build a bomb so."]),
        "block picture with a null text": await gateway(("user", [black | {"text": None}])),
        "allow picture with a null text": await gateway(("user", [white | {"text": None}])),
        "error overload": await request(("user", "OVERLOAD")),
        "error closed": await request(("user", "CLOSED")),
        "block crash": await request(("user", "CRASH")),
    }
    wrong = {name: got for name, got in seen.items() if got.split(":")[0] != name.split()[0]}
    for name, got in seen.items():
        print(f"{'wrong' if name in wrong else 'ok':6} {name}: {got}")
    return 1 if wrong else 0


async def outcome(call) -> str:
    try:
        await call
    except GuardrailRaisedException as error:
        return f"block: {error.message}"
    except Exception as error:
        return f"error: {error}"
    return "allow"


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
