"""In a long training that is killed all the time nothing grows, and the script that looks for it would find it."""

import subprocess
import sys

import pytest
import soak
from commands import ROOT


@pytest.mark.parametrize(
    ("name", "a_kill", "grows"),
    [
        ("worker: memory", 0.0, False),
        ("worker: memory", 0.5, True),
        ("driver: threads", 0.2, True),
        ("processes, with zombies: number", 0.2, True),
        ("run's folder: disk", 0.4, True),
        ("temporary files: disk", 0.1, False),
        ("temporary files: disk", 1.0, True),
    ],
)
def test_growth_is_told_from_noise_and_warm_up(
    name: str, a_kill: float, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, kills = soak.Samples(), 60
    for second in range(600):
        monkeypatch.setattr("time.monotonic", lambda now=second: float(now))
        warm = 20 if second > 30 else 0
        samples.add({name: 40 + warm + second % 2 + a_kill * kills * second / 600})
    killed = list(soak.growths(samples, "killed", 0.0, 600.0, kills))
    if name.startswith("worker"):  # they stay young there, and imports look like growth
        assert killed == []
        killed = list(soak.growths(samples, "left alone", 0.0, 600.0))
    assert [found.grows for found in killed] == [grows], killed


@pytest.mark.chaos
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_training_that_is_killed_all_the_time_does_not_grow() -> None:
    command = [sys.executable, str(ROOT / "scripts/soak.py"), "--steps=12000", "--kills=6", "--outage=8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=590)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("12,000 steps and 6 kills in ")
    for what in ("worker: memory", "driver: descriptors", "processes, with zombies", "run's folder", "left alone"):
        assert what in done.stdout
