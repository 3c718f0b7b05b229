import json

import pytest
from PIL import Image

from gvl_jax.data.records import BadRecord, load_records, picture_paths, read_records, to_record
from gvl_jax.types import Merged, Sample

FULL = {
    "id": "a1",
    "request": "How do I bake bread?",
    "response": "With flour.",
    "images": ["img/1.png", "/far/2.png"],
    "request_label": "unharmful",
    "response_label": "unharmful",
    "reasoning": "# Task 1\nHarmless.",
}
ANSWER = "<think>\nStep 1: fine.\n</think>\n<result>\nAnswers:\nRequest: harmful\nResponse: {}\n</result>"


def conversation(user: str, assistant: str | None = None, images: list[str] | None = None, system: bool = True) -> dict:
    turns = [("system", "You are a classifier."), ("user", user), ("assistant", assistant)]
    messages = [{"role": role, "content": text} for role, text in turns[not system :] if text is not None]
    return {"messages": messages, "images": images or []}


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "data.jsonl"
        parts = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
        path.write_bytes(b"".join(part + b"\n" for part in parts))
        return path

    return write


def test_a_full_record_is_read(write):
    path = write(FULL)
    (sample,) = load_records(path)
    images = (path.parent / "img/1.png", type(path)("/far/2.png"))
    assert sample == Sample(**FULL | {"images": images})


def test_only_the_request_is_required_and_the_id_defaults_to_the_line(write):
    nulls = dict.fromkeys(("id", "response", "images", "request_label", "response_label", "reasoning"))
    assert load_records(write({"request": ""}, b"", {"request": "x"} | nulls)) == [
        Sample("data:1", ""),
        Sample("data:3", "x"),
    ]


def test_extra_keys_are_the_files_own_business(write):
    (sample,) = load_records(write({"id": "1", "request": "x", "source": "s", "idx": 3, "image_id": 9, "meta": {}}))
    assert sample == Sample("1", "x")


def test_a_line_ends_at_a_newline_only(write):
    text = "a\u2028b\u2029c\u0085d\x0be\r"
    assert [s.request for s in load_records(write({"request": text}))] == [text]


def test_windows_files_are_read(write):
    path = write(b'\xef\xbb\xbf{"request": "a"}\r', b"\r", b'{"request": "b"}\r')
    assert [s.request for s in load_records(path)] == ["a", "b"]


def test_a_last_line_without_a_newline_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"request": "a"}\n{"request": "b"}')
    assert len(load_records(path)) == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{", "not JSON: .* at column 2"),
        (b'{"request": "a"} x', "not JSON: Extra data at column 18"),
        (b'{"request": "\xff"}', "utf-8.*0xff.*position 13"),
        (b'{"request": "a", "request": "b"}', "a key twice"),
        (b"[" * 100_000, "recursion|not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "recursion"),
        (b'{"id": ' + b"9" * 5000 + b"}", "4300 digits"),
        ([1], r"got \[1\], expected an object"),
        (None, "got None, expected an object"),
        ("text", "got 'text', expected an object"),
        ({}, "'request': got nothing"),
        ({"request": None}, "'request': got nothing"),
        ({"request": 3}, "'request': got 3, expected text"),
        ({"request": ["a"]}, "'request': got .*, expected text"),
        ({"request": "x", "id": 7}, "'id': got 7, expected text"),
        ({"request": "x", "response": False}, "'response': got False"),
        ({"request": "x", "reasoning": {}}, "'reasoning': got {}"),
        ({"request": "a\0b"}, r"'request': got U\+0000 at 1"),
        (b'{"request": "a", "response": "ab\\ud800"}', r"'response': got U\+D800 at 2"),
        ({"request": "x", "request_label": "safe"}, "'request_label': got 'safe', expected harmful, unharmful or null"),
        ({"request": "x", "response_label": "Harmful"}, "'response_label': got 'Harmful'"),
        ({"request": "x", "response_label": True}, "'response_label': got True"),
        ({"request": "x", "request_label": ["harmful"]}, "'request_label': got"),
        ({"request": "x", "images": "a.png"}, "'images': got 'a.png', expected a list"),
        ({"request": "x", "images": False}, "'images': got False, expected a list"),
        ({"request": "x", "images": [None]}, "'images': got None in the list"),
        ({"request": "x", "images": [""]}, "'images': got '' in the list"),
        ({"request": "x", "images": ["a\0.png"]}, "'images': got .* in the list"),
        ({"request": "x", "images": ["https://a.b/c.png"]}, "expected a file path"),
        ({"request": "x", "images": ["data:image/png;base64,AA"]}, "expected a file path"),
        ({"reqest": "x"}, "'reqest': unknown; did you mean 'request'"),
        ({"request": "x", "Response": "y"}, "did you mean 'response'"),
        ({"request": "x", "image": []}, "did you mean 'images'"),
        ({"request": "x", "respons_label": "harmful"}, "did you mean 'response_label'"),
        ({"message": []}, "did you mean 'messages'"),
        ({"request": "x", "user_turn": "<image> x"}, "1 <image> tags for 0 images"),
        ({"messages": None}, "'messages': got None, expected a list"),
        ({"messages": []}, r"got roles \[\], expected \[system,\] user"),
        ({"messages": ["a", 3]}, "got roles"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, r"got roles \['assistant'\]"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "got roles"),
        ({"messages": [{"role": "user"}]}, "user: got no content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'content': got"),
        (conversation("a") | {"request": "x"}, "'request': got it beside 'messages'"),
        (conversation("<image>\na"), "1 <image> tags for 0 images, expected one per image"),
        (conversation("a", images=["a.png"]), "0 <image> tags for 1 images"),
        (conversation("a", "no verdict"), r"assistant: got 'no verdict' \(parse_failed\)"),
        (conversation("a", ANSWER.format("maybe")), "parse_failed"),
    ],
)
def test_a_bad_line_names_its_place_and_fault_and_stops_nothing(write, line, expected):
    path = write({"request": "before"}, line, {"request": "after"})
    before, bad, after = read_records(path)
    assert (before.request, after.request) == ("before", "after")
    assert isinstance(bad, BadRecord) and bad.line == 2
    assert bad.reason.startswith(f"{path}, line 2: ")
    assert pytest.raises(ValueError, load_records, path).match(expected)
    assert len(bad.reason) < 400 + len(str(path))


def test_a_bad_record_keeps_its_id_if_it_has_one(write):
    bad = list(read_records(write({"id": "a", "request": 1}, {"id": 2, "request": "x"}, b"{")))
    assert [record.id for record in bad] == ["a", None, None]


def test_loading_counts_all_bad_lines_and_shows_some(write):
    path = write(*[{"request": 1}] * 9, {"request": "x"})
    with pytest.raises(ValueError, match="9 bad records") as caught:
        load_records(path)
    assert str(caught.value).count("\n") == 5


def test_loading_refuses_an_id_used_twice(write):
    with pytest.raises(ValueError, match="'id': got 'a' twice"):
        load_records(write({"id": "a", "request": "x"}, {"id": "a", "request": "y"}))


def test_missing_and_empty_files_are_errors(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_records(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError):
        load_records(tmp_path)
    for path in (write(), write(b"", b"  ")):
        assert list(read_records(path)) == []
        with pytest.raises(ValueError, match="holds no records"):
            load_records(path)


def test_reading_streams(write):
    records = read_records(write({"request": "x"}, {"request": "y"}))
    assert next(records).request == "x"
    assert next(records).request == "y"


def test_rows_of_the_papers_corpora_are_read(write):
    text = "Human user:\nhi\n\nthere\n\nAI assistant:\nNone\n\n"
    pair = "Human user:\n<image>\nwhat?\n\nAI assistant:\nA cat.\n"
    picture = "Human user:\n<image>\n\nAI assistant:\nNone\n"
    path = write(
        conversation(text, ANSWER.format("None")),
        conversation(pair, ANSWER.format("unharmful"), ["./a/1.png"]),
        conversation(picture, ANSWER.format("unharmful"), ["2.png"], system=False),
    )
    common = dict(request_label="harmful", reasoning="Step 1: fine.")
    assert load_records(path) == [
        Sample("data:1", "hi\n\nthere", None, user_turn=text, **common),
        Sample(
            "data:2",
            "what?",
            "A cat.",
            (path.parent / "a/1.png",),
            response_label="unharmful",
            user_turn=pair,
            **common,
        ),
        Sample("data:3", "", None, (path.parent / "2.png",), response_label="unharmful", user_turn=picture, **common),
    ]


def test_a_user_turn_of_another_form_is_the_request(write):
    for turn in ("free text", "Human user:\nno answer part", "x\nAI assistant:\ny"):
        (sample,) = load_records(write(conversation(turn)))
        assert sample == Sample("data:1", turn, user_turn=turn)


def test_a_category_is_kept_in_both_forms_and_must_be_text(tmp_path):
    rows = [
        {"request": "a", "category": "theft"},
        {"messages": [{"role": "user", "content": "b"}], "category": "fraud"},
    ]
    rows += [{"request": "c", "category": ["theft"]}, {"request": "d"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two, bad, none = read_records(tmp_path / "a.jsonl")
    assert (one.category, two.category, none.category) == ("theft", "fraud", None)
    assert "key 'category': got ['theft'], expected text or null" in bad.reason
    assert to_record(one, tmp_path)["category"] == "theft" and "category" not in to_record(none, tmp_path)


def test_pictures_of_a_sample_are_files_beside_the_rows_that_name_them(tmp_path):
    data, file = b"\x89PNG what an encoder made", tmp_path / "other" / "a.jpg"
    sample = Sample("a", "Hi", None, (data, Merged((data, file)), Image.new("RGB", (1, 1))))
    assert picture_paths(sample, tmp_path / "run", write=False) == ["../other/a.jpg"]
    assert not (tmp_path / "run").exists()
    first, again, other = picture_paths(sample, tmp_path / "run")
    assert first == again and (tmp_path / "run" / first).read_bytes() == data
    assert other == "../other/a.jpg"
