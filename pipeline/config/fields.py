"""What the configuration's sections are made of: settings with a meaning, a unit and bounds, and errors of one line."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any

from pipeline.errors import UserError


def setting(
    default: Any,
    meaning: str,
    unit: str = "",
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
) -> Any:
    """A field of a section, and what people are told of it.

    Args:
        meaning: in one line, for `pipeline config --explain` and docs/settings.md.
        unit: of the number, such as "pixels"; also in the error text.
        low, above, high: the number, or each of several, is finite, >= low, > above and <= high.
    """
    return field(default=default, metadata={"meaning": meaning, "unit": unit, "low": low, "above": above, "high": high})


def bounds_in_words(metadata: Mapping[str, Any]) -> str:
    """The bounds of a setting, such as "at least 8 and at most 4096 (pixels)"; only its unit where it has none."""
    words = {"low": "at least", "above": "above", "high": "at most"}
    text = " and ".join(f"{w} {metadata[k]}" for k, w in words.items() if math.isfinite(metadata[k]))
    return " ".join(filter(None, [text, metadata["unit"] and f"({metadata['unit']})"]))


def _is_within(value: float, metadata: Mapping[str, Any]) -> bool:
    return math.isfinite(value) and metadata["low"] <= value <= metadata["high"] and value > metadata["above"]


class Section:
    """Checks the bounds that a section's fields declare."""

    @classmethod
    def key(cls, name: str) -> str:
        return f"{cls.__name__.removesuffix('Config').lower()}.{name}"

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(number, (int, float)) and not _is_within(number, f.metadata) for number in numbers):
                self.require(False, f.name, f"must be {bounds_in_words(f.metadata) or 'finite'}")

    def require(self, holds: bool, name: str, fix: str) -> None:
        """Raise UserError naming this section's field `name`, its value, and `fix`."""
        if not holds:
            raise UserError(f"{self.key(name)}={show(getattr(self, name))}: {fix}")


# scheme://NAME:SECRET@ with any SECRET, also with slashes, as AWS's have; but not host:port/x@y, nor [v6 address].
# https://TOKEN@ too, though a mere user's name in other schemes.
_LOGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/:@\[]*:(?!\d+/)[^@]+@|https?://[^/?#@]+@", re.IGNORECASE)
# In a query: ?sig=, &account_key=, &X-Amz-Signature=, &SharedAccessSignature=; but not ?page_token=.
_SECRETS = re.compile(
    "secret|passw(or)?d|signature|credential|authorization|(account|access|api|private)key|^key$"
    "|(?<!page)(?<!next)(?<!continuation)token$"
)
_SHORT_SECRETS = {"sig", "sas", "pwd", "pass", "auth", "bearer"}


def _has_credentials(uri: str) -> bool:
    scheme, _, rest = uri.partition("://")
    if not rest or not re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return False
    query = (part.partition("=") for part in rest.partition("?")[2].split("&"))
    return _LOGIN.match(uri) is not None or any(value and _is_secret(name) for name, _, value in query)


def _is_secret(name: str) -> bool:
    """Whether a query's value of this name is one to keep."""
    words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    return bool(_SHORT_SECRETS & {*words}) or _SECRETS.search("".join(words)) is not None


def refuse_credentials(key: str, value: Any) -> None:
    """Raise UserError, without the value, where it is a URI with a password, a token or a signature in it."""
    if isinstance(value, str) and _has_credentials(value):
        raise UserError(
            f"{key}: leave the login out of it, since settings are logged and stored; give it in the environment, as "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_SAS_TOKEN, or PGPASSWORD"
        )


def show(value: Any) -> str:
    """A value as one would write it in an override."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
