"""Which attempt of a training this is: counted in run.json, told to MLflow and to whoever watches. Rank 0's work."""

from collections.abc import Mapping, Sequence
from functools import partial

from pipeline.events import AttemptStarted
from pipeline.failures import retry
from pipeline.runs.checkpoint import Checkpoint
from pipeline.runs.manifest import RunManifest
from pipeline.runs.spec import Failure, RunSpec, WorkerContext
from pipeline.tracking.mlflow_logger import MlflowLogger


class Attempt:
    """One attempt, begun by being made.

    Args:
        manifest: before this attempt. resumed: the checkpoint that it goes on from.

    Raises:
        SupersededError, RuntimeError: the run is not this attempt's, see `RunManifest.check`.
    """

    def __init__(self, spec: RunSpec, ctx: WorkerContext, manifest: RunManifest, resumed: Checkpoint | None):
        self._spec, self._ctx, self._manifest, self._resumed = spec, ctx, manifest, resumed
        self._failures: Sequence[Failure] = ctx.failures or manifest.unended()
        self._replace(manifest.begin(len(self._failures), spec.cfg.train.precision))

    @property
    def number(self) -> int:
        return self._manifest.attempts

    @property
    def training_id(self) -> str:
        return self._manifest.training_id

    def facts(self) -> dict[str, str | int]:
        """What checkpoints and summaries tell of it."""
        return self._manifest.facts()

    def check(self) -> None:
        """Make sure that the run is still this attempt's to write; errors as of `RunManifest.check`."""
        self._manifest.check(self._spec.run, self._spec.claim)

    def end(self) -> None:
        self._replace(self._manifest.end())

    def _replace(self, new: RunManifest) -> None:
        replace = partial(self._manifest.replaced, new, self._spec.run, self._spec.claim)
        self._manifest = retry(replace, self._ctx.warn, self._spec.cfg.cluster.timeout_s)

    def announce(
        self,
        mlflow: MlflowLogger,
        fingerprint: str,
        num_steps: int,
        startup: Mapping[str, float],
        precision_reason: str,
        compilation: str,
    ) -> None:
        """Tell that it has begun.

        Args:
            fingerprint: of the training images. num_steps: of the whole training. startup: seconds of each of its
                start's parts. precision_reason: why it is the one that the configuration says. compilation: see
                `CompileDecision`.
        """
        ctx, cfg, resumed = self._ctx, self._spec.cfg, self._resumed
        first_step = resumed.step if resumed else 0
        tags = self._manifest.tags(self._failures, first_step, ctx.world_size)
        mlflow.set_tags({**tags, "pipeline.data_fingerprint": fingerprint, "pipeline.compilation": compilation})
        recovery = self._manifest.recovery(self._failures, first_step, ctx.world_size)
        # The step of these is the attempt's number.
        mlflow.log_metrics(self.number, {f"attempt/{name}": value for name, value in recovery.items()})
        ctx.emit(
            AttemptStarted(
                attempt=self.number,
                step=first_step,
                num_steps=num_steps,
                global_batch=cfg.train.global_batch,
                resumed_from=str(resumed.place) if resumed else None,
                world_size=ctx.world_size,
                num_threads=ctx.num_threads,
                device=ctx.device.type,
                precision=cfg.train.precision,
                precision_reason=precision_reason,
                compilation=compilation,
                startup=dict(startup),
                failures=self._manifest.failures,
                lost_steps=recovery.get("lost_steps"),
                recovery_s=recovery.get("recovery_s"),
            )
        )
