"""`gvl data overlap`: which training records repeat rows of the benchmarks; a report, and a copy without them."""

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gvl_jax.data.benchmarks import fetch, read, select
from gvl_jax.data.contamination import Index, Report, Settings
from gvl_jax.data.prepared import Prepared
from gvl_jax.data.records import BadRecord, load_records, read_records, to_record
from gvl_jax.metrics import progress
from gvl_jax.run_folder import replace_text
from gvl_jax.types import Sample


def main(args: list[str]) -> int:
    """Print how many rows of each benchmark are touched. A bad record stops it before anything is written."""
    usual = Settings()
    parser = argparse.ArgumentParser("gvl data overlap", description="training records that repeat benchmark rows")
    parser.add_argument("train", nargs="+", type=Path, help="JSONL files and prepared data sets of training records")
    parser.add_argument("--against", nargs="+", required=True, help="names of benchmarks, or JSONL files of records")
    parser.add_argument(
        "--benchmark-files", type=Path, help="folder of local copies of benchmarks; others come from the hub"
    )
    parser.add_argument("--similarity", type=float, default=usual.similarity,
                        help="share of n-grams from which texts are near (default: %(default)s)")  # fmt: skip
    parser.add_argument("--ngram", type=int, default=usual.ngram, help="words (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=usual.bits,
                        help="of 256 in which near pictures may differ (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="write the report as JSON, with examples")
    parser.add_argument("--remove", type=Path, help="write the records that touch nothing to this JSONL file")
    options = parser.parse_args(args)
    settings = Settings(options.similarity, options.ngram, options.bits)
    if options.remove and options.remove.resolve() in [path.resolve() for path in options.train]:
        parser.error(f"--remove {options.remove} is training data; give another name")
    if not (0 < settings.similarity <= 0.99 and settings.ngram >= 1 and settings.bits >= 0):
        parser.error("expected --similarity above 0 and at most 0.99, --ngram from 1, --bits from 0")
    index = Index(_benchmarks(options.against, options.benchmark_files), settings)
    report, part = Report(index), Path(f"{options.remove}.part")
    total = sum(len(Prepared(path)) if path.is_dir() else _lines(path) for path in options.train)
    with (
        progress(total, "overlap") as advance,
        part.open("w", encoding="utf-8") if options.remove else nullcontext() as clean,
    ):
        for sample in _records(options.train):
            found = index.matches(sample)
            report.add(sample, found)
            if clean and not found:
                clean.write(json.dumps(to_record(sample, options.remove.parent), ensure_ascii=False) + "\n")
            advance()
    if options.output:
        replace_text(options.output, json.dumps(report.as_dict(), indent=1, ensure_ascii=False))
    print(_table(report.as_dict()))
    if options.remove:
        part.replace(options.remove)
        print(f"{options.remove}: {report.records - report.touched} records are left")
    return 0


def _benchmarks(names: list[str], folder: Path | None) -> Iterator[tuple[str, Iterator[Sample]]]:
    for name in names:
        if name.endswith(".jsonl"):
            yield Path(name).stem, _shown(Path(name).stem, load_records(name))
            continue
        for benchmark in select([name]):
            yield benchmark.name, _shown(benchmark.name, read(benchmark, fetch(benchmark, folder)))


def _shown(name: str, samples: list[Sample]) -> Iterator[Sample]:
    with progress(len(samples), f"index {name}") as advance:
        for sample in samples:
            yield sample
            advance()


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def _records(paths: list[Path]) -> Iterator[Sample]:
    """Raises ValueError for a bad record, and for an id that comes twice: one file with both could not be read."""
    seen = set()
    for path in paths:
        for record in Prepared(path) if path.is_dir() else read_records(path):
            if isinstance(record, BadRecord):
                raise ValueError(record.reason)
            if record.id in seen:
                raise ValueError(f"{path}: key 'id': got {record.id!r} twice, expected each id once in all files")
            seen.add(record.id)
            yield record


def _table(report: dict[str, Any]) -> str:
    kinds = ("any", "exact text", "near text", "exact picture", "near picture")
    lines = [
        f"{'rows of the benchmark':>24}{'size':>8}" + "".join(f"{kind:>15}" for kind in kinds) + f"{'records':>10}"
    ]
    for name, found in report["benchmarks"].items():
        cells = "".join(f"{found['rows'][kind]:>15}" for kind in kinds)
        lines.append(f"{name:>24}{found['size']:>8}{cells}{found['records']:>10}")
    lines.append(f"{report['touched']} of {report['records']} training records repeat a row")
    if report["unreadable_pictures"]:
        lines.append(f"{report['unreadable_pictures']} pictures could not be read, and were not compared")
    return "\n".join(lines)
