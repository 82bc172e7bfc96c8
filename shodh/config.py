"""The one config loader: frozen keyword-only dataclasses <- YAML <- ``key.subkey=value``.

Imports neither torch nor deepspeed, so that ``--help`` and config errors are instant.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


class ConfigError(ValueError):
    """Input by a user that cannot be used; its message is the one line the user sees."""


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read ``path`` as ``cls``, then apply ``key.subkey=value`` overrides (values are YAML).

    Raises ConfigError for a missing file, broken YAML, an unknown key (the nearest key is named) or a wrong type.
    """
    return parse_config(cls, read_plain(path, overrides), source=str(path))


def read_plain(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What ``path`` and overrides say, whoever is to read it; ConfigError for a missing file or broken YAML."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"config={path}: is a folder. Give a YAML file in it.")
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(
            f"config={path}: no such file. " + (f"There are: {', '.join(near)}." if near else "Check it.")
        )
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={path}: not valid YAML: {_one_line(error)}. Mend the file.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"config={path}: holds a {type(raw).__name__}. Write `key: value` lines.")
    for override in overrides:
        _apply_override(raw, override)
    return raw


def parse_config(cls: type[T], raw: dict[str, Any], *, source: str) -> T:
    """Turn a nested mapping into ``cls``; ``source`` names where it came from in error messages."""
    _check_keys(cls, raw, prefix="", source=source)
    try:
        return TypeAdapter(cls).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "config"
        if first["type"] in ("missing", "missing_keyword_only_argument"):
            raise ConfigError(f"{key}: missing in {source}. Add it, or pass {key}=value.") from None
        message = first["msg"].removeprefix("Value error, ")
        if key == "config":
            raise ConfigError(f"{message} (in {source})") from None
        shown = key if isinstance(first["input"], dict) else f"{key}={first['input']!r}"
        raise ConfigError(f"{shown}: {message} (in {source}).") from None


def dump_config(config: Any) -> str:
    """The resolved config as YAML; ``load_config`` of it gives the same config back."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as the dicts, lists and strings that YAML and JSON hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"argument={override!r}: not key=value. Write for example training.num_steps=100.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML: {_one_line(error)}. Quote it.") from None
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key}={text}: {parent} is a value, not a section. Set {parent} itself.")
    node[last] = _merge(node.get(last), value)


def _merge(old: Any, new: Any) -> Any:
    """``new`` over ``old``: sections are merged key by key, everything else is replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _merge(old.get(key), value) for key, value in new.items()}
    return new


def _check_keys(annotation: Any, raw: Any, *, prefix: str, source: str) -> None:
    """Refuse keys that no dataclass has, at every depth (also inside tuples, dicts and optionals)."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for option in args:
            _check_keys(option, raw, prefix=prefix, source=source)
    elif origin in (tuple, list) and isinstance(raw, list):
        for i, item in enumerate(raw):
            _check_keys(args[0], item, prefix=f"{prefix}{i}.", source=source)
    elif origin is dict and isinstance(raw, dict):
        for key, item in raw.items():
            _check_keys(args[1], item, prefix=f"{prefix}{key}.", source=source)
    elif dataclasses.is_dataclass(annotation) and isinstance(raw, dict):
        hints = typing.get_type_hints(annotation)
        known = [f.name for f in dataclasses.fields(annotation)]
        for key, item in raw.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"Did you mean {prefix}{near[0]}?" if near else f"Known keys: {', '.join(known)}."
                raise ConfigError(f"{prefix}{key}={item!r}: no such key in {source}. {hint}")
            _check_keys(hints[key], item, prefix=f"{prefix}{key}.", source=source)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
