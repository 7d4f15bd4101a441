"""The figures for Prometheus: what they show, and that the dashboard shows what there is."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray.dashboard.modules.reporter as reporter
from manifests import K8S, kustomize, of_kind, rendered

from pipeline.cluster import prometheus
from pipeline.events import AttemptFailed, AttemptStarted, CheckpointWritten, Evaluated, Event, StepLogged

DASHBOARD = K8S / "monitoring/grafana-dashboard.json"
OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used"}  # there is none here to export them


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def shown() -> set[str]:
    """The metrics in the dashboard's queries."""
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    queries += [variable["definition"] for variable in dashboard()["templating"]["list"] if "definition" in variable]
    return set(re.findall(r"\bray_\w+", " ".join(queries))) - {"ray_io_cluster"}  # a label


class Recorded(dict[str, float]):
    """Stands for Ray's gauges: keeps the last value of each, by name."""

    def gauge(self, name: str, text: str, tags: tuple[str, ...]) -> Any:
        recorded = self

        class Gauge:
            def set_default_tags(self, tags: dict[str, str]) -> None:
                assert tags == {"run": "pets"}

            def set(self, value: float) -> None:
                recorded[name.removeprefix("pipeline_")] = value

        return Gauge()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    values = Recorded()
    monkeypatch.setattr(prometheus, "Gauge", values.gauge)
    return values


class Told(prometheus.Gauges):
    """Exports at once."""

    def event(self, event: Event) -> None:
        super().event(event)
        self.export()


def start(step: int, attempt: int, failures: int) -> AttemptStarted:
    return AttemptStarted(attempt, step, 100, 64, None, 2, 1, "cpu", "fp32", "as configured", {}, failures)


def step(number: int) -> StepLogged:
    rates = {"perf/images_per_s": 50.0, "perf/data_wait_share": 0.1, "perf/goodput": 0.8}
    return StepLogged(number, {"train/loss": 2.0, "train/lr": 0.1, "data/bad_images": 0, **rates})


def test_gauges_show_the_newest_event_of_each_kind(recorded: Recorded) -> None:
    told = Told("pets")
    told.event(start(10, attempt=3, failures=1))
    assert "goodput_ratio" not in recorded
    told.event(step(30))
    assert recorded["goodput_ratio"] == 0.8
    told.event(CheckpointWritten(20, "..."))
    assert (recorded["step"], recorded["checkpoint_step"]) == (30, 20)
    told.event(AttemptFailed("..."))
    assert (recorded["failures"], recorded["workers"], recorded["images_per_second"]) == (2, 0, 0)
    told.event(start(20, attempt=4, failures=2))
    assert (recorded["workers"], recorded["failures"], recorded["attempts"]) == (2, 2, 4)


def test_an_evaluation_is_no_training_loss(recorded: Recorded) -> None:
    told = Told("pets")
    told.event(start(0, attempt=1, failures=0))
    told.event(step(1))
    told.event(Evaluated(1, {"top1": 0.75, "top5": 0.9, "loss": 9.0, "count": 10}))
    assert (recorded["top1_ratio"], recorded["loss"]) == (0.75, 2.0)


def test_the_dashboard_shows_every_gauge_and_no_other() -> None:
    ours = {name for name in shown() if name.startswith("ray_pipeline_")}
    assert ours == {f"ray_{prometheus.PREFIX}{name}" for name in prometheus.GAUGES}


def test_ray_has_the_gauges_of_gpus() -> None:
    source = Path(reporter.__path__[0], "reporter_agent.py").read_text()
    assert shown() >= OF_GPUS
    for name in OF_GPUS:
        assert f'gauge=METRICS_GAUGES["{name.removeprefix("ray_")}"]' in source


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    content = dashboard()
    panels = content["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    corners = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(corners)) == len(corners)
    variables = {variable["name"]: variable for variable in content["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    used = set(re.findall(r"\$\{?([a-z]\w*)", DASHBOARD.read_text()))
    assert used == set(variables)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]


def test_grafana_and_prometheus_find_what_is_theirs() -> None:
    objects = kustomize(K8S / "monitoring")
    (config,), (monitor,) = of_kind(objects, "ConfigMap"), of_kind(objects, "PodMonitor")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config["data"]["training.json"]) == dashboard()
    (wanted,) = monitor["spec"]["selector"]["matchExpressions"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (job,) = of_kind(rendered("base"), "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        template = group["template"]
        assert template["metadata"]["labels"][wanted["key"]] in wanted["values"]
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        assert ports[endpoint["port"]] == 8080
