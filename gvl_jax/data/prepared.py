"""Prepared data sets: checked samples with their pictures' original bytes, in ArrayRecord shards.

    manifest.json       counts, source, licence, the sha256 of every shard; written last, so it marks a whole set
    rejected.jsonl      every row that was left out, with the reason
    NAME-SPLIT.array_record-00000-of-00012, features.json, dataset_info.json      what tensorflow_datasets reads

Shard k of a split holds what is kept of rows k * shard_rows and on, so it depends on those rows alone: a killed run
goes on with the first shard that is not whole, and gives the same bytes.
"""

import bisect
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gvl_jax.data.corpora import Corpus, read_picture
from gvl_jax.data.images import ImageRejected, open_image
from gvl_jax.data.records import BadRecord, load_records, replace_bytes
from gvl_jax.data.tokenizer import Tokenizer
from gvl_jax.guard.prompt import answer_text, build_example, build_prompt
from gvl_jax.guard.verdict import parse
from gvl_jax.types import Sample

SHARD_ROWS = 1024  # rows of the source; about 100 MB with pictures
FORMAT = 1  # of the folder; another one is refused

A = TypeVar("A")
B = TypeVar("B")


class Rejected(NamedTuple):
    """A row that is left out. reason: bad_record, no_verdict, bad_reasoning, contradiction, missing_image,
    broken_image, over_long or duplicate_id."""

    row: int  # of its split, from 0
    id: str | None
    reason: str
    detail: str


class Kept(NamedTuple):
    """A row as it is stored, and what is counted of it."""

    record: bytes
    modality: str
    request_label: str | None
    response_label: str | None


# ------------------------------------------------------------------------------------------------ one row


def encode(sample: Sample) -> bytes:
    """A sample whose pictures are bytes, as a tf.train.Example: the same bytes at every call."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2  # slow to import: not where JSONL is read

    values = {name: [value.encode()] for name, value in sample._asdict().items() if isinstance(value, str)}
    features = {
        name: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=value))
        for name, value in (values | {"images": list(sample.images)}).items()
    }
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def decode(record: bytes) -> Sample:
    """`encode`'s inverse. Also for records that grain's ArrayRecordDataSource reads."""
    from tensorflow_datasets.proto import tf_example_pb2

    features = tf_example_pb2.Example.FromString(record).features.feature
    values = {name: list(feature.bytes_list.value) for name, feature in features.items()}
    images = tuple(values.pop("images", ()))
    return Sample(images=images, **{name: value[0].decode() for name, value in values.items()})  # type: ignore[arg-type]


def modality(sample: Sample) -> str:
    """text, image (pictures alone) or text_image."""
    if not sample.images:
        return "text"
    return "text_image" if sample.request or sample.response else "image"


def text_tokens(sample: Sample, tokenizer: Tokenizer) -> int:
    """Tokens of prompt and answer with one for each picture: what is left when all pictures shrink."""
    grids = np.array([[1, 2, 2]] * len(sample.images), np.int32).reshape(-1, 3)
    if sample.request_label is None:
        return len(build_prompt(sample, grids, tokenizer)[0])
    answer = answer_text(sample.reasoning, sample.request_label, sample.response_label)
    return len(build_example(sample, grids, tokenizer, answer)[0])


def check(
    row: tuple[int, Sample | BadRecord | Rejected], tokenizer: Tokenizer | None = None, max_length: int | None = None
) -> Kept | Rejected:
    """A row with its pictures read and opened, or why it is left out."""
    number, sample = row
    if isinstance(sample, Rejected):
        return sample
    if isinstance(sample, BadRecord):
        return Rejected(number, sample.id, sample.code, sample.reason)
    try:
        if sample.request_label is not None:
            said = parse(answer_text(sample.reasoning, sample.request_label, sample.response_label))
            if "reasoning_conflict" in said.warnings:
                labels = f"request {sample.request_label}, response {sample.response_label}"
                return Rejected(number, sample.id, "contradiction", f"the reasoning concludes otherwise than {labels}")
        if tokenizer and max_length and (tokens := text_tokens(sample, tokenizer)) > max_length:
            return Rejected(number, sample.id, "over_long", f"{tokens} tokens of text, at most {max_length} fit")
    except ValueError as error:
        return Rejected(number, sample.id, "bad_reasoning", str(error))
    try:
        pictures = tuple(read_picture(image) if isinstance(image, Path) else image for image in sample.images)
        for picture in pictures:
            open_image(picture)
    except ImageRejected as error:
        reason = "missing_image" if error.reason == "missing" else "broken_image"
        return Rejected(number, sample.id, reason, str(error))
    record = encode(sample._replace(images=pictures))
    return Kept(record, modality(sample), sample.request_label, sample.response_label)


def in_order(function: Callable[[A], B], items: Iterable[A], workers: int | None = None) -> Iterator[B]:
    """`function` of each item, in order, computed in threads a few items ahead. Decoders and tokenizers of pictures
    and text leave the interpreter's lock, so threads suffice, and a kill leaves no process behind."""
    count = workers or min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        ahead: deque = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


# ------------------------------------------------------------------------------------------------ writing


def survey(corpus: Corpus, limit: int | None = None) -> dict[str, dict[str, Any]]:
    """Rows of each split, `limit` at most, and the sha256 of what they say, so that a source that changes while a data
    set is half written is noticed."""
    found = {}
    for split, rows in corpus.splits.items():
        count, said = 0, hashlib.sha256()
        for row in itertools.islice(rows(), limit):
            count += 1
            said.update(repr(row).encode())
        found[split] = {"rows": count, "sha256": said.hexdigest()}
    return found


def prepare(
    corpus: Corpus, folder: str | Path, *, tokenizer: Tokenizer | None = None, settings: dict[str, Any] | None = None,
    max_length: int | None = None, limit: int | None = None, workers: int | None = None, shard_rows: int = SHARD_ROWS,
    surveyed: dict[str, dict[str, Any]] | None = None, advance: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:  # fmt: skip
    """Check every row of a corpus and write a prepared data set. → its manifest.

    tokenizer, max_length: rows whose text alone is longer are rejected. limit: first rows of each split. settings: what
    else decides the result (the tokenizer's name), for the manifest. surveyed: what `survey` found, if it is known.
    advance: called with a number of rows done.

    A folder that holds the whole set is left as it is. Raises ValueError for one that was begun with other settings,
    and if no row is kept.
    """
    folder = Path(folder)
    unfinished = folder / "unfinished"
    surveyed = surveyed or survey(corpus, limit)
    decided = {
        "format": FORMAT, "name": corpus.name, **corpus.origin, "source_rows": surveyed, **(settings or {}),
        "max_length": max_length, "limit": limit, "shard_rows": shard_rows,
    }  # fmt: skip
    for file in (folder / "manifest.json", unfinished / "settings.json"):
        if file.is_file() and (before := json.loads(file.read_bytes()).get("settings")) != decided:
            changed = [key for key in decided if not isinstance(before, dict) or before.get(key) != decided[key]]
            raise ValueError(
                f"{folder} holds a data set prepared with another {', '.join(changed)}; use another folder"
            )
    if (folder / "manifest.json").is_file():
        shutil.rmtree(unfinished, ignore_errors=True)  # of a kill between the manifest and its removal
        return read_manifest(folder)
    unfinished.mkdir(parents=True, exist_ok=True)
    _write_json(unfinished / "settings.json", {"settings": decided})

    judge = partial(check, tokenizer=tokenizer, max_length=max_length)
    seen: set[str] = set()
    shards: dict[str, list[dict[str, Any]]] = {}
    for split, rows in corpus.splits.items():
        left, total = _marked(itertools.islice(rows(), limit), seen), -(-surveyed[split]["rows"] // shard_rows)
        shards[split] = []
        for number in range(total):
            name = f"{corpus.name}-{split}.array_record-{number:05d}-of-{total:05d}"
            part, done = list(itertools.islice(left, shard_rows)), unfinished / f"{name}.json"
            if not done.is_file():
                _write_json(done, _write_shard(folder / name, in_order(judge, part, workers), advance))
            else:
                advance(len(part))
            shards[split].append(json.loads(done.read_bytes()))
    return _finish(folder, decided, shards)


def _marked(rows: Iterable[Sample | BadRecord], seen: set[str]) -> Iterator[tuple[int, Sample | BadRecord | Rejected]]:
    """Rows with their number; a sample whose id has been seen is rejected."""
    for number, row in enumerate(rows):
        if isinstance(row, Sample) and row.id in seen:
            yield number, Rejected(number, row.id, "duplicate_id", "an earlier row has this id, expected it once")
            continue
        if isinstance(row, Sample):
            seen.add(row.id)
        yield number, row


def _write_shard(path: Path, rows: Iterable[Kept | Rejected], advance: Callable[[int], object]) -> dict[str, Any]:
    """A shard, whole, and what the manifest needs of it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    counts: Counter[tuple] = Counter()
    rejected, size = [], 0
    part = path.with_name(path.name + ".part")
    writer = ArrayRecordWriter(str(part), "group_size:1")  # rows are read one by one, in any order
    for row in rows:
        if isinstance(row, Kept):
            writer.write(row.record)
            size += len(row.record)
            counts[row[1:]] += 1
        else:
            rejected.append(row._asdict())
        advance(1)
    writer.close()
    part.replace(path)
    return {
        "file": path.name, "rows": counts.total(), "bytes": size, "sha256": _sha256(path),
        "counts": [[*key, number] for key, number in sorted(counts.items(), key=str)], "rejected": rejected,
    }  # fmt: skip


def _finish(folder: Path, settings: dict[str, Any], shards: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """rejected.jsonl, the files of tensorflow_datasets, and the manifest."""
    rejected = [{"split": split} | row for split, of in shards.items() for shard in of for row in shard["rejected"]]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
    replace_bytes(folder / "rejected.jsonl", lines.encode())
    splits = {split: _summary(of) for split, of in shards.items()}
    if not any(split["rows"] for split in splits.values()):
        first = rejected[0]["detail"] if rejected else "the source is empty"
        raise ValueError(f"{folder}: none of {len(rejected)} rows is kept, the first: {first}")
    manifest = {
        "settings": settings,
        "rows": sum(split["rows"] for split in splits.values()),
        "rejected": dict(sorted(Counter(row["reason"] for row in rejected).items())),
        "splits": splits,
    }
    for cut in folder.glob("*.part"):  # by a kill
        cut.unlink()
    _write_tfds(folder, manifest)
    _write_json(folder / "manifest.json", manifest)
    shutil.rmtree(folder / "unfinished")
    return manifest


def _summary(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """A split as the manifest shows it."""
    return {
        "rows": sum(shard["rows"] for shard in shards),
        "rejected": sum(len(shard["rejected"]) for shard in shards),
        **_counts(count for shard in shards for count in shard["counts"]),
        "shards": [{key: shard[key] for key in ("file", "rows", "bytes", "sha256")} for shard in shards],
    }


def _counts(rows: Iterable[Sequence[Any]]) -> dict[str, dict[str, int]]:
    """Rows of each modality and label, from (modality, request label, response label, number of rows)."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in Kept._fields[1:]}
    for *values, number in rows:
        for column, value in zip(counts.values(), values, strict=True):
            column[str(value)] += number
    return {name: dict(sorted(column.items())) for name, column in counts.items()}


def _write_tfds(folder: Path, manifest: dict[str, Any]) -> None:
    """features.json and dataset_info.json: pictures are bytes there, too, for whoever reads to decode as they like."""
    import tensorflow_datasets as tfds

    text, maybe = tfds.features.Text(), tfds.features.Text(optional=True)
    forms = {"id": text, "request": text, "images": tfds.features.Sequence(text)}
    features = tfds.features.FeaturesDict({name: forms.get(name, maybe) for name in Sample._fields})
    settings, template = (
        manifest["settings"],
        tfds.core.ShardedFileTemplate(data_dir=folder, filetype_suffix="array_record"),
    )
    infos = [
        tfds.core.SplitInfo(
            name=name, shard_lengths=[shard["rows"] for shard in split["shards"]],
            num_bytes=sum(shard["bytes"] for shard in split["shards"]),
            filename_template=template.replace(dataset_name=settings["name"], split=name),
        )
        for name, split in manifest["splits"].items()
        if split["shards"]
    ]  # fmt: skip
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, check_data=False, license=settings["licence"],
        description=f"Samples of {settings['source']}, prepared by gvl_jax; see manifest.json.",
    )  # fmt: skip


def _write_json(path: Path, content: Any) -> None:
    replace_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ reading


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Raises ValueError for a folder that holds no whole data set of this format."""
    file = Path(folder) / "manifest.json"
    if not file.is_file():
        raise ValueError(
            f"{folder}: has no manifest.json, expected a prepared data set; finish it with gvl data prepare"
        )
    manifest = json.loads(file.read_bytes())
    if (found := manifest.get("settings", {}).get("format")) != FORMAT:
        raise ValueError(f"{file}: got format {found}, expected {FORMAT}; prepare the data set again")
    return manifest


class Prepared(Sequence[Sample]):
    """The samples of a prepared data set, all splits one after the other, read one by one. Pictures are bytes.

    Can be read from several threads; pickles small, without what it has open.
    """

    def __init__(self, folder: str | Path):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        shards = [shard for split in read_manifest(folder)["splits"].values() for shard in split["shards"]]
        # With its rows in the name a file is not opened until it is read.
        self.records = ArrayRecordDataSource(
            [f"{Path(folder) / s['file']}[0:{s['rows']}]" for s in shards if s["rows"]]
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"got sample {index}, expected 0 to {len(self) - 1}")
        return decode(self.records[index])


class Samples(Sequence[Sample]):
    """Data sets one after the other, as one; `limit`: the first samples only."""

    def __init__(self, parts: Sequence[Sequence[Sample]], limit: int | None = None):
        self.parts = parts
        ends = list(itertools.accumulate(map(len, parts)))
        self.ends = [end if limit is None else min(end, limit) for end in ends]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"got sample {index}, expected 0 to {len(self) - 1}")
        part = bisect.bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


def load_samples(paths: Iterable[str | Path], limit: int | None = None) -> Samples:
    """What a stage reads: prepared data sets (folders; samples are read when asked for) and JSONL files (in memory).

    Raises what `Prepared` and `load_records` raise.
    """
    return Samples([Prepared(path) if Path(path).is_dir() else load_records(path) for path in paths], limit)


def verify(
    folder: str | Path, workers: int | None = None, advance: Callable[[int], object] = lambda count: None
) -> list[str]:
    """What is wrong with a prepared data set: hashes, counts, rows that do not parse, pictures that do not open."""
    folder = Path(folder)
    manifest, problems = read_manifest(folder), []
    for name, split in manifest["splits"].items():
        seen: Counter[tuple] = Counter()
        whole = True
        for shard in split["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or _sha256(path) != shard["sha256"]:
                problems.append(f"{path}: {'its sha256 is not the manifest' if path.is_file() else 'is missing'}")
                whole = False
                continue
            for problem, sample in in_order(_inspect, _records(path), workers):
                advance(1)
                problems += [f"{path}, {problem}"] if problem else []
                if sample is not None:
                    seen[sample] += 1
        for key, found in _counts((*values, number) for values, number in seen.items()).items():
            if whole and found != split[key]:
                problems.append(f"split {name}: got {key} {found}, the manifest says {split[key]}")
    try:
        lines = (folder / "rejected.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        rejected = dict(Counter(json.loads(line)["reason"] for line in lines))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [*problems, f"rejected.jsonl: cannot be read: {error}"]
    if rejected != manifest["rejected"]:
        problems.append(f"rejected.jsonl: got {rejected}, the manifest says {manifest['rejected']}")
    return problems


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return enumerate(ArrayRecordDataSource(str(path)))


def _inspect(row: tuple[int, bytes]) -> tuple[str, tuple[Any, ...] | None]:
    number, record = row
    try:
        sample = decode(record)
    except Exception as error:  # protobuf's own, missing and unknown fields, bytes that are no text
        return f"row {number}: does not parse: {type(error).__name__}: {error}", None
    try:
        for image in sample.images:
            open_image(image)
    except ImageRejected as error:
        return f"row {number}, record {sample.id!r}: {error}", None
    return "", (modality(sample), sample.request_label, sample.response_label)
