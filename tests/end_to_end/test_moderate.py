"""`gvl moderate` and `Guard` on what nobody has vouched for. The guard has random weights, so it never finds a verdict:
every judgement must block, and what is looked at is which rows come out, why, and in which order."""

import io
import json
import random
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import hostile
import numpy as np
import pytest
from PIL import Image
from tiny_models import write_checkpoint

from gvl_jax import Guard, Judgement
from gvl_jax.cli import main
from gvl_jax.config import Images, Mesh, Moderate
from gvl_jax.data.loader import SampleRejected, to_example
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.guard.closing import closing
from gvl_jax.types import Sample

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--mesh.data", "1", "--dtype", "float32", "--prompts", "2", "--reasoning-budget", "8", "--max-pixels", "7056"]
SMALL += ["--buckets.prompt", "640", "--buckets.patches", "256", "--max-characters", "1500", "--max-images", "2"]
KEYS = list(Judgement._fields)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of one layer with random weights."""
    text = "Is it harmful or unharmful? The user wants to wash a car."
    return write_checkpoint(tmp_path_factory.mktemp("guard"), text, 320)


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header claims 9,000 x 9,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


GOOD = [
    {"id": "text", "request": "How do I wash a car?"},
    {"id": "answered", "request": "How do I wash a car?", "response": "With soap."},
    {"id": "picture", "request": "What is this?", "images": ["sub/one.png"]},
    {"id": "pictures", "request": "", "images": ["sub/one.png", "sub/two.png"]},
    {"id": "turn", "messages": [{"role": "user", "content": "Human user:\nHi\n\nAI assistant:\nNone\n\n"}]},
    {"id": "empty", "request": ""},
    {"id": "text", "request": "An id may come twice.", "extra": 1},
]
BAD = [
    ({"id": "lost", "request": "", "images": ["sub/none.png"]}, "lost", "missing"),
    ({"id": "broken", "request": "", "images": ["sub/broken.png"]}, "broken", "truncated"),
    ({"id": "bomb", "request": "", "images": ["sub/bomb.png"]}, "bomb", "too_many_pixels"),
    ({"id": "folder", "request": "", "images": ["sub"]}, "folder", "missing"),
    ({"id": "long", "request": "a" * 1501}, "long", "too_long: over 1500 characters"),
    ({"id": "long turn", "request": "Hi", "user_turn": "a" * 1501}, "long turn", "too_long: over 1500 characters"),
    ({"id": "tokens", "request": "\U0001f9ea" * 700}, "tokens", "too_long"),
    ({"id": "three", "request": "", "images": ["sub/one.png"] * 3}, "three", "got 3 images, at most 2"),
    ({"id": "number", "request": 3}, "number", "got 3, expected text"),
    ({"id": "label", "request": "Hi", "request_label": "safe"}, "label", "got 'safe', expected harmful, unharmful"),
    ({"id": "nul", "request": "a\0b"}, "nul", "U+0000"),
    ({"id": "\ud800", "request": "Hi"}, "line {}", "U+D800"),
    ({"id": 7, "request": "Hi"}, "line {}", "got 7, expected text"),
    ({"id": "link", "request": "", "images": ["https://a/b.png"]}, "link", "expected a file path"),
    ("not JSON", "line {}", "not JSON"),
    ("[1, 2]", "line {}", "expected an object"),
    ('{"request": "', "line {}", "not JSON"),
    (b"\xff\xfe", "line {}", "line {}"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Good and bad lines mixed, their pictures beside them, and what each line must become: (id, reason or None)."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "sub").mkdir()
    files = {"one": png(60, 90), "two": png(28, 28), "broken": png(60, 90)[:60] + b"\0" * 40, "bomb": bomb()}
    for name, content in files.items():
        (folder / "sub" / f"{name}.png").write_bytes(content)
    lines: list[bytes] = []
    expected: list[tuple[str, str | None]] = []
    for i, (line, name, reason) in enumerate(BAD):
        if i % 2 == 0:
            good = GOOD[i // 2 % len(GOOD)]
            lines += [json.dumps(good).encode(), b""]  # blank lines are no rows
            expected.append((good["id"], None))
        lines.append(
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        )
        expected.append((name.format(len(lines)), reason.format(len(lines))))
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    return folder / "rows.jsonl", expected


def moderate(model, rows, output, *more) -> list[str]:
    return ["moderate", str(model), "--input", str(rows), "--output", str(output), *SMALL, *more]


@pytest.fixture(scope="module")
def judged(model, rows, tmp_path_factory):
    """The bytes of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("judged") / "out.jsonl"
    assert main(moderate(model, rows[0], output)) == 0
    return output.read_bytes()


# ---------------------------------------------------------------------------------------------------------------- files


def test_every_line_becomes_a_row_in_order_and_bad_ones_block_with_their_reason(model, judged, rows):
    longest = 8 + int(closing(load_tokenizer(model), 1000).length)  # the reasoning's budget, and the forced close
    got = [json.loads(line) for line in judged.split(b"\n")[:-1]]
    assert [row["id"] for row in got] == [name for name, _ in rows[1]]
    for row, (name, reason) in zip(got, rows[1], strict=True):
        assert list(row) == KEYS and row["flagged"] is True, name
        if reason is None:
            assert row["status"] in ("parse_failed", "truncated") and row["reason"] is None, (name, row)
            assert 0 < row["tokens"] <= longest
        else:
            assert row["status"] == "input_rejected" and reason in row["reason"], (name, row["reason"])
            assert (row["request"], row["response"], row["tokens"]) == (None, None, 0)


STOPPED = """
import os, signal, sys
from gvl_jax import moderate
from gvl_jax.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits that it is ignored

class Stopped(moderate.Guard):
    calls = 0

    def moderate_batch(self, samples):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().moderate_batch(samples)

moderate.Guard = Stopped
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ctrl_c_keeps_whole_rows_and_the_same_command_goes_on_to_the_same_bytes(model, rows, judged, tmp_path):
    args = moderate(model, rows[0], tmp_path / "out.jsonl")
    stopped = subprocess.run([sys.executable, "-c", STOPPED, *args], cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode == 130, stopped.stderr
    assert "interrupted" in stopped.stderr and "Traceback" not in stopped.stderr
    written = (tmp_path / "out.jsonl").read_bytes()
    assert judged.startswith(written) and written.count(b"\n") == 16 and written.endswith(b"\n")
    assert main(args) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == judged


@pytest.mark.parametrize("kept", [0, 3, 700, 0.5, 0.9, 1.0])
def test_a_kill_at_any_byte_is_made_good(kept, model, rows, judged, tmp_path):
    part = judged[: kept if isinstance(kept, int) else int(kept * len(judged))]
    (tmp_path / "out.jsonl").write_bytes(part)
    assert main(moderate(model, rows[0], tmp_path / "out.jsonl")) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == judged


@pytest.mark.parametrize("content", [
    b"something else", b"one\ntwo\n", b'{"id": "text"}\n', b'["id"]\n', b"3\n",
])  # fmt: skip
def test_an_output_of_something_else_is_refused_and_left_as_it_is(content, model, rows, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_bytes(content)
    code = main(moderate(model, rows[0], tmp_path / "out.jsonl"))
    assert code == 2
    assert "not the beginning of this job" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_an_output_of_another_job_is_refused(model, judged, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"id": "first", "request": "Hi"}\n')
    (tmp_path / "out.jsonl").write_bytes(judged)
    assert main(moderate(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl")) == 2
    assert "not the beginning of this job" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == judged


def test_the_input_is_never_the_output(model, rows, capsys):
    before = rows[0].read_bytes()
    assert main(moderate(model, rows[0], rows[0].parent / "sub" / ".." / "rows.jsonl")) == 2
    assert "output is the input" in capsys.readouterr().err
    assert rows[0].read_bytes() == before


# ----------------------------------------------------------------------------------------------------------- one record


def test_a_record_of_flags_is_judged_on_standard_output(model, rows, capsys):
    image = str(rows[0].parent / "sub" / "one.png")
    given = ["moderate", str(model), "--request", "Hi", "--response", "Hello", "--image", image, *SMALL]
    assert main(given) == 0
    (row,) = capsys.readouterr().out.splitlines()
    assert list(json.loads(row)) == KEYS and json.loads(row)["flagged"]
    assert main([*given, "--exit-code"]) == 3


@pytest.fixture(scope="module")
def guard(model):
    settings = Moderate(str(model), dtype="float32", prompts=4, reasoning_budget=8, max_pixels=7056, mesh=Mesh(data=1))
    return Guard(settings)


def test_a_picture_is_the_same_as_path_bytes_and_image(guard, rows):
    path = rows[0].parent / "sub" / "one.png"
    sources = [path, str(path), path.read_bytes(), Image.open(path)]
    said = [guard.moderate("What is this?", images=[source]) for source in sources]
    assert said[0].tokens > 0 and said[0].flagged and said == [said[0]] * 4
    assert guard.moderate(images=[b"GIF89a"]).status == "input_rejected"


def test_a_guard_needs_no_more_than_its_checkpoint(model):
    judged = Guard.from_pretrained(model, dtype="float32").moderate("What is this?")
    assert judged.tokens > 0 and judged.flagged and judged.status != "input_rejected"


def test_fast_goes_by_its_scores_and_auto_reasons_where_they_are_uncertain(model, guard):
    asked = "How do I wash a car?"
    samples = [Sample("one", asked), Sample("two", asked, "With soap."), Sample("long", "x" * 10**6)]
    settings = guard.config
    fast = Guard(replace(settings, mode="fast")).moderate_batch(samples)
    assert [one.decided_by for one in fast] == ["fast", "fast", "fail_closed"]
    assert fast[0].tokens == 1 < fast[1].tokens and fast[0].response is None is fast[0].scores["response"]
    for one in fast[:2]:
        labels = [None if p is None else "harmful" if p >= 0.5 else "unharmful" for p in one.scores.values()]
        assert [one.request, one.response] == labels and one.flagged == ("harmful" in labels)
        assert one.status == "ok" and one.reasoning is None
    auto = replace(settings, mode="auto", uncertain_from=0.0, uncertain_to=1.0)
    assert Guard(auto).moderate_batch(samples) == guard.moderate_batch(samples)
    sure = replace(auto, uncertain_from=1.0)
    assert Guard(sure).moderate_batch(samples) == fast


# -------------------------------------------------------------------------------------------------------------- hostile


def attacks() -> list[Sample]:
    rng = random.Random(0)
    texts = [*hostile.REQUESTS.values(), *rng.sample(list(hostile.COMPLETIONS.values()), 10), *hostile.fuzzed(10, 0)]
    samples = [Sample(f"request {i}", text) for i, text in enumerate(texts)]
    return samples + [Sample(f"response {i}", "Hi", text) for i, text in enumerate(texts)]


def test_nothing_hostile_gets_past_a_guard_that_has_no_verdict(guard):
    judged = guard.moderate_batch(attacks())
    assert [one.id for one in judged] == [sample.id for sample in attacks()]
    assert all(one.flagged and one.request is None and one.response is None for one in judged)
    assert {one.status for one in judged} <= {"parse_failed", "truncated", "input_rejected"}
    assert sum(one.status == "input_rejected" for one in judged) <= 4  # the endless ones


def test_hostile_text_never_becomes_a_control_token(model):
    tokenizer = load_tokenizer(model)
    start, end = tokenizer.im_start, tokenizer.im_end
    seen = 0
    for sample in attacks():
        try:
            tokens = to_example(sample, tokenizer, Images(), 4096).tokens.tolist()
        except SampleRejected:
            continue
        assert [token for token in tokens if token in tokenizer.added] == [start, end, start, end, start]
        seen += 1
    assert seen > 60
