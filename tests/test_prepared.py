"""Prepared data sets: the same bytes however they come about, read by us, by grain and by tensorflow_datasets."""

import io
import json
import pickle
import shutil
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from functools import partial

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gvl_jax import evaluate, overlap
from gvl_jax import prepare as cli
from gvl_jax.config import ConfigError, Eval, Sft
from gvl_jax.data import prepared, tiny
from gvl_jax.data.corpora import open_corpus
from gvl_jax.data.loader import steps
from gvl_jax.data.prepared import Prepared, decode, load_samples, prepare, verify
from gvl_jax.data.records import load_records, to_record
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.types import Sample

REASONING = (
    "# Task 1\n## Reasoning Step 1\nSeen.\n# Task 1 Conclusion\nRequest: {}\n# Task 2\n## Reasoning Step 1\nNone."
)
ROWS = 60


def picture(seed, kind="PNG", side=32):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def record(number, **changes):
    label = ("harmful", "unharmful")[number % 2]
    return {
        "id": f"r{number}", "request": "" if number % 3 == 0 else f"request {number}", "response": None,
        "images": [f"img/{number % 7}.png"] if number % 3 != 1 else [], "request_label": label, "response_label": None,
        "reasoning": REASONING.format(label),
    } | changes  # fmt: skip


BAD = {
    "missing_image": {"images": ["img/none.png"]},
    "broken_image": {"images": ["img/broken.png"]},
    "contradiction": {"request_label": "harmful", "reasoning": REASONING.format("unharmful")},
    "bad_reasoning": {"reasoning": "it says </think> inside"},
    "over_long": {"request": "1 " * 3000},
    "duplicate_id": {"id": "r0"},
    "bad_record": {"request": 7},
    "no_verdict": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "harmful, I think"}]
    },
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two JSONL files, every kind of bad row among the first one's, and their pictures."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "img").mkdir()
    for number in range(7):
        (folder / f"img/{number}.png").write_bytes(picture(number, ("PNG", "JPEG", "WEBP")[number % 3]))
    (folder / "img/broken.png").write_bytes(picture(0)[:200])
    rows = [record(number) for number in range(ROWS)]
    for number, (reason, changes) in enumerate(BAD.items()):
        row = record(100 + number, images=[]) | changes
        if reason == "no_verdict":
            row = {"id": row["id"], "messages": changes["messages"]}
        rows.insert(5 * number + 2, row)
    (folder / "first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "second-part.jsonl").write_text("".join(json.dumps(record(n)) + "\n" for n in range(ROWS, ROWS + 9)))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write_tiny(folder, ["request many words harmful unharmful"], vocab_size=300)
    return folder


@pytest.fixture(scope="module")
def make(source, model):
    tokenizer = load_tokenizer(model)
    return lambda folder, **more: prepare(
        open_corpus("jsonl", str(source)), folder, tokenizer=tokenizer, max_length=3000, shard_rows=16, **more
    )


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make(folder, workers=1)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_bad_row_is_listed_with_its_reason_and_the_rest_is_counted(whole, source):
    rejected = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    assert [(row["reason"], row["row"]) for row in rejected] == [(reason, 5 * i + 2) for i, reason in enumerate(BAD)]
    assert {row["split"] for row in rejected} == {"first"} and all(row["detail"] for row in rejected)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["rejected"] == dict.fromkeys(sorted(BAD), 1)
    assert manifest["settings"]["source"] == str(source)
    first, second = manifest["splits"]["first"], manifest["splits"]["second_part"]
    assert (first["rows"], first["rejected"], second["rows"], second["rejected"]) == (60, 8, 9, 0)
    assert first["modality"] == {"image": 20, "text": 20, "text_image": 20}
    assert first["request_label"] == {"harmful": 30, "unharmful": 30} and first["response_label"] == {"None": 60}
    assert [shard["rows"] for shard in first["shards"]] == [13, 13, 14, 16, 4]


def test_eval_reads_a_prepared_set_sample_by_sample_beside_files(whole, source, tmp_path):
    config = Eval(data=(str(whole), str(source / "second-part.jsonl")), limit=7)
    names, samples = evaluate.to_judge(config, tmp_path)
    assert (names, len(samples)) == ([whole.name] * 7 + ["second-part"] * 7, 14)
    assert samples[3] == Prepared(whole)[3] and samples[7].id == f"r{ROWS}"
    assert isinstance(samples.parts[0].parts[0], Prepared)  # nothing is decoded before it is asked for
    (tmp_path / "second-part.jsonl").write_text(json.dumps(record(0, images=[])))
    with pytest.raises(ConfigError, match="second-part names two of data and benchmarks"):
        evaluate.to_judge(replace(config, data=(*config.data, str(tmp_path / "second-part.jsonl"))), tmp_path)


def test_the_samples_come_back_with_their_pictures_bytes(whole, source):
    samples = Prepared(whole)
    assert len(samples) == ROWS + 9
    (source / "good.txt").write_text("".join(json.dumps(record(n)) + "\n" for n in range(ROWS + 9)))
    for sample, expected in zip(samples, load_records(source / "good.txt"), strict=True):
        assert sample == expected._replace(images=tuple(path.read_bytes() for path in expected.images))
    assert len(pickle.dumps(samples)) < 2000
    assert pickle.loads(pickle.dumps(samples))[33] == samples[33]


def test_grain_and_tensorflow_datasets_read_it_too(whole):
    samples = list(Prepared(whole))
    shards = sorted(str(path) for path in whole.glob("jsonl-first.*"))
    assert [decode(row) for row in grain.sources.ArrayRecordDataSource(shards)] == samples[:ROWS]
    read = tfds.builder_from_directory(whole).as_data_source(split="first")
    assert len(read) == ROWS
    for row, sample in zip(read, samples, strict=False):
        assert list(row["images"]) == list(sample.images)
        fields = {name: None if value is None else value.decode() for name, value in row.items() if name != "images"}
        assert fields == {name: value for name, value in sample._asdict().items() if name != "images"}
    assert "tensorflow" not in sys.modules


def test_two_runs_and_any_number_of_threads_give_the_same_files(whole, make, tmp_path):
    make(tmp_path, workers=5)
    assert contents(tmp_path) == contents(whole)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    make(tmp_path)  # done already: nothing is written
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(ValueError, match="prepared with another source_rows, limit; use another folder"):
        make(tmp_path, limit=3)


def test_a_source_that_has_changed_meanwhile_is_refused(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text(json.dumps({"request": "a"}) + "\n")

    def stop(count):
        raise Stop

    with pytest.raises(Stop):
        prepare(open_corpus("jsonl", str(source)), out, advance=stop)
    source.write_text(json.dumps({"request": "b"}) + "\n")
    with pytest.raises(ValueError, match="prepared with another source_rows"):
        prepare(open_corpus("jsonl", str(source)), out)


class Stop(Exception):
    pass


@pytest.mark.parametrize("rows", [0, 16, 40, 76])
def test_a_run_that_failed_goes_on_and_gives_the_same_files(whole, make, tmp_path, rows):
    done = 0

    def stop(count):
        nonlocal done
        done += count
        if done > rows:
            raise Stop

    with pytest.raises(Stop):
        make(tmp_path, advance=stop)
    assert not (tmp_path / "manifest.json").exists()
    kept = {name: path.stat().st_ino for name, path in {p.name: p for p in tmp_path.glob("jsonl-*-of-*[0-9]")}.items()}
    assert len(kept) == {0: 0, 16: 1, 40: 2, 76: 5}[rows]
    make(tmp_path)
    assert contents(tmp_path) == contents(whole)
    assert all((tmp_path / name).stat().st_ino == inode for name, inode in kept.items())  # whole shards are kept


KILLED = """
import os, signal, sys
from gvl_jax.data.corpora import open_corpus
from gvl_jax.data.prepared import prepare
from gvl_jax.data.tokenizer import load_tokenizer
source, model, folder = sys.argv[1:]
left = 30
def advance(count):
    global left
    left -= count
    if not left:
        assert "jax" not in sys.modules and "tensorflow" not in sys.modules
        os.kill(os.getpid(), signal.SIGKILL)
prepare(open_corpus("jsonl", source), folder, tokenizer=load_tokenizer(model), max_length=3000, shard_rows=16,
        advance=advance)
"""


def test_a_killed_run_goes_on_and_gives_the_same_files(whole, make, source, model, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, source, model, tmp_path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.glob("*.part"))
    make(tmp_path)
    assert contents(tmp_path) == contents(whole)
    (tmp_path / "unfinished").mkdir()  # as a kill leaves it that comes after the manifest
    make(tmp_path)
    assert not (tmp_path / "unfinished").exists()


def test_a_source_without_one_good_row_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"request": 7}) + "\n")
    with pytest.raises(ValueError, match="none of 1 rows is kept, the first: .*line 1: key 'request'"):
        prepare(open_corpus("jsonl", str(tmp_path / "a.jsonl")), tmp_path / "out")
    with pytest.raises(ValueError, match="no manifest.json"):
        Prepared(tmp_path / "out")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def test_verify_finds_nothing_wrong_with_a_whole_set_and_names_what_is(copy, capsys):
    assert cli.main(["verify", str(copy)]) == 0
    first, second, third = sorted(copy.glob("jsonl-first.*"))[:3]
    data = bytearray(first.read_bytes())
    data[70_000] ^= 1
    first.write_bytes(data)
    second.unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["second_part"]["request_label"]["harmful"] += 1
    manifest["rejected"]["over_long"] = 2
    (copy / "manifest.json").write_text(json.dumps(manifest))
    problems = verify(copy)
    assert [str(path) in problem for path, problem in zip((first, second), problems, strict=False)] == [True, True]
    assert "sha256" in problems[0] and "missing" in problems[1]
    assert "request_label" in problems[2] and problems[2].startswith("split second_part") and "rejected" in problems[3]
    assert len(problems) == 4
    assert cli.main(["verify", str(copy)]) == 1 and str(second) in capsys.readouterr().out
    for cut in ('{"reason', '{"row": 1}'):
        (copy / "rejected.jsonl").write_text(cut + "\n")
        assert verify(copy)[3].startswith("rejected.jsonl: cannot be read")
    (copy / "rejected.jsonl").unlink()
    assert verify(copy)[3].startswith("rejected.jsonl: cannot be read")


def test_verify_reads_every_row_and_opens_every_picture(make, tmp_path, monkeypatch):
    sound = prepared.encode
    spoiled = {
        "r5": lambda sample: b"no protobuf",
        "r7": lambda sample: sound(sample._replace(images=(b"no picture",))),
    }
    monkeypatch.setattr(prepared, "encode", lambda sample: spoiled.get(sample.id, sound)(sample))
    make(tmp_path)
    monkeypatch.undo()
    unread, unopened, counts = verify(tmp_path)[:3]
    assert "row 5: does not parse" in unread and "record 'r7': image rejected (bad_format)" in unopened
    assert counts.startswith("split first: got modality")


def test_a_stage_reads_folders_and_files_alike_and_the_first_of_all(whole, source):
    file = source / "second-part.jsonl"
    samples = load_samples([file, whole, file])
    assert len(samples) == 9 + ROWS + 9 + 9
    assert [samples[i].id for i in (8, 9, 9 + ROWS + 8, 9 + ROWS + 9)] == ["r68", "r0", "r68", "r60"]
    limited = load_samples([file, whole, file], limit=11)
    assert [sample.id for sample in limited] == [f"r{n}" for n in range(60, 69)] + ["r0", "r1"]
    with pytest.raises(IndexError):
        limited[11]


def test_a_sample_of_a_prepared_set_can_be_written_as_a_record(whole, tmp_path):
    samples = [sample for sample in Prepared(whole) if sample.images][:9]
    lines = [json.dumps(to_record(sample, tmp_path)) + "\n" for sample in samples]
    (tmp_path / "hard.jsonl").write_text("".join(lines))
    for again, sample in zip(load_records(tmp_path / "hard.jsonl"), samples, strict=True):
        assert again._replace(images=tuple(path.read_bytes() for path in again.images)) == sample
    assert (
        sorted(path.suffix for path in (tmp_path / "images").iterdir()) == [".jpg"] * 2 + [".png"] * 3 + [".webp"] * 2
    )


def test_overlap_reads_a_prepared_set_and_what_it_leaves_is_a_file(whole, tmp_path, capsys):
    (tmp_path / "bench.jsonl").write_text(json.dumps({"request": "request 1"}) + "\n")
    args = [str(whole), "--against", str(tmp_path / "bench.jsonl")]
    assert overlap.main([*args, "--remove", str(tmp_path / "clean.jsonl")]) == 0
    assert f"1 of {ROWS + 9} training records" in capsys.readouterr().out
    left = [sample for sample in Prepared(whole) if sample.id != "r1"]
    for sample, expected in zip(load_records(tmp_path / "clean.jsonl"), left, strict=True):
        assert sample._replace(images=tuple(path.read_bytes() for path in sample.images)) == expected


def test_an_empty_response_is_none_for_the_modality_as_it_is_for_the_prompt():
    found = [prepared.modality(Sample("a", "", said, (b"x",))) for said in (None, "", "Yes")]
    assert found == ["image", "image", "text_image"]


@pytest.mark.parametrize("weights", [(), (1, 3)])
def test_a_resumed_run_reads_on_in_the_same_order(whole, weights):
    samples = load_samples([whole, whole])
    mixture = list(zip(samples.parts, weights, strict=False))
    read = partial(steps, samples, lambda sample: sample.id, per_step=16, epochs=1, seed=1, mixture=mixture)
    order = list(read())
    assert len(order) == 9 and sum(map(len, order)) == 2 * (ROWS + 9)
    assert all(list(read(start=start)) == order[start:] for start in range(1, 9))
    halves = zip(read(share=(0, 2)), read(share=(1, 2)), strict=True)
    assert [[one for pair in zip(*both, strict=True) for one in pair] for both in halves] == order


def test_a_mixture_draws_each_part_by_its_weight_and_all_of_it():
    large, small = [f"a{n}" for n in range(300)], [f"b{n}" for n in range(50)]
    read = steps([*large, *small], str, per_step=10, epochs=4, seed=0, mixture=[(large, 1), (small, 3)])
    drawn = [one for step in read for one in step]
    of_small = [one for one in drawn if one in small]
    assert (len(drawn), len(of_small)) == (4 * 350, 3 * 350)
    rounds = [of_small[i : i + 50] for i in range(0, 1050, 50)]
    assert all(sorted(one) == sorted(small) for one in rounds) and len(set(map(tuple, rounds))) == 21
    assert set(drawn) == {*large, *small}


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, 2.0, 3.0)])
def test_weights_must_fit_the_paths(weights):
    with pytest.raises(ValueError, match="train_weights is .* expected a number above 0 for each of the 2 of train"):
        Sft(train=("a", "b"), train_weights=weights)


def test_memory_stays_flat_over_an_epoch(tmp_path):
    """200 pictures of 48 KB: neither writing nor reading holds more than the few that are under way."""
    (tmp_path / "img").mkdir()
    for number in range(200):
        (tmp_path / f"img/{number}.png").write_bytes(picture(number, side=128))
    rows = [{"request": "", "images": [f"img/{number}.png"]} for number in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = open_corpus("jsonl", str(tmp_path / "a.jsonl"))
    size = sum(path.stat().st_size for path in (tmp_path / "img").iterdir())
    prepare(corpus, tmp_path / "warm", limit=2)  # what libraries keep for good is not counted
    tracemalloc.start()
    prepare(corpus, tmp_path / "out", workers=2)
    assert tracemalloc.get_traced_memory()[1] < size / 4
    seen = 0
    for step in steps(Prepared(tmp_path / "out"), lambda sample: sample, per_step=4, epochs=2, seed=0, workers=2):
        seen += len(step)
        if seen == 100:
            tracemalloc.reset_peak()
    assert (seen, tracemalloc.get_traced_memory()[1] < size / 4) == (400, True)
    tracemalloc.stop()


def test_the_commands_print_counts_and_draw_plots(source, model, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["prepare", str(source), str(out), "--tokenizer", str(model), "--max-length", "3000", "--limit", "20"]
    assert cli.main([*args, "--dry-run"]) == 0
    assert "first: 20 rows" in capsys.readouterr().out and not out.exists()
    assert cli.main(args) == 0
    rejected = {"bad_reasoning": 1, "broken_image": 1, "contradiction": 1, "missing_image": 1}
    assert f"{out}: 25 rows kept; rejected: {rejected}" in capsys.readouterr().out
    assert cli.main(["stats", str(out), "--tokenizer", str(model), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert numbers["all"]["samples"] == 25 and numbers["all"]["steps"]["mean"] == 2
    assert numbers["image"]["picture_tokens"]["mean"] == 4 and numbers["text"]["pictures"]["sum"] == 0
    assert Image.open(out / "stats.png").size == (1200, 700)
    with pytest.raises(ValueError, match="expected both or none"):
        cli.main(args[:5])
