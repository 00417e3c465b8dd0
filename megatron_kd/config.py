"""Configuration: YAML files and ``key=value`` overrides become trees of frozen dataclasses.

Every part of the program declares its settings as a frozen dataclass next to the code they configure; a verb's
configuration is a dataclass of those. :func:`load_config` reads a file, applies the overrides, checks every key and
type, and raises one :class:`~megatron_kd.errors.ConfigError` that lists every fault. A file may build on another:
``base: other.yaml`` (relative to the file) is loaded first, and the file's own keys override it.

A dataclass may define

- ``validate(self) -> Iterable[str]``, which yields one message for each fault in its values;
- ``RENAMED = {"old": "new"}``: an old key still works, with a warning that gives its new name.
"""

import dataclasses
import difflib
import logging
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_kd.errors import ConfigError

logger = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT")
MAX_BASE_DEPTH = 8


class _Loader(yaml.SafeLoader):
    """Loads YAML without its date type: ``name: 2026-11-21`` is a string."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load_config(schema: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a configuration of type ``schema``.

    Args:
        schema: a dataclass type; its nested dataclasses correspond to nested mappings in the file.
        path: a YAML file, or None to start from the defaults.
        overrides: ``key=value`` strings with dotted keys; values are YAML (``a.b=3``, ``a.c=[1,2]``, ``a.d=null``).

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (the message suggests the nearest), a required
            key is missing, a value has the wrong type, or a ``validate`` method reports a fault.
    """
    where = str(path) if path is not None else "the command line"
    tree = _read_yaml(Path(path)) if path is not None else {}
    return from_mapping(schema, _merge(tree, _parse_overrides(overrides), where, resolve=True), where)


def from_mapping(schema: type[ConfigT], tree: Mapping[str, Any], where: str) -> ConfigT:
    """Build ``schema`` from nested mappings, with the checks of :func:`load_config`.

    Args:
        where: where the mapping comes from; error messages begin with it.
    """
    faults: list[str] = []
    config = _build(schema, tree, "", faults)
    if not faults:
        faults.extend(_validate(config, ""))
    if faults:
        raise ConfigError(f"{where}: " + "; ".join(faults))
    return config


def to_mapping(config: Any) -> dict[str, Any]:
    """Return a configuration as nested plain mappings."""
    return dataclasses.asdict(config)


def dump_yaml(config: Any) -> str:
    """Return the resolved configuration as YAML, keys in declaration order."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path, depth: int = 0) -> dict[str, Any]:
    if depth > MAX_BASE_DEPTH:
        raise ConfigError(f"{path}: more than {MAX_BASE_DEPTH} levels of 'base:'; does a file name itself as its base?")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration file ({_first_line(error)})") from None
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({_first_line(error)})") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys, not {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(_read_yaml(path.parent / str(base), depth + 1), tree, str(path), resolve=False)


def _merge(base: dict[str, Any], overrides: dict[str, Any], where: str, resolve: bool) -> dict[str, Any]:
    """Merge two trees, ``overrides`` winning; with ``resolve``, replace each ``${…}`` by the value it refers to."""
    try:
        merged = OmegaConf.merge(OmegaConf.create(base), OmegaConf.create(overrides))
        return cast(dict[str, Any], OmegaConf.to_container(merged, resolve=resolve))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from None


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key or any(not part for part in key.split(".")):
            raise ConfigError(f"the command line: '{override}' is not of the form key=value")
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"the command line: '{override}' sets a key below one that has a plain value")
        try:
            node[leaf] = yaml.load(value, _Loader) if value else ""
        except yaml.YAMLError:
            node[leaf] = value
    return tree


def _build(schema: type[Any], tree: Any, prefix: str, faults: list[str]) -> Any:
    if not isinstance(tree, Mapping):
        faults.append(f"'{prefix.rstrip('.')}' must be a mapping of keys, not {tree!r}")
        return None
    tree = _rename_old_keys(schema, tree, prefix, faults)
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key in tree:
        if key not in fields:
            faults.append(f"unknown key '{prefix}{key}'" + _nearest(str(key), schema, prefix))
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], f"{prefix}{name}", faults)
        elif _is_required(field):
            if dataclasses.is_dataclass(hints[name]):
                values[name] = _build(hints[name], {}, f"{prefix}{name}.", faults)
            else:
                faults.append(f"'{prefix}{name}' is required")
    if faults:
        return None
    return schema(**values)


def _rename_old_keys(schema: type, tree: Mapping[str, Any], prefix: str, faults: list[str]) -> dict[str, Any]:
    renamed: Mapping[str, str] = getattr(schema, "RENAMED", {})
    found = dict(tree)
    for old, new in renamed.items():
        if old not in found:
            continue
        if new in found:
            faults.append(f"'{prefix}{old}' is the old name of '{prefix}{new}': give only one of them")
            continue
        found[new] = found.pop(old)
        logger.warning(f"'{prefix}{old}' is now called '{prefix}{new}'; the old name still works")
    return found


def _convert(hint: Any, value: Any, key: str, faults: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, f"{key}.", faults)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        for choice in choices:
            attempt: list[str] = []
            converted = _convert(choice, value, key, attempt)
            if not attempt:
                return converted
        faults.extend(attempt if len(choices) == 1 else [f"'{key}' has a value of the wrong type: {value!r}"])
        return None
    if origin is typing.Literal:
        if value in arguments:
            return value
        faults.append(f"'{key}' must be one of {', '.join(map(str, arguments))}, not {value!r}")
        return None
    if origin in (tuple, list):
        if isinstance(value, str) or not isinstance(value, Sequence):
            value = [value]
        return tuple(_convert(arguments[0], item, f"{key}[{i}]", faults) for i, item in enumerate(value))
    if origin is dict or hint is dict:
        if isinstance(value, Mapping):
            return dict(value)
        faults.append(f"'{key}' must be a mapping of keys, not {value!r}")
        return None
    return _convert_scalar(hint, value, key, faults)


def _convert_scalar(hint: type, value: Any, key: str, faults: list[str]) -> Any:
    if hint is Any:
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (int, float) and isinstance(value, str):
        try:  # YAML 1.1 reads 6e-4 as a string.
            number = float(value)
            if hint is float:
                return number
            if number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    faults.append(f"'{key}' must be of type {hint.__name__}, not {value!r}")
    return None


def _validate(config: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _validate(value, f"{prefix}{field.name}.")
    validate = getattr(config, "validate", None)
    if validate is not None:
        yield from validate()


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for name in (field.name for field in dataclasses.fields(schema)):
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hints[name]):
            yield from _all_keys(hints[name], f"{prefix}{name}.")


def _nearest(key: str, schema: type, prefix: str) -> str:
    candidates: dict[str, str] = {}
    for full in _all_keys(schema, prefix):
        leaf = full.rsplit(".", 1)[-1]
        if leaf not in candidates or full.count(".") < candidates[leaf].count("."):
            candidates[leaf] = full  # where several sections have the key: the shallowest, then the first
    match = difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
    return f" (did you mean '{candidates[match[0]]}'?)" if match else ""


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
