"""CPU, memory, disk, network and GPUs of a node, logged by MLflow's own monitor, through an MLflow that is away."""

import logging

from mlflow.system_metrics import system_metrics_monitor


class Monitor(system_metrics_monitor.SystemMetricsMonitor):  # type: ignore[misc]
    """Goes on after a call that fails; MLflow's own ends at the first one."""

    def monitor(self) -> None:
        # `MlflowLogger` tells the user of an MLflow that is away, once.
        logging.getLogger(system_metrics_monitor.__name__).setLevel(logging.ERROR)
        while not self._shutdown_event.is_set():
            super().monitor()
            for monitor in self.monitors:  # else the next point is the mean over all the time that MLflow was away
                monitor.clear_metrics()
            if not self._shutdown_event.is_set():
                self.mlflow_logger.data.clear()
            self._shutdown_event.wait(self.sampling_interval)
