"""How people read results: rows in columns, numbers, how a process ended."""

import re
import signal
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

MAX_REASON = 240  # characters of one
RAY_LOG = re.compile(r"Set the |\[[\d-]+ [\d:,]+ [A-Z] \d+ \d+\] ")  # advice, and lines of its C++ log


def columns(rows: Sequence[Sequence[str]], align: str = "", *, gap: int = 2) -> list[str]:
    """Rows of cells as lines, in which each column is as wide as its widest cell.

    Args:
        align: "<" or ">" for each column, such as "<>>"; columns beyond its end are "<".
        gap: spaces between columns.
    """
    shown = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*shown, strict=True)]
    sides = align.ljust(len(widths), "<")
    lines = []
    for row in shown:
        cells = []
        for cell, width, side in zip(row, widths, sides, strict=True):
            fill = " " * (width - cell_len(cell))
            cells.append(fill + cell if side == ">" else cell + fill)
        lines.append((" " * gap).join(cells).rstrip())
    return lines


def figure(value: float | None, form: str | None = None) -> str:
    """A number for people, or "-" where it is not known; by default 1,234 for counts and 0.1234 for all others."""
    if value is None:
        return "-"
    return format(value, form or (",d" if isinstance(value, int) else ".4f"))


def between(bounds: Sequence[float], form: str) -> str:
    """Two bounds, such as quartiles: "0.98 to 1.02"."""
    low, high = bounds
    return f"{low:{form}} to {high:{form}}"


def shorten(text: str, width: int) -> str:
    """A name that anyone may have chosen, in at most so many columns of a terminal."""
    text = _printable(text)
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def last_telling_line(said: str) -> str:
    """What a traceback or a log ends with: no bracket or underlining, nor Ray's own log and advice."""
    lines = [line.strip() for line in said.splitlines()]
    telling = [line for line in lines if len(line) > 2 and not set(line) <= set("^~ |-=")]
    return next((line[:MAX_REASON] for line in reversed(telling) if not RAY_LOG.match(line)), "")


def signal_in_words(number: int) -> str:
    """Such as "signal 11 (SIGSEGV: segmentation fault)"."""
    return f"signal {number} ({signal.Signals(number).name}: {(signal.strsignal(number) or 'unknown').lower()})"
