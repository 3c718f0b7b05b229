"""Upstream corpora → Samples, from the hub at a pinned revision or from local files of the same layout.

    guardreasoner-vl   GuardReasoner-VLTrain: columns messages, images; the pictures in zips of a second repository
    guardreasoner      GuardReasonerTrain: columns instruction, input, output; its three tasks become our two
    jsonl              records as `records.py` reads them
    llamafactory       LLaMA-Factory and ShareGPT files: `messages` or `conversations`, and `images`

A corpus whose columns are not these any more is an error that names the column; a row that is wrong is a BadRecord.
"""

import json
import re
import reprlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from gvl_jax.data.images import LIMITS, ImageRejected
from gvl_jax.data.records import BadRecord, RecordRejected, read_records, read_row, to_sample
from gvl_jax.types import Label, Sample

Kind = Literal["guardreasoner-vl", "guardreasoner", "jsonl", "llamafactory"]
Rows = Callable[[], Iterator[Sample | BadRecord]]  # reads from the start at each call, one row at a time

VL_PICTURES = "yueliu1999/GuardReasoner-VLTrain-Image"
VL_SPLITS = ("text", "image", "text_image")
TEXT_SPLITS = ("WildGuardTrainR", "AegisTrainR", "BeaverTailsTrainR", "ToxicChatTrainR")
# What the first row of a split must hold, in the words of `describe`.
VL_COLUMNS = {"messages": ("a list of {content, role}",), "images": ("a list of text", "an empty list")}
TEXT_COLUMNS = {"instruction": ("text",), "input": ("text",), "output": ("text",)}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names

# GuardReasoner's answers, after the reasoning.
_THREE_ANSWERS = re.compile(
    r"(.*)Answers:\s*Request:\s*(harmful|unharmful)\s+Completion:\s*\w+\s+Response:\s*(harmful|unharmful|none)\s*",
    re.IGNORECASE | re.DOTALL,
)
_LABELS: dict[str, Label | None] = {"harmful": "harmful", "unharmful": "unharmful", "none": None}
_TASK = re.compile(r"(?m)^(?=# Task \d)")


class Corpus(NamedTuple):
    """What can be prepared. Reading a split raises ValueError if its columns are not those expected."""

    name: str  # of the data set, as tensorflow_datasets allows: letters, digits, underscores
    origin: dict[str, Any]  # source, revision, licence, pictures: for the manifest
    splits: dict[str, Rows]


def open_corpus(
    kind: Kind, source: str, *, revision: str | None = None, images: str | None = None,
    images_revision: str | None = None, splits: tuple[str, ...] = (), licence: str | None = None,
) -> Corpus:  # fmt: skip
    """A corpus by its kind. `source` and `images`: a hub id, or local files. `splits`: those wanted; none: all.

    images: where pictures are looked for; a folder or a zip. Unset: beside the records; for GuardReasoner-VLTrain from
    the hub, its picture repository. licence: unset: what the card says.

    Raises ValueError for a split that is not there, an argument that this kind does not read and what the hub does not
    give, FileNotFoundError.
    """
    unread = {
        "guardreasoner-vl": {},
        "guardreasoner": {"images": images, "images_revision": images_revision},
    }.get(kind, {"revision": revision, "images_revision": images_revision})  # the others are local files
    if given := [f"{name} {value!r}" for name, value in unread.items() if value is not None]:
        raise ValueError(f"{given[0]}: a corpus of the kind {kind} has no use for it; leave it out")
    if kind in ("guardreasoner-vl", "guardreasoner"):
        read, known = (_read_vl, VL_SPLITS) if kind == "guardreasoner-vl" else (_read_text, TEXT_SPLITS)
        wanted = _chosen(splits, known, source)
        folder, commit = fetch(source, revision, ("README.md", "*.parquet", "*.json", "*.jsonl"))
        origin = {"source": source, "revision": commit, "licence": licence or _card_licence(folder)}
        pictures: dict[str, Path] = {}
        if kind == "guardreasoner-vl":
            pictures, of_pictures = _vl_pictures(source, folder, images, images_revision, wanted)
            origin |= of_pictures
        tables = _tables(folder)
        if missing := [split for split in wanted if split not in tables]:
            raise ValueError(f"{source}: got the splits {', '.join(tables)}, expected also {', '.join(missing)}")
        return Corpus(
            kind.replace("-", "_"), origin, {one: partial(read, tables[one], one, pictures.get(one)) for one in wanted}
        )
    path = Path(source)
    endings = (".jsonl",) if kind == "jsonl" else (".json", ".jsonl")
    files: dict[str, Path] = {}
    for file in _files(path, endings):
        if (other := files.setdefault(re.sub(r"\W", "_", file.stem), file)) != file:
            raise ValueError(f"{file} and {other} make a split of one name; rename one of them")
    wanted = _chosen(splits, tuple(files), source)
    where = None if images is None else Path(images)
    origin = {"source": source, "revision": None, "licence": licence}
    reader = read_records if kind == "jsonl" else _read_conversations
    return Corpus(kind, origin, {split: partial(reader, files[split], where) for split in wanted})


def fetch(source: str, revision: str | None, patterns: tuple[str, ...]) -> tuple[Path, str | None]:
    """A local folder as it is; else a data set of the hub: its cached files that match, and the commit they are of."""
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r}: belongs to a hub id; {source} is a local folder")
        return Path(source), None
    from huggingface_hub import snapshot_download  # slow to import, rarely needed

    try:
        folder = snapshot_download(source, repo_type="dataset", revision=revision, allow_patterns=list(patterns))
    except Exception as error:  # the client raises OSError, ValueError, httpx errors and its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{source} is not a local folder and could not be fetched from the hub ({reason}). Check the name, the "
            "revision, the network and your access token, or download it elsewhere and pass its folder"
        ) from error
    return Path(folder), Path(folder).name


def describe(value: Any) -> str:
    """The form of a value of a row: text, a list of text, {content, role}, ..."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return f"a list of {describe(value[0])}" if value else "an empty list"
    return "{" + ", ".join(sorted(map(str, value))) + "}" if isinstance(value, dict) else type(value).__name__


def check_columns(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]], where: str) -> None:
    """Raises ValueError if a row lacks one of the columns, or holds something else in it."""
    for column, forms in columns.items():
        found = describe(row[column]) if column in row else f"no such column, only {', '.join(row)}"
        if found not in forms:
            raise ValueError(
                f"{where}: column {column!r}: got {found}, expected {forms[0]}; "
                "upstream has changed its schema: give the --revision that this version was written for"
            )


def read_picture(path: Path, limit: int = LIMITS.max_bytes) -> bytes:
    """The bytes of a picture: of a file, or of a member where a folder of the path is a zip. Raises ImageRejected."""
    try:
        packed = next((parent for parent in path.parents if parent.suffix == ".zip" and parent.is_file()), None)
        if packed is None:
            with path.open("rb") as file:
                data = file.read(min(path.stat().st_size, limit) + 1)  # room for what is there, not for the limit
        else:
            with _zip(packed).open(path.relative_to(packed).as_posix()) as member:
                data = member.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError, KeyError) as error:
        raise ImageRejected("missing", f"no such file: {path}") from error
    except (OSError, EOFError, zipfile.BadZipFile, RuntimeError, ValueError, zlib.error) as error:
        raise ImageRejected("undecodable", f"{path}: {type(error).__name__}: {error}") from error
    if len(data) > limit:
        raise ImageRejected("too_many_bytes", f"{path}: got more than {limit} bytes")
    return data


@cache
def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)  # members can be read from several threads at once
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: {error}; fetch it again") from error


@cache
def _members(path: Path) -> frozenset[str]:
    return frozenset(_zip(path).namelist())


def _chosen(splits: tuple[str, ...], known: tuple[str, ...], source: str) -> tuple[str, ...]:
    if unknown := [split for split in splits if split not in known]:
        raise ValueError(f"{source}: got split {unknown[0]!r}, expected one of {', '.join(known)}")
    return splits or known


def _files(path: Path, endings: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(file for file in path.glob("*") if file.suffix in endings and file.name != "dataset_info.json")
    if not files:
        raise FileNotFoundError(f"{path}: got no {' or '.join(endings)} file, expected one or a folder of them")
    return files


def _tables(folder: Path) -> dict[str, Any]:
    """The splits of a copy of a hub repository, row by row: parquet or JSON files, named by its card or by habit."""
    from datasets import load_dataset  # slow to import, rarely needed

    return dict(load_dataset(str(folder.absolute()), streaming=True))


def _card_licence(folder: Path) -> str | None:
    from huggingface_hub import DatasetCard

    card = folder / "README.md"
    return DatasetCard.load(card).data.license if card.is_file() else None


def _vl_pictures(
    source: str, folder: Path, images: str | None, revision: str | None, splits: tuple[str, ...]
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Where the pictures of each split are (its zip, or an unzipped folder), and what the manifest says of them."""
    zips = tuple(f"{split}.zip" for split in splits if split != "text")
    if images is None:
        images = source if Path(source).is_dir() else VL_PICTURES
    if not zips:
        return {}, {}
    origin: dict[str, Any] = {"images": images}
    if Path(images).is_file():
        pictures = dict.fromkeys(splits, Path(images))
    else:
        root, commit = fetch(images, revision, zips)
        if commit and (gone := [name for name in zips if not (root / name).is_file()]):
            raise ValueError(f"{images}: got no {', '.join(gone)}; give the --images-revision that has them")
        found = {split: root / f"{split}.zip" for split in splits}
        pictures = {split: path if path.is_file() else root for split, path in found.items()}
        origin["images_revision"] = commit
    for path in pictures.values():
        if path.is_file():
            _members(path)  # a broken one stops here, not as a rejected row each
    return pictures, origin


def locate(root: Path, name: str) -> Path:
    """A picture by the path that a row of GuardReasoner-VLTrain gives, in a zip or a folder.

    The paths start at LLaMA-Factory's folder or at its data folder, where the authors unzip: `./data/image/1.png` is
    `image/1.png`. Raises ValueError for a path that leads elsewhere.
    """
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts:
        raise ValueError(f"key 'images': got {name!r}, expected a path inside {root}")
    packed = root.is_file()
    for path in (plain, PurePosixPath(*plain.parts[1:]) if plain.parts[:1] == ("data",) else plain):
        if path.as_posix() in _members(root) if packed else (root / path).is_file():
            return root / path
    return root / plain


def _read_vl(table: Any, split: str, pictures: Path | None) -> Iterator[Sample | BadRecord]:
    columns = {name: forms for name, forms in VL_COLUMNS.items() if name != "images" or split != "text"}

    def convert(row: dict[str, Any], default_id: str) -> Sample:
        names = row.get("images")
        if isinstance(names, list) and pictures is not None:
            names = [str(locate(pictures, name)) if isinstance(name, str) else name for name in names]
        sample = to_sample({"messages": row["messages"], "images": names}, default_id, Path())
        if sample.request_label is None:
            raise RecordRejected("no_verdict", "key 'messages': got no assistant turn, expected one with the answer")
        return sample

    for number, row in enumerate(table, start=1):
        if number == 1:
            check_columns(row, columns, f"split {split}")
        yield read_row(row, number, f"split {split}, row {number}", partial(convert, default_id=f"{split}:{number}"))


def _read_text(table: Any, split: str, pictures: Path | None) -> Iterator[Sample | BadRecord]:
    for number, row in enumerate(table, start=1):
        if number == 1:
            check_columns(row, TEXT_COLUMNS, f"split {split}")
        convert = partial(_of_three_tasks, default_id=f"{split}:{number}")
        yield read_row(row, number, f"split {split}, row {number}", convert)


def _of_three_tasks(row: dict[str, Any], default_id: str) -> Sample:
    """GuardReasoner also judges whether the answer is a refusal, as task 2: that part goes, task 3 becomes task 2."""
    sample = to_sample({"messages": [{"role": "user", "content": row["input"]}]}, default_id, Path())
    output = row["output"] or ""
    if (answers := _THREE_ANSWERS.fullmatch(output)) is None:
        raise RecordRejected(
            "no_verdict",
            f"column 'output': got {output[-80:]!r} at its end, expected Answers: Request, Completion, Response",
        )
    parts = [part.strip(" -\n") for part in _TASK.split(answers[1]) if part.strip(" -\n")]
    if {part[:8] for part in parts} != {"# Task 1", "# Task 2", "# Task 3"}:
        raise RecordRejected(
            "bad_reasoning", f"column 'output': got {answers[1][:80]!r}, expected parts # Task 1, # Task 2 and # Task 3"
        )
    kept = [part.replace("# Task 3", "# Task 2", 1) for part in parts if not part.startswith("# Task 2")]
    request, response = (_LABELS[answers[i].lower()] for i in (2, 3))
    return sample._replace(request_label=request, response_label=response, reasoning="\n\n".join(kept))


def _read_conversations(path: Path, images: Path | None = None) -> Iterator[Sample | BadRecord]:
    """Rows of a LLaMA-Factory or ShareGPT file; picture paths are relative to `images`, or else to the file."""
    folder = path.parent if images is None else images
    for number, row in enumerate(_json_rows(path), start=1):
        convert = partial(_of_conversation, default_id=f"{path.stem}:{number}", folder=folder)
        yield read_row(row, number, f"{path}, row {number}", convert)


def _of_conversation(row: Any, default_id: str, folder: Path) -> Sample:
    if not isinstance(row, dict) or not {"messages", "conversations"} & set(row):
        raise ValueError(f"got {reprlib.repr(row)}, expected an object with 'messages' or 'conversations'")
    turns = row.get("messages", row.get("conversations"))
    if isinstance(turns, list):
        turns = [
            {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
            if isinstance(turn, dict) and isinstance(turn.get("from"), str)
            else turn
            for turn in turns
        ]
        if isinstance(row.get("system"), str) and row["system"]:
            turns = [{"role": "system", "content": row["system"]}, *turns]
    images = [row["images"]] if isinstance(row.get("images"), str) else row.get("images")
    identity = {"id": row["id"]} if isinstance(row.get("id"), str) else {}
    return to_sample({"messages": turns, "images": images} | identity, default_id, folder)


def _json_rows(path: Path, chunk: int = 1 << 16) -> Iterator[Any]:
    """The rows of a JSON array, one in memory at a time, or the lines of a JSONL file (as bytes)."""
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if not start.startswith(b"["):
            yield from (line for line in file if line.strip())
            return
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(chunk).lstrip()[1:]
        while not (text := text.lstrip(", \r\n\t")).startswith("]"):
            try:
                row, end = decode(text)
            except json.JSONDecodeError as error:
                if not (added := file.read(chunk)):
                    raise ValueError(f"{path}: not a JSON array: {error.msg}, before {text[:80]!r}") from error
                text += added
                continue
            text = text[end:]
            yield row
