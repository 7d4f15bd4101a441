"""Every setting in words: for `pipeline config --explain`, the error texts, and docs/settings.md.

`python -m pipeline.config.reference > docs/settings.md` writes that page anew.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline.config.fields import bounds_in_words, show
from pipeline.config.schema import Config
from pipeline.errors import UserError

PAGE = """\
# Settings

Each is `section.key` in a configuration file or on the command line, as `train.epochs=3`. `pipeline config --explain`
prints this list, `pipeline config --explain train` a section of it, and `pipeline config CONFIG` the values that a
configuration has. This page is written by `python -m pipeline.config.reference > docs/settings.md`.
"""


@dataclass(frozen=True)
class Setting:
    """One setting, for people."""

    key: str
    meaning: str
    allowed: str  # such as "a whole number, at least 1 (steps)"
    default: str  # as one would write it in an override

    def lines(self) -> list[str]:
        return [f"{self.key}={self.default}", f"    {self.meaning}", f"    {self.allowed}"]


def settings() -> dict[str, Setting]:
    """All settings by their keys, in the order of the schema."""
    known = {}
    for section, of_section in get_type_hints(Config).items():
        kinds = get_type_hints(of_section)
        for f in fields(of_section):
            allowed = _allowed(kinds[f.name], f.metadata)
            key = f"{section}.{f.name}"
            known[key] = Setting(key, f.metadata["meaning"], allowed, show(f.default))
    return known


def explain(key: str | None) -> list[Setting]:
    """The setting of this key, those of the section of this name, or all.

    Raises:
        UserError: there is neither.
    """
    known = settings()
    chosen = [known[k] for k in known if key is None or k == key or k.startswith(f"{key}.")]
    if not chosen:
        raise UserError(f"--explain {key}: {no_such_key(str(key))}")
    return chosen


def no_such_key(key: str) -> str:
    """That there is no such setting, and the nearest one."""
    known, last = settings(), key.split(".")[-1]
    names = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    names += [k for k in known if k.split(".")[-1] == last]
    if len(last) > 3:
        names += [k for k, setting in known.items() if last.replace("_", " ") in setting.meaning.lower()]
    names += difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"no such key; {f'did you mean {names[0]}?' if names else '`pipeline config --explain` lists all keys'}"


def page() -> str:
    """docs/settings.md."""
    lines, known = [PAGE], settings().values()
    for section in fields(Config):
        lines += [f"## {section.name}", "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        for setting in known:
            if setting.key.startswith(f"{section.name}."):
                default = setting.default and f"`{setting.default}`"
                lines.append(f"| `{setting.key}` | {default} | {setting.allowed} | {setting.meaning} |")
        lines.append("")
    return "\n".join(lines)


def _allowed(kind: Any, metadata: Mapping[str, Any]) -> str:
    """An annotation and its bounds in words."""
    if isinstance(kind, UnionType):
        (kind,) = (k for k in get_args(kind) if k is not NoneType)
        return f"{_allowed(kind, metadata)}, or null"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        number = len(get_args(kind))
        text = "a list of two numbers, [low,high]" if number == 2 else f"a list of {number} numbers"
        text = "a list of numbers, [a,b,...]" if Ellipsis in get_args(kind) else text
    else:  # cluster.workers is Any
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        text = names.get(kind, "a whole number, at least 1, or [min,max] of them")
    bounds = bounds_in_words(metadata)
    return ", ".join([text, bounds]) if bounds and not bounds.startswith("(") else f"{text} {bounds}".rstrip()


if __name__ == "__main__":
    print(page(), end="")
