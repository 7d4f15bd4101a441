"""The report: its figures are the run's, names from outside stay text, it needs nothing but itself, and it arrives."""

import dataclasses
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from ranks import FAST, context
from rich.cells import cell_len
from s3 import free_port
from servers import MlflowServer

from pipeline.cli import app
from pipeline.config.loading import changed_keys, dump, load, marked
from pipeline.data.indexing.build import build_index
from pipeline.events import Event, Warned
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.tracking import summary
from pipeline.tracking.metrics import Predictions
from pipeline.tracking.mlflow_logger import MlflowLogger
from pipeline.tracking.mlflow_run import MlflowRun, Target
from pipeline.tracking.records import Report
from pipeline.tracking.report import charts
from pipeline.tracking.report.page import MAX_MATRIX, NUM_MISTAKES, Facts, Mistake, write_report
from pipeline.training import recorder
from pipeline.training.loop import fit

ODD = ["<script>alert(1)</script>", '"><img src=http://evil.example/x>', "日本語のクラス", "$\\frac{a}{b$", "x" * 300]
HISTORY = {metric: [(step, 1.0 / step) for step in range(1, 400)] for metric in charts.METRICS}
PNG, JPEG = b"\x89PNG", b"\xff\xd8\xff"


class Page(HTMLParser):
    """What a browser would make of it: tags, their attributes, tables row by row."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text, self._open = "", False
        cards = re.findall(r'<div class="card"><b>(.*?)</b><span>(.*?)</span>', text)
        self.cards = {name: value for value, name in cards}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._open = True
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag != "table"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data.strip()

    def table(self, heading: str) -> list[list[str]]:
        """The rows of the first table with this column."""
        return next(table[1:] for table in self.tables if heading in table[0])


def predictions_of(num_classes: int, num_images: int) -> Predictions:
    """What a model might say that is right on about two thirds."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, num_images)
    first = np.where(rng.random(num_images) < 2 / 3, labels, rng.integers(0, num_classes, num_images))
    best = np.stack([(first + k) % num_classes if k < num_classes else np.full_like(first, -1) for k in range(5)], 1)
    sure = rng.random(num_images)
    probabilities = np.stack([sure, *((1 - sure) / 2**k for k in range(1, 5))], 1)
    return Predictions(labels, best, probabilities, -np.log(sure + 1e-3))


def facts_of(classes: list[str], num_images: int = 600) -> Facts:
    predictions = predictions_of(len(classes), num_images)
    meta: dict[str, Any] = {
        "classes": classes,
        "step": 40,
        "num_steps": 50,
        "attempts": 2,
        "failures": 1,
        "best_top1": 0.7,
    }
    meta |= {"seconds": {"forward": 30.0, "data wait": 10.0}, "images_per_s": 123.4, "versions": {"torch": "9.9"}}
    cfg = load(None, ["data.train=here/train", "data.val=here/val", "model.depth=34", "data.crop_scale=[0.5,1.0]"])
    mistakes = [Mistake(int(row), f"val/{row}.jpg", JPEG) for row in predictions.confident_mistakes(NUM_MISTAKES)]
    return Facts("odd", "here/val", meta, cfg, predictions, mistakes)


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_figures_of_classes_follow_from_the_confusion_matrix() -> None:
    predictions = predictions_of(7, 300)
    matrix = predictions.confusion(7)
    for k, one in enumerate(predictions.per_class(7)):
        assert one.images == matrix[k].sum()
        assert one.recall == pytest.approx(matrix[k, k] / matrix[k].sum())
        assert one.precision == pytest.approx(matrix[k, k] / matrix[:, k].sum())
        others = np.delete(matrix[k], k)
        assert one.taken_for is not None
        assert one.taken_for[1] == others.max() == matrix[k, one.taken_for[0]]
    pairs = predictions.confused()
    assert sorted(pairs, key=lambda pair: -pair[2]) == pairs
    assert {(a, b): n for a, b, n in pairs} == {
        (a, b): matrix[a, b] for a in range(7) for b in range(7) if a != b and matrix[a, b]
    }
    mistakes = predictions.confident_mistakes(5)
    assert not predictions.correct[mistakes].any()
    of_mistakes = predictions.probabilities[predictions.correct == 0, 0]
    assert predictions.probabilities[mistakes[-1], 0] >= np.sort(of_mistakes)[-5]


def test_a_class_without_images_has_no_accuracy() -> None:
    predictions = dataclasses.replace(predictions_of(3, 30), labels=np.ones(30, dtype=np.int64))
    assert [(one.images, one.recall) for one in predictions.per_class(3)[::2]] == [(0, None), (0, None)]
    assert facts_of(["a", "b"]).worst_first()[0].recall is not None


def test_the_page_shows_the_facts(tmp_path: Path) -> None:
    facts = facts_of([f"class {k}" for k in range(10)])
    files = write_report(facts, HISTORY, tmp_path / "out")
    assert files == ["report.html", "curves.png", "time.png", "reliability.png", "confusion.png"]
    assert all((tmp_path / "out" / name).read_bytes().startswith(PNG) for name in files[1:])
    page, scores = page_of(tmp_path / "out"), facts.predictions.scores()
    assert page.cards["top-1 accuracy"] == f"{scores['top1']:.2%}"
    assert page.cards["loss, nats"] == f"{scores['loss']:.4f}"
    assert page.cards["calibration error"] == f"{scores['ece']:.4f}"
    assert (page.cards["goodput"], page.cards["images/s"], page.cards["attempts"]) == ("75.0%", "123", "2")
    assert ["data wait", "10.0", "25.0%", ""] in page.table("phase")
    accuracies = [float(row[2].rstrip("%")) for row in page.table("accuracy")]
    assert len(accuracies) == 10
    assert accuracies == sorted(accuracies), "the worst class first"
    matrix = [[int(cell or 0) for cell in row[2:]] for row in page.table("true class")]
    assert matrix == facts.predictions.confusion(10).tolist()
    assert ["torch", "9.9"] in page.tables[-1]
    pictures = [
        attributes for tag, attributes in page.tags if tag == "img" and (attributes["src"] or "")[5:15] == "image/jpeg"
    ]
    assert [one["title"] for one in pictures] == [one.place for one in facts.mistakes]


def test_names_from_outside_stay_text_and_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    """Class names are folder names of anyone's data set; some are code, some are in no font, some never end."""
    for classes in (ODD, ODD + [f"c{k}" for k in range(MAX_MATRIX)]):
        write_report(facts_of(classes), HISTORY, tmp_path)
        page = page_of(tmp_path)
        assert "script" not in {tag for tag, _ in page.tags}
        assert all(name in page.text for name in ODD[:4])
        for tag, attributes in page.tags:
            assert tag not in ("link", "iframe", "object")
            assert (attributes.get("src") or "data:").startswith("data:")
            assert (attributes.get("href") or "#").startswith("#")
            assert not any(name.startswith("on") for name in attributes)
        assert not re.search(r"url\(|@import", (tmp_path / "report.html").read_text(encoding="utf-8"))


def test_a_names_characters_may_be_in_any_font_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Chinese and Japanese ones are; here with a font that comes with matplotlib."""

    def drawn_as_unknown(*fonts: str) -> bool:
        monkeypatch.setattr(charts, "FONTS", ("DejaVu Sans", *fonts))
        charts._fonts.cache_clear()
        for first, file in (("\u20d2", "a.png"), ("?", "b.png")):
            charts.confusion(predictions_of(2, 30), [first, "b"], tmp_path / file)
        return (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    assert drawn_as_unknown("no such font")
    assert not drawn_as_unknown("no such font", "STIXGeneral")
    charts._fonts.cache_clear()


def test_of_a_thousand_classes_the_worst_and_the_best_are_shown(tmp_path: Path) -> None:
    facts = facts_of([f"n{k:04d}" for k in range(1000)], 20_000)
    write_report(facts, {}, tmp_path, "MLflow is away")
    page = page_of(tmp_path)
    shown = [[row[0] for row in table[1:]] for table in page.tables if "accuracy" in table[0]]
    ranked = [facts.classes[one.label] for one in facts.worst_first()]
    assert shown == [ranked[:25], ranked[-25:]]
    assert "The 25 worst of 1,000 classes" in page.text
    assert [row[:2] for row in page.table("of the class's")] == [
        [facts.classes[a], facts.classes[b]] for a, b, _ in facts.predictions.confused()[:12]
    ]
    assert "There are no curves: MLflow is away" in page.text
    assert not (tmp_path / "curves.png").exists()


def test_facts_laid_aside_give_the_same_page(tmp_path: Path) -> None:
    facts = facts_of(ODD)
    (tmp_path / "aside").mkdir()
    facts.save(tmp_path / "aside")
    write_report(facts, HISTORY, tmp_path / "now")
    write_report(Facts.load(tmp_path / "aside"), HISTORY, tmp_path / "later")
    now, later = ((tmp_path / name / "report.html").read_text(encoding="utf-8") for name in ("now", "later"))
    made = re.compile(r"written .* UTC")
    assert made.sub("", now) == made.sub("", later)


def test_an_early_checkpoint_of_a_perfect_model(tmp_path: Path) -> None:
    """No mistakes, and a meta.json that tells nothing but what the first ones told."""
    facts = facts_of(["a", "b"])
    labels = facts.predictions.labels
    best = np.stack([labels, 1 - labels, *[np.full_like(labels, -1)] * 3], 1)
    right, meta = dataclasses.replace(facts.predictions, best=best), {"classes": ["a", "b"], "step": 1}
    write_report(dataclasses.replace(facts, predictions=right, meta=meta, mistakes=[]), {}, tmp_path)
    page = page_of(tmp_path)
    assert (page.cards["top-1 accuracy"], page.cards["goodput"], page.cards["failures"]) == ("100.00%", "-", "-")
    assert "There are none." in page.text


def test_settings_that_differ_are_marked() -> None:
    cfg = facts_of(["a", "b"]).cfg
    changed = changed_keys(cfg)
    assert changed == {"data.train", "data.val", "model.depth", "data.crop_scale"}
    lines = [line.strip() for line, differs in marked(dump(cfg), changed) if differs]
    assert lines == ["train: here/train", "val: here/val", "crop_scale:", "- 0.5", "- 1.0", "depth: 34"]


@pytest.fixture(scope="module")
def own_images(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 100 digits, and its index beside it, which tests may take away."""
    folder = tmp_path_factory.mktemp("own")
    for file in sorted((digits / "val").glob("*/*.jpg"))[::3]:
        (folder / "val" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / "val" / file.parent.name)
    build_index(folder / "val")[0].save(folder / "val.arrow")
    return folder


def make_job(folder: Path, images: Path, *overrides: str) -> RunSpec:
    sources = [f"data.train={images}/val.arrow", f"data.val={images}/val.arrow"]
    few = ["train.steps=4", "train.log_every=1", "optim.warmup_epochs=0.1", "mlflow.report=true", "checkpoint.every=2"]
    cfg = load(None, [*sources, *FAST, "train.global_batch=64", *few, f"run.storage={folder}", *overrides])
    (folder / "drawn").mkdir(exist_ok=True)
    return RunSpec(cfg, Storage(folder / "drawn"), f"{images}/val.arrow", f"{images}/val.arrow")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, own_images: Path) -> dict[str, Any]:
    """The summary of a short training, at whose end its report was made."""
    events: list[Event] = []
    summary = fit(make_job(tmp_path_factory.mktemp("runs"), own_images), context(events=events))
    assert [e.text for e in events if isinstance(e, Warned)] == []
    return summary


def fetched(uri: str, run_id: str, to: Path) -> Path:
    """The report among a run's artifacts."""
    return Path(mlflow.MlflowClient(uri).download_artifacts(run_id, "report", str(to)))


def test_a_training_ends_with_its_report_in_mlflow(trained: dict[str, Any], tmp_path: Path) -> None:
    folder = fetched(trained["mlflow_uri"], trained["mlflow_run_id"], tmp_path)
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["confusion.png", "curves.png", "reliability.png", "report.html", "time.png"]
    page = page_of(folder)
    assert page.cards["top-1 accuracy"] == f"{trained['top1']:.2%}"
    assert page.cards["loss, nats"] == f"{trained['loss']:.4f}"
    text = " ".join(page.text.split())
    assert "step 4 of 4" in text
    assert "Counted until this report: what came after it" in text
    pictures = [one for tag, one in page.tags if tag == "img" and "title" in one]
    wrong = round((1 - trained["top1"]) * 120)
    assert len(pictures) == min(NUM_MISTAKES, wrong)
    left = sorted(p.name for p in (Path(trained["run_dir"]) / "mlflow").iterdir())
    assert left == ["id", "outbox.jsonl", "sent.json", "target.json"], "what was laid aside is gone"


def test_a_report_that_was_logged_is_not_asked_for_twice(trained: dict[str, Any], tmp_path: Path) -> None:
    """A process that ends between logging it and noting that."""
    identity = json.loads((Path(trained["run_dir"]) / "run.json").read_text())
    run = MlflowRun(Target(trained["mlflow_uri"], "pipeline", trained["run_dir"], identity["training_id"]))
    before = (fetched(trained["mlflow_uri"], run.id, tmp_path) / "report.html").read_bytes()
    run.send([Report(str(tmp_path / "gone"))])
    (tmp_path / "again").mkdir()
    assert (fetched(trained["mlflow_uri"], run.id, tmp_path / "again") / "report.html").read_bytes() == before


def test_a_report_that_cannot_be_drawn_is_told_and_what_follows_is_sent(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("pipeline.tracking.report.page.write_report", fail)
    problems: list[str] = []
    target = Target(trained["mlflow_uri"], "pipeline", str(tmp_path), "undrawn")
    logger = MlflowLogger(target, tmp_path, problems.append)
    logger.log_report(facts_of(["a", "b"]))
    assert logger.close("FINISHED", 60) == 0
    assert problems == ["no report is made: RuntimeError: no ink"]
    assert mlflow.MlflowClient(target.uri).get_run(logger.run_id).info.status == "FINISHED"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["id", "outbox.jsonl", "sent.json", "target.json"]


def test_facts_that_cannot_be_laid_aside_are_told_and_end_nothing(
    trained: dict[str, Any], tmp_path: Path, own_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Predictions, file: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Predictions, "save", fail)
    events: list[Event] = []
    spec = make_job(tmp_path, own_images, f"mlflow.uri={trained['mlflow_uri']}", "train.steps=2")
    summary = fit(spec, context(events=events))
    assert (summary["status"], summary["mlflow_waiting"]) == ("done", 0)
    (warning,) = (e.text for e in events if isinstance(e, Warned))
    assert "no report is made (OSError: [Errno 28] No space left on device); try again: pipeline report" in warning
    assert [p.name for p in (tmp_path / "drawn/mlflow").iterdir() if p.is_dir()] == []


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_report_comes_later_where_mlflow_was_away(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By then neither the images nor the checkpoints are there."""
    monkeypatch.setattr(recorder, "MLFLOW_END_S", 1.0)
    images, runs = tmp_path / "images", tmp_path / "runs"
    shutil.copytree(digits / "val", images / "val")
    build_index(images / "val")[0].save(images / "val.arrow")
    runs.mkdir()
    with MlflowServer(tmp_path, free_port()) as server:
        summary = fit(make_job(runs, images, f"mlflow.uri={server.uri}"), context(events=[]))
        assert summary["mlflow_waiting"] > 0
        shutil.rmtree(images)
        shutil.rmtree(runs / "drawn/checkpoints")
        server.start()
        capsys.readouterr()
        assert app.main(["sync", summary["run_dir"], "--json"]) == 0
        synced = json.loads(capsys.readouterr().out)
        page = page_of(fetched(server.uri, synced["mlflow_run_id"], tmp_path))
    assert page.cards["top-1 accuracy"] == f"{summary['top1']:.2%}"
    assert any((one.get("src") or "").startswith("data:image/jpeg") for _, one in page.tags)


def report(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = app.main(["report", *map(str, args)])
    return code, *capsys.readouterr()


def test_report_on_demand(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.time()
    code, out, err = report(capsys, trained["run_dir"])
    assert (code, err) == (0, "")
    assert max(cell_len(line) for line in out.splitlines() if not line.startswith(("/", "open"))) <= 80
    assert f"top-1 {trained['top1']:.4f}" in out
    assert "open report-drawn/report.html" in out
    assert "logged to MLflow, below report/" in out
    again = fetched(trained["mlflow_uri"], trained["mlflow_run_id"], tmp_path)
    assert (again / "report.html").read_bytes() == Path("report-drawn/report.html").read_bytes()
    assert Path("report-drawn/curves.png").stat().st_mtime >= began


def test_report_of_other_images_or_an_older_checkpoint_is_not_the_runs(
    trained: dict[str, Any], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = report(capsys, trained["run_dir"], "--data", digits / "val", "--out", tmp_path / "a", "--json")
    found = json.loads(out)
    assert (code, found["count"], found["not_logged"], found["curves_note"]) == (
        0,
        360,
        "its images are not the run's own (--data)",
        None,
    )
    assert len(found["worst_classes"]) == 10
    older = min(Path(trained["checkpoint"]).parent.glob("step_*"))
    code, out, _ = report(capsys, older, "--out", tmp_path / "b", "--json")
    found = json.loads(out)
    assert (code, found["not_logged"]) == (0, "step_00000004 is newer")
    assert found["step"] < 4


def test_report_without_mlflow_says_so(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    code, out, _ = report(capsys, trained["run_dir"], "--out", tmp_path, "--mlflow-uri", away)
    assert code == 0
    assert f"no curves: MLflow at {away} does not answer: " in out
    assert f"There are no curves: MLflow at {away} does not answer" in page_of(tmp_path).text
    other = f"sqlite:///{tmp_path}/none.db"
    code, out, _ = report(capsys, trained["run_dir"], "--out", tmp_path, "--mlflow-uri", other)
    assert code == 0
    assert f"not logged to MLflow: MLflow at {other} does not know this training" in out
    assert not (tmp_path / "none.db").exists()


def test_the_time_of_a_training_that_is_done_is_its_summarys(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No checkpoint knows what came after it."""

    def shown(*args: object) -> tuple[str, dict[str, float], float]:
        code, out, _ = report(capsys, *args, "--out", tmp_path, "--json")
        assert code == 0
        found = json.loads(out)
        return found["counted"], found["seconds"], found["goodput"]

    told = summary.complete(trained | {"ended": time.time() - 60})
    summary.save(told, pytest.fail)
    counted, seconds, goodput = shown(trained["run_dir"])
    assert (counted, seconds, seconds["shut-down"] >= 60) == ("over the whole training", told["seconds"], True)
    assert goodput == pytest.approx(told["goodput"], abs=1e-3)
    assert "Counted over the whole training." in " ".join(page_of(tmp_path).text.split())
    older = min(Path(trained["checkpoint"]).parent.glob("step_*"))
    counted, seconds, _ = shown(older)
    assert (counted, seconds["shut-down"]) == (f"until step {int(older.name[5:])}", 0)
    (Path(trained["run_dir"]) / summary.FILE).unlink()


def test_only_the_summary_of_that_end_counts(tmp_path: Path) -> None:
    """Not one of a training that was stopped or killed since, of another one in the same folder, or a damaged one."""
    told = {"status": "done", "training_id": "mine", "step": 4, "seconds": {"compute": 1.5}, "run_dir": str(tmp_path)}
    summary.save(told, pytest.fail)
    assert summary.read_seconds(Storage(tmp_path), "mine", 4) == {"compute": 1.5}
    assert summary.read_seconds(Storage(tmp_path / "none"), "mine", 4) == {}
    others = ({"status": "stopped"}, {"training_id": "another"}, {"step": 2}, {"seconds": None})
    for content in (b"", b"[]", *(json.dumps(told | other).encode() for other in others)):
        (tmp_path / summary.FILE).write_bytes(content)
        assert summary.read_seconds(Storage(tmp_path), "mine", 4) == {}


def test_a_summary_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    summary.save({"run_dir": str(tmp_path / "gone")}, told.append)
    assert len(told) == 1
    assert f"{tmp_path}/gone/summary.json is not written" in told[0]


@pytest.fixture(scope="module")
def unheard(tmp_path_factory: pytest.TempPathFactory, own_images: Path) -> tuple[dict[str, Any], str]:
    """The summary of a training that MLflow never heard of, and where that was looked for."""
    away = f"http://127.0.0.1:{free_port()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "MLFLOW_END_S", 0.1)
        spec = make_job(tmp_path_factory.mktemp("unheard"), own_images, f"mlflow.uri={away}", "mlflow.log_model=false")
        return fit(spec, context()), away


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, float]]]:
    """The curves that were drawn last."""
    last: dict[str, list[tuple[int, float]]] = {}
    draw = charts.curves

    def curves(history: charts.History, file: Path) -> None:
        last.clear()
        last.update({name: list(points) for name, points in history.items()})
        draw(history, file)

    monkeypatch.setattr(charts, "curves", curves)
    return last


def test_curves_that_mlflow_never_got_are_drawn_from_the_outbox(
    unheard: tuple[dict[str, Any], str],
    tmp_path: Path,
    drawn: dict[str, list[tuple[int, float]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    done, away = unheard
    run = tmp_path / "copy"
    shutil.copytree(done["run_dir"], run)
    code, out, _ = report(capsys, run, "--out", tmp_path / "out")
    assert code == 0
    assert f"curves: drawn from what {run} keeps for MLflow: MLflow at {away} does not answer: " in out
    assert f"Curves drawn from what {run} keeps for MLflow: " in page_of(tmp_path / "out").text
    assert set(drawn) == set(charts.METRICS)
    assert [step for step, _ in drawn["train/loss"]] == [1, 2, 3, 4]
    assert drawn["val/top1"][-1] == (4, done["top1"])

    outbox = run / "mlflow/outbox.jsonl"
    records = [json.loads(line) for line in outbox.read_text().splitlines()]
    late = [one for one in records if one["kind"] == "metrics" and one["step"] > 2]
    outbox.write_text("".join(json.dumps(one) + "\n" for one in late) + '{"kind": "met')
    code, out, _ = report(capsys, run, "--out", tmp_path / "out", "--json")
    assert "MLflow, from step 3 on (MLflow got what came before): " in json.loads(out)["curves_note"]
    assert [step for step, _ in drawn["train/loss"]] == [3, 4], "and half a line hurts nobody"


def test_what_waits_continues_mlflows_curves(
    trained: dict[str, Any],
    tmp_path: Path,
    drawn: dict[str, list[tuple[int, float]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the outbox of this machine; or beside the checkpoints, where the run lies on an object store."""
    run = tmp_path / "copy"
    shutil.copytree(trained["run_dir"], run)
    waiting = [{"kind": "metrics", "time": 0, "step": step, "values": {"train/loss": 9.0, "x": 1}} for step in (5, 6)]
    (run / "mlflow/outbox.jsonl").write_text(json.dumps(waiting[1]) + "\n")
    target = {"uri": "", "experiment": "", "run": "", "training_id": ""}
    kept = [{"owner": "another", "target": target}, {"kind": "tags"}, waiting[0]]
    (run / "mlflow-backlog").mkdir()
    (run / "mlflow-backlog/00000001.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    code, out, _ = report(capsys, run, "--out", tmp_path / "out", "--mlflow-uri", trained["mlflow_uri"], "--json")
    assert (code, json.loads(out)["curves_note"]) == (0, None)
    assert [step for step, _ in drawn["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert drawn["train/loss"][4:] == [(5, 9.0), (6, 9.0)]


def test_wrong_requests_get_one_line(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (("nothing", "--storage", tmp_path), "no run, MLflow run id or checkpoint 'nothing'"),
        ((trained["run_dir"], "--out", tmp_path / "file"), f"--out {tmp_path}/file: File exists; name another"),
        (
            (trained["run_dir"], "--data", tmp_path / "no", "--out", tmp_path / "o"),
            f"no folder or index file {tmp_path}/no",
        ),
    ):
        code, out, err = report(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
