"""The house rules that a machine can hold: who may import whom, sizes, live settings, documents that tell the truth."""

import ast
import io
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from gvl_jax.cli import main
from gvl_jax.config import Eval, Mine, Moderate, Rl, Serve, Sft, Synthesize
from gvl_jax.settings import keys_of, load

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gvl_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


# Who may import whom. A part is a file or a folder of gvl_jax; each may import itself and what stands here.
STAGES = {"sft", "mine", "rl", "evaluate", "moderate"}
TOOLS = {
    "types", "config", "guard", "data", "models", "losses", "optim", "decoding", "slots", "sampler", "checkpoint",
    "metrics", "run_folder", "settings", "sharding", "groups", "cost",
}  # fmt: skip
MAY_IMPORT = {
    "types": set(),
    "config": {"types"},
    "settings": {"config"},
    "sharding": {"types", "config"},
    "guard": {"types"},
    "data": {"types", "config", "guard"},
    "models": {"types", "sharding"},
    "losses": set(),
    "optim": {"config", "sharding"},
    "decoding": {"types", "guard", "models", "sharding"},
    "slots": {"types", "config", "guard", "data", "models", "decoding"},
    "sampler": {"types", "config", "guard", "data", "models", "losses", "decoding", "slots", "metrics", "sharding"},
    "groups": {"types", "config", "guard", "data", "losses", "sampler", "sharding"},
    "checkpoint": {"sharding"},
    "metrics": {"run_folder"},
    "run_folder": {"types", "config", "settings", "guard", "sharding"},
    "markup": {"data"},
    "eval_report": {"types", "guard", "markup"},
    "report": {"markup", "eval_report"},
    "cost": {"models"},
    "hlo": set(),
    "machine": {"sharding"},
    "doctor": {"machine", "data", "models"},
    **{stage: TOOLS for stage in STAGES},
    "compare": TOOLS,
    "calibrate": TOOLS,
    "card": {"data", "guard", "eval_report"},
    "demo": TOOLS | STAGES | {"report"},
    "bench": TOOLS | {"sft", "rl", "cost"},
    "buckets": TOOLS | {"sft"},
    "export": TOOLS,
    "verify": TOOLS,
    "programs": TOOLS | {"sft", "rl", "cost"},
    "plan": TOOLS | {"programs", "hlo", "bench"},
    "overlap": {"types", "data", "metrics", "run_folder"},
    "serve": TOOLS | {"moderate"},
    "synthesize": TOOLS,
    "prepare": TOOLS,
    "cli": {part(path) for path in FILES},
    "__init__": TOOLS | STAGES,  # the public names: gvl_jax.Guard
}
DATA = sorted({path.stem for path in FILES if part(path) == "data"} - {"__init__", "loader"})  # grain imports jax
STAGE_OF_FILE = {"sft": Sft, "mine": Mine, "rl": Rl, "eval": Eval, "synthesize": Synthesize}


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node):
    """Dotted names that the code under `node` imports: gvl_jax.data.images.to_patches, numpy, ..."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import; write gvl_jax.{child.module}"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_dependencies_point_one_way(path):
    allowed = MAY_IMPORT[part(path)] | {part(path)}  # a KeyError: a new part, which needs its line in MAY_IMPORT
    wanted = {name.split(".")[1] for name in imports(tree(path)) if name.startswith("gvl_jax.")}
    assert wanted <= allowed


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_heavy_libraries_stay_in_their_parts(path):
    libraries = {name.split(".")[0] for name in imports(tree(path))}
    assert "torch" not in libraries or path.relative_to(PACKAGE).as_posix() == "bench/theirs.py"
    if part(path) in ("guard", "data", "types", "config"):
        assert not libraries & {"jax", "flax", "optax", "orbax"}


@pytest.mark.parametrize(
    "module, absent",
    [
        *((f"gvl_jax.data.{name}", ("jax", "torch", "transformers")) for name in DATA),
        ("gvl_jax.data.loader", ("torch", "transformers")),
        ("gvl_jax.guard.scores", ("jax", "torch", "transformers")),
        ("gvl_jax.cli", ("torch", "transformers")),
        ("gvl_jax.serve.decoder", ("jax", "torch", "transformers", "yaml")),
    ],
)
def test_importing_a_module_leaves_the_heavy_libraries_out(module, absent):
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_the_loader_starts_no_device():
    code = "import gvl_jax.data.loader; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f.name for f in functions if f.name != "run" and f.end_lineno - f.lineno + 1 > 80]
    assert not long


def test_nothing_is_left_for_later():
    unfinished = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b|NotImplemented" "Error")
    sources = [*FILES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("scripts/*.py")]
    assert not [path for path in sources if unfinished.search(path.read_text(encoding="utf-8"))]
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "common")]


def test_every_setting_is_read():
    read = {
        node.attr
        for path in FILES
        if part(path) != "config"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    settings = {key.split(".")[-1] for stage in (*STAGE_OF_FILE.values(), Moderate, Serve) for key in keys_of(stage)}
    assert settings <= read


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_loads_and_names_its_inputs_and_output(path):
    config = load(STAGE_OF_FILE[path.stem.split("_")[0]], str(path), [])
    if path.parent.name == "demo":  # `gvl demo` names those
        return
    assert config.model and config.output
    assert any(getattr(config, name, None) for name in ("train", "data", "benchmarks"))


def commands():
    """The `gvl` and `make` commands in the README's code blocks."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("gvl ", "make "))]


@cache
def help_page(*verbs):
    page = io.StringIO()
    with redirect_stdout(page), pytest.raises(SystemExit, match="^0$"):
        main([*verbs, "--help"])
    return page.getvalue()


def test_every_command_of_the_readme_exists():
    assert commands()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for program, *words in commands():
        if program == "make":
            assert {word for word in words if "=" not in word} <= set(targets), words
            continue
        verbs = [words[0], *(word for word in words[1:2] if re.fullmatch("[a-z][a-z-]+", word))]  # data prepare
        page = help_page(*verbs)
        missing = [word for word in words if word.startswith("--") and word.split("=")[0] not in page]
        assert not missing, (words, missing)
        assert all((ROOT / word).is_file() for word in words if word.startswith("configs/")), words


def test_every_module_has_its_place_in_the_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [name for path, name in zip(FILES, NAMES, strict=True) if path.stem != "__init__" and name not in page]


PAGES = [path for pages in ("*.md", "docs/**/*.md", "tpu/*.md") for path in sorted(ROOT.glob(pages))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_the_functions_they_name_are_there(page):
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:|mailto:", target):
            continue
        file = page.parent / target
        assert file.exists(), (label, target)
        if file.suffix == ".py" and re.fullmatch(r"`\w+`", label):
            defined = {node.name for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            assert label.strip("`") in defined, (label, target)
