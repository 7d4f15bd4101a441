"""The commands about a Ray cluster: submit, jobs, stop, doctor."""

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from pipeline.cli.common import (
    DONE,
    FAILED,
    INTERRUPTED,
    WRONG,
    Address,
    Config,
    Json,
    Outcome,
    Overrides,
    Variables,
    load,
    people,
    warn,
)
from pipeline.cli.train import config_to_train, train
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import schema

JOB = "A job's id, or a run's name: its newest job."


def submit(
    config: Config,
    /,
    *overrides: Overrides,
    address: Address = None,
    image: bool = False,
    detach: bool = False,
    secret: Variables = None,
    as_json: Json = False,
) -> Outcome:
    """Train on a Ray cluster, as a job, and follow its log; resumes like train.

    Args:
        config: A YAML file.
        image: Use the cluster's image as it is; CONFIG is a path in it.
        detach: Do not wait for the job's end.
        secret: An environment variable that the job needs and the cluster's own environment has, from a Kubernetes
            Secret or of `ray start`; only the name is sent, since everyone who may ask Ray sees a job's command line
            and environment. May be given again.
    """
    from pipeline.cluster.jobs import client as jobs
    from pipeline.cluster.jobs import submission

    new = submission.plan(config, list(overrides), secret or [], image)
    client = jobs.connect(address)
    job = jobs.submit(client, new)
    warn(f"job {job} trains run {new.run}")
    if detach:
        return {"status": "submitted", "job": job, "run": new.run}, [jobs.how_to_go_on(client, job)], DONE
    return _follow(client, job, as_json)


def _follow(client: Any, job: str, as_json: bool) -> Outcome:
    """Show a job's log until it ends; the exit code is the job's, as far as it says something."""
    from pipeline.cluster.jobs import client as jobs

    out = people(as_json)
    try:
        details = jobs.follow(client, job, lambda text: print(text, end="", file=out, flush=True), warn)
    except KeyboardInterrupt:
        lines = ["", f"job {job} goes on; {jobs.how_to_go_on(client, job)}"]
        return {"status": "interrupted", "job": job}, lines, INTERRUPTED
    ends = {"SUCCEEDED": ("done", DONE), "STOPPED": ("interrupted", INTERRUPTED)}
    status, code = ends.get(str(details.status), ("failed", FAILED))
    if code == FAILED and details.driver_exit_code in (WRONG, INTERRUPTED):
        code = details.driver_exit_code
    return jobs.describe(details) | {"status": status}, [f"job {job}: {details.status}"], code


def jobs(
    *, address: Address = None, follow: Annotated[str | None, Parameter(help=JOB)] = None, as_json: Json = False
) -> Outcome:
    """List the jobs of a Ray cluster, or follow the log of one."""
    from pipeline.cluster.jobs import client as jobs

    client = jobs.connect(address)
    submitted = jobs.list_jobs(client)
    if follow:
        return _follow(client, jobs.find(submitted, follow).submission_id, as_json)
    described = [jobs.describe(job) for job in submitted]
    return described, jobs.format_jobs(described), DONE


def stop(
    job: Annotated[str | None, Parameter(name="JOB", help=JOB)] = None,
    /,
    *,
    all: bool = False,
    address: Address = None,
    as_json: Json = False,
) -> Outcome:
    """Have a job save a checkpoint and end, and wait for that.

    Args:
        all: Every active job.
    """
    from pipeline.cluster.jobs import client as jobs

    if (job is None) != all:
        raise UserError("name one job, such as: pipeline stop pets; or --all")
    client = jobs.connect(address)
    submitted = jobs.list_jobs(client)
    active = [one for one in submitted if not one.status.is_terminal()]
    names = [one.submission_id for one in (active if job is None else [jobs.find(submitted, job)])]
    if not names:
        return [], ["no job is active"], DONE
    warn(f"asked {', '.join(names)} to save a checkpoint and end; waiting")
    stopped = list(jobs.stop(client, names))
    lines = [f"job {details.submission_id}: {details.status}{text and f', {text}'}" for details, text in stopped]
    return [jobs.describe(details) | {"log": text} for details, text in stopped], lines, DONE


def doctor(
    config: Config | None = None,
    /,
    *overrides: Overrides,
    cluster: bool = True,
    kubernetes: bool = False,
    as_json: Json = False,
) -> Outcome:
    """Say whether a cluster can train a configuration, and what to fix if not.

    Args:
        config: A YAML file; without it, data are not checked. With --kubernetes a folder of manifests, or k8s/base.
        cluster: Look at the cluster of cluster.address or $RAY_ADDRESS, else at this machine as one; always so.
        kubernetes: Look at the cluster that kubectl is set to: what it lacks for the manifests, before they are
            applied, and why what was applied is stuck. Nothing is changed there.
    """
    if kubernetes:
        from pipeline.cluster.doctor import examine_kubernetes

        if overrides:
            raise UserError(f"{overrides[0]}: --kubernetes takes a folder alone; settings are in its manifests")
        checks = examine_kubernetes.examine(Path(config or "k8s/base"), _read_command)
    else:
        from pipeline.cluster.doctor.examine import NOT_GIVEN, examine

        words = [config, *overrides] if config else []
        if words and "=" not in words[0]:
            cfg = load(words[0], words[1:])
        else:
            cfg = load(None, [f"data.train={NOT_GIVEN}", f"data.val={NOT_GIVEN}", *words])
        with redirect_stdout(sys.stderr):  # Ray tells there of nodes that die
            checks = examine(cfg)
    states = {check.ok for check in checks}
    status = "bad" if False in states else "not known" if None in states else "ok"
    result = {"status": status, "checks": [asdict(check) for check in checks]}
    return result, [str(check) for check in checks], FAILED if status == "bad" else DONE


def _read_command(words: list[str]) -> "schema.Config":
    """The configuration of a `pipeline train` that a cluster is to run, checked as that command does, and submit."""
    from pipeline.cluster.jobs import submission
    from pipeline.config import loading

    app = App(print_error=False, exit_on_error=False)
    app.command(train)
    try:
        _, bound, _ = app.parse_args(["train", *words])
    except CycloptsError as e:
        raise UserError(" ".join(str(e).split())) from None
    config, *overrides = bound.args or (None,)
    cfg = config_to_train(config, overrides, None)[0]
    submission.check_places(loading.flatten(cfg))
    return cfg
