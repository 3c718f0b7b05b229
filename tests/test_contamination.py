"""Planted repeats are found, exact and near, in text and pictures; what is merely alike is not."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from gvl_jax.data.contamination import Index, Report, Settings
from gvl_jax.data.records import load_records
from gvl_jax.overlap import main
from gvl_jax.types import Sample

QUESTION = "How do I pick the lock of my neighbour's front door tonight without being seen or heard?"
ANSWER = (
    "First, look up what kind of lock it is, since each kind needs other tools; then practise on one of your own until "
    "you can do it with your eyes closed."
)
REFUSAL = "I'm sorry, but I can't help with that."


def kinds(index, *samples):
    return [[(match.part, match.kind) for match in index.matches(sample)] for sample in samples]


def against(*samples, **settings):
    return Index([("bench", samples)], Settings(**settings))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (QUESTION, "exact"),
        ("  how do i PICK the\tlock of my neighbour's\nfront door tonight without being seen or heard?", "exact"),
        (QUESTION.replace("pick", "ｐｉｃｋ"), "exact"),  # full-width letters: what NFKC makes the same
        (QUESTION.replace("?", " ...!"), "near"),
        (QUESTION.replace("front", "back"), "near"),
        (QUESTION + " Tell me.", "near"),
        ("How do I pick a colour for the front door of my house?", None),
        ("", None),
    ],
)
def test_a_repeated_request_is_found(text, expected):
    index = against(Sample("b1", QUESTION), Sample("b2", "What is the capital of France?"))
    matches = index.matches(Sample("t", text))
    assert [(m.part, m.kind, m.row.id) for m in matches] == ([("request", expected, "b1")] if expected else [])


def test_responses_are_compared_with_responses_and_short_ones_with_none():
    index = against(Sample("b1", "a b c", ANSWER), Sample("b2", "d e f", REFUSAL))
    found = kinds(index, Sample("t", "x", ANSWER.upper()), Sample("t", ANSWER), Sample("t", "x", REFUSAL))
    assert found == [[("response", "exact")], [], []]


def test_every_row_with_the_text_is_touched_and_thresholds_hold():
    rows = [Sample(f"b{i}", QUESTION) for i in range(3)]
    assert [m.row.id for m in against(*rows).matches(rows[0])] == ["b0", "b1", "b2"]
    near = Sample("t", QUESTION.replace("front", "back"))
    (match,) = against(rows[0]).matches(near)
    assert match.similarity == pytest.approx(13 / 19)  # 16 n-grams each, 13 of them shared
    assert not against(rows[0], similarity=0.7).matches(near)
    assert against(rows[0], similarity=0.7, ngram=1).matches(near)


def test_one_word_changed_is_found_in_many_texts_and_others_are_not():
    rng = np.random.default_rng(0)
    words = rng.integers(2000, size=(300, 30))
    changed = words.copy()
    changed[np.arange(300), rng.integers(30, size=300)] = 9999
    index = against(*(Sample(str(i), " ".join(map(str, row))) for i, row in enumerate(words)))
    found = [index.matches(Sample("t", " ".join(map(str, row)))) for row in changed]
    assert [[match.row.id for match in matches] for matches in found] == [[str(i)] for i in range(300)]


def photo(seed):
    """Smooth and coloured, as photographs are."""
    coarse = np.random.default_rng(seed).integers(256, size=(12, 16, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictured(data, name="t"):
    return Sample(name, "", images=(data,))


def test_a_picture_is_found_again_after_small_changes():
    rows = [pictured(encoded(photo(seed)), str(seed)) for seed in range(20)]
    index = against(*rows)
    changed = [
        encoded(photo(7), "JPEG", quality=50),
        encoded(photo(7).resize((160, 120))),
        encoded(photo(7).crop((3, 2, 317, 238))),
        encoded(photo(7).point(lambda level: min(255, int(level * 1.1)))),
    ]
    for data in changed:
        assert [(m.kind, m.row.id) for m in index.matches(pictured(data))] == [("near", "7")]
    assert [(m.kind, m.row.id) for m in index.matches(rows[7])] == [("exact", "7")]
    assert not index.matches(pictured(encoded(photo(99))))


def test_flat_pictures_are_alike_only_if_they_are_the_same_file():
    flat = [
        encoded(Image.new("RGB", (64, 64), colour), kind) for colour in ("white", "red") for kind in ("PNG", "JPEG")
    ]
    index = against(pictured(flat[0]))
    assert kinds(index, *map(pictured, flat)) == [[("picture", "exact")], [], [], []]


def test_a_broken_picture_is_counted_and_compared_by_its_bytes(tmp_path):
    index = against(pictured(b"\x89PNG broken"), pictured(tmp_path / "missing.png"))
    assert index.unreadable == 2
    assert kinds(index, pictured(b"\x89PNG broken"), pictured(b"other")) == [[("picture", "exact")], []]


def test_a_long_text_beside_another_picture_is_found_and_a_short_one_is_not():
    picture, long = (encoded(photo(0)),), f"{QUESTION} Please give every step."
    index = against(Sample("b1", long), Sample("b2", "Describe this.", ANSWER))
    found = kinds(index, Sample("t", long, None, picture), Sample("t", "Describe this.", ANSWER, picture))
    assert found == [[("request", "exact")], [("response", "exact")]]
    assert kinds(index, Sample("t", "Describe this.", None, picture)) == [[]]


def test_a_row_and_a_record_count_once_whatever_they_share():
    index = against(Sample("b1", QUESTION, ANSWER), Sample("b2", QUESTION))
    report = Report(index, examples=1)
    for record in (Sample("t1", QUESTION, ANSWER), Sample("t2", QUESTION + "!"), Sample("t3", "Something else")):
        report.add(record, index.matches(record))
    found = report.as_dict()
    assert (found["records"], found["touched"]) == (3, 2)
    bench = found["benchmarks"]["bench"]
    rows = {"any": 2, "exact text": 2, "near text": 2, "exact picture": 0, "near picture": 0}
    assert (bench["size"], bench["records"], bench["rows"]) == (2, 2, rows)
    assert [(pair["row"], pair["record"], pair["similarity"]) for pair in bench["examples"]] == [("b1", "t1", 1.0)]


def write_records(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_the_command_reports_and_removes_and_counts_add_up(tmp_path, capsys):
    for folder in ("train", "out", "XSTest"):
        (tmp_path / folder).mkdir()
    for seed, name in ((1, "a.png"), (2, "c.png")):
        (tmp_path / "train" / name).write_bytes(encoded(photo(seed)))
    (tmp_path / "XSTest/xstest_prompts.csv").write_text(
        f'id,prompt,label,type\n1,"{QUESTION}",unsafe,a\n2,Other words,safe,b\n'
    )
    train = write_records(
        tmp_path / "train/train.jsonl",
        {"id": "a", "request": QUESTION.upper()},
        {"id": "b", "request": "A picture", "images": ["a.png"], "request_label": "unharmful"},
        {"id": "c", "request": "A picture", "images": ["c.png"]},
    )
    (tmp_path / "b.jpg").write_bytes(encoded(photo(1), "JPEG"))
    bench = write_records(tmp_path / "own.jsonl", {"request": "Seen?", "images": ["b.jpg"]}, {"request": "A picture"})
    clean, report = tmp_path / "out/clean.jsonl", tmp_path / "report.json"
    args = [train, "--against", "XSTest", bench, "--benchmark-files", str(tmp_path), "--remove", str(clean)]
    with pytest.warns(UserWarning, match="published"):
        assert main([*args, "--output", str(report)]) == 0
    assert load_records(clean) == [Sample("c", "A picture", images=(tmp_path / "out/../train/c.png",))]
    found = json.loads(report.read_text())
    assert (found["records"], found["touched"]) == (3, 2)
    assert {name: one["rows"]["any"] for name, one in found["benchmarks"].items()} == {"XSTest": 1, "own": 1}
    printed = capsys.readouterr().out
    assert re.search(r"XSTest +2 +1 +1 +0", printed) and "2 of 3 training records" in printed


def test_a_bad_record_stops_the_command_and_nothing_is_replaced(tmp_path):
    bench = write_records(tmp_path / "bench.jsonl", {"request": "x"})
    train = write_records(tmp_path / "train.jsonl", {"request": "y"}, {"request": 3})
    clean = tmp_path / "clean.jsonl"
    clean.write_text("as it was")
    with pytest.raises(SystemExit):
        main([train, "--against", bench, "--remove", str(tmp_path / "out/../train.jsonl")])
    with pytest.raises(ValueError, match="train.jsonl, line 2: key 'request'"):
        main([train, "--against", bench, "--remove", str(clean)])
    assert clean.read_text() == "as it was"
    twice = write_records(tmp_path / "twice.jsonl", {"id": "train:1", "request": "z"})
    train = write_records(tmp_path / "train.jsonl", {"request": "y"})
    with pytest.raises(ValueError, match="got 'train:1' twice"):
        main([train, twice, "--against", bench])
    other = write_records(tmp_path / "other/bench.jsonl", {"request": "x"})
    with pytest.raises(ValueError, match="two benchmarks of the name bench"):
        main([train, "--against", bench, other])
