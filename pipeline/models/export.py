"""A checkpoint's model as one file that needs nothing of this package: ONNX, or torch.export's pt2.

Both hold the same graph: uint8 pixels in, logits out, computed in fp32, for any number of images. A file is
compared with the model that it was made of before it gets its name, so that one which is there is right.
"""

import copy
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pipeline.config.schema import Config
from pipeline.errors import UserError

FORMATS = ("onnx", "pt2")
NOTES = "model.json"  # in a pt2 file; `pyfunc_model` reads it
TOLERANCE = 1e-4  # largest difference of a probability
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class ExportError(RuntimeError):
    """What was written does not compute what the checkpoint's model does."""


def require_writable(kind: str, out: Path) -> None:
    """Raise UserError for a format or a place that cannot be written to, before anything is loaded."""
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: must be {' or '.join(FORMATS)}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, such as {out / f'model.{kind}'}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or name another file")
    missing = [name for name in ONNX_PACKAGES if kind == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx: {missing[0]} is not installed; install it with: pip install 'pipeline[onnx]'")


def trace_graph(model: nn.Module, size: int) -> ExportedProgram:
    """The graph of a model in eval mode: (N, 3, size, size) uint8 to logits (N, C) float32, for any N from 1 up."""
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # of two images: one would fix N
    # torch.export.save warns of weights in another order.
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    return torch.export.export(plain, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))


def make_notes(cfg: Config, classes: tuple[str, ...], checkpoint: str) -> dict[str, Any]:
    """What a user of the graph must know: classes in the order of the logits, how images are cut, where it is from."""
    size = {"size": cfg.data.size_to_evaluate, "val_resize": cfg.data.val_resize}
    return {"classes": list(classes), **size, "checkpoint": checkpoint}


def export(model: nn.Module, notes: dict[str, Any], images: Tensor, kind: str, out: Path) -> float:
    """Write a model to the file `out`, if it passes the comparison.

    Args:
        notes: see `make_notes`.
        images: (N, 3, S, S) uint8, to compare with, one alone and all in a batch.

    Returns:
        The largest difference of a probability.

    Raises:
        ExportError: another likeliest class, or a probability that differs by more than TOLERANCE.
        UserError: the file cannot be written.
    """
    write, read = {"onnx": (_write_onnx, _read_onnx), "pt2": (write_pt2, _read_pt2)}[kind]
    graph = trace_graph(model, notes["size"])
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        write(graph, notes, temporary)
        difference = _compare(model, read(temporary), images)
        temporary.replace(out)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror or e}); name another file") from None
    finally:
        temporary.unlink(missing_ok=True)
    return difference


@torch.inference_mode()
def _compare(model: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor) -> float:
    difference = 0.0
    for number in (1, len(images)):
        expected, actual = (run(images[:number]).double().softmax(1) for run in (model, exported))
        difference = max(difference, float((expected - actual).abs().max()))
        if not torch.equal(expected.argmax(1), actual.argmax(1)):
            raise ExportError(f"in a batch of {number} it takes an image for another class than the checkpoint does")
    if not difference <= TOLERANCE:  # also where it is not a number
        raise ExportError(f"a probability differs from the checkpoint's by {difference:.1e}, more than {TOLERANCE:.0e}")
    return difference


def write_pt2(graph: ExportedProgram, notes: dict[str, Any], to: Path) -> None:
    """Write a graph with its notes, for `torch.export.load`."""
    with to.open("wb") as f:  # a path would have to end in .pt2
        torch.export.save(graph, f, extra_files={NOTES: json.dumps(notes)})


def _read_pt2(file: Path) -> Callable[[Tensor], Tensor]:
    with file.open("rb") as f:
        return torch.export.load(f).module()


def _write_onnx(graph: ExportedProgram, notes: dict[str, Any], to: Path) -> None:
    program = torch.onnx.export(
        graph,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),  # the name of what is dynamic already
    )
    assert program is not None, "dynamo=True gives a program"
    program.model.metadata_props.update({key: json.dumps(value) for key, value in notes.items()})
    program.save(to, external_data=False)


def _read_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
