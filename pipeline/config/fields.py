"""What the configuration's sections are made of: bounded fields, and errors of one line."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any

from pipeline.errors import UserError


def num(default: Any, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf) -> Any:
    """A field whose number, or each of whose numbers, is finite, >= low, > above and <= high."""
    bounds = {"low": low, "above": above, "high": high}
    return field(default=default, metadata=bounds)


def _out_of_bounds(value: float, bounds: Mapping[str, float]) -> str:
    """What `value` should be; empty if it is that."""
    if math.isfinite(value) and bounds["low"] <= value <= bounds["high"] and value > bounds["above"]:
        return ""
    limits = {"low": "at least", "above": "above", "high": "at most"}
    return " and ".join(f"{words} {bounds[k]:g}" for k, words in limits.items() if math.isfinite(bounds[k])) or "finite"


class Section:
    """Checks the bounds that a section's fields declare."""

    @classmethod
    def key(cls, name: str) -> str:
        return f"{cls.__name__.removesuffix('Config').lower()}.{name}"

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value is not None and "low" in f.metadata:
                for number in value if isinstance(value, (list, tuple)) else [value]:
                    wanted = _out_of_bounds(number, f.metadata)
                    self.require(not wanted, f.name, f"must be {wanted}")

    def require(self, holds: bool, name: str, fix: str) -> None:
        """Raise UserError naming this section's field `name`, its value, and `fix`."""
        if not holds:
            raise UserError(f"{self.key(name)}={show(getattr(self, name))}: {fix}")


# scheme://NAME:SECRET@ with any SECRET, also with slashes, as AWS's have; but not host:port/x@y, nor [v6 address].
# https://TOKEN@ too, though a mere user's name in other schemes. And queries: ?sig=, &account_key=, &X-Amz-Signature=.
_CREDENTIALS = re.compile(
    r"""^[a-z][a-z0-9+.-]*://[^/:@\[]*:(?!\d+/)[^@]+@
    |^https?://[^/?\#@]+@
    |^[a-z][a-z0-9+.-]*://[^?]*\?(.*&)?([^=&]*[-_])?
        (sig|signature|sas|secret|password|credential|(account|access|secret|api|private)[-_]?key)([-_][^=&]*)?=[^&]
    |^[a-z][a-z0-9+.-]*://[^?]*\?(.*&)?((access|auth|bearer|sas|x-amz-security|session)[-_]?)?token=[^&]""",
    re.IGNORECASE | re.VERBOSE,
)


def refuse_credentials(key: str, value: Any) -> None:
    """Raise UserError, without the value, where it is a URI with a password, a token or a signature in it."""
    if isinstance(value, str) and _CREDENTIALS.match(value):
        raise UserError(
            f"{key}: leave the login out of it, since settings are logged and stored; give it in the environment, as "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_SAS_TOKEN, or PGPASSWORD"
        )


def show(value: Any) -> str:
    """A value as one would write it in an override."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
