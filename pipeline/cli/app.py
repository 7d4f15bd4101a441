"""The command line. Exit codes: 0 done, 1 the command failed, 2 the request was wrong, 130 interrupted."""

from pipeline import clock  # noqa: F401  first, since it takes the time

# isort: split
import inspect
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from cyclopts import (
    App,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    UnknownOptionError,
    UnusedCliTokensError,
)

from pipeline import environment
from pipeline.cli import bench, cluster, data, models, train
from pipeline.cli.common import DONE, FAILED, INTERRUPTED, WRONG, drop_unread, warn
from pipeline.errors import NonRetryableError, UserError

MEASURE = Group("Measure", sort_key=5)
GROUPS: dict[Group, tuple[Any, ...]] = {
    Group("Train", sort_key=1): (train.train, train.runs, train.report, train.sync, train.config),
    Group("Data", sort_key=2): (data.index, data.pack, data.preview),
    Group("Models", sort_key=3): (models.evaluate, models.predict, models.export, models.register),
    Group("Cluster", sort_key=4): (cluster.submit, cluster.jobs, cluster.stop, cluster.doctor),
    MEASURE: (bench.plan,),
}


def _shown(default: Any) -> str | None:
    """A default as the help shows it: of a flag, and of what has none, nothing."""
    return None if default is False or default is None else str(default)


def _usage(command: Any, before: str = "") -> str:
    """Such as "Usage: pipeline index SOURCE --out OUT [OPTIONS]"; cyclopts' own does not name what may be left out."""
    words, options = [], []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        shown = next((m.name[0] for m in getattr(parameter.annotation, "__metadata__", ()) if m.name), name.upper())
        if parameter.kind is parameter.VAR_POSITIONAL:
            words.append(f"[{shown} ...]")
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            words.append(shown if parameter.default is parameter.empty else f"[{shown}]")
        elif parameter.default is parameter.empty:
            options.append(f"--{name} {name.upper()}")
    return " ".join(["Usage: pipeline", before + command.__name__, *words, *options, "[OPTIONS]"])


def make_app() -> App:
    """The commands, in groups."""
    app = App(
        name="pipeline",
        help="Exact, fault-tolerant training of image classifiers.",
        help_format="plaintext",  # markdown would be another 50 ms
        version=lambda: version("pipeline"),
        default_parameter=Parameter(negative=(), show_default=_shown),  # no --no-json
        group_commands=Group("Other", sort_key=6),
        group_parameters=Group("Options"),
        print_error=False,
        exit_on_error=False,
    )
    app.register_install_completion_command(help="Write completion for your shell, and a line into its start-up file.")
    for group, commands in GROUPS.items():
        for place, command in enumerate(commands):
            app.command(command, group=group, sort_key=place, usage=_usage(command))
    parts = App(
        name="bench", help="Measure a part of training on this machine.", group=MEASURE, group_commands=Group("Parts")
    )
    of_bench: tuple[Any, ...] = (bench.loader, bench.step, bench.train, bench.scale)
    for place, part in enumerate(of_bench):
        parts.command(part, sort_key=place, usage=_usage(part, "bench "))
    app.command(parts)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if argv is None:
        environment.restart_interpreter()
    words = sys.argv[1:] if argv is None else argv
    if text := environment.leave_out_unusable_kernels(os.environ):
        warn(f"warning: {text}")
    try:
        return _run(words, as_json="--json" in words)
    finally:
        drop_unread()


def _run(words: Sequence[str], as_json: bool) -> int:
    try:
        command, bound, _ = make_app().parse_args(words)
        if "as_json" not in bound.signature.parameters:  # --help, --version, --install-completion
            with suppress(SystemExit):  # rich's, where nobody reads
                command(*bound.args, **bound.kwargs)
            return DONE
        as_json = bound.arguments.get("as_json", as_json)
        result, lines, code = command(*bound.args, **bound.kwargs)
    except CycloptsError as e:
        way = " ".join(["pipeline", *(e.command_chain or []), "--help"])
        _give_up(as_json, WRONG, {"status": "wrong", "error": f"{_in_words(e)}; see {way}"})
        return _end_job()
    except NonRetryableError as e:
        _give_up(as_json, WRONG, {"status": "wrong", "error": str(e)})
        return _end_job()
    except UserError as e:
        return _give_up(as_json, WRONG, {"status": "wrong", "error": str(e)})
    except OSError as e:  # a storage that does not answer, a full disk
        return _give_up(as_json, FAILED, {"status": "failed", "error": str(e)})
    except KeyboardInterrupt:
        return _give_up(as_json, INTERRUPTED, {"status": "interrupted"})
    try:
        for line in [json.dumps(result)] if as_json else lines:
            print(line, flush=True)
    except BrokenPipeError:
        return int(code)
    except OSError as e:  # a full disk; a training has ended well all the same
        warn(f"pipeline: the result cannot be written: {e.strerror}")
        return int(code) if command is train.train else FAILED
    return int(code)


def _in_words(error: CycloptsError) -> str:
    """What is wrong with a command line."""
    name = error.argument.name if error.argument else ""
    if isinstance(error, MissingArgumentError):
        return f"{error.keyword}: give a value" if error.keyword else f"{name} is missing"
    if isinstance(error, UnusedCliTokensError):
        return f"{(error.unused_tokens or [''])[0]}: one word too many"
    text = " ".join(str(error).split()).partition(" Available commands")[0]
    if isinstance(error, UnknownOptionError):
        from pipeline.config.reference import settings

        option = error.token.keyword or error.token.value
        text = text.replace(option, option := option.partition("=")[0])  # a secret
        name = option.strip("-").replace("-", "_")
        text += "".join(f" A setting is {key}=VALUE." for key in settings() if key.split(".")[-1] == name)
    return text.rstrip(".")


def _give_up(as_json: bool, code: int, result: dict[str, str]) -> int:
    warn(f"pipeline: {result.get('error', result['status'])}")
    with suppress(OSError):  # nobody reads: the exit code says it
        if as_json:
            print(json.dumps(result), flush=True)
    return code


def _end_job() -> int:
    """Where this is the job of a RayJob, end it as stopped, so that KubeRay does not make the request again."""
    if os.environ.get("PIPELINE_RAYJOB") and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        from pipeline.cluster.jobs import client as jobs

        try:
            jobs.end_as_stopped()
        except (UserError, ConnectionError) as e:
            warn(f"pipeline: KubeRay will try again, in vain: {e}")
    return WRONG
