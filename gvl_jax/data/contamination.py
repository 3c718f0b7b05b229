"""Which training records repeat rows of a benchmark: the same text, nearly the same text, the same picture.

Texts are near if they share enough of their word n-grams (Jaccard similarity; candidates by MinHash and LSH, Broder
1997, then counted exactly), pictures if their 256-bit perceptual hashes differ in few bits. Not found: a benchmark's
text inside a much longer one, or drawn into a picture, or a short request beside another picture. Memory holds the
benchmarks, not the training records.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gvl_jax.data.images import ImageRejected, open_image
from gvl_jax.types import ImageSource, Sample

PERMUTATIONS = 128  # of a MinHash
RECALL = (0.1, 0.9)  # a missed pair is nine times as bad as a candidate to count: at the threshold 87 % are found
ENOUGH_WORDS = 20  # shorter responses, and requests beside a picture, are canned: equal everywhere
HASH_SIDE = 16  # bits of a picture's hash: its square
FLAT = 4.0  # standard deviation of grey levels below which a picture shows nothing to compare


Kind = Literal["exact", "near"]
Part = Literal["request", "response", "picture"]


class Settings(NamedTuple):
    similarity: float = 0.5  # of the n-grams of two texts that are near
    ngram: int = 3  # words
    bits: int = 24  # of 256 in which near pictures may differ


class Row(NamedTuple):
    """A row of a benchmark."""

    benchmark: str
    id: str


class Match(NamedTuple):
    """One training record and one row of a benchmark that repeat each other."""

    part: Part
    kind: Kind
    similarity: float  # of n-grams, or of the bits of hashes
    row: Row
    theirs: str  # the row's text, or the name of its picture
    ours: str


class Index:
    """The benchmarks, by text and by picture. `unreadable`: pictures that could not be compared."""

    def __init__(self, benchmarks: Iterable[tuple[str, Iterable[Sample]]], settings: Settings):
        from datasketch import MinHashLSH

        self.settings = settings
        self.sizes: Counter[str] = Counter()
        self.unreadable = 0
        self._texts: dict[tuple[Part, str], list[Row]] = defaultdict(list)  # (part, normalised text)
        self._near = MinHashLSH(threshold=settings.similarity, num_perm=PERMUTATIONS, weights=RECALL)
        self._pictures: dict[bytes, list[tuple[Row, str]]] = defaultdict(list)  # by the digest of the file
        hashes = []
        for name, samples in benchmarks:
            if name in self.sizes:
                raise ValueError(f"got two benchmarks of the name {name}, whose rows would be one; rename a file")
            for sample in samples:
                self.sizes[name] += 1
                row = Row(name, sample.id)
                for key in _parts(sample):
                    if key not in self._texts:
                        self._near.insert(key, self._minhash(key[1]))
                    self._texts[key].append(row)
                for label, digest, bits in self._looked_at(sample.images):
                    self._pictures[digest].append((row, label))
                    if bits is not None:
                        hashes.append((bits, row, label))
        self._hashed = [(row, label) for _, row, label in hashes]
        self._bits = np.array([bits for bits, _, _ in hashes], np.uint8).reshape(-1, HASH_SIDE**2 // 8)

    def matches(self, sample: Sample) -> list[Match]:
        """Every row that the record repeats."""
        found = []
        for part, text in _parts(sample):
            mine = grams(text, self.settings.ngram)
            for key in {(part, text), *self._near.query(self._minhash(text))} & self._texts.keys():
                if key[0] != part:
                    continue
                kind: Kind = "exact" if key[1] == text else "near"
                similarity = jaccard(mine, grams(key[1], self.settings.ngram))
                if similarity >= self.settings.similarity:
                    found += [Match(part, kind, similarity, row, key[1], text) for row in self._texts[key]]
        for name, digest, bits in self._looked_at(sample.images):
            same = self._pictures.get(digest, [])
            found += [Match("picture", "exact", 1.0, row, theirs, name) for row, theirs in same]
            if bits is None:
                continue
            apart = np.bitwise_count(self._bits ^ bits).sum(1)
            for number in np.flatnonzero(apart <= self.settings.bits):
                if self._hashed[number] not in same:
                    similarity = 1 - float(apart[number]) / HASH_SIDE**2
                    found.append(Match("picture", "near", similarity, *self._hashed[number], name))
        return found

    def _minhash(self, text: str) -> Any:
        from datasketch import MinHash

        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([gram.encode() for gram in grams(text, self.settings.ngram)])
        return sketch

    def _looked_at(self, images: tuple[ImageSource, ...]) -> Iterator[tuple[str, bytes, np.ndarray | None]]:
        """Name, digest and hash of each picture that is a file, or bytes. No hash: flat, or unreadable."""
        for image in images:
            data = image.read_bytes() if isinstance(image, Path) and image.is_file() else image
            if not isinstance(data, bytes):
                self.unreadable += 1
                continue
            try:
                bits = picture_hash(data)
            except ImageRejected:
                self.unreadable += 1
                bits = None
            yield image.name if isinstance(image, Path) else "in memory", hashlib.sha256(data).digest(), bits


class Report:
    """What was found, as it is added up. Each training record and each row counts once, whatever they share."""

    def __init__(self, index: Index, examples: int = 5):
        self.records = self.touched = 0
        self._index, self._examples = index, examples
        self._rows: dict[str, dict[str, set[str]]] = {
            name: {"any": set(), "exact text": set(), "near text": set(), "exact picture": set(), "near picture": set()}
            for name in index.sizes
        }
        self._records: Counter[str] = Counter()
        self._pairs: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def add(self, sample: Sample, found: list[Match]) -> None:
        self.records += 1
        self.touched += bool(found)
        self._records.update({match.row.benchmark for match in found})
        for match in sorted(found, key=lambda match: (-match.similarity, match.row, match.part)):
            name, rows = match.row.benchmark, self._rows[match.row.benchmark]
            what = f"{match.kind} {'picture' if match.part == 'picture' else 'text'}"
            if match.row.id not in rows["any"] and len(self._pairs[name]) < self._examples:
                pair = match._asdict() | {"row": match.row.id, "record": sample.id}
                pair |= {side: pair[side][:200] for side in ("theirs", "ours")}
                self._pairs[name].append(pair | {"similarity": round(match.similarity, 3)})
            rows["any"].add(match.row.id)
            rows[what].add(match.row.id)

    def as_dict(self) -> dict[str, Any]:
        """For JSON. `rows`: of the benchmark, by how they were found; `records`: of the training data that touch it."""
        return {
            "settings": self._index.settings._asdict(),
            "records": self.records,
            "touched": self.touched,
            "unreadable_pictures": self._index.unreadable,
            "benchmarks": {
                name: {
                    "size": self._index.sizes[name],
                    "records": self._records[name],
                    "rows": {what: len(ids) for what, ids in rows.items()},
                    "examples": self._pairs[name],
                }
                for name, rows in self._rows.items()
            },
        }


def normalise(text: str) -> str:
    """Compatible characters, case and white space made the same."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def grams(text: str, size: int) -> set[str]:
    """The word n-grams of a normalised text, without punctuation; of a shorter text, all its words as one."""
    words = re.findall(r"\w+", text)
    return {" ".join(words[start : start + size]) for start in range(max(1, len(words) - size + 1))}


def jaccard(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second)


def picture_hash(data: bytes) -> np.ndarray | None:
    """u8[32]: the picture's perceptual hash (DCT), packed. None: the picture is flat, and like every other flat one.

    Raises ImageRejected.
    """
    import imagehash

    image = open_image(data).convert("L")
    if np.asarray(image.resize((64, 64))).std() < FLAT:
        return None
    return np.packbits(imagehash.phash(image, HASH_SIDE).hash)


def _parts(sample: Sample) -> Iterator[tuple[Part, str]]:
    """The texts that are compared. Short ones beside a picture are not: "describe this" is beside many."""
    request, response = normalise(sample.request), normalise(sample.response or "")
    if re.search(r"\w", request) and (not sample.images or len(request.split()) >= ENOUGH_WORDS):
        yield "request", request
    if len(response.split()) >= ENOUGH_WORDS:
        yield "response", response
