"""Exported files compute what the checkpoint does, for any number of images; one that does not is never there."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from commands import Run
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models import export, pretrained
from pipeline.storage import Storage
from pipeline.training import inference

NUM_IMAGES = 360  # all of the validation set


def load_onnx(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    session = onnxruntime.InferenceSession(file)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("images", "tensor(uint8)", ["batch", 3, 32, 32])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    notes = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), notes


def load_pt2(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    files = {export.NOTES: ""}
    return torch.export.load(file, extra_files=files).module(), json.loads(files[export.NOTES])


@pytest.mark.parametrize(("kind", "read"), [("onnx", load_onnx), ("pt2", load_pt2)])
def test_a_file_says_of_the_validation_set_what_the_checkpoint_says(
    run: Run, trained: dict[str, Any], tmp_path: Path, kind: str, read: Callable[..., Any]
) -> None:
    out = tmp_path / f"model.{kind}"
    code, output, _ = run("export", trained["run_dir"], "--format", kind, "--out", out, "--json")
    result = json.loads(output)
    assert (code, result["status"], result["compared"]["of"]) == (0, "done", "validation images")
    assert result["compared"]["batches"] == [1, 16]
    assert 0 <= result["compared"]["largest_difference"] <= 1e-4
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    exported, notes = read(out)
    model, cfg, classes = pretrained.load_model(Storage(trained["checkpoint"]))
    assert notes == {"classes": list(classes), "size": 32, "val_resize": 32, "checkpoint": "step_00000066"}
    images, _ = inference.some_images(cfg, NUM_IMAGES)
    assert len(images) == NUM_IMAGES
    with torch.inference_mode():
        expected = model(images).softmax(1)
        for number in (1, 7, NUM_IMAGES):
            probabilities = exported(images[:number]).softmax(1)
            assert torch.equal(probabilities.argmax(1), expected[:number].argmax(1))
            torch.testing.assert_close(probabilities, expected[:number], rtol=0, atol=1e-4)


class OtherWhenExported(nn.Module):
    """A network whose graph is not what it computes, as a failure of an exporter would have it."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images / 255)
        return logits * self.factor if torch.compiler.is_exporting() else logits


@pytest.mark.parametrize(
    ("factor", "message"),
    [(1.01, "a probability differs"), (-1.0, "another class"), (float("nan"), "another class|nan")],
)
def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, factor: float, message: str) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    notes = {"size": 8, "val_resize": 8, "classes": list("abcd"), "checkpoint": "none"}
    out = tmp_path / "model.pt2"
    out.write_text("of before")
    with pytest.raises(export.ExportError, match=message):
        export.export(OtherWhenExported(factor), notes, images, "pt2", out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_text() == "of before"
    export.export(OtherWhenExported(1.0), notes, images, "pt2", out)
    assert load_pt2(out)[1] == notes


def test_without_the_validation_set_random_images_are_compared(trained: dict[str, Any]) -> None:
    _, cfg, _ = pretrained.load_model(Storage(trained["checkpoint"]))
    gone = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, val="/gone"))
    images, source = inference.some_images(gone, 5)
    assert (tuple(images.shape), images.dtype) == ((5, 3, 32, 32), torch.uint8)
    assert source.startswith("random images (of the run's own: no folder")
    assert torch.equal(images, inference.some_images(gone, 5)[0])


def test_what_cannot_be_written_gets_one_line(run: Run, trained: dict[str, Any], tmp_path: Path) -> None:
    for kind, out, message in (
        ("tflite", tmp_path / "m", "--format tflite: must be onnx or pt2"),
        ("onnx", tmp_path, f"--out {tmp_path}: is a folder; name a file, such as {tmp_path}/model.onnx"),
        ("pt2", tmp_path / "none" / "m.pt2", f"there is no folder {tmp_path}/none"),
        ("pt2", Path("/proc/m.pt2"), "--out /proc/m.pt2: cannot be written"),
    ):
        code, output, err = run("export", trained["run_dir"], "--format", kind, "--out", out)
        assert (code, output, err.count("\n")) == (2, "", 1), err
        assert message in err


def test_without_the_extra_onnx_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    with pytest.raises(
        UserError, match=r"onnxscript is not installed; install it with: pip install 'pipeline\[onnx\]'"
    ):
        export.require_writable("onnx", tmp_path / "m.onnx")
    export.require_writable("pt2", tmp_path / "m.pt2")
