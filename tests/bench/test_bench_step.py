"""`pipeline bench step|train|scale`: ratios within rounds, true verdicts, and real measurements with each command."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT

from pipeline.bench import common, scaling, step
from pipeline.bench.verdict import step_verdict
from pipeline.cli import app
from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.data.loading.loader import LoaderContext
from pipeline.errors import UserError
from pipeline.local_files import make_folder
from pipeline.training.microbatch import AutoMicrobatch
from pipeline.training.state import TrainState

SMALL = ["model.depth=18", "train.global_batch=16", "cluster.workers=2"]
PLACE = LoaderContext(0, 1, torch.device("cpu"), 1)


def judged(mfu: float | None, ratios: dict[str, float], rounds: int = 5) -> str:
    per_s = {step.CONFIGURED: [10.0, 20.0]} | {name: [10 * r, 20 * r] for name, r in ratios.items()}
    tried = common.compare(per_s, step.CONFIGURED)
    del tried[step.CONFIGURED]
    return step_verdict(tried, mfu, "measured", rounds)


def test_the_steps_verdict_names_the_bound_and_the_best_setting() -> None:
    assert "memory bounds a step" in judged(0.2, {})
    assert "none of the settings tried helps" in judged(0.2, {"train.precision=fp32": 1.01})
    assert judged(0.6, {"a=1": 1.2, "b=2": 1.5}) == (
        "arithmetic bounds a step: it attains 60% of the peak; b=2 helps most: 1.50 times"
    )
    assert "the device's peak is not known" in judged(None, {})
    assert judged(0.6, {"a=1": 1.2}, rounds=4).endswith("do not say which of the settings tried helps")


def of_workers(efficiency: float, **longer: float) -> dict[str, Any]:
    """Rows of one and two workers, whose steps take so many seconds longer in each part."""
    one = {f"{part}_s_per_step": 1.0 for part in scaling.PARTS} | {
        "efficiency": 1.0,
        "efficiency_quartiles": [1.0, 1.0],
    }
    two = one | {f"{part}_s_per_step": 1.0 + s for part, s in longer.items()}
    return {"1": one, "2": two | {"efficiency": efficiency, "efficiency_quartiles": [efficiency, efficiency]}}


def test_the_scalings_verdict_names_what_grows_most() -> None:
    assert scaling.verdict(of_workers(0.95)) == "2 workers attain 95.0% of 2 times one's speed (95.0% to 95.0%)"
    text = scaling.verdict(of_workers(0.5, compute=0.1, communication=0.9))
    assert "most is communication (900 ms)" in text
    assert "cluster.gradients=bf16" in text


def test_a_step_is_timed_for_the_share_of_one_worker() -> None:
    cfg = step.settled(load(ROOT / "configs/digits.yaml", [*SMALL, "train.precision=fp32"]), PLACE.device)
    progress = list[str]()
    result = step.bench_step({step.CONFIGURED: cfg}, PLACE, 3, 2, lambda done, total, text: progress.append(text))
    assert result["batch"] == 8
    assert len(result["rows"][step.CONFIGURED]["per_round"]) == 3
    assert sum(result["parts"].values()) == pytest.approx(1)
    assert 0 < result["mfu"] < 1
    assert result["ledger_share"] < 0.005, "what the ledger costs"
    assert result["tflops"] == pytest.approx(
        6 * result["macs_per_image"] * result["rows"][step.CONFIGURED]["images_per_s"] / 1e12, rel=1e-3
    )
    assert len(progress) == 4


def test_a_setting_that_cannot_be_tried_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def create(cfg: Config, *args: Any) -> TrainState:
        if cfg.optim.name == "adamw":
            raise RuntimeError("no room\nfor two moments")
        return real(cfg, *args)

    real = TrainState.create
    monkeypatch.setattr(TrainState, "create", create)
    names = {step.CONFIGURED: "sgd", "optim.name=adamw": "adamw", "optim.nesterov=false": "sgd"}
    cfgs = {
        name: load(ROOT / "configs/digits.yaml", [*SMALL, "train.precision=fp32", f"optim.name={kind}"])
        for name, kind in names.items()
    }
    variants = {name: step.settled(cfg, PLACE.device) for name, cfg in cfgs.items()}
    result = step.bench_step(variants, PLACE, 1, 1, lambda *_: None)
    assert set(result["rows"]) == {step.CONFIGURED, "optim.nesterov=false"}
    assert "optim.name=adamw is left out: no room\n" in capsys.readouterr().err


def test_a_step_that_does_not_fit_is_measured_in_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a training computes it, instead of an end by a lack of memory."""
    monkeypatch.setattr(step, "may_try_out", lambda *_: True)
    monkeypatch.setattr(AutoMicrobatch, "_fits", lambda self, state, net, batch, size: size <= 3)
    small = ["model.depth=18", "train.precision=fp32", "train.global_batch=8"]
    cfgs = [load(ROOT / "configs/digits.yaml", [*small, f"train.micro_batch={size}"]) for size in (3, 8)]
    whole, parts = (step.BareStep(step.settled(cfg, PLACE.device), PLACE) for cfg in cfgs)
    assert (whole.is_split, parts.is_split) == (False, True)
    assert "2 instead of 4 images at a time" in capsys.readouterr().err
    assert parts.measure(1) > 0


def test_settings_that_leave_the_step_alone_are_not_tried(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "step", str(ROOT / "configs/digits.yaml"), "--try"]
    for setting in ("data.train=/x", "model.compile=none"):
        assert app.main([*words, setting]) == 2
        assert f"--try {setting}: changes nothing of the bare step" in capsys.readouterr().err


def test_more_workers_than_cores_are_refused_by_scale() -> None:
    cfg = load(ROOT / "configs/digits.yaml", SMALL)
    with pytest.raises(UserError, match=r"--workers 9999: with 1 cores each, this machine has room for \d+"):
        scaling.bench_scale(cfg, [9999], 1, 5, lambda done, total, text: None)


def test_what_a_training_begins_and_ends_with_is_not_measured() -> None:
    """A name for the registry needs a logged model; a run's weights do not lie in the measurement's storage."""
    cfg = load(ROOT / "configs/digits.yaml", ["mlflow.register=pets", "model.weights=other-run", "train.profile=[1,2]"])
    measured = common.config_to_measure(cfg, cfg.cluster, "bench", "runs", None, batch=8, steps=20, every=5)
    assert (measured.mlflow.register, measured.mlflow.log_model, measured.model.weights, measured.train.profile) == (
        None,
        False,
        None,
        None,
    )
    assert (measured.run.stop_at_step, measured.train.global_batch, measured.train.log_every) == (20, 8, 5)


def test_turns_let_everyone_be_first() -> None:
    order = list[str]()
    measurements = {name: partial(order.append, name) for name in "abc"}
    measured = common.take_turns(measurements, 4, lambda done, total, text: None, lambda _: 1.0)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(values) for name, values in measured.items()} == {"a": 4, "b": 4, "c": 4}


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(UserError, match=r"--threads 4096: this process may use \d+ cores; lower it"):
        step.context_here(4096)


def test_a_place_for_figures_that_cannot_be_made_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file/x: Not a directory; name another directory"):
        make_folder(tmp_path / "file/x")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code = app.main(["bench", *words, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_step_and_train_as_commands(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"data.train={digits}/train", f"data.val={digits}/val", *SMALL]
    where = [str(ROOT / "configs/digits.yaml"), *data, "--threads", "1", "--rounds", "2", "--out", str(tmp_path)]
    of_step = run(capsys, "step", *where, "--steps", "1", "--try", "optim.nesterov=false")
    assert set(of_step["rows"]) == {step.CONFIGURED, "optim.nesterov=false"}
    train = run(capsys, "train", *where, "--steps", "3")
    assert train["rows"]["pipeline"]["ratio"] > 0.2
    assert 0 <= train["data_wait_share"] < 1
    assert train["communication_share"] < 0.01
    assert (train["host_late_share"], train["memory_share"], train["is_split"]) == (None, None, False)
    assert train["bound"] in ("data", "compute")
    assert train["verdict"].startswith(f"{train['ratio']:.3f} of the ceiling (quartiles ")
    assert f"waiting for images {train['data_wait_share']:.1%}, for other" in step.format_result(train)[-3]
    assert {p.name for p in tmp_path.iterdir()} == {"step.json", "step.png", "train.json", "train.png"}
    assert json.loads((tmp_path / "train.json").read_text()) == train
    for result in (of_step, train):
        assert step.format_result(result)[-1] == result["verdict"]


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(400)
def test_scale_as_a_command(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"data.train={digits}/train", f"data.val={digits}/val", *SMALL, "cluster.cpus_per_worker=1"]
    words = ["--rounds", "1", "--steps", "10", "--workers", "2", "--out", str(tmp_path)]
    result = run(capsys, "scale", str(ROOT / "configs/digits.yaml"), *data, *words)
    assert set(result["workers"]) == {"1", "2"}
    assert result["global_batch_per_worker"] == 8
    one, two = result["workers"]["1"], result["workers"]["2"]
    assert one["efficiency"] == 1
    assert 0.1 < two["efficiency"] < 1.5
    assert one["communication_s_per_step"] < 1e-5 < two["communication_s_per_step"]  # to find nobody takes 1e-6
    assert result["allreduce_gb_s"] > 0.01
    assert set(result["startup"]) >= {"driver", "Ray and imports", "processes", "state"}
    plan = ["plan", str(ROOT / "configs/digits.yaml"), "--gpus", "8", "--gpu", "A100", "--json"]
    assert app.main([*plan, "--measured", str(tmp_path / "scale.json")]) == 0
    predicted = json.loads(capsys.readouterr().out)["measured"]["workers"]["2"]
    assert 0 < predicted["predicted"] <= 1
    assert predicted["measured"] == pytest.approx(two["efficiency"], rel=1e-3)
