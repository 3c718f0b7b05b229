"""Configs from YAML files and flags, and back. An unknown key is an error that names the nearest one."""

import difflib
import types
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from gvl_jax.config import ConfigError

Config = TypeVar("Config")


class _EachKeyOnce(yaml.SafeLoader):
    """Of two equal keys PyYAML takes the last; YAML forbids them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"got the key {key.value} twice", key.start_mark)
        return super().construct_mapping(node, deep)


def load(cls: type[Config], path: str | None, args: list[str], verb: str = "") -> Config:
    """The defaults of `cls`, then the YAML file at `path`, then flags such as `--optim.peak-lr 2e-5`.

    `verb`: the command's name on the help page, if it is not the class's. Relative paths in the file stay as they are:
    they count from the working directory.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds an unknown key or a value of a wrong type.
        SystemExit: 2 for a wrong flag, 0 for --help; the message is printed.
    """
    config = cls()
    if path is not None:
        try:
            tree = yaml.load(Path(path).read_text(encoding="utf-8"), _EachKeyOnce)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        try:
            config = _fill(config, {} if tree is None else tree, "", keys_of(cls))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
    return tyro.cli(cls, default=config, args=args, prog=f"gvl {verb or cls.__name__.lower()}")


def dump(config: Any) -> str:
    """YAML of every setting; `load` of it gives an equal config."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def keys_of(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings: model, optim.peak_lr, ..."""
    keys = []
    for name, kind in get_type_hints(cls).items():
        keys += keys_of(kind, f"{prefix}{name}.") if is_dataclass(kind) else [prefix + name]
    return keys


def _fill(config: Any, tree: object, prefix: str, keys: list[str]) -> Any:
    """`config` with the values of `tree` in place of its own; what the tree does not name stays."""
    if not isinstance(tree, dict):
        where = prefix.rstrip(".") or "the file"
        raise ConfigError(
            f"{where}: got {_show(tree)}, expected a section with the keys {', '.join(f.name for f in fields(config))}"
        )
    kinds = get_type_hints(type(config))
    values = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            leaves = [k for k in keys if k.split(".")[-1] == str(name)]
            nearest = (leaves + difflib.get_close_matches(key, keys, n=1))[:1]
            hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(keys)}"
            raise ConfigError(f"unknown key {key}; {hint}")
        if is_dataclass(kinds[name]):
            values[name] = _fill(getattr(config, name), value, f"{key}.", keys)
        else:
            values[name] = _convert(value, kinds[name], key)
    return replace(config, **values)


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value`, as YAML read it, as the field's type. Strict, but for 2e-5, which YAML 1.1 reads as text."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _convert(value, options[0], key)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, options[0], f"{key}[{i}]") for i, item in enumerate(value))
    if origin is Literal and isinstance(value, str) and value in options:
        return value
    if kind is float and type(value) in (int, float, str):
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is kind:
        return value
    raise ConfigError(f"{key}: got {_show(value)}, expected {_name(kind)}")


def _show(value: object) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def _name(kind: Any) -> str:
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(options)
    if origin is tuple:
        return f"a list of {_name(options[0])}"
    return kind.__name__
