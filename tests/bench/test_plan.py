"""The paper model of scale: its limits, its closed forms against simulation, published figures, and what users see."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT

from pipeline.bench.planning import cost_model, plan
from pipeline.bench.planning.assumptions import CARDS, Assumptions, assume
from pipeline.bench.planning.cost_model import ModelCost, Scenario
from pipeline.bench.planning.failure_model import FailureModel
from pipeline.cli import app
from pipeline.config.loading import load
from pipeline.errors import UserError

IMAGENET = ROOT / "configs" / "imagenet"
ALONE = Assumptions(launch_us=0, full_node=1, jitter=0, latency_us=0)  # nothing but arithmetic and bandwidth
FAST = replace(ALONE, link_gb_s=1e9, network_gb_s=1e9, storage_gb_s=1e9, node_read_gb_s=1e9, cores_per_gpu=1e9)


@pytest.fixture(scope="module")
def resnet152() -> ModelCost:
    return cost_model.count_network(load(IMAGENET / "resnet152.yaml").model, 224)


@pytest.fixture(scope="module")
def resnet50() -> ModelCost:
    return cost_model.count_network(load(IMAGENET / "resnet152.yaml", ["model.depth=50"]).model, 224)


def case(net: ModelCost, a: Assumptions, *words: str, depth: int = 152, **more: Any) -> Scenario:
    return Scenario(load(IMAGENET / "resnet152.yaml", [f"model.depth={depth}", *words]), a, net, plan.IMAGENET, **more)


def test_the_network_is_counted_from_our_own_model(resnet152: ModelCost, resnet50: ModelCost) -> None:
    assert resnet152.parameters == 60_192_808
    assert resnet152.macs == pytest.approx(11.51e9, rel=1e-3)
    assert resnet50.macs == pytest.approx(cost_model.RESNET50_MACS, rel=1e-3)
    assert resnet50.elements == pytest.approx(cost_model.RESNET50_ELEMENTS, rel=1e-3)


def test_one_gpu_sends_nothing(resnet152: ModelCost) -> None:
    row = cost_model.predict(case(resnet152, Assumptions()), 1)
    assert cost_model.all_reduce_s(1, 1e9, Assumptions()) == 0
    assert (row.parts["network"], row.parts["stragglers"], row.efficiency) == (0, 0, 1)


def test_a_ring_sends_twice_the_bytes_but_for_ones_own_part() -> None:
    a = replace(ALONE, link_share=1, link_gb_s=100, network_gb_s=10, gpus_per_node=8)
    assert cost_model.all_reduce_s(8, 1e9, a) == pytest.approx(2 * 7 / 8 / 100)
    assert cost_model.all_reduce_s(32, 1e9, a) == pytest.approx(2 * 7 / 8 / 100 + 2 * 3 / 4 / 10)
    times = [cost_model.all_reduce_s(2**k, 1e9, replace(a, latency_us=10)) for k in range(11)]
    assert times == sorted(times)


def test_an_all_reduce_hides_behind_the_backward_pass_but_for_its_last_bucket() -> None:
    a = replace(ALONE, overlap=1)
    assert cost_model.exposed_s(4.0, 4, 100.0, a) == 1.0
    assert cost_model.exposed_s(4.0, 4, 2.0, a) == 4.0 - 2.0 * 3 / 4
    assert cost_model.exposed_s(4.0, 4, 100.0, replace(a, overlap=0)) == 4.0
    assert cost_model.exposed_s(4.0, 1, 100.0, a) == 4.0


@pytest.mark.parametrize("gpus", [2, 8, 64, 1024])
def test_with_endless_bandwidth_only_stragglers_cost(resnet152: ModelCost, gpus: int) -> None:
    assert cost_model.predict(case(resnet152, FAST), gpus).efficiency == pytest.approx(1, abs=1e-4)
    row = cost_model.predict(case(resnet152, replace(FAST, jitter=0.05)), gpus)
    assert row.efficiency == pytest.approx(1 / (1 + 0.05 * cost_model.expected_max(gpus)), abs=1e-4)


def test_the_expected_maximum_is_that_of_drawn_numbers() -> None:
    rng = np.random.default_rng(0)
    for ranks in (2, 8, 64, 1024):
        drawn = rng.standard_normal((4000, ranks)).max(axis=1).mean()
        assert cost_model.expected_max(ranks) == pytest.approx(drawn, abs=0.06)


def test_small_batches_cost_what_nvidia_published() -> None:
    """ResNet-50, AMP inference on a V100: DeepLearningExamples, container 21.03, averages in ms."""
    published = {1: 12.78, 4: 13.41, 8: 13.65, 16: 14.0, 32: 15.84, 64: 23.18, 128: 43.55, 256: 84.14}
    for batch, ms in published.items():
        assert cost_model.compute_s(batch, 3080, 12.9e-3) * 1e3 == pytest.approx(ms, rel=0.07)


def test_half_the_rate_is_attained_where_the_docstring_says() -> None:
    batch = 0.03 * 2000 / math.sqrt(3)
    assert batch / cost_model.compute_s(batch, 2000, 0.03) == pytest.approx(1000)


@pytest.mark.parametrize(
    ("card", "gpus", "published", "within"),
    [("A100", 1, 2470, 0.02), ("A100", 8, 16621, 0.02), ("V100", 1, 1200, 0.1), ("V100", 8, 8322, 0.15)],
)
def test_published_speeds_of_resnet50(
    resnet50: ModelCost, card: str, gpus: int, published: float, within: float
) -> None:
    """The A100's are fitted; the V100's are not, and so say how well a card's speed follows from its memory."""
    a, _ = assume(card, [])
    row = cost_model.predict(case(resnet50, a, depth=50, batch_per_gpu=256), gpus)
    assert row.images_per_s == pytest.approx(published, rel=within)


def test_the_published_efficiency_of_256_gpus(resnet50: ModelCost) -> None:
    """Goyal et al. 2017: about 90% from 8 to 256 P100s, 8 a machine, 50 Gbit/s, 32 images on each."""
    a, _ = assume("V100", ["network_gb_s=6.25", "full_node=1"])
    few, many = (cost_model.predict(case(resnet50, a, depth=50, batch_per_gpu=32, rate=150.0), n) for n in (8, 256))
    assert many.efficiency / few.efficiency == pytest.approx(0.9, abs=0.05)


def test_what_bounds_is_named(resnet152: ModelCost) -> None:
    def bound(gpus: int, *words: str, **more: Any) -> str:
        return cost_model.predict(case(resnet152, assume("H100", words)[0], **more), gpus).bound

    assert bound(8) == "arithmetic"
    assert bound(256) == "launching kernels"
    assert bound(8, "node_read_gb_s=0.1") == "reading"
    assert bound(8, "cores_per_gpu=1", rate=3000) == "decoding"
    assert bound(64, "network_gb_s=0.5") == "network"


def test_what_must_be_monotone(resnet152: ModelCost) -> None:
    rows = [cost_model.predict(case(resnet152, assume("A100", [])[0], batch_per_gpu=64), 2**k) for k in range(11)]
    assert [r.images_per_s for r in rows] == sorted(r.images_per_s for r in rows)
    assert [r.efficiency for r in rows] == sorted((r.efficiency for r in rows), reverse=True)
    slow = [cost_model.predict(case(resnet152, replace(Assumptions(), network_gb_s=g)), 64).hours for g in (0.1, 1, 10)]
    assert slow == sorted(slow, reverse=True)
    micro = [
        cost_model.predict(case(resnet152, Assumptions(), f"train.micro_batch={n}"), 8).step_s for n in (8, 32, 128)
    ]
    assert micro == sorted(micro, reverse=True)


def test_the_slowest_rank_has_the_largest_share(resnet152: ModelCost) -> None:
    """1,024 images on 96 GPUs: some have 11, and pairs stay together where images are mixed."""
    assert cost_model.split_batch(case(resnet152, ALONE), 96) == (1024, 11)
    assert cost_model.split_batch(case(resnet152, ALONE, "data.mixup=0.2"), 96) == (1024, 12)


def test_hours_and_cost_follow_from_the_steps(resnet152: ModelCost) -> None:
    a = replace(FAST, gpu_mtbf_h=1e12, start_s=0, val_images=0, hold_gb_s=1e9, price_per_gpu_hour=2)
    row = cost_model.predict(case(resnet152, a, "train.epochs=10", "optim.warmup_epochs=1", rate=1000.0), 8)
    assert row.hours == pytest.approx(10 * (plan.IMAGENET // 1024) * 1024 / 8000 / 3600, rel=1e-3)
    assert row.cost == pytest.approx(row.hours * 16)
    evaluated = cost_model.predict(case(resnet152, replace(a, val_images=60_000), "train.epochs=10", rate=1000.0), 8)
    assert (evaluated.hours - row.hours) * 3600 == pytest.approx(10 * 60_000 / 24_000, rel=1e-3)


def test_young_and_daly() -> None:
    model = FailureModel(10_000, restart=0, hold=50, write=0)
    assert model.young() == 1000
    assert model.daly() == pytest.approx(1000 * (1 + 0.05 / 3 + 0.0025 / 9) - 50)
    assert replace(model, hold=300, mtbf=100).daly() == 100


@pytest.mark.parametrize(("hold", "mtbf"), [(0.1, 1e5), (5, 3600), (60, 1800)])
def test_dalys_interval_loses_least(hold: float, mtbf: float) -> None:
    model = FailureModel(mtbf, restart=60, hold=hold, write=0)
    best = max(model.goodput(interval) for interval in np.geomspace(hold / 10, mtbf, 2000))
    assert model.goodput(model.daly()) == pytest.approx(best, rel=1e-4)
    assert replace(model, write=1e6).best_interval() == 1e6


def test_without_failures_only_holding_costs() -> None:
    assert FailureModel(1e15, restart=100, hold=1, write=0).goodput(99) == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("mtbf", "interval", "restart", "hold", "write"),
    [(3600, 600, 120, 5, 30), (1e5, 700, 120, 0.1, 1.6), (1000, 300, 60, 20, 100), (500, 100, 200, 1, 0)],
)
def test_the_closed_form_is_the_simulations_mean(
    mtbf: float, interval: float, restart: float, hold: float, write: float
) -> None:
    model = FailureModel(mtbf, restart, hold, write)
    runs = model.simulate(300 * mtbf, interval, num_runs=200)
    assert runs is not None
    error = runs.std() / math.sqrt(len(runs))
    assert runs.mean() == pytest.approx(model.goodput(interval), rel=0.003 + 3 * error)


def test_a_simulation_repeats_and_gives_up_on_what_never_ends() -> None:
    model = FailureModel(1000, 60, 1, 10)
    first, second, other = (model.simulate(1e5, 100, num_runs=50, seed=s) for s in (1, 1, 2))
    assert first is not None and second is not None and other is not None  # noqa: PT018
    assert first.tolist() == second.tolist() != other.tolist()
    assert model.simulate(1e9, 100) is None
    assert FailureModel(5, 60, 1, 10).goodput(100) == 0


def test_a_run_that_would_never_end_says_so() -> None:
    result = plan.plan(load(IMAGENET / "resnet152.yaml"), 64, "H100", ["gpu_mtbf_h=0.01"])
    assert "Infinity" not in json.dumps(result)
    row = next(candidate for candidate in result["rows"] if candidate["gpus"] == 64)
    assert (row["goodput"], row["hours"], row["cost"]) == (0, None, None)
    assert any("would not end" in note for note in result["notes"])


def test_small_images_and_small_data_are_planned_for() -> None:
    """An image of 32 pixels leaves one value a channel at the end; a larger cluster's batch exceeds the data."""
    cfg = load(IMAGENET.parent / "digits.yaml")
    result = plan.plan(cfg, 2, "T4", batch_per_gpu=256, num_images=1437)
    assert [row["gpus"] for row in result["rows"]] == [2]
    grown = load(IMAGENET.parent / "digits.yaml", ["data.start_size=16"])
    assert any("start_size" in note for note in plan.plan(grown, 2, "T4")["notes"])


def test_the_recommended_interval_loses_no_more_than_the_configured() -> None:
    words = ["gpu_mtbf_h=2000", "write_gb_s=2"]
    for every in (1, 1000, 200_000):
        cfg = load(IMAGENET / "resnet152.yaml", [f"checkpoint.every={every}"])
        intervals = plan.plan(cfg, 64, "H100", words)["checkpoints"]
        assert intervals["best"]["goodput"] >= intervals["configured"]["goodput"]
        assert intervals["best"]["simulated"]["mean"] == pytest.approx(intervals["best"]["goodput"], abs=0.01)


def test_a_checkpoint_has_all_that_its_optimizer_keeps(resnet152: ModelCost) -> None:
    """Two moments for LAMB as for AdamW, one for SGD and LARS, besides the weights."""
    held = {
        name: cost_model.model_failures(case(resnet152, Assumptions(), f"optim.name={name}"), 8).hold
        for name in ("sgd", "lars", "adamw", "lamb")
    }
    assert held["sgd"] == held["lars"] == pytest.approx(2 / 3 * held["adamw"])
    assert held["lamb"] == held["adamw"]


def test_changes_help_where_they_bound() -> None:
    cfg = load(IMAGENET / "resnet152.yaml")
    assert "launch_us" in plan.plan(cfg, 64, "H100")["changes"][0]["change"]
    assert "storage" in plan.plan(cfg, 8, "H100", ["node_read_gb_s=0.1"])["changes"][0]["change"]
    assert "grad_bytes" in plan.plan(cfg, 64, "A100", ["network_gb_s=0.1", "launch_us=0"])["changes"][1]["change"]


MEASURED = {
    "workers": {
        "1": {"images_per_s": 10.0, "images_per_s_quartiles": [10.0, 10.0], "compute_s_per_step": 1.0},
        "2": {"images_per_s": 16.0, "compute_s_per_step": 1.05},
    },
    "global_batch_per_worker": 10,
    "parameters": 50_000_000,
    "allreduce_gb_s": 1.0,
}


def test_two_workers_are_predicted_from_one() -> None:
    """200 MB over 1 GB/s, once around: 0.2 s beside the second of computing, where nothing hides it."""
    a, origins = assume("H100", ["overlap=0", "latency_us=0"])
    checked = plan.check_efficiency(MEASURED, a, origins)
    assert checked["workers"][2]["predicted"] == pytest.approx(1 / 1.2)
    assert checked["workers"][2]["measured"] == 0.8
    assert checked["workers"][2]["compute_ratio"] == 1.05
    a, origins = assume("H100", ["overlap=0", "latency_us=0", "rdma=0", "tcp_gb_s=0.1"])
    assert plan.check_efficiency(MEASURED, a, origins) == checked, "the link was measured, whatever carries it"
    a, origins = assume("H100", ["overlap=0", "latency_us=0", "network_gb_s=0.5"])
    assert plan.check_efficiency(MEASURED, a, origins)["workers"][2]["predicted"] == pytest.approx(1 / 1.4)


def test_a_measurement_that_is_none(tmp_path: Path) -> None:
    a, origins = assume("H100", [])
    broken: dict[str, Any]
    for broken in ({}, {"workers": {}}, MEASURED | {"allreduce_gb_s": 0}, MEASURED | {"parameters": "many"}):
        with pytest.raises(UserError, match="bench scale"):
            plan.check_efficiency(broken, a, origins)
    without = {k: v for k, v in MEASURED.items() if k != "allreduce_gb_s"}
    with pytest.raises(UserError, match="--assume network_gb_s="):
        plan.check_efficiency(without, a, origins)


def test_every_card_is_planned_for(resnet152: ModelCost) -> None:
    speeds = {card: cost_model.card_rate(resnet152, "bf16", assume(card.lower(), [])[0]) for card in CARDS}
    assert sorted(speeds, key=lambda card: speeds[card])[-3:] == ["H100", "H200", "B200"]
    assert speeds["T4"] < speeds["V100"] < speeds["A100"]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = app.main(["plan", *map(str, words)])
    return code, *capsys.readouterr()


def test_the_answer_for_people(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "scale.json"
    file.write_text(json.dumps(MEASURED))
    code, out, _ = run(capsys, IMAGENET / "resnet152.yaml", "--gpus", 24, "--gpu", "h100", "--measured", file)
    lines = out.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= 80
    assert [line.split()[1] for line in lines if line.startswith(">")] == ["24"]
    assert "is no index here: ImageNet-1k's 1,281,167" in " ".join(lines)
    for name in Assumptions.__dataclass_fields__:
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert "0.800 measured" in out


def test_the_answer_for_programs(
    capsys: pytest.CaptureFixture[str], digits_index: Callable[[str], Path], tmp_path: Path
) -> None:
    """Images and their size come from the index where there is one."""
    words = ["model.depth=50", f"data.train={digits_index('train')}", "train.global_batch=64"]
    code, out, _ = run(capsys, IMAGENET / "resnet152.yaml", *words, "--gpus", 8, "--gpu", "A100", "--json")
    result = json.loads(out)
    assert code == 0
    assert result["images"] == 1437
    assert result["assumptions"]["image_kb"]["origin"] == "counted"
    assert result["assumptions"]["image_kb"]["value"] < 2
    assert [row["gpus"] for row in result["rows"]] == [8, 16, 32, 64]  # no more than images in a batch
    assert len(result["notes"]) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "H10"], "--gpu H10: not in the table; use one of B200, H200, H100"),
        (["--assume", "jiter=0.1"], "did you mean jitter?"),
        (["--assume", "jitter"], "--assume jitter: must be a number, such as jitter=0.02"),
        (["--assume", "network_gb_s=0"], "--assume network_gb_s=0: must be a number, at least 1e-06"),
        (["--assume", "overlap=2"], "at least 0 and at most 1"),
        (["--assume", "gpu_mtbf_h=inf"], "must be a number, at least 1e-06 and at most 1e+09"),
        (["--assume", "gpu_mtbf_h=1e308"], "at most 1e+09"),
        (["--assume", "gpus_per_node=2.5"], "must be a whole number"),
        (["--assume", "rdma=0.5"], "must be a whole number"),
        (["--assume", "rdma=2"], "at least 0 and at most 1"),
        (["--gpus", "2000"], "--gpus 2000: train.global_batch=1024 gives some of them nothing; ask for at most 1024"),
        (["--images", "100"], "a global batch of 1024 is more than the 100 images; lower train.global_batch"),
        (["--batch-per-gpu", "3", "data.mixup=1"], "--batch-per-gpu 3: must be even"),
        (["--measured", "/nothing.json"], "--measured /nothing.json: cannot be read"),
        (["train.epoch=3"], "did you mean train.epochs?"),
    ],
)
def test_wrong_requests(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    needed = [("--gpus", "64"), ("--gpu", "H100")]
    given = [word for option in needed if option[0] not in words for word in option]
    code, out, err = run(capsys, IMAGENET / "resnet152.yaml", *given, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
