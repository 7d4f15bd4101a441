"""Reading and writing configurations.

`load()` merges the schema, a YAML file and `key=value` overrides, in that order, into frozen
dataclasses.
"""

import difflib
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.config import reference
from pipeline.config.fields import refuse_credentials, show
from pipeline.config.schema import Config
from pipeline.config.training import GRAPH_MODES
from pipeline.errors import UserError
from pipeline.failures import says_of_one_file


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Merge schema, file and overrides.

    Args:
        path: a YAML file, or None for the defaults alone.
        overrides: `key=value` strings; the value is YAML.

    Raises:
        UserError: an unreadable file, or a wrong key, type or value.
    """
    return _merge({} if path is None else _read_yaml(Path(path)), overrides)


def load_saved(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A checkpoint's, which an earlier version may have written; arguments and errors as of `load`."""
    content = _read_yaml(path)
    data = content.get("data") or {}
    if 0 < data.get("hw_decoder_load", 1) < 1:  # 0.65 was the default
        data["hw_decoder_load"] = 1.0
    model = content.get("model") or {}
    if model.get("compile") in GRAPH_MODES and (content.get("train") or {}).get("micro_batch"):
        model["compile"] = "default"  # the pair was allowed, and gradients came out wrong
    return _merge(content, overrides)


def _merge(content: dict[Any, Any], overrides: Sequence[str]) -> Config:
    settings = list(_leaves({k: v for k, v in content.items() if v is not None}))  # "train:" alone says nothing
    settings += map(parse_override, overrides)
    merged = OmegaConf.structured(Config)
    try:
        merged = OmegaConf.merge(merged, *(_nest(key, value) for key, value in settings))
    except OmegaConfBaseException:
        for key, value in settings:  # each alone, which takes half a second, for the one to be named
            try:
                OmegaConf.merge(merged, _nest(key, value))
            except OmegaConfBaseException:
                raise UserError(_explain(key, value)) from None
        raise
    try:
        cfg = OmegaConf.to_object(merged)
    except OmegaConfBaseException as e:
        raise UserError(f"{e.full_key}: {str(e).splitlines()[0]}") from None
    assert isinstance(cfg, Config)
    return cfg


def dump(cfg: Config) -> str:
    """The whole configuration as YAML that `load()` reads back to an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def to_dict(cfg: Config) -> dict[str, Any]:
    """The whole configuration as nested plain containers."""
    plain = OmegaConf.to_container(OmegaConf.structured(cfg))
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def flatten(cfg: Config) -> dict[str, Any]:
    """The configuration as {"section.key": value}."""
    return dict(_leaves(to_dict(cfg)))


def changed_keys(cfg: Config) -> set[str]:
    """The "section.key" of what differs from the defaults."""
    defaults = flatten(load(None, ["data.train=to-be-given", "data.val=to-be-given"]))  # neither has one
    return {key for key, value in flatten(cfg).items() if value != defaults[key]}


def marked(text: str, keys: Collection[str]) -> Iterator[tuple[str, bool]]:
    """The lines of a `dump`, each with whether it belongs to one of the "section.key" in `keys`."""
    section, key = "", ""
    for line in text.splitlines():
        if match := re.match(r"(\w+):", line):
            section, key = match[1], ""
        elif match := re.match(r"  (\w+):", line):
            key = match[1]
        yield line, f"{section}.{key}" in keys


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"no config file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as e:
        if isinstance(e, OSError) and not says_of_one_file(e, path.parent):  # it may be a checkpoint's
            raise
        raise UserError(f"config file {path} cannot be read: {e}") from None
    except (YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"config file {path} is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"config file {path} must hold sections such as 'train:', not a {type(content).__name__}")
    return content


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value`; the value is YAML."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{text!r} is not an override: write key=value, such as train.epochs=3")
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(text).decode("utf-8", "backslashreplace")
        raise UserError(f"{shown}: is not UTF-8, as configurations and checkpoints are; rename it") from None
    try:
        return key.strip(), OmegaConf.to_container(OmegaConf.create(f"value: {raw}"))["value"]  # type: ignore[index,call-overload]
    except (YAMLError, OmegaConfBaseException):
        raise UserError(f"{text}: the value is not YAML; quote it, as in {key}='\"...\"'") from None


def _nest(key: str, value: Any) -> dict[str, Any]:
    first, dot, rest = key.partition(".")
    return {first: _nest(rest, value) if dot else value}


def _explain(key: str, value: Any) -> str:
    """Why OmegaConf refused `value` for `key`, and what it should be."""
    refuse_credentials(key, value)
    known = reference.settings()
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"{key}={show(value)}: is a section; set one of {', '.join(inside)}"
    return f"{key}={show(value)}: {f'must be {known[key].allowed}' if key in known else reference.no_such_key(key)}"
