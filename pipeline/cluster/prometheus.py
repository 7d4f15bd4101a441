"""A training's figures for Prometheus: gauges that a Ray node exports beside Ray's own.

The driver gets every event of a run, so the gauges are its, and no step waits for them. Ray puts `ray_` before their
names and exports them every ten seconds from the driver's node. A gauge that is not set for twenty vanishes there: so
all are set time and again, and are gone soon after the driver's end.
"""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from pipeline.events import AttemptFailed, AttemptStarted, CheckpointWritten, Evaluated, Event, StepLogged

PREFIX = "pipeline_"
GAUGES = {  # name -> the events' key, and what it is
    "images_per_second": ("perf/images_per_s", "Images trained on, by all workers, since the last logged step"),
    "data_wait_ratio": ("perf/data_wait_share", "Share of the time since the last logged step spent waiting for data"),
    "loss": ("train/loss", "Mean training loss over the global batch of the last logged step"),
    "learning_rate": ("train/lr", "Learning rate of the last logged step"),
    "broken_images": ("data/bad_images", "Broken images that this attempt's workers have met"),
    "top1_ratio": ("top1", "Top-1 accuracy on the validation images at the last evaluation"),
    "step": ("step", "Steps done"),
    "steps": ("num_steps", "Steps of the whole training"),
    "workers": ("world_size", "Workers that train now"),
    "attempts": ("attempt", "Attempts of the run so far: its start, and each restart and resume"),
    "failures": ("failures", "Failures of the run so far"),
    "checkpoint_step": ("", "Step of the newest checkpoint"),
    "goodput_ratio": (
        "perf/goodput",
        "Share of a training's wall time, in all attempts, that computed steps that count",
    ),
}


class Gauges:
    """Takes the events of one driver, which is connected to Ray.

    Args:
        run: the run's name, a tag of all gauges.
    """

    def __init__(self, run: str):
        self._gauges = {name: Gauge(f"{PREFIX}{name}", text, ("run",)) for name, (_, text) in GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})
        self._values: dict[str, float] = {}

    def event(self, event: Event) -> None:
        match event:
            case CheckpointWritten():
                self._values["checkpoint_step"] = event.step  # written beside training, which is further by now
            case AttemptFailed():
                self._values |= {"failures": self._values.get("failures", 0) + 1, "workers": 0, "images_per_second": 0}
            case AttemptStarted():
                self._take(vars(event))
            case StepLogged():
                self._take({"step": event.step, **event.metrics})
            case Evaluated():
                self._take({"step": event.step, "top1": event.scores["top1"]})

    def _take(self, values: Mapping[str, Any]) -> None:
        self._values |= {name: values[key] for name, (key, _) in GAUGES.items() if key in values}

    def export(self) -> None:
        """Set all gauges; to be called every few seconds."""
        for name, value in self._values.items():
            self._gauges[name].set(value)
