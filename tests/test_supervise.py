"""The process that the user starts: what a driver leaves behind is no trouble of the user's."""

import subprocess

import psutil
import pytest

from pipeline import supervise


def test_a_process_that_has_just_ended_by_itself_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the result of a training that ended well would be lost in a traceback, once in a while."""
    child = subprocess.Popen(["true"])
    seen = psutil.Process(child.pid)
    child.wait()
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [seen])
    supervise.kill_descendants(set())
