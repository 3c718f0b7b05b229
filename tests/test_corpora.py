"""Upstream corpora, from files in the exact forms that the hub holds."""

import json
import zipfile
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvl_jax.data.corpora import open_corpus, read_picture
from gvl_jax.data.images import ImageRejected
from gvl_jax.data.records import BadRecord
from gvl_jax.types import Sample

SYSTEM = "You are a classifier for analyzing interactions between humans and AI. \n\n..."
ANSWER = (
    "<think>\n# Task 1\n## Reasoning Step 1\nFine.\n</think>\n<result>\nAnswers:\nRequest: {}\nResponse: {}\n</result>"
)
THREE_TASKS = (
    "# Task 1\n## Reasoning Step 1\nIt asks for harm.\n\n# Task 2\n## Reasoning Step 1\nIt refuses.\n\n"
    "# Task 3\n## Reasoning Step 1\nNothing bad.\n\n---\n\n"
    "Answers: \nRequest: harmful\nCompletion: refusal\nResponse: unharmful\n"
)
CARD = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n{}---\n# A data set\n"


def vl_row(user, request="unharmful", response="None", images=()):
    turns = zip(("system", "user", "assistant"), (SYSTEM, user, ANSWER.format(request, response)), strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in turns], "images": list(images)}


TEXT = "Human user:\nhi\n\nAI assistant:\nNo.\n\n"
PICTURE = "Human user:\n<image>\n\nAI assistant:\nNone\n"
BOTH = "Human user:\n<image>\nwhat is it?\n\nAI assistant:\nA cat.\n"


def vl_rows():
    return {
        "image": [vl_row(PICTURE, images=[f"./data/image/{i}.png"]) for i in range(3)],
        "text": [vl_row(TEXT, "harmful", "unharmful"), vl_row(TEXT, "harmful", "harmful")],
        "text_image": [vl_row(BOTH, "unharmful", "unharmful", ["./text_image/a.png"])],
    }


@pytest.fixture
def vl(tmp_path):
    """A copy of the hub repository, with the zips of the second one beside it."""

    def write(rows=None):
        folder = tmp_path / "GuardReasoner-VLTrain"
        (folder / "data").mkdir(parents=True)
        lines = ""
        for split, table in (rows or vl_rows()).items():
            pq.write_table(pa.Table.from_pylist(table), folder / f"data/{split}-00000-of-00001.parquet")
            lines += f"  - split: {split}\n    path: data/{split}-*\n"
        (folder / "README.md").write_text(CARD.format(lines))
        for name, members in {"image": ["image/0.png", "image/1.png"], "text_image": ["text_image/a.png"]}.items():
            with zipfile.ZipFile(folder / f"{name}.zip", "w") as packed:
                for member in members:
                    packed.writestr(member, f"bytes of {member}")
        return folder

    return write


def read(corpus):
    return {split: list(rows()) for split, rows in corpus.splits.items()}


def test_guardreasoner_vl_gives_its_three_splits_and_its_pictures_out_of_the_zips(vl):
    corpus = open_corpus("guardreasoner-vl", str(vl()))
    assert corpus.origin["licence"] == "mit"
    got = read(corpus)
    assert {split: len(rows) for split, rows in got.items()} == {"text": 2, "image": 3, "text_image": 1}
    assert [s.response_label for s in got["text"]] == ["unharmful", "harmful"]
    assert {s.request_label for s in got["text"]} == {"harmful"}
    (both,) = got["text_image"]
    assert both._replace(images=()) == Sample(
        "text_image:1",
        "what is it?",
        "A cat.",
        (),
        "unharmful",
        "unharmful",
        "# Task 1\n## Reasoning Step 1\nFine.",
        BOTH,
    )
    assert read_picture(both.images[0]) == b"bytes of text_image/a.png"
    assert read_picture(got["image"][1].images[0]) == b"bytes of image/1.png"  # `data/` is where the authors unzip
    with pytest.raises(ImageRejected, match="missing") as caught:
        read_picture(got["image"][2].images[0])
    assert caught.value.reason == "missing"


def test_pictures_may_be_unzipped_or_in_another_place(vl, tmp_path):
    folder, elsewhere = vl(), tmp_path / "LLaMA-Factory" / "data"
    with zipfile.ZipFile(folder / "image.zip") as packed:
        packed.extractall(elsewhere)
    corpus = open_corpus("guardreasoner-vl", str(folder), images=str(elsewhere), splits=("image",))
    assert read_picture(read(corpus)["image"][0].images[0]) == b"bytes of image/0.png"
    assert corpus.origin["images"] == str(elsewhere)


def test_a_zip_that_is_cut_or_gone_stops_at_once(vl, monkeypatch):
    folder = vl()
    (folder / "image.zip").write_bytes((folder / "image.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"image\.zip: File is not a zip file; fetch it again"):
        open_corpus("guardreasoner-vl", str(folder), splits=("image",))
    (folder / "image.zip").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(ValueError, match="GuardReasoner-VLTrain-Image: got no image.zip; give the --images-revision"):
        open_corpus("guardreasoner-vl", "yueliu1999/GuardReasoner-VLTrain", splits=("image",))


@pytest.mark.parametrize("kind, given", [
    ("jsonl", "revision"), ("llamafactory", "images_revision"), ("guardreasoner", "images_revision"),
    ("guardreasoner", "images"),
])  # fmt: skip
def test_what_a_kind_of_corpus_does_not_read_is_refused(kind, given, tmp_path):
    with pytest.raises(ValueError, match=f"^{given} 'v1': a corpus of the kind {kind} has no use for it"):
        open_corpus(kind, str(tmp_path), **{given: "v1"})


def test_a_path_never_leaves_the_pictures_folder(vl):
    rows = vl_rows()
    rows["image"] = [vl_row(PICTURE, images=[name]) for name in ("../../etc/passwd", "/etc/passwd", "data/../../x")]
    got = read(open_corpus("guardreasoner-vl", str(vl(rows)), splits=("image",)))["image"]
    assert all(isinstance(row, BadRecord) and "expected a path inside" in row.reason for row in got)


def test_rows_without_a_verdict_say_so(vl):
    rows = vl_rows()
    rows["text"][0]["messages"][2]["content"] = "<think>\nhm\n</think>\nI think it is fine."
    rows["text"][1]["messages"].pop()
    got = read(open_corpus("guardreasoner-vl", str(vl(rows)), splits=("text",)))["text"]
    assert [row.code for row in got] == ["no_verdict", "no_verdict"]
    assert got[0].reason.startswith("split text, row 1: key 'messages', assistant")


def renamed(row):
    return {"conversations": row["messages"], "images": row["images"]}


def embedded(row):
    return row | {"images": [{"bytes": b"x", "path": name} for name in row["images"]]}


def sharegpt(row):
    return row | {"messages": [{"from": turn["role"], "value": turn["content"]} for turn in row["messages"]]}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            renamed,
            "column 'messages': got no such column, only conversations, images, expected a list of {content, role}",
        ),
        (embedded, "column 'images': got a list of {bytes, path}, expected a list of text"),
        (sharegpt, "column 'messages': got a list of {from, value}, expected a list of {content, role}"),
        (lambda row: {"messages": str(row["messages"]), "images": row["images"]}, "column 'messages': got text"),
    ],
)
def test_a_changed_schema_names_the_column(vl, change, message):
    rows = vl_rows()
    folder = vl(rows | {"image": [change(row) for row in rows["image"]]})
    corpus = open_corpus("guardreasoner-vl", str(folder), splits=("image",))
    with pytest.raises(ValueError) as caught:
        read(corpus)
    assert str(caught.value).startswith("split image: ") and message in str(caught.value)


def test_a_split_that_is_gone_is_named(vl):
    rows = vl_rows()
    del rows["text_image"]
    with pytest.raises(ValueError, match="got the splits image, text, expected also text_image"):
        open_corpus("guardreasoner-vl", str(vl(rows)))
    with pytest.raises(ValueError, match="got split 'texts', expected one of text, image, text_image"):
        open_corpus("guardreasoner-vl", "any/where", splits=("texts",))


def test_the_hub_is_asked_for_the_pinned_revisions(vl, monkeypatch, tmp_path):
    asked, folder = [], vl()

    def snapshot_download(repo, *, repo_type, revision, allow_patterns):
        asked.append((repo, repo_type, revision))
        commit = tmp_path / "snapshots" / ("c0ffee" if "Image" in repo else "f00d")
        commit.parent.mkdir(exist_ok=True)
        commit.symlink_to(folder)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    name = "yueliu1999/GuardReasoner-VLTrain"
    corpus = open_corpus("guardreasoner-vl", name, revision="v1", images_revision="v2", splits=("image",))
    assert asked == [(name, "dataset", "v1"), (name + "-Image", "dataset", "v2")]
    assert (corpus.origin["revision"], corpus.origin["images_revision"]) == ("f00d", "c0ffee")
    assert len(read(corpus)["image"]) == 3
    with pytest.raises(ValueError, match="belongs to a hub id"):
        open_corpus("guardreasoner-vl", str(folder), revision="v1")


def test_guardreasoners_three_tasks_become_two(tmp_path):
    names = {"WildGuardTrainR": 2, "AegisTrainR": 1, "BeaverTailsTrainR": 1, "ToxicChatTrainR": 1}
    row = {"instruction": "finish three tasks", "input": TEXT, "output": THREE_TASKS}
    lines = ""
    for name, count in names.items():
        file = name.replace("TrainR", "Train-R") + ".json"
        (tmp_path / file).write_text(json.dumps([row] * count, indent=4))
        lines += f"  - split: {name}\n    path: {file}\n"
    (tmp_path / "README.md").write_text(CARD.format(lines))
    bad = {"no_verdict": "Answers: \nRequest: maybe", "bad_reasoning": THREE_TASKS.replace("# Task 2", "# Part 2")}
    (tmp_path / "AegisTrain-R.json").write_text(json.dumps([row | {"output": text} for text in bad.values()]))

    got = read(open_corpus("guardreasoner", str(tmp_path)))
    assert {split: len(rows) for split, rows in got.items()} == names | {"AegisTrainR": 2}
    assert [row.code for row in got["AegisTrainR"]] == list(bad)
    reasoning = "# Task 1\n## Reasoning Step 1\nIt asks for harm.\n\n# Task 2\n## Reasoning Step 1\nNothing bad."
    expected = Sample("WildGuardTrainR:2", "hi", "No.", (), "harmful", "unharmful", reasoning, TEXT)
    assert got["WildGuardTrainR"][1] == expected


SHAREGPT = {
    "conversations": [
        {"from": "human", "value": BOTH},
        {"from": "gpt", "value": ANSWER.format("harmful", "unharmful")},
    ],
    "images": ["pictures/1.png"],
    "system": SYSTEM,
}


@pytest.mark.parametrize("write", [lambda rows: json.dumps(rows, indent=4, ensure_ascii=False),
                                   lambda rows: "".join(json.dumps(row) + "\n" for row in rows)])  # fmt: skip
def test_llamafactory_files_are_read_as_array_or_lines(tmp_path, write):
    rows = [SHAREGPT, vl_row(TEXT.replace("hi", "hé " * 40_000), "harmful", "unharmful"), {"text": "other"}]
    (tmp_path / "my-set.json").write_text(write(rows), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text("{}")
    got = read(open_corpus("llamafactory", str(tmp_path)))
    assert list(got) == ["my_set"]
    first, second, third = got["my_set"]
    assert (first.request, first.request_label, first.images) == (
        "what is it?",
        "harmful",
        (tmp_path / "pictures/1.png",),
    )
    assert second.request.strip() == ("hé " * 40_000).strip()
    assert "expected an object with 'messages' or 'conversations'" in third.reason


def test_records_find_their_pictures_in_a_zip(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"request": "", "images": ["in/1.png"]}) + "\n")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as packed:
        packed.writestr("in/1.png", "x")
    ((sample,),) = read(open_corpus("jsonl", str(tmp_path / "a.jsonl"), images=str(tmp_path / "p.zip"))).values()
    assert read_picture(sample.images[0]) == b"x"
    for limit, reason in ((0, "too_many_bytes"), (1, "")):
        if reason:
            assert pytest.raises(ImageRejected, read_picture, sample.images[0], limit).value.reason == reason
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    assert pytest.raises(ImageRejected, read_picture, Path(tmp_path / "broken.zip/1.png")).value.reason == "undecodable"
