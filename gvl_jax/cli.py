"""The `gvl` command: a verb, a config file, flags. No logic: each verb calls the function that does it.

Exit codes: 0 done · 1 failed · 2 wrong usage · 3 something was flagged under `moderate --exit-code` · 75 stopped by
SIGTERM, after saving: start it again · 76 another process of the run has gone: start it again, a few times · 130
interrupted
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gvl_jax.config import ConfigError, Dtype, Eval, Mine, Moderate, Rl, Serve, Sft
from gvl_jax.settings import dump, load

USAGE = """\
gvl VERB …

  demo [--seeds N] [--json FILE]     train a tiny guard by every stage of the method, and judge with it
  sft CFG        mine CFG            fine-tune on reasoning; find the items that the model gets wrong
  rl CFG         eval CFG            reinforce; score labelled records
  eval compare RUN_A RUN_B           do two evals of the same records differ by more than chance?
  calibrate RUN                      make scores probabilities, by an eval run with --scores fast
  moderate MODEL [--input FILE]      judge requests, responses and pictures
  serve MODEL [--port P]             the same over HTTP, for gateways and OpenAI clients; a page at /
  convert from-hf|to-hf|verify …     checkpoints between layouts, losslessly; from-run: a run's as a model
  data embedded DIR                  write the small corpus made for the demo
  data prepare SOURCE DIR            check a corpus and write it as a prepared data set, which stages read too
  data stats|verify DIR              what is in a data set; whether a prepared one is whole
  data buckets CFG                   propose buckets.patches for the data of `gvl sft CFG`
  data benchmarks [--check DIR]      the benchmarks that `eval` knows; what the copies in DIR hold
  data overlap FILE --against NAME   training records that repeat rows of benchmarks, and a copy without them
  data synthesize CFG                let a teacher that is told the labels write the reasoning
  report RUN                         report.html of a run folder
  card RUN …                         model card and data card from run folders
  plan CFG --topology v5p:4x4x4      does a config of sft or rl fit on a TPU slice? no TPU is needed
  bench [--size S] [--only CASES]    speed and memory against transformers, and against the plain way
  doctor [--model M] [--data FILE]   what stands in the way on this machine, and the command that removes it

CFG is a YAML file of configs/; any of its fields is a flag: --optim.peak-lr 2e-5. `gvl VERB --help` lists them.
A stage that was stopped goes on when the same command is given again; with --dry-run it shows what it would do, with
--json it prints its result for machines."""


AGAIN = 75  # saved: launchers start the command again
LOST = 76  # another process has gone, maybe for a reason that comes again: launchers start again, and count


def main(argv: list[str] | None = None) -> int:
    """Run one command. → the exit code."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if args else 2
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(VERBS)}"
        print(f"gvl: unknown verb {verb!r}; {hint}", file=sys.stderr)
        return 2
    try:
        return VERBS[verb](rest)
    except ConfigError as error:
        print(f"gvl {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ngvl {verb}: interrupted; what is done is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        code, why = _again(error)
        if code:
            print(f"gvl {verb}: {why}; the same command goes on from there", file=sys.stderr, flush=True)
            if code == LOST:
                os._exit(code)  # at a common exit JAX would wait for the other one, and abort in the end
            return code
        if os.environ.get("GVL_TRACEBACK"):
            raise
        message = str(error) or type(error).__name__
        print(f"gvl {verb}: {message}", file=sys.stderr)
        return 1


def _again(error: Exception) -> tuple[int, str]:
    """The exit code by which the same command should be given again, and why; 0 for an error of its own."""
    if "gvl_jax.run_folder" not in sys.modules:  # no stage ran; JAX may be what is broken
        return 0, ""
    import jax

    from gvl_jax.run_folder import Stopped

    if isinstance(error, Stopped):
        return AGAIN, str(error)
    own = any(status in str(error) for status in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED"))
    if isinstance(error, jax.errors.JaxRuntimeError) and not own and jax.process_count() > 1:
        return LOST, f"another process has gone ({str(error).splitlines()[0]})"
    return 0, ""


def _stage(kind: Any, module: str) -> Callable[[list[str]], int]:
    def call(args: list[str]) -> int:
        dry, as_json = "--dry-run" in args, "--json" in args
        args = [arg for arg in args if arg not in ("--dry-run", "--json")]
        path = args.pop(0) if args and not args[0].startswith("-") else None
        config = load(kind, path, args)
        if dry:
            print(dump(config), end="")
            print(f"# would run {module} and write {config.output or 'nothing: output is not set'}")
            return 0
        _compile_cache()
        _start()
        result = _entry(module)(config)
        if as_json:
            print(json.dumps({"result": result if kind is Eval else str(result)}))
        else:
            print(_scores(result) if kind is Eval else f"{module}: {result}")
        return 0

    return call


def _entry(module: str) -> Callable[..., Any]:
    """`run` of a stage: imported on use, since it starts JAX."""
    import importlib

    return importlib.import_module(f"gvl_jax.{module}").run


def _start() -> None:
    """Join the other processes of the run."""
    from gvl_jax.sharding import start

    start()


def _compile_cache() -> None:
    """Keep compiled programs between processes, unless JAX_COMPILATION_CACHE_DIR says where (or, empty, not to)."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", _cache_folder())


def _cache_folder() -> str:
    return os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "gvl_jax" / "xla"))


def _scores(table: list[dict]) -> str:
    """The model's lines of `evaluate` for people."""
    columns = ("rule", "task", "modality", "benchmark", "n", "f1", "f1_low", "f1_high", "precision", "recall", "fpr",
               "balanced_accuracy", "auroc", "parse_failures", "mean_tokens")  # fmt: skip
    return _table([row for row in table if row["predictor"] == "model" and row["category"] is None], columns)


def _table(rows: list[dict], columns: tuple[str, ...]) -> str:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return "<0.001" if 0 < value < 0.0005 else f"{value:.3f}"
        return "—" if value is None else str(value)

    cells = [columns, *(tuple(cell(row[name]) for name in columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _eval(args: list[str]) -> int:
    if args[:1] != ["compare"]:
        return _stage(Eval, "evaluate")(args)
    parser = argparse.ArgumentParser("gvl eval compare", description="paired bootstrap of F1, and McNemar's test")
    parser.add_argument("a", type=Path, help="the run folder of an eval")
    parser.add_argument("b", type=Path, help="another, over the same records")
    parser.add_argument("--json", action="store_true", help="print the table for machines")
    options = parser.parse_args(args[1:])

    table = _entry("compare")(options.a, options.b)
    print(json.dumps({"result": table}) if options.json else _table(table, tuple(table[0])) if table else "no labels")
    return 0


def _calibrate(args: list[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # it needs no accelerator, and must not hold one
    parser = argparse.ArgumentParser(
        "gvl calibrate", description="fit on held-out records that were judged with scores"
    )
    parser.add_argument("run", type=Path, help="the run folder of an eval with scores: fast")
    parser.add_argument("--method", choices=("temperature", "platt"), default="temperature")
    parser.add_argument("--model", type=Path, help="the checkpoint directory to write to (default: that of the run)")
    parser.add_argument("--json", action="store_true", help="print what is stored for machines")
    options = parser.parse_args(args)

    path = _entry("calibrate")(options.run, options.method, options.model)
    stored = json.loads(path.read_text(encoding="utf-8"))
    if options.json:
        print(json.dumps(stored))
        return 0
    print(path)
    for task, line in stored["tasks"].items():
        change = ", ".join(f"{name} {line['before'][name]:.4f} → {line['after'][name]:.4f}" for name in line["before"])
        print(f"{task}: temperature {line['temperature']:.3f}, bias {line['bias']:.3f}, {line['n']} records: {change}")
    for task, reason in stored["left_out"].items():
        print(f"{task}: left out: {reason}")
    return 0


def _card(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "gvl card", description="README.md for the model and DATA_CARD.md, from run folders"
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of sft, rl, eval, and of prepared data")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder to write to (default: this one)")
    parser.add_argument("--license", default="unknown", help="of the weights, a name that the hub knows")
    options = parser.parse_args(args)

    from gvl_jax.card import write_cards

    for path in write_cards(options.runs, options.output, options.license):
        print(path)
    return 0


def _moderate(args: list[str]) -> int:
    if args and not args[0].startswith("-"):
        args = ["--model", *args]
    dry, args = "--dry-run" in args, [arg for arg in args if arg not in ("--dry-run", "--json")]
    config = load(Moderate, None, args)
    if dry:
        print(dump(config), end="")
        return 0
    _compile_cache()
    flagged = _entry("moderate")(config)
    return 3 if flagged and config.exit_code else 0


def _serve(args: list[str]) -> int:
    if args and not args[0].startswith("-"):
        args = ["--model", *args]
    dry, args = "--dry-run" in args, [arg for arg in args if arg != "--dry-run"]
    config = load(Serve, None, args)
    if dry:
        print(dump(config), end="")
        return 0
    _compile_cache()
    try:
        run = _entry("serve.run")
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing; pip install 'gvl_jax[serve]'") from None
    run(config)
    return 0


def _demo(args: list[str]) -> int:
    parser = argparse.ArgumentParser("gvl demo", description="every stage of the method on a small made-up corpus")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="how many times, with seeds 0, 1, … (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the table for machines to this file")
    options = parser.parse_args(args)
    _compile_cache()
    _entry("demo")(options.output, options.seeds, options.json)
    return 0


def _convert(args: list[str]) -> int:
    parser = argparse.ArgumentParser("gvl convert")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, text in (("from-hf", "any layout → the hub's"), ("to-hf", "any layout → --layout")):
        one = verbs.add_parser(name, help=text)
        one.add_argument("source")
        one.add_argument("target", type=Path)
        one.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: as stored (float16 as float32)")
        if name == "to-hf":
            one.add_argument("--layout", choices=("hub", "transformers5"), default="hub")
    run = verbs.add_parser("from-run", help="a checkpoint of a run of sft or rl → a model directory")
    run.add_argument("source", type=Path, help="the run folder")
    run.add_argument("target", type=Path)
    run.add_argument("--step", type=int, help="default: the newest")
    verify = verbs.add_parser("verify", help="are two checkpoints one model? tensors, files, logits of a fixture")
    verify.add_argument("first")
    verify.add_argument("second")
    verify.add_argument("--hashes", type=Path, metavar="FILE", help="write key → sha256 of FIRST's tensors as JSON")
    verify.add_argument("--no-logits", action="store_true", help="spare the memory of one model")
    options = parser.parse_args(args)

    from gvl_jax.models.qwen_vl import hub

    if options.verb == "verify":
        return _verify(hub.resolve(options.first), hub.resolve(options.second), options.hashes, not options.no_logits)
    if options.verb == "from-run":
        from gvl_jax.export import export

        print(f"{options.target}: the model after step {export(options.source, options.target, options.step)}")
        return 0
    source = hub.resolve(options.source)
    config = hub.load_config(source)
    layout: hub.Layout = getattr(options, "layout", "hub")
    params = hub.load_params(source, config, dtype=options.dtype)
    stored = {leaf.dtype.name for leaf in hub.flatten(params).values()}
    dtype: Dtype = "bfloat16" if stored == {"bfloat16"} else "float32"
    hub.save_params(options.target, params, config, layout=layout, dtype=dtype, source=source)
    print(f"{options.target}: {layout} layout, {dtype}")
    return 0


def _verify(first: Path, second: Path, hashes: Path | None, logits: bool) -> int:
    from gvl_jax.run_folder import replace_text
    from gvl_jax.verify import compare

    found = compare(first, second, logits)
    if hashes:
        replace_text(hashes, json.dumps(found.tensors, indent=1) + "\n")
    if found.differences:
        print("\n".join(found.differences))
        return 1
    print(f"{first} and {second} hold the same {len(found.tensors)} tensors and {found.files} companion files")
    print(f"largest difference of the logits: {'not compared' if found.logits is None else found.logits}")
    return 0


# Verbs of `gvl data` that are the `main` of a module.
DATA_MODULES = {
    "prepare": ("prepare", "check a corpus and write it as a prepared data set"),
    "stats": ("prepare", "what is in a data set"),
    "verify": ("prepare", "is a prepared data set whole?"),
    "buckets": ("buckets", "propose buckets.patches for the data of a config file of SFT"),
    "overlap": ("overlap", "training records that repeat rows of benchmarks"),
    "synthesize": ("synthesize", "let a teacher that is told the labels write the reasoning"),
}


def _data(args: list[str]) -> int:
    if args and args[0] in DATA_MODULES:
        import importlib

        os.environ["JAX_PLATFORMS"] = "cpu"  # no accelerator is needed, and this one may be at work
        module, _ = DATA_MODULES[args[0]]
        return importlib.import_module(f"gvl_jax.{module}").main(args if module == "prepare" else args[1:])
    parser = argparse.ArgumentParser("gvl data")
    verbs = parser.add_subparsers(dest="verb", required=True)
    embedded = verbs.add_parser("embedded", help="write the small corpus made for the demo")
    embedded.add_argument("directory", type=Path)
    embedded.add_argument("--seed", type=int, default=0)
    benchmarks = verbs.add_parser("benchmarks", help="list the benchmarks that eval knows")
    benchmarks.add_argument("--check", type=Path, metavar="FOLDER", help="load the local copies in this folder")
    for name, (_, text) in DATA_MODULES.items():
        verbs.add_parser(name, help=text)
    options = parser.parse_args(args)
    if options.verb == "benchmarks":
        return _benchmarks(options.check)

    from gvl_jax.data.embedded import write

    write(options.directory, options.seed)
    print(f"{options.directory}: train.jsonl, heldout.jsonl, images/")
    return 0


def _benchmarks(folder: Path | None) -> int:
    from gvl_jax.data.benchmarks import BENCHMARKS, counts, local_copy, read

    failed = False
    for one in BENCHMARKS:
        published = ", ".join(
            f"{n} {task}s" for task, n in (("request", one.requests), ("response", one.responses)) if n
        )
        access = "gated" if one.gated else "open"
        print(f"{one.name:>22}  {published:<29}  {one.licence:<13}  {access:<5}  {one.repo}@{one.revision}")
        if folder is None or not (copy := local_copy(one, folder)).is_dir():
            continue
        try:
            samples = read(one, copy)
        except (ValueError, OSError) as error:
            failed = True
            print(f"{'':>22}  {error}")
            continue
        found = "; ".join(f"{task}: {counts(samples, task)}" for task in ("request", "response"))
        print(f"{'':>22}  {len(samples)} rows; {found}")
    return 1 if failed else 0


def _report(args: list[str]) -> int:
    parser = argparse.ArgumentParser("gvl report")
    parser.add_argument("run", type=Path, help="a run folder, or a folder of run folders")
    parser.add_argument("--json", action="store_true", help="print the path as JSON")
    options = parser.parse_args(args)

    from gvl_jax.report import write_report

    path = write_report(options.run)
    print(json.dumps({"report": str(path)}) if options.json else path)
    return 0


def _bench(args: list[str]) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two libraries share one accelerator
    from gvl_jax.bench.run import main

    _compile_cache()
    return main(args)


def _plan(args: list[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the slice that is planned for is not this machine
    from gvl_jax.plan import main

    return main(args)


def _doctor(args: list[str]) -> int:
    parser = argparse.ArgumentParser("gvl doctor", description="versions, devices, memory, disks, hub, data, model")
    parser.add_argument("--model", help="a checkpoint directory or hub id to look into")
    parser.add_argument("--data", type=Path, help="records to load: a JSONL file or a prepared folder")
    parser.add_argument("--output", default="runs", help="where runs will be written (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the checks for machines")
    options = parser.parse_args(args)

    from gvl_jax.doctor import run

    return run(options.model, options.data, options.output, _cache_folder(), options.json)


VERBS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "sft": _stage(Sft, "sft"),
    "mine": _stage(Mine, "mine"),
    "rl": _stage(Rl, "rl"),
    "eval": _eval,
    "calibrate": _calibrate,
    "card": _card,
    "moderate": _moderate,
    "serve": _serve,
    "convert": _convert,
    "data": _data,
    "report": _report,
    "plan": _plan,
    "bench": _bench,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
