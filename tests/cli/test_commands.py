"""The command line as a person meets it: what it prints, its JSON, its exit codes."""

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import mlflow
import pytest
from commands import ROOT, Run
from odd_images import damaged_jpeg, write_odd_folder
from ranks import context

from pipeline.config.loading import load
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training import inference
from pipeline.training.loop import fit

CONFIGS = ROOT / "configs"
SMALL = ["model.depth=18", "train.epochs=3", "optim.warmup_epochs=0.5", "checkpoint.every=40"]


def storage(trained: dict[str, Any]) -> str:
    return str(Path(trained["run_dir"]).parent)


def test_sync_of_what_is_not_there(run: Run, tmp_path: Path, trained: dict[str, Any]) -> None:
    code, _, err = run("sync", "smal", "--storage", storage(trained))
    assert code == 2
    assert "no run, MLflow run id or checkpoint 'smal'" in err
    assert "did you mean small?" in err
    code, _, err = run("sync", "small", "--storage", "s4://bucket/runs")
    assert code == 2
    assert "run.storage=s4://bucket/runs: " in err
    assert "use a directory, s3://... or gs://..." in err


def test_a_secret_in_a_uri_is_refused_and_not_repeated(run: Run) -> None:
    code, out, err = run("sync", "small", "--storage", "s3://key:hush@bucket/runs")
    assert code == 2
    assert "run.storage: leave the login out of it" in err
    assert "hush" not in out + err


def test_sync_tells_mlflow_of_a_killed_run(run: Run, tmp_path: Path, digits_index: Callable[[str], Path]) -> None:
    """An attempt that was killed could not say so: its MLflow run seems to run for ever."""
    cfg = load(CONFIGS / "digits.yaml", [*SMALL, "run.stop_at_step=2", "train.log_every=1"])
    folder, indexes = tmp_path / "killed", (str(digits_index("train")), str(digits_index("val")))
    folder.mkdir()
    summary = fit(RunSpec(cfg, Storage(folder), *indexes), context())
    client = mlflow.MlflowClient(summary["mlflow_uri"])
    client.update_run(summary["mlflow_run_id"], status="RUNNING")
    identity = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**identity, "open": True}))
    code, out, _ = run("sync", "killed", "--storage", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["waiting"] == 0
    assert client.get_run(summary["mlflow_run_id"]).info.status == "KILLED"


def test_config_prints_yaml_or_json(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("config", CONFIGS / "digits.yaml", "train.epochs=7")
    assert code == 0
    (tmp_path / "c.yaml").write_text(out)
    assert load(tmp_path / "c.yaml").train.epochs == 7
    code, out, _ = run("config", CONFIGS / "digits.yaml", "run.seed=1", "--json", "model.depth=50")
    assert (json.loads(out)["model"]["depth"], json.loads(out)["run"]["seed"]) == (50, 1)


def test_index_counts_and_names_what_it_leaves_out(run: Run, tmp_path: Path) -> None:
    usable, unusable = write_odd_folder(tmp_path / "images")
    code, out, err = run("index", tmp_path / "images", "--out", tmp_path / "i.arrow")
    assert code == 0
    assert f"{len(usable)} images of 2 classes, {len(unusable)} left out" in out
    assert all(name in err for name in unusable)
    code, out, _ = run("index", tmp_path / "images", "--out", tmp_path / "i.arrow", "--json")
    result = json.loads(out)
    assert (result["images"], len(result["refused"])) == (len(usable), len(unusable))
    code, _, err = run("index", tmp_path / "nothing", "--out", tmp_path / "i.arrow")
    assert (code, err.count("\n")) == (2, 1)


def test_evaluate_repeats_the_trainings_figures(
    run: Run, trained: dict[str, Any], digits: Path, tmp_path: Path
) -> None:
    code, out, _ = run("evaluate", "small", "--storage", storage(trained), "--json")
    scores = json.loads(out)
    assert code == 0
    assert scores["count"] == 360
    assert scores["top1"] == trained["top1"]
    assert scores["loss"] == pytest.approx(trained["loss"], rel=1e-3)
    assert scores["checkpoint"] == trained["checkpoint"]
    for reference in (trained["run_dir"], trained["checkpoint"]):
        assert json.loads(run("evaluate", reference, "--json")[1]) == scores
    by_id = run("evaluate", trained["mlflow_run_id"], "--storage", storage(trained), "--json")
    assert json.loads(by_id[1]) == scores
    shutil.copytree(digits / "val" / "3", tmp_path / "3")
    (tmp_path / "3" / "empty.jpg").touch()
    code, out, err = run("evaluate", trained["run_dir"], "--data", tmp_path)
    assert (code, err) == (0, f"warning: left out {tmp_path}/3/empty.jpg: empty file\n")
    assert f"on {len(list(tmp_path.glob('3/*'))) - 1} images" in out


def test_evaluate_refuses_what_it_cannot_score(run: Run, trained: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "x.jpg").write_bytes(damaged_jpeg())
    code, _, err = run("evaluate", trained["run_dir"], "--data", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "3/x.jpg is broken" in err
    (tmp_path / "3").rename(tmp_path / "three")
    code, _, err = run("evaluate", trained["run_dir"], "--data", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "has class 'three', which the training images do not have" in err


def test_predict_names_a_class_for_each_image(run: Run, trained: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    images = sorted((digits / "val").glob("*/*.jpg"))[::9]
    code, out, _ = run("predict", trained["run_dir"], *images, "--top", 3, "--json")
    predictions = json.loads(out)["predictions"]
    assert code == 0
    assert [p["image"] for p in predictions] == [str(i) for i in images]
    right = sum(p["class"] == Path(p["image"]).parent.name for p in predictions)
    assert right >= 0.5 * len(images)
    assert all(1 >= p["top"][0]["probability"] >= p["top"][2]["probability"] >= 0 for p in predictions)
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    (tmp_path / "worse.jpg").write_bytes(damaged_jpeg())
    broken = [tmp_path / "bad.jpg", tmp_path / "worse.jpg", Path("none.jpg")]
    code, out, err = run("predict", trained["run_dir"], broken[0], images[0], *broken[1:])
    assert code == 2
    assert len(out.splitlines()) == 1
    assert out.startswith(str(images[0]))
    assert [line.split(":")[0] for line in err.splitlines()] == [str(path) for path in broken]
    code, _, err = run("predict", trained["run_dir"], images[0], "--top", 11)
    assert code == 2
    assert "--top 11: must be from 1 to the model's 10 classes" in err


def test_predict_takes_folders_and_stdin_in_their_order(
    run: Run, trained: dict[str, Any], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table and JSON say the same; more images than fit one chunk; an image that is named twice is answered twice."""
    monkeypatch.setattr(inference, "CHUNK", 25)
    folder, three = digits / "val" / "7", digits / "val" / "3"
    sevens, threes = (sorted(place.glob("*.jpg")) for place in (folder, three))
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    for name in ("deep/b.JPG", "a.png", "deep/.hidden/c.jpg", "notes.txt"):
        shutil.copy(sevens[0], tmp_path / name)
    listed = f"{three}\n\n{sevens[0]}\r\n{tmp_path}/none.jpg".encode()

    def asked(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(listed)))
        return run("predict", trained["run_dir"], folder, "-", tmp_path, "--top", 2, *words)

    expected = [*sevens, *threes, sevens[0], tmp_path / "none.jpg", tmp_path / "a.png", tmp_path / "deep/b.JPG"]
    code, out, err = asked("--csv")
    rows = list(csv.DictReader(StringIO(out)))
    assert (code, err) == (2, f"{tmp_path}/none.jpg: no such file\n")
    assert out.startswith("image,class,probability,error,class_2,probability_2\n")
    assert [row["image"] for row in rows] == [str(path) for path in expected]
    code, out, _ = asked("--json")
    for row, prediction in zip(rows, json.loads(out)["predictions"], strict=True):
        top = [
            value
            for t in prediction.get("top", [{}, {}])
            for value in (t.get("class", ""), str(t.get("probability", "")))
        ]
        assert [row[k] for k in ("class", "probability", "class_2", "probability_2")] == top
        assert row["error"] == prediction.get("error", "")


def test_predict_is_told_of_every_broken_image(run: Run, trained: dict[str, Any], tmp_path: Path) -> None:
    """Also where all are broken, more than a training would bear, and one has a name that is no text."""
    for k in range(5):
        (tmp_path / f"{k}.jpg").write_bytes(damaged_jpeg())
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.jpg")).write_bytes(damaged_jpeg())
    code, out, err = run("predict", trained["run_dir"], tmp_path, Path("x" * 300), "--csv")
    rows = list(csv.DictReader(StringIO(out)))
    assert (code, len(rows), err.count("\n")) == (2, 7, 7)
    assert all(row["error"] and not row["class"] for row in rows)
    assert rows[5]["error"] == "the name is not UTF-8; rename it"
    assert rows[6]["error"].startswith("not readable (File name too long")


def test_predict_without_an_image_gets_one_line(
    run: Run, trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"\n")))
    for words, message in (
        ([tmp_path], f"{tmp_path} has no image file at any depth"),
        (["-"], "stdin names no image; give it paths, one a line"),
        (["x.jpg", "--csv", "--json"], "--csv: does not go with --json"),
        (["x.jpg", "--csv", "--top", 0], "--top: 0: must be a whole number, at least 1"),
    ):
        code, out, err = run("predict", trained["run_dir"], *words)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
        assert out == "" or "--json" in words


def test_unknown_runs_name_the_nearest(run: Run, trained: dict[str, Any]) -> None:
    code, _, err = run("evaluate", "smal", "--storage", storage(trained))
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean small?" in err
    code, _, err = run("train", "--resume", "nothing-like-it", f"run.storage={storage(trained)}")
    assert (code, err.count("\n")) == (2, 1)
    assert "runs there: small" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "name a config file"),
        (["train", "train.epochs=3"], "name a config file"),
        (["train", "configs/none.yaml"], "no config file configs/none.yaml"),
        (["train", "configs/digits.yaml", "--resume", "x"], "leave out configs/digits.yaml"),
        (["train", "configs/digits.yaml", "data.train=/none"], "no folder or index file /none"),
        (["train", "--resume", "x", "nonsense"], "leave out nonsense"),
    ],
)
def test_wrong_commands_get_one_line(run: Run, args: list[str], message: str) -> None:
    code, out, err = run(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_resume_from_an_older_checkpoint_needs_a_name(run: Run, trained: dict[str, Any]) -> None:
    older = Path(trained["run_dir"]) / "checkpoints" / "step_00000040"
    code, _, err = run("train", "--resume", older)
    assert (code, err.count("\n")) == (2, 1)
    assert "is not the newest checkpoint of its run, step_00000066 is" in err
    assert "run.name=NAME" in err
