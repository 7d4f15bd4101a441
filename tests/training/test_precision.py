"""What a training computes in: as its devices can, told with its reason, kept by a resume, and never in silence slow.

Devices are faked, so that every kind of machine is seen on any.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
import pytest
import torch
import torch.distributed as dist
from commands import ROOT
from ranks import context, run_ranks

from pipeline.bench.planning import plan
from pipeline.cli import app
from pipeline.config.loading import load
from pipeline.data.loading.loader import LoaderContext
from pipeline.events import AttemptStarted, Event, Warned
from pipeline.runs import checkpoint
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training import inference, loop, precision, setup
from pipeline.training.evaluation import log_probabilities
from pipeline.training.loop import fit
from pipeline.training.precision import Hardware, cpu, decide, emulation, gpu, settle
from pipeline.training.step import autocast, train_step

CPU = torch.device("cpu")
ZEN3 = {"avx2": True}
SKYLAKE = ZEN3 | {"avx512_f": True}
ZEN4 = SKYLAKE | {"avx512_bf16": True}
SAPPHIRE = ZEN4 | {"amx_bf16": True, "avx512_fp16": True}
ARM = {"neon": True}
NONE = "no bf16 arithmetic in this CPU"
ON_AVX2 = cpu(ZEN3, "AVX2", {})
ON_ZEN4 = cpu(ZEN4, "AVX512", {})
TINY = [
    *("data.image_size=24", "data.val_resize=24", "model.depth=18", "train.global_batch=8", "optim.warmup_epochs=0"),
    *("train.steps=2", "mlflow.log_model=false", "mlflow.report=false", "mlflow.checkpoints=none"),
]


@pytest.mark.parametrize(
    ("features", "vectors", "environ", "wanted", "reason"),
    [
        (ZEN3, "AVX2", {}, "fp32", NONE),
        (SKYLAKE, "AVX512", {}, "fp32", NONE),
        (ZEN4, "AVX512", {}, "bf16", "AVX512_BF16"),
        (SAPPHIRE, "AVX512", {}, "bf16", "AMX"),
        (SAPPHIRE, "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bf16", "AVX512_BF16"),
        (SAPPHIRE, "AVX512", {"ONEDNN_MAX_CPU_ISA": "ALL"}, "bf16", "AMX"),
        (ZEN4, "AVX512", {"ONEDNN_MAX_CPU_ISA": "avx2"}, "fp32", "ONEDNN_MAX_CPU_ISA=avx2 leaves out this CPU"),
        (ZEN4, "AVX512", {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, "fp32", "DNNL_MAX_CPU_ISA=AVX512_CORE leaves out"),
        (ZEN4, "AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}, "fp32", "ATEN_CPU_CAPABILITY=avx2 leaves out"),
        (ZEN4, "DEFAULT", {}, "fp32", NONE),
        (ARM, "DEFAULT", {}, "fp32", NONE),
        (ARM | {"bf16": True}, "DEFAULT", {}, "bf16", "Arm's bf16"),
        ({}, "DEFAULT", {}, "fp32", NONE),
    ],
)
def test_a_cpu_computes_in_what_it_has(
    features: dict[str, bool], vectors: str, environ: dict[str, str], wanted: str, reason: str
) -> None:
    decision = decide("auto", [cpu(features, vectors, environ)])
    assert decision.precision == wanted
    assert decision.reason.startswith(reason)
    assert decision.warning is None


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [((10, 0), "bf16"), ((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 1), "fp32")],
)
def test_a_gpu_computes_in_what_it_has(capability: tuple[int, int], wanted: str) -> None:
    decision = decide("auto", [gpu(capability)])
    assert decision.precision == wanted
    assert decision.reason == "compute capability {}.{}".format(*capability)


@pytest.mark.parametrize(
    ("workers", "wanted", "reason"),
    [
        ([gpu((9, 0)), gpu((8, 0))], "bf16", "compute capability 9.0"),
        ([gpu((9, 0)), gpu((7, 5))], "fp16", "worker 1: compute capability 7.5"),
        ([gpu((7, 0)), gpu((9, 0))], "fp16", "compute capability 7.0"),
        ([gpu((9, 0)), gpu((7, 0)), gpu((6, 0))], "fp32", "worker 2: compute capability 6.0"),
        ([ON_ZEN4, ON_ZEN4, ON_AVX2], "fp32", f"worker 2: {NONE}"),
    ],
)
def test_workers_compute_in_what_all_of_them_have(workers: list[Hardware], wanted: str, reason: str) -> None:
    assert (decide("auto", workers).precision, decide("auto", workers).reason) == (wanted, reason)


@pytest.mark.parametrize(
    ("asked", "kept", "wanted", "reason"),
    [
        ("auto", "bf16", "bf16", "as before"),
        ("bf16", "bf16", "bf16", "as before"),
        ("fp32", "bf16", "fp32", "as configured"),
        ("bf16", None, "bf16", "as configured"),
        ("auto", "auto", "fp32", NONE),
    ],
)
def test_what_is_asked_for_wins_then_what_the_run_began_with(
    asked: str, kept: str | None, wanted: str, reason: str
) -> None:
    decision = decide(asked, [ON_AVX2], kept)
    assert (decision.precision, decision.reason) == (wanted, reason)
    assert (decision.warning is not None) == (wanted == "bf16")


@pytest.mark.parametrize(
    ("asked", "workers", "warning"),
    [
        (
            "bf16",
            [ON_AVX2],
            "bf16 is emulated on this CPU: a step takes 5 to 8 times as long as in fp32; set train.precision=fp32",
        ),
        ("fp16", [ON_AVX2], "a step takes 9 to 10 times as long as in fp32; "),
        ("bf16", [cpu(SKYLAKE, "AVX512", {})], "a step takes 1.4 to 1.8 times as long as in fp32; "),
        ("fp16", [ON_ZEN4], "fp16 is emulated on this CPU: a step takes 13 to 15 times as long as in "),
        ("bf16", [cpu(ARM, "DEFAULT", {})], "a step takes longer than in fp32; set train.precision=fp32"),
        ("bf16", [ON_ZEN4, ON_AVX2], "bf16 is emulated on 1 of 2 workers: a step takes 5 to 8 times"),
        ("bf16", [gpu((7, 5))], "(compute capability 7.5): a step takes longer than in fp16; set train.precision=fp16"),
        ("fp16", [gpu((6, 1))], "a step takes longer than in fp32; set train.precision=fp32"),
        ("fp16", [cpu(SAPPHIRE, "AVX512", {})], None),
        ("fp16", [gpu((9, 0))], None),
        ("fp32", [gpu((9, 0)), gpu((6, 0))], None),
    ],
)
def test_emulation_is_told_with_its_cost_and_its_fix(asked: str, workers: list[Hardware], warning: str | None) -> None:
    told = emulation(asked, workers)
    assert told is None if warning is None else warning in str(told)
    assert "\n" not in str(told)


def test_nothing_computes_in_what_is_not_decided() -> None:
    with pytest.raises(AssertionError, match="auto: not decided yet"):
        autocast("auto", CPU)
    assert settle(load(None, ["data.train=x", "data.val=x"]), CPU).train.precision in ("bf16", "fp32")


@pytest.mark.parametrize(("card", "wanted"), [("A100", "bf16"), ("L4", "bf16"), ("V100", "fp16"), ("T4", "fp16")])
def test_a_plan_knows_what_its_card_has(card: str, wanted: str) -> None:
    cfg = load(ROOT / "configs/imagenet/resnet152.yaml")
    assert plan.plan(cfg, 8, card)["precision"] == wanted


@pytest.fixture
def spec(digits_index: Callable[[str], Path], tmp_path: Path) -> Callable[..., RunSpec]:
    """Makes a job of two steps, by overrides; each is of the same run."""

    def make(*overrides: str) -> RunSpec:
        index = digits_index("few")
        cfg = load(None, [f"data.train={index}", f"data.val={index}", *TINY, f"run.storage={tmp_path}", *overrides])
        (tmp_path / "run").mkdir(exist_ok=True)
        return RunSpec(cfg, Storage(tmp_path / "run"), str(index), str(index))

    return make


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Hardware], None]:
    """Makes this machine one with other hardware."""

    def become(hardware: Hardware) -> None:
        for module in (precision, setup, inference):
            monkeypatch.setattr(module, "hardware_of", lambda device: hardware)

    return become


def trained(spec: RunSpec) -> tuple[str, str, list[str]]:
    """The precision of a training and its reason, by its start; the warnings."""
    events: list[Event] = []
    fit(spec, context(events=events))
    start = next(e for e in events if isinstance(e, AttemptStarted))
    return start.precision, start.precision_reason, [e.text for e in events if isinstance(e, Warned)]


def saved(spec: RunSpec) -> str:
    """What the newest checkpoint says."""
    found = checkpoint.newest_valid(spec.checkpoints, pytest.fail)
    assert found is not None
    return found.cfg.train.precision


@pytest.mark.parametrize(("hardware", "wanted"), [(ON_AVX2, "fp32"), (ON_ZEN4, "bf16")])
def test_a_training_says_everywhere_what_auto_became(
    spec: Callable[..., RunSpec], machine: Callable[[Hardware], None], hardware: Hardware, wanted: str
) -> None:
    machine(hardware)
    one = spec()
    assert trained(one) == (wanted, hardware.reason, [])
    assert saved(one) == wanted
    uri = f"sqlite:///{one.run.local.parent}/mlflow.db" if one.run.local else ""
    (run,) = mlflow.MlflowClient(uri).search_runs(["1"])
    assert run.data.params["train.precision"] == wanted
    assert f"precision: {wanted}\n" in mlflow.artifacts.load_text(f"{run.info.artifact_uri}/config/attempt_1.yaml")


def test_a_resume_keeps_its_precision_and_warns_once_where_it_is_emulated(
    spec: Callable[..., RunSpec], machine: Callable[[Hardware], None]
) -> None:
    machine(ON_ZEN4)
    trained(spec())
    machine(ON_AVX2)
    name, reason, (warning,) = trained(spec("train.steps=3"))
    assert (name, reason) == ("bf16", "as before")
    assert warning == emulation("bf16", [ON_AVX2])
    assert saved(spec()) == "bf16"
    assert trained(spec("train.steps=4", "train.precision=fp32")) == ("fp32", "as configured", [])
    assert saved(spec()) == "fp32"
    machine(ON_ZEN4)
    assert trained(spec("train.steps=5")) == ("fp32", "as before", [])


def test_a_checkpoint_of_before_keeps_the_bf16_that_it_says(
    spec: Callable[..., RunSpec], machine: Callable[[Hardware], None]
) -> None:
    """Then bf16 was the default, and run.json had no word of it."""
    machine(ON_ZEN4)
    old = spec("train.precision=bf16")
    trained(old)
    content = old.run.read_bytes("run.json")
    old.run.write_bytes("run.json", content.replace(b', "precision": "bf16"', b""))
    assert content != old.run.read_bytes("run.json")
    machine(ON_AVX2)
    assert trained(spec("train.steps=3"))[:2] == ("bf16", "as before")


def test_an_attempt_that_left_no_checkpoint_has_decided_all_the_same(
    spec: Callable[..., RunSpec], machine: Callable[[Hardware], None]
) -> None:
    """MLflow keeps the first value of each parameter for good."""
    machine(ON_ZEN4)
    one = spec()
    trained(one)
    for name in one.checkpoints.names():
        (one.checkpoints / name).remove()
    machine(ON_AVX2)
    assert trained(one)[:2] == ("bf16", "as before")


def of_ranks(
    rank: int, world_size: int, hardware: list[Hardware], *specs: RunSpec
) -> list[tuple[set[str], list[Event]]]:
    """Each rank on a machine of its own kind: for each job what its steps computed in, and its events."""
    found = []
    for one in specs:
        seen, events = set[str](), list[Event]()

        def look(*args: Any, seen: set[str] = seen, **options: Any) -> Any:
            seen.add(args[3].precision)
            return train_step(*args, **options)

        with (
            mock.patch.object(setup, "hardware_of", return_value=hardware[rank]),
            mock.patch.object(loop, "train_step", look),
        ):
            fit(one, context(rank, world_size, events))
        dist.barrier()
        found.append((seen, events))
    return found


def test_two_workers_decide_together_and_rank_0_warns(spec: Callable[..., RunSpec]) -> None:
    two = [ON_ZEN4, ON_AVX2]
    specs = spec("cluster.workers=2"), spec("cluster.workers=2", "train.steps=3", "train.precision=bf16")
    first, second = run_ranks(of_ranks, 2, two, *specs)
    assert [computed for computed, _ in first] == [computed for computed, _ in second] == [{"fp32"}, {"bf16"}]
    starts = [e for _, events in first for e in events if isinstance(e, AttemptStarted)]
    assert [e.precision for e in starts] == ["fp32", "bf16"]
    assert [e.precision_reason for e in starts] == [f"worker 1: {NONE}", "as configured"]
    warnings = [[e.text for _, events in rank for e in events if isinstance(e, Warned)] for rank in (first, second)]
    assert warnings == [[emulation("bf16", two)], []]


def test_evaluating_keeps_the_precision_and_predicting_takes_what_is_there(
    spec: Callable[..., RunSpec], machine: Callable[[Hardware], None], digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(ON_ZEN4)
    one = spec()
    trained(one)
    place = one.checkpoints / one.checkpoints.names()[0]
    images = sorted((digits / "val" / "3").iterdir())[:2]
    computed: list[str] = []

    def look(model: Any, views: Any, name: str, in_parts: Any) -> Any:
        computed.append(name)
        return log_probabilities(model, views, name, in_parts)

    monkeypatch.setattr(inference, "log_probabilities", look)
    list(inference.predict(place, images, 1, pytest.fail))
    machine(ON_AVX2)
    list(inference.predict(place, images, 1, pytest.fail))
    assert computed == ["bf16", "fp32"]
    told: list[str] = []
    inference.evaluate_checkpoint(place, None, told.append)
    assert told == [f"warning: {emulation('bf16', [ON_AVX2])}"]
    inference.evaluate_checkpoint(place, None, pytest.fail, overrides=["train.precision=fp32"])
    inference.evaluate_checkpoint(place, None, pytest.fail, overrides=["train.precision=auto"])


def test_a_benchmark_settles_what_it_measures(
    machine: Callable[[Hardware], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """So that auto and what it became are told to be the same step, and what is emulated is told once."""
    machine(ON_AVX2)
    words = ["bench", "step", str(ROOT / "configs/digits.yaml"), "model.depth=18", "train.global_batch=4"]
    assert app.main([*words, "--try", "train.precision=fp32"]) == 2
    assert "--try train.precision=fp32: changes nothing of the bare step" in capsys.readouterr().err
    few = ["--rounds", "1", "--steps", "1", "--threads", str(min(2, LoaderContext.here().num_threads))]
    assert app.main([*words, "--try", "train.precision=bf16", *few]) == 0
    out, err = capsys.readouterr()
    assert ", fp32, batch 2 on " in out
    assert err.count("is emulated on") == 1
