"""What a resume refuses: by the driver, before Ray is started, and in the same words by the workers."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Run
from ranks import context

from pipeline.config.loading import load
from pipeline.config.running import ClusterConfig
from pipeline.config.schema import Config
from pipeline.data.indexing.build import build_index
from pipeline.errors import UserError
from pipeline.events import Event
from pipeline.runs import checkpoint
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.tracking import find
from pipeline.training import open_run
from pipeline.training.loop import fit

SMALL = ["data.image_size=32", "data.val_resize=32", "model.depth=18", "train.global_batch=64", "train.steps=30"]
QUIET = ["train.precision=fp32", "mlflow.log_model=false", "mlflow.report=false", "mlflow.checkpoints=none"]

Settings = Callable[..., Config]


@pytest.fixture(scope="module")
def stopped(digits_index: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with the run `run`, stopped at step 2 after a checkpoint at step 1."""
    storage = tmp_path_factory.mktemp("runs")
    data = [f"data.train={digits_index('train')}", f"data.val={digits_index('val')}"]
    where = [f"run.storage={storage}", "run.name=run", "run.stop_at_step=2", "checkpoint.every=1"]
    with open_run.open_run(load(None, [*data, *SMALL, *QUIET, *where]), print) as spec:
        fit(spec, context())
    return storage


@pytest.fixture
def settings(stopped: Path, digits_index: Callable[[str], Path], tmp_path: Path) -> Settings:
    """Makes the configuration of the run, with overrides, for a copy of it."""
    shutil.copytree(stopped, tmp_path / "runs")
    data = [f"data.train={digits_index('train')}", f"data.val={digits_index('val')}"]

    def make(*overrides: str) -> Config:
        return load(None, [*data, *SMALL, *QUIET, f"run.storage={tmp_path}/runs", "run.name=run", *overrides])

    return make


def refused(cfg: Config, resume_from: str | None = None) -> str:
    """The line with which driver and worker refuse a training."""
    assert cfg.run.name is not None
    spec = RunSpec(cfg, Storage(cfg.run.storage) / cfg.run.name, cfg.data.train, cfg.data.val, resume_from)
    with pytest.raises(UserError) as by_driver, open_run.open_run(cfg, print, resume_from):
        pass
    with pytest.raises(UserError) as by_worker:
        fit(spec, context())
    assert str(by_driver.value) == str(by_worker.value)
    assert "\n" not in str(by_driver.value)
    return str(by_driver.value)


@pytest.mark.parametrize("setting", ["train.global_batch=32", "run.seed=1", "data.shuffle_block=8"])
def test_what_orders_the_images_stays(settings: Settings, setting: str) -> None:
    said = refused(settings(setting))
    assert said.startswith(f"{setting}: ")
    assert "step_00000002 was trained with" in said
    assert "another value changes which images come next; set " in said


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ("model.depth=34", "its weights are of another network; set model.depth=18, or use another run.name"),
        ("model.stride_on=1x1", "its weights are of another network; set model.stride_on=3x3, or "),
        (
            "model.freeze=stem",
            "its optimizer's state is of another kind or of other parameters; set model.freeze=none",
        ),
        ("optim.name=lamb", "its optimizer's state is of another kind or of other parameters; set optim.name=sgd, or "),
        ("optim.layer_decay=0.5", "parameters; set optim.layer_decay=1.0, or use another run.name"),
    ],
)
def test_the_network_and_its_optimizer_stay(settings: Settings, setting: str, fix: str) -> None:
    said = refused(settings(setting))
    assert said.startswith(f"{setting}: ")
    assert "step_00000002 was trained with" in said
    assert fix in said


def test_the_images_stay_unless_others_are_allowed(settings: Settings, digits_index: Callable[[str], Path]) -> None:
    other = f"data.train={digits_index('val')}"
    assert "was trained on other images than data.train=" in refused(settings(other))
    with open_run.open_run(settings(other, "data.allow_changed=true", "run.stop_at_step=3"), print) as spec:
        assert fit(spec, context())["step"] == 3


def test_leave_for_one_change_is_none_for_the_next(settings: Settings, digits_index: Callable[[str], Path]) -> None:
    cfg = settings(f"data.train={digits_index('val')}", "data.allow_changed=true", "run.stop_at_step=3")
    with open_run.open_run(cfg, print) as spec:
        fit(spec, context())
    found = checkpoint.newest_valid(spec.checkpoints, pytest.fail)
    assert found is not None
    assert not find.config_to_resume(found, []).data.allow_changed
    assert find.config_to_resume(found, ["data.allow_changed=true"]).data.allow_changed


def test_the_number_of_classes_stays_whatever_is_allowed(settings: Settings, digits: Path, tmp_path: Path) -> None:
    for name in ("0", "1"):
        shutil.copytree(digits / "train" / name, tmp_path / "two" / name)
    build_index(tmp_path / "two")[0].save(tmp_path / "two.arrow")
    two = [f"data.{part}={tmp_path}/two.arrow" for part in ("train", "val")]
    said = refused(settings(*two, "data.allow_changed=true"))
    assert f"data.train={tmp_path}/two.arrow: holds 2 classes, and " in said
    assert "step_00000002 was trained with 10; " in said


def test_a_training_does_not_end_before_its_checkpoint(settings: Settings) -> None:
    assert "is at step 2, and this configuration ends at step 1; raise train.epochs" in refused(
        settings("train.steps=1")
    )


def test_a_branch_is_held_to_the_checkpoint_that_it_begins_with(settings: Settings) -> None:
    cfg = settings("run.name=branch", "model.depth=34")
    begins_with = f"{cfg.run.storage}/run/checkpoints/step_00000001"
    assert refused(cfg, begins_with).startswith(f"model.depth=34: {begins_with} was trained with 18")


def test_damaged_checkpoints_are_told_by_the_workers_and_decide_nothing(settings: Settings) -> None:
    cfg = settings("run.stop_at_step=3")
    newest = Path(cfg.run.storage, "run", "checkpoints", "step_00000002")
    (newest / checkpoint.CONFIG).write_text("model: {depth: 34}")
    assert "step_00000001 was trained with 18" in refused(settings("model.depth=34"))
    events, warnings = list[Event](), list[str]()
    with open_run.open_run(cfg, warnings.append) as spec:
        assert [text for text in warnings if "damaged" in text] == []
        assert fit(spec, context(events=events))["step"] == 3
    assert sum("step_00000002: config.yaml is damaged" in getattr(event, "text", "") for event in events) == 1


def test_a_command_tells_of_newer_checkpoints_that_it_does_not_take(
    settings: Settings, run: Run, tmp_path: Path
) -> None:
    """Else `pipeline evaluate` would give an older one's figures as if they were the newest's."""
    (Path(settings().run.storage, "run", "checkpoints", "step_00000002") / checkpoint.CONFIG).write_text("{}")
    code, out, err = run("evaluate", "run", "--storage", f"{tmp_path}/runs", "--json")
    assert code == 0
    assert "step_00000001" in out
    assert "warning: skipped a checkpoint: " in err
    assert "step_00000002: config.yaml is damaged" in err


def test_images_that_have_gone_are_told_before_any_worker_starts(
    settings: Settings, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits / "val", tmp_path / "images")
    build_index(tmp_path / "images")[0].save(tmp_path / "images.arrow")
    (tmp_path / "images").rename(tmp_path / "away")
    cfg = settings(f"data.val={tmp_path}/images.arrow", "run.name=new")
    line = f"data.val: the index's images are not there: {tmp_path}/images is missing or empty"
    with pytest.raises(UserError, match=f"{line}; restore them"), open_run.open_run(cfg, print):
        pass
    warnings = list[str]()
    with open_run.open_run(dataclasses.replace(cfg, cluster=ClusterConfig(address="head:6379")), warnings.append):
        assert warnings == [f"{line} on the driver's machine"]


def test_what_teaches_nothing_is_refused_before_any_worker_starts(
    settings: Settings, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits / "val" / "3", tmp_path / "one" / "3")
    (tmp_path / "photos.zip").write_bytes(b"PK")
    for name, line in (
        ("one", f"data.train={tmp_path}/one: all images are of one class, 3; give at least two class folders"),
        ("photos.zip", f"{tmp_path}/photos.zip is an archive, which is not read in place; unpack it"),
    ):
        cfg = settings(f"data.train={tmp_path}/{name}", "run.name=new")
        with pytest.raises(UserError, match=line), open_run.open_run(cfg, print):
            pass


def test_where_all_are_damaged_it_is_told_at_once(settings: Settings) -> None:
    cfg = settings()
    for place in Path(cfg.run.storage, "run", "checkpoints").glob("step_*"):
        (place / checkpoint.STATE).write_bytes(b"short")
    assert "none of the 2 checkpoints in" in refused(cfg)


def test_the_driver_reads_no_state(settings: Settings) -> None:
    """Which may be gigabytes, in an object store."""
    cfg = settings()
    for place in Path(cfg.run.storage, "run", "checkpoints").glob("step_*"):
        os.truncate(place / checkpoint.STATE, 0)
        os.truncate(place / checkpoint.STATE, checkpoint.read_meta(Storage(place))["files"][checkpoint.STATE]["size"])
    with open_run.open_run(cfg, print):
        pass


def test_a_command_that_is_refused_leaves_the_runs_index(settings: Settings, digits: Path) -> None:
    """Its workers, on whatever machine, begin each attempt with it."""
    cfg = settings(f"data.train={digits}/val", f"data.val={digits}/val", "run.name=run")
    with open_run.open_run(settings(f"data.train={digits}/train", f"data.val={digits}/val"), print) as spec:
        before = Path(spec.train_index).read_bytes()
    with pytest.raises(UserError, match="was trained on other images"), open_run.open_run(cfg, print):
        pass
    assert Path(spec.train_index).read_bytes() == before
    assert sorted(path.name for path in Path(spec.train_index).parent.iterdir()) == ["train.arrow", "val.arrow"]


def test_an_open_run_has_nothing_left_to_do_in_its_storage(settings: Settings, digits: Path) -> None:
    """Which may be away in the end: that would hide how the training has ended."""
    with open_run.open_run(settings(f"data.train={digits}/train", f"data.val={digits}/val"), print) as spec:
        index = Path(spec.train_index).parent
        assert sorted(path.name for path in index.iterdir()) == ["train.arrow", "val.arrow"]
        index.parent.rename(index.parent.with_name("away"))


def test_a_run_that_was_copied_does_not_log_to_the_originals_mlflow_run(settings: Settings, tmp_path: Path) -> None:
    """Each step would have two values there. A whole storage has its own MLflow: that is what `settings` copies."""
    storage = tmp_path / "runs"
    with open_run.open_run(settings(), print):
        pass
    shutil.copytree(storage / "run", storage / "copy")
    line = f"run.name=copy: {storage}/copy is a copy of {storage}/run, and both would log to one run of MLflow"
    with pytest.raises(UserError, match=line), open_run.open_run(settings("run.name=copy"), print):
        pass
    link = tmp_path / "link"
    link.symlink_to(storage)
    with open_run.open_run(settings(f"run.storage={link}"), print):  # the same folder by another path
        pass
    (storage / "run").rename(storage / "moved")
    with open_run.open_run(settings("run.name=moved"), print), open_run.open_run(settings("run.name=copy"), print):
        pass


def test_a_named_store_of_mlflow_is_found_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another directory than the first command's, and after it was moved with the storage."""
    monkeypatch.chdir(tmp_path)
    with open_run.open_run(
        settings("run.name=other", "mlflow.uri=sqlite:///runs/own.db", "run.stop_at_step=1"), print
    ) as spec:
        fit(spec, context())
    monkeypatch.chdir("/")
    found = checkpoint.newest_valid(spec.checkpoints, pytest.fail)
    assert found is not None
    assert find.config_to_resume(found, []).mlflow.uri == f"sqlite:///{tmp_path}/runs/own.db"
    assert (tmp_path / "runs/own.db").exists()
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    found = checkpoint.newest_valid(Storage(tmp_path / "moved/other/checkpoints"), pytest.fail)
    assert found is not None
    assert find.config_to_resume(found, []).mlflow.uri == f"sqlite:///{tmp_path}/moved/own.db"
    override = f"run.storage={tmp_path}/moved"
    assert find.config_to_resume(found, [override]).mlflow.uri == f"sqlite:///{tmp_path}/moved/own.db"
    assert find.config_to_resume(found, ["mlflow.uri=sqlite:////x.db"]).mlflow.uri == "sqlite:////x.db"
