"""The race against the loops that people use: windows, ratios, choice of settings, freezing; one short race."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bench_peers
import make_photos
import peers_report
import psutil
import pytest
import turns
from commands import ROOT

from pipeline.training.precision import cpu

TICK = """
import json, os, sys, time
parent = os.getppid()
with open(sys.argv[1], "a") as file:
    while os.getppid() == parent:
        print(json.dumps({"time": time.monotonic()}), file=file, flush=True)
        time.sleep(0.01)
"""


def steady(start: float, seconds_per_step: float, num_steps: int) -> list[float]:
    return [start + i * seconds_per_step for i in range(num_steps)]


def windows(**seconds_per_step: list[float]) -> dict[str, list[list[float]]]:
    return {name: [steady(100 * i, s, 9) for i, s in enumerate(rounds)] for name, rounds in seconds_per_step.items()}


RACE = windows(
    torchvision=[0.2, 0.8], timm=[0.4, 0.4], pipeline=[0.1, 0.2], fit=[0.09, 0.18], ceiling=[0.1, 0.1]
)  # seconds a step in two rounds


def test_steps_made_of_what_lay_ready_do_not_count() -> None:
    """Three quick steps, then a step a second: one a second is the speed."""
    assert peers_report.steps_per_s([10.0, 10.1, 10.2, 11.2, 12.2, 13.2], num_ahead=2) == pytest.approx(1.0)


def test_the_pause_between_windows_does_not_count() -> None:
    assert peers_report.pooled([steady(0, 0.5, 5), steady(1000, 1.0, 5)], num_ahead=0) == pytest.approx(8 / 6)


def test_ratios_are_taken_within_rounds_to_the_best_peer_of_each() -> None:
    summary = peers_report.summarise(RACE, batch=4, num_ahead=2, background=0)
    assert summary["ratios"]["best peer"]["per_round"] == [2.0, 2.0]
    assert summary["ratios"]["timm"]["per_round"] == [4.0, 2.0]
    assert summary["ratios"]["ceiling"]["median"] == pytest.approx(0.75)
    assert summary["contestants"]["pipeline"]["images_per_s"]["median"] == pytest.approx(30.0)
    assert summary["ray_and_mlflow_ms_per_step"]["median"] == pytest.approx(15.0)


def test_what_ours_takes_in_the_turns_of_others_is_made_good_to_them() -> None:
    plain, lessened = (peers_report.summarise(RACE, batch=4, num_ahead=2, background=b) for b in (0, 0.05))
    for name, ratio in plain["ratios"].items():
        assert lessened["ratios"][name]["median"] == pytest.approx(0.95 * ratio["median"])
        assert lessened["ratios"][name]["over_all"] == pytest.approx(0.95 * ratio["over_all"])
    assert lessened["contestants"]["pipeline"] == plain["contestants"]["pipeline"]


def test_the_verdicts_tell_an_aim_that_is_missed() -> None:
    summary = peers_report.summarise(RACE, batch=4, num_ahead=2, background=0)
    assert peers_report.verdict(summary, "best peer").startswith("aim reached: pipeline / best peer 2.000")
    assert peers_report.verdict(summary, "ceiling").startswith("aim missed: pipeline / ceiling 0.750")


def test_a_slow_minute_does_not_choose_the_setting() -> None:
    """The second is faster in most rounds, and has the lower mean by one bad round of all."""
    assert peers_report.fastest([[10.0, 10.0, 100.0], [11.0, 11.0, 99.0]]) == 1


@pytest.mark.parametrize(("features", "wanted"), [({"avx2": True}, "fp32"), ({"avx512_bf16": True}, "bf16")])
def test_all_compute_in_what_the_cpu_has(
    features: dict[str, bool], wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_peers, "hardware_of", lambda device: cpu(features, "AVX512", {}))
    monkeypatch.setattr(sys, "argv", ["bench_peers.py"])
    assert bench_peers._case(bench_peers._arguments()).precision == wanted
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", "--precision", "bf16"])
    assert bench_peers._case(bench_peers._arguments()).precision == "bf16"
    assert ("; give --precision fp32\n" in capsys.readouterr().err) == (wanted == "fp32")


@pytest.fixture
def ticking(tmp_path: Path) -> Iterator[turns.Running]:
    script, progress = tmp_path / "tick.py", tmp_path / "progress"
    script.write_text(TICK)
    command = ["sh", "-c", f"{sys.executable} {script} {progress} & wait"]
    running = turns.Running(turns.Program("ticks", command, "tick.py", {}, progress, tmp_path / "log"))
    yield running
    running.end()


def test_a_frozen_program_stands_still_and_goes_on(ticking: turns.Running) -> None:
    ticking.warm_up(3)
    before = ticking.times()
    time.sleep(0.3)
    assert ticking.times() == before
    started = time.monotonic()
    step_times = ticking.window(0.3, 5)
    assert len(step_times) >= 5
    assert started <= step_times[0] <= step_times[-1] <= time.monotonic()
    assert ticking.times() == before + step_times


def test_turns_do_not_overlap(ticking: turns.Running, tmp_path: Path) -> None:
    other_file = tmp_path / "other"
    command = ["sh", "-c", f"{sys.executable} {tmp_path / 'tick.py'} {other_file} & wait"]
    other = turns.Running(turns.Program("others", command, "tick.py", {}, other_file, tmp_path / "other_log"))
    try:
        for running in (ticking, other):
            running.warm_up(1)
        raced = turns.race([ticking, other], 2, 0.2, 3, lambda i, windows: None)
    finally:
        other.end()
    (a, d), (b, c) = raced["ticks"], raced["others"]  # the order turns round
    for earlier, later in ((a, b), (b, c), (c, d)):
        assert earlier[-1] < later[0]


def test_a_program_that_dies_is_told_with_what_it_said(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo out of luck; exit 3"]
    running = turns.Running(turns.Program("it", command, "none", {}, tmp_path / "progress", tmp_path / "log"))
    with pytest.raises(turns.StalledError, match=r"(?s)it has ended with code 3; .*out of luck"):
        running.warm_up(1)
    running.end()


@pytest.mark.e2e
@pytest.mark.thorough
@pytest.mark.timeout(400)
def test_a_short_race_tells_all_and_leaves_nothing_running(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    make_photos.write(photos, 32)
    settings = ["--model", "resnet18", "--size", "32", "--batch", "8", "--rounds", "2", "--window", "1"]
    settings += ["--warm-up", "1", "--no-trials", "--json", "--photos", str(photos), "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_peers.py"), *settings],
        stdout=subprocess.PIPE,
        text=True,
    )
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "peers_resnet18_32.json").read_text())
    names = ["torchvision", "timm", "pipeline", "fit", "ceiling"]
    assert list(result["contestants"]) == list(result["settings"]) == names
    assert all(len(result["contestants"][name]["per_round"]) == 2 for name in names)
    assert result["machine"]["cores"] == bench_peers.num_cores()
    missed = [name for name, aim in peers_report.AIMS.items() if result["ratios"][name]["median"] < aim]
    assert done.returncode == bool(missed)
    assert [p.pid for p in psutil.process_iter() if str(photos) in " ".join(_command(p))] == []


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []  # it ended meanwhile
