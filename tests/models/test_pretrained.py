"""Beginning with others' weights: torchvision's, timm's, our own; and what happens to the last layer."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from ranks import context
from safetensors.torch import save_file
from torch import Tensor

from pipeline.cli import app
from pipeline.config.loading import load
from pipeline.config.training import ModelConfig
from pipeline.errors import UserError
from pipeline.events import Event, Note
from pipeline.models.pretrained import load_pretrained
from pipeline.models.resnet import ResNet
from pipeline.runs import checkpoint
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.tracking import find
from pipeline.training.loop import fit

TEN = tuple(f"class {i}" for i in range(10))


def new_model(num_classes: int, **settings: Any) -> ResNet:
    torch.manual_seed(3)
    return ResNet(ModelConfig(depth=18, **settings), num_classes)


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(torchvision.models.resnet18(weights=None).state_dict())


def holds(model: ResNet, weights: dict[str, Tensor], *, without: tuple[str, ...] = ()) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items() if name not in without)


def test_torchvisions_file_gives_all_but_the_last_layer_to_ten_classes(
    theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(theirs, tmp_path / "resnet18.pth")
    model, untouched = new_model(10), new_model(10)
    line = load_pretrained(model, str(tmp_path / "resnet18.pth"), TEN)
    assert line.endswith("resnet18.pth; the last layer anew: 1000 classes there, 10 here")
    assert holds(model, theirs, without=("fc.weight", "fc.bias"))
    assert torch.equal(model.fc.weight, untouched.fc.weight)


def test_and_all_to_as_many_classes(theirs: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(theirs, tmp_path / "resnet18.pth")
    model = new_model(1000)
    assert "the last layer, too" in load_pretrained(model, str(tmp_path / "resnet18.pth"), tuple(map(str, range(1000))))
    assert holds(model, theirs)


def test_timms_file_fits_variant_d(tmp_path: Path) -> None:
    weights = timm.create_model("resnet18d", pretrained=False).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    model = new_model(1000, variant="d")
    load_pretrained(model, str(tmp_path / "model.safetensors"), tuple(map(str, range(1000))))
    assert holds(model, weights)


@pytest.mark.parametrize("name", ["model_ema", "state_dict"])
def test_what_training_programs_wrap_around_weights_is_seen_through(
    name: str, theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    averaged = {f"module.{key}": value for key, value in theirs.items()}
    averaged["n_averaged"] = torch.tensor(3)
    torch.save({name: averaged, "optimizer": {}, "epoch": 3}, tmp_path / "checkpoint.pth")
    model = new_model(1000)
    load_pretrained(model, str(tmp_path / "checkpoint.pth"), tuple(map(str, range(1000))))
    assert holds(model, theirs)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "net.", "model._orig_mod.", "_orig_mod.module.encoder_fc."])
def test_what_stands_before_all_names_is_seen_through(prefix: str, theirs: dict[str, Tensor], tmp_path: Path) -> None:
    """Of torch.compile, DDP and Lightning, in any order, and what else such a module holds is left."""
    wrapped = {f"{prefix}{key}": value for key, value in theirs.items()}
    beside = {"loss.weight": torch.ones(3), "accuracy.fc.bias": torch.ones(1), "seen": torch.tensor(3)}
    model = new_model(1000)
    load_pretrained(model, write(tmp_path / "w.ckpt", {"state_dict": wrapped | beside}), tuple(map(str, range(1000))))
    assert holds(model, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_taken(dtype: torch.dtype, theirs: dict[str, Tensor], tmp_path: Path) -> None:
    model = new_model(1000)
    stored = {name: value.to(dtype) if value.is_floating_point() else value for name, value in theirs.items()}
    load_pretrained(model, write(tmp_path / "w.pth", stored), tuple(map(str, range(1000))))
    assert holds(model, {name: value.to(theirs[name].dtype) for name, value in stored.items()})


def test_files_from_before_batch_norms_counted_are_taken(theirs: dict[str, Tensor], tmp_path: Path) -> None:
    """As torchvision's first weights of each depth."""
    model = new_model(1000)
    stored = {name: value for name, value in theirs.items() if not name.endswith("num_batches_tracked")}
    load_pretrained(model, write(tmp_path / "w.pth", stored), tuple(map(str, range(1000))))
    assert holds(model, theirs)


def write(file: Path, content: Any) -> str:
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    return str(file)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")  # torch's, of the sparse tensor
def test_files_that_are_of_no_use_get_one_line(theirs: dict[str, Tensor], tmp_path: Path) -> None:
    resnet50 = torchvision.models.resnet50(weights=None).state_dict()
    headless = {name: value for name, value in theirs.items() if not name.startswith("fc.")}
    for content, message in [
        (resnet50, r"is another network \(.*\); set model.depth and model.variant to its own"),
        (headless, "has no fc.bias; give"),
        (headless | {"head.fc.bias": torch.ones(3)}, "has no layer1.0.conv1.weight under the prefix of its fc.bias; "),
        (
            {f"{who}.{name}": value for who in ("teacher", "student") for name, value in theirs.items()},
            r"holds several networks \(student.fc.bias, teacher.fc.bias\); save the state_dict of one alone",
        ),
        (
            theirs | {"fc.weight": theirs["fc.weight"].to(torch.int8)},
            r"fc.weight is torch.int8, not plain",
        ),
        (
            theirs | {"fc.weight": theirs["fc.weight"].to(torch.complex64)},
            "fc.weight is torch.complex64, ",
        ),
        (
            theirs | {"fc.weight": theirs["fc.weight"].to(torch.float8_e4m3fn)},
            "fc.weight is torch.float8",
        ),
        (theirs | {"fc.weight": theirs["fc.weight"].to_sparse()}, "fc.weight is torch.sparse_coo, not"),
        (theirs | {"bn1.num_batches_tracked": torch.tensor(1j)}, "bn1.num_batches_tracked is torch.comp"),
        (theirs | {"conv1.weight": theirs["conv1.weight"] * torch.nan}, "conv1.weight is not finite"),
        (
            {"model": theirs, "args": argparse.Namespace(lr=1)},
            "is no file of tensors .*; fetch it again, or save the state_dict",
        ),
        (b"<html>not found</html>", "is no file of tensors"),
        (b"", "is no file of tensors"),
        ([1, 2], "is no file of tensors .it holds a list"),
    ]:
        with pytest.raises(UserError, match=f"model.weights={tmp_path}/w.pth: {message}") as e:
            load_pretrained(new_model(10), write(tmp_path / "w.pth", content), TEN)
        assert "\n" not in str(e.value)
    (tmp_path / "w.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is no file of tensors"):
        load_pretrained(new_model(10), str(tmp_path / "w.safetensors"), TEN)


@pytest.fixture
def spec(digits_index: Callable[[str], Path], tmp_path: Path) -> Callable[..., RunSpec]:
    def make(name: str, *overrides: str) -> RunSpec:
        train, val = digits_index("train"), digits_index("val")
        data = [f"data.train={train}", f"data.val={val}", "data.image_size=32", "data.val_resize=32", "model.depth=18"]
        steps = ["train.steps=2", "train.global_batch=64", "optim.warmup_epochs=0", "mlflow.log_model=false"]
        cfg = load(None, [*data, *steps, "mlflow.checkpoints=none", f"run.storage={tmp_path}", *overrides])
        (tmp_path / name).mkdir(exist_ok=True)
        return RunSpec(cfg, Storage(tmp_path / name), str(train), str(val))

    return make


def test_a_run_begins_with_anothers_averaged_weights_and_resumes_with_its_own(spec: Callable[..., RunSpec]) -> None:
    first = spec("first", "train.ema_decay=0.9")
    fit(first, context(0, 1))
    storage = first.run.parent
    place = find.find_weights("first", storage, None)
    averaged = checkpoint.load(Storage(place)).state()["ema"]

    frozen = ["model.freeze=layer4", "train.ema_decay=0.9", "optim.layer_decay=0.7"]
    second, events = spec("second", f"model.weights={place}", *frozen), list[Event]()
    fit(second, context(0, 1, events))
    (note,) = [event.text for event in events if isinstance(event, Note)]
    assert note == f"begins with the weights of {place}; the last layer, too"
    newest = checkpoint.newest_valid(second.checkpoints, pytest.fail)
    assert newest is not None
    for kind in ("model", "ema"):
        saved = newest.state()[kind]
        assert {name for name in averaged if not torch.equal(saved[name], averaged[name])} == {"fc.weight", "fc.bias"}
    events.clear()
    fit(second, context(0, 1, events))
    assert not [event for event in events if isinstance(event, Note)]


def test_weights_that_are_not_there_are_told_before_anything_starts(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.storage={tmp_path}", "model.weights=nowhere"]
    assert app.main(["train", "configs/digits.yaml", *data]) == 2
    assert "model.weights=nowhere: no such file, and no run, MLflow run id or checkpoint" in capsys.readouterr().err
    (tmp_path / "w.pth").write_text("plain text")
    assert app.main(["train", "configs/digits.yaml", *data[:-1], f"model.weights={tmp_path}/w.pth"]) == 2
    assert "w.pth: is no file of tensors" in capsys.readouterr().err
    assert app.main(["runs", "--storage", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out
