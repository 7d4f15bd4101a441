"""The paper model of the network between nodes: by RDMA, and over TCP, which NCCL takes where there is none."""

import re
from dataclasses import replace

import pytest
from commands import ROOT

from pipeline.bench.planning import cost_model, plan
from pipeline.bench.planning.assumptions import assume
from pipeline.cli import app
from pipeline.config.loading import load

RECIPE = ROOT / "configs" / "imagenet" / "resnet152.yaml"
RESNET152_PARAMETERS = 60_192_808


def test_over_tcp_faster_links_do_not_help() -> None:
    """421 MB of ResNet-152's gradients leave each of 8 nodes a step: 105 ms at 4 GB/s, and 1.5 by 400 GB/s of links."""
    a, _ = assume("H100", ["latency_us=0", "link_gb_s=1e9"])
    num_bytes = RESNET152_PARAMETERS * 4
    assert cost_model.all_reduce_s(64, num_bytes, a) == pytest.approx(1.5e-3, rel=0.01)
    for gb_s in (6, 100, 400):
        tcp = replace(a, rdma=0, network_gb_s=gb_s)
        assert cost_model.all_reduce_s(64, num_bytes, tcp) == pytest.approx(105e-3, rel=0.01)
    slow = replace(a, network_gb_s=1)
    assert cost_model.all_reduce_s(64, num_bytes, slow) == cost_model.all_reduce_s(64, num_bytes, replace(slow, rdma=0))
    assert cost_model.all_reduce_s(8, num_bytes, a) == cost_model.all_reduce_s(8, num_bytes, replace(a, rdma=0))


def test_both_transports_are_told_of_where_nodes_talk() -> None:
    cfg = load(RECIPE)
    by_rdma, over_tcp = plan.plan(cfg, 64, "H100"), plan.plan(cfg, 64, "H100", ["rdma=0"])
    assert plan.plan(cfg, 8, "H100")["between_nodes"] is None
    both = by_rdma["between_nodes"]
    assert both == over_tcp["between_nodes"]
    assert both["rdma"]["network_s"] < 0.01 < 0.05 < both["tcp"]["network_s"] < 0.11  # the backward pass hides the rest
    for result, name in ((by_rdma, "rdma"), (over_tcp, "tcp")):
        row = next(row for row in result["rows"] if row["gpus"] == 64)
        assert (row["step_s"], row["parts"]["network"]) == (both[name]["step_s"], both[name]["network_s"])
    assert over_tcp["assumptions"]["rdma"] == by_rdma["assumptions"]["rdma"] | {"value": 0.0, "origin": "given"}
    saves = {change["change"]: change["saves"] for change in over_tcp["changes"]}
    assert saves["RDMA between nodes (rdma=1), as k8s/overlays/rdma has it"] > 0.5
    assert saves["twice the network of a node (network_gb_s)"] == 0
    assert not any("rdma" in change["change"] for change in by_rdma["changes"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "64"], r"they would wait [\d.]+ ms, and take [\d.]+ ms \(estimated; --assume rdma=0\)\."),
        (["--gpus", "64", "--assume", "rdma=0"], r"Over TCP between nodes, steps wait [\d.]+ ms for the network\."),
        (["--gpus", "8"], ""),
    ],
)
def test_what_tcp_costs_is_one_sentence(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    code = app.main(["plan", str(RECIPE), "--gpu", "H100", *words])
    answer = " ".join(capsys.readouterr().out.splitlines())
    assert code == 0
    assert re.search(says, answer)
    assert ("between nodes, steps wait" in answer) == bool(says)
