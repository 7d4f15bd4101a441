"""A process that hangs ends itself, and leaves its stacks behind."""

import subprocess
import sys
import time

HANG = """
import threading
from pipeline.training import watchdog
watchdog.GRACE_S = 0
with watchdog.Watchdog(1.0) as dog:
    for _ in range(3):
        threading.Event().wait(0.6)
        dog.feed()
    print("fed", flush=True)
    def hang_here(): threading.Event().wait(60)
    hang_here()
"""
CALM = """
import time
from pipeline.training import watchdog
watchdog.GRACE_S = 0
with watchdog.Watchdog(0.5): pass
time.sleep(1)
print("alive")
"""


def run(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)


def test_a_hang_ends_the_process_and_says_where() -> None:
    began = time.monotonic()
    done = run(HANG)
    assert done.returncode == 1
    assert done.stdout == "fed\n"
    assert "hang_here" in done.stderr
    assert time.monotonic() - began < 30


def test_it_ends_with_its_block() -> None:
    assert run(CALM).stdout == "alive\n"
