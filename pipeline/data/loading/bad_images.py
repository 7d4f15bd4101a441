"""The count of images that turn out to be broken."""

from collections.abc import Callable

from pipeline.data.index import Index
from pipeline.failures import FatalError

MAX_NAMED = 10


class BadDataError(FatalError):
    """More images are broken than the configuration allows."""


def max_bad_images(max_fraction: float, num_images: int) -> int:
    """How many images of an index may be broken: one at least, but for a share of 0."""
    return max(1, int(max_fraction * num_images)) if max_fraction > 0 else 0


class BadImages:
    """The broken images of an index.

    Args:
        max_fraction: of the index that may be broken, see `max_bad_images`.
        on_bad: called once for each broken image with its path and the reason.
    """

    def __init__(self, index: Index, max_fraction: float, on_bad: Callable[[str, str], None]):
        self._index, self._on_bad = index, on_bad
        self._max_fraction, self._max_number = max_fraction, max_bad_images(max_fraction, len(index))
        self._rows: set[int] = set()

    def path(self, row: int) -> str:
        """The whole path of a row's image."""
        return self._index.full_path(row)

    def count(self, row: int, reason: str) -> None:
        """Count a row, once.

        Raises:
            BadDataError: one too many.
        """
        if row in self._rows:
            return
        self._rows.add(row)
        self._on_bad(self.path(row), reason)
        if len(self._rows) > self._max_number:
            paths = ", ".join(self._index.path(r) for r in sorted(self._rows)[:MAX_NAMED])
            more = f" and {len(self._rows) - MAX_NAMED} more" if len(self._rows) > MAX_NAMED else ""
            raise BadDataError(  # at least: each worker counts its own, and none has seen all images
                f"at least {len(self._rows)} of {len(self._index)} images in {self._index} are broken, and "
                f"data.max_bad_fraction={self._max_fraction:g} allows {self._max_number}: {paths}{more}; "
                "fix them, have them left out by a new index (pipeline index --verify), or raise the limit"
            )
