"""What the package says to people, in one list that is read as a whole: plain words, one line, no guesses of Ray's."""

import re
from difflib import unified_diff
from pathlib import Path

from messages import collect

LIST = Path(__file__).parent / "messages.txt"
# Words of no living English, or of our own making, or that no user can act upon.
ODD = (
    r"\b(mend\w*|whence|thence|hither|thither|betwixt|nought|ere|hitherto|unto|SYSTEM_ERROR|oops|sorry|illegal|TODO)\b"
)


def test_each_message_has_been_read() -> None:
    now, read = list(collect()), LIST.read_text().splitlines()
    changes = [line for line in unified_diff(read, now, n=0, lineterm="") if not line.startswith(("---", "+++", "@@"))]
    how = "read them as a new user would, then: python tests/support/messages.py > tests/messages.txt"
    assert now == read, f"{how}\n" + "\n".join(changes)


def test_no_message_has_odd_words() -> None:
    assert [m for m in collect() if re.search(ODD, m.partition(": ")[2])] == []
