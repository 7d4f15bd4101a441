"""Jobs on a Ray cluster, over HTTP: submitting a training, following its log, listing and stopping."""

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from difflib import get_close_matches
from itertools import chain, count
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from pipeline.cluster.jobs.submission import Submission
from pipeline.errors import UserError
from pipeline.text import columns

for _name in ("modules.dashboard_sdk", "modules.job.sdk"):
    logging.getLogger(f"ray.dashboard.{_name}").setLevel(logging.ERROR)  # they tell of each upload and connection

STOP_WAIT_S = 600  # for a checkpoint, before Ray kills a job that is to stop; 3 s by default
REQUEST_TIMEOUT_S = 60.0
SILENCE_TIMEOUT_S = 60.0  # without a line, before a log is asked for anew: the connection may be dead
RETRY_TIMEOUT_S = 300.0  # with a cluster that does not answer while a log is followed
TOKEN = "set RAY_AUTH_MODE=token, and put the head's token into RAY_AUTH_TOKEN or ~/.ray/auth_token"


class UnknownJobError(ConnectionError):
    """The cluster knows no such job any more."""


class Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, but it does not wait for ever, and its errors are one line."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        try:
            return super()._do_request(method, endpoint, timeout=REQUEST_TIMEOUT_S, **options)
        except AuthenticationError:
            raise UserError(f"{self._address} refuses the token, or got none; {TOKEN}") from None
        except OSError:  # also of `requests`
            raise ConnectionError(f"{self._address} does not answer; is the address right, and the head up?") from None

    def _raise_error(self, response: Any) -> None:
        last = (response.text.strip().splitlines() or ["nothing more"])[-1]
        kind = UnknownJobError if response.status_code == 404 else ConnectionError
        raise kind(f"{self._address} refuses, with {response.status_code}: {last}")


def connect(address: str | None) -> Client:
    """A client of the cluster whose dashboard is at `address`, a URL.

    Raises:
        UserError: a wrong address or token.
        ConnectionError: it does not answer.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address and _is_url(os.environ.get("RAY_ADDRESS")):
        address = os.environ["RAY_ADDRESS"]
    if not address:
        raise UserError("name the cluster: --address http://HEAD:8265, or $RAY_API_SERVER_ADDRESS")
    if not _is_url(address):
        raise UserError(f"--address {address}: give the URL of Ray's dashboard, such as http://HEAD:8265")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray looks there before it looks at its argument
    try:
        return Client(address)
    except AuthenticationError:
        raise UserError(f"Ray asks for a token, and there is none; {TOKEN}") from None
    except (UserError, ConnectionError):
        raise
    except (RuntimeError, KeyError, OSError, ValueError):
        raise UserError(f"{address} is not Ray's dashboard; give its URL, such as http://HEAD:8265") from None


def _is_url(text: str | None) -> bool:
    return re.match(r"https?://[^/]", text or "") is not None


def submit(client: Client, submission: Submission) -> str:
    """Send a job.

    Returns:
        Its id: the run's name, with a number from the second job on.

    Raises:
        UserError: another job trains the run.
    """
    run, jobs = submission.run, list_jobs(client)
    for job in jobs:
        if run_of(job) == run and not job.status.is_terminal():
            raise UserError(
                f"run.name={run}: is being trained by job {job.submission_id}, {job.status}; "
                f"pipeline stop {job.submission_id} stops it; or use another name"
            )
    taken = {job.submission_id for job in jobs}
    job_id = next(name for name in chain([run], (f"{run}-{n}" for n in count(2))) if name not in taken)
    environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
    if submission.tree is not None:
        environment["working_dir"] = str(submission.tree)
    return str(client.submit_job(entrypoint=submission.entrypoint, submission_id=job_id, runtime_env=environment))


def list_jobs(client: Client) -> list[JobDetails]:
    """All jobs that were submitted, the newest last."""
    return sorted((job for job in client.list_jobs() if job.submission_id), key=lambda job: job.start_time or 0)


def end_as_stopped() -> None:
    """End this process, a job's, as if somebody had stopped the job: KubeRay starts a new cluster for one that failed.

    Raises:
        UserError, ConnectionError: the dashboard did not take it.
    """
    job = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    connect("http://127.0.0.1:8265").stop_job(job)
    time.sleep(60)  # Ray ends this process meanwhile: SIGTERM


def run_of(job: JobDetails) -> str | None:
    """The name of the run that a job trains, from its command line."""
    names = re.findall(r"run\.name=([\w.-]+)", job.entrypoint)
    return str(names[-1]) if names else None


def find(jobs: Sequence[JobDetails], name: str) -> JobDetails:
    """The job with the id `name`, or of the run `name`: the active one, else the newest.

    Raises:
        UserError: there is none.
    """
    if named := [job for job in jobs if name in (job.submission_id, run_of(job))]:
        return max(named, key=lambda job: (not job.status.is_terminal(), job.start_time or 0))
    known = [job.submission_id for job in jobs]
    near = get_close_matches(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"jobs there: {', '.join(known[-5:]) or 'none'}"
    raise UserError(f"no job {name} ({hint})")


def follow(client: Client, job: str, write: Callable[[str], Any], warn: Callable[[str], None]) -> JobDetails:
    """Pass on a job's log, from its beginning, until the job ends; a lost connection is taken up again.

    Raises:
        ConnectionError: the cluster is away for too long, or has forgotten the job.
    """
    num_seen, lost_at = 0, 0.0  # characters; when the connection broke

    async def tail() -> bool:
        """Until the end of the log; False if it is silent."""
        nonlocal num_seen, lost_at
        position, stream = 0, client.tail_job_logs(job)
        try:
            while True:
                text = await asyncio.wait_for(anext(stream), SILENCE_TIMEOUT_S)
                lost_at = 0.0
                write(text[max(0, num_seen - position) :])
                position += len(text)
                num_seen = max(num_seen, position)
        except StopAsyncIteration:
            return True
        except TimeoutError:
            return False

    while True:
        try:
            if asyncio.run(tail()) and (details := client.get_job_info(job)).status.is_terminal():
                return details
        except UnknownJobError:
            raise ConnectionError(
                f"the cluster has forgotten job {job}: its head was restarted; submit it again, and it resumes"
            ) from None
        except (OSError, RuntimeError, aiohttp.ClientError) as e:
            if not lost_at:
                lost_at = time.monotonic()
                warn(f"lost the connection to {client.get_address()}; trying again for {RETRY_TIMEOUT_S:.0f} s")
            if time.monotonic() - lost_at > RETRY_TIMEOUT_S:
                raise ConnectionError(f"lost job {job}, which may go on; {how_to_go_on(client, job)}") from e
        time.sleep(1)


def how_to_go_on(client: Client, job: str) -> str:
    words = f"{job} --address {client.get_address()}"
    return f"pipeline jobs --follow {words} shows its log, pipeline stop {words} stops it"


def stop(client: Client, jobs: Sequence[str]) -> Iterator[tuple[JobDetails, str]]:
    """Have jobs save a checkpoint and end, and wait for that; nothing happens to those that have ended.

    Yields:
        Each job, and what its log says of the step and the checkpoint.
    """
    for job in jobs:
        client.stop_job(job)
    for job in jobs:
        while not (details := client.get_job_info(job)).status.is_terminal():
            time.sleep(0.5)
        ends = re.findall(r"^(\w+ at step \d+ of \d+)$|^  checkpoint  (.+)$", client.get_job_logs(job), re.MULTILINE)
        yield details, ", ".join(part for end in ends[-2:] for part in end if part)


def describe(job: JobDetails) -> dict[str, Any]:
    """What is worth knowing of a job; times in seconds since the epoch, why: of a failure."""
    began, ended = ((t or 0) / 1000 for t in (job.start_time, job.end_time))
    why = None
    if job.status == "FAILED":
        errors = re.findall(r"^(?:pipeline|failed): .*", job.message or "", re.MULTILINE)
        killed = f"ended with exit code {job.driver_exit_code}: perhaps killed for lack of memory"
        killed += "; submit it again, and it resumes"
        why = errors[-1][:200] if errors else killed
    return {
        "job": job.submission_id,
        "status": str(job.status),
        "run": run_of(job),
        "started": began,
        "seconds": round((ended or time.time()) - began, 1),
        "why": why,
    }


def format_jobs(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Jobs as `describe` gives them, for people."""
    rows = [("JOB", "STATUS", "RUN", "STARTED", "TOOK", "")]
    for job in jobs:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job["started"]))
        took = str(timedelta(seconds=round(job["seconds"])))
        rows.append((job["job"], job["status"], job["run"] or "-", started, took, job["why"] or ""))
    return columns(rows)
