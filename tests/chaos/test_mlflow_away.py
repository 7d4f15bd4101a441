"""MLflow goes away, fails and dawdles: training does not wait, nothing is lost, nothing comes twice, order holds."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from commands import loss_series
from ranks import context
from s3 import free_port
from servers import MlflowServer, Mode, Proxy

from pipeline.cli import app
from pipeline.config.loading import load
from pipeline.events import Event, StepLogged, Warned
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training import recorder
from pipeline.training.loop import fit

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

NUM_STEPS = 60


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow"), port) as one:
        one.start()
        yield one


@pytest.fixture
def proxy(server: MlflowServer, port: int) -> Iterator[Proxy]:
    with Proxy(port, free_port()) as one:
        yield one


@pytest.fixture
def spec(digits_index: Callable[[str], Path], tmp_path: Path, proxy: Proxy) -> Callable[[str], RunSpec]:
    def make(name: str) -> RunSpec:
        train, val = str(digits_index("train")), str(digits_index("val"))
        small = ["data.image_size=32", "data.val_resize=32", "model.depth=18", "train.global_batch=64"]
        length = [f"train.steps={NUM_STEPS}", "train.log_every=1", "train.eval_every=1000", "checkpoint.every=20"]
        logged = [f"mlflow.uri={proxy.uri}", "mlflow.log_model=false", "mlflow.report=false"]
        logged += ["optim.warmup_epochs=0.5"]
        cfg = load(None, [f"data.train={train}", f"data.val={val}", *small, *length, *logged])
        (tmp_path / name).mkdir()
        return RunSpec(cfg, Storage(tmp_path / name), train, val)

    return make


def train(spec: RunSpec, proxy: Proxy, mode_at: dict[int, Mode]) -> tuple[dict[str, Any], list[str]]:
    """Train, and set the proxy's mode when a step is logged; the summary and the warnings."""
    warnings: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, StepLogged):
            proxy.mode = mode_at.get(event.step, proxy.mode)
        if isinstance(event, Warned):
            warnings.append(event.text)

    proxy.mode = mode_at[0]
    return fit(spec, dataclasses.replace(context(), emit=watch)), warnings


STORIES: dict[str, dict[int, Mode]] = {
    "always there": {0: "up"},
    "down at the start": {0: "down", 30: "up"},
    "down in the middle": {0: "up", 10: "down", 40: "up"},
    "fails in the middle": {0: "up", 10: "500", 40: "up"},
    "fails at the start": {0: "500", 30: "up"},
    "slow in the middle": {0: "up", 10: "slow", 50: "up"},
}


# CI has no time for all of them.
MARKS = {
    "always there": pytest.mark.thorough,
    "down at the start": pytest.mark.thorough,
    "fails in the middle": pytest.mark.thorough,
    "fails at the start": pytest.mark.long,
    "slow in the middle": pytest.mark.long,
}


@pytest.mark.parametrize("story", [pytest.param(s, marks=MARKS.get(s, ())) for s in STORIES])
def test_everything_arrives_once_in_order(
    story: str, spec: Callable[[str], RunSpec], proxy: Proxy, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MLFLOW_END_S", 60.0)
    name = story.replace(" ", "_")
    summary, warnings = train(spec(name), proxy, STORIES[story])
    assert summary["status"] == "done"
    assert summary["mlflow_waiting"] == 0
    assert [step for step, _ in loss_series(server.uri, name)] == list(range(1, NUM_STEPS + 1))
    told = [w for w in warnings if "records wait in" in w]
    assert bool(told) == ("down" in story or "fails" in story)
    client = mlflow.MlflowClient(server.uri)
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    logging_s, compute_s = (run.data.metrics[f"time/{phase}_s"] for phase in ("logging", "compute"))
    print(f"{story}: {1000 * logging_s / NUM_STEPS:.2f} ms of logging a step")
    assert logging_s < 0.05 * compute_s
    assert run.data.tags["pipeline.attempt_1"] == "from step 0, 1 workers"
    assert {a.path for a in client.list_artifacts(run.info.run_id, "checkpoints")} == {"checkpoints/step_00000060"}


@pytest.mark.long
def test_it_never_comes_back_and_the_outbox_is_sent_later(
    spec: Callable[[str], RunSpec],
    proxy: Proxy,
    server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run ends well, says where its records lie and how to send them; then `pipeline sync` does."""
    monkeypatch.setattr(recorder, "MLFLOW_END_S", 2.0)
    one = spec("never")
    summary, warnings = train(one, proxy, {0: "up", 30: "down"})
    assert summary["status"] == "done"
    assert summary["mlflow_waiting"] > 30
    outbox = one.run.local_dir / "mlflow" / "outbox.jsonl"
    assert f"records wait in {outbox}; to send them: pipeline sync {one.run}" in warnings[-1]
    capsys.readouterr()
    assert app.main(["sync", str(one.run)]) == 1
    assert f"MLflow at {proxy.uri} is away" in capsys.readouterr().out
    proxy.mode = "up"
    assert app.main(["sync", str(one.run)]) == 0
    assert f"MLflow at {proxy.uri} has all of {one.run}" in capsys.readouterr().out
    assert [step for step, _ in loss_series(server.uri, "never")] == list(range(1, NUM_STEPS + 1))
    assert app.main(["sync", str(one.run)]) == 0  # once more changes nothing
    assert len(loss_series(server.uri, "never")) == NUM_STEPS
    client = mlflow.MlflowClient(server.uri)
    assert client.get_run(summary["mlflow_run_id"]).info.status == "FINISHED"


def test_an_answer_that_is_lost_is_not_logged_twice(
    spec: Callable[[str], RunSpec], proxy: Proxy, server: MlflowServer
) -> None:
    """The server does what it was asked, and hangs up before it says so."""
    stop = threading.Event()

    def flicker() -> None:
        while not stop.wait(0.3):
            proxy.mode = "mute" if proxy.mode == "up" else "up"

    flickering = threading.Thread(target=flicker)
    flickering.start()
    try:
        summary, _ = train(spec("mute"), proxy, {0: "mute", NUM_STEPS: "up"})
    finally:
        stop.set()
        flickering.join()
        proxy.mode = "up"
    if summary["mlflow_waiting"]:
        assert app.main(["sync", summary["run_dir"]]) == 0
    assert [step for step, _ in loss_series(server.uri, "mute")] == list(range(1, NUM_STEPS + 1))
