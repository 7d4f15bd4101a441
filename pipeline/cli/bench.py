"""The commands that measure: bench loader, bench step, bench train, bench scale, and plan, on paper."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token

from pipeline.cli.common import DONE, FAILED, Config, Count, Json, Outcome, Overrides, load, warn, whole
from pipeline.errors import UserError
from pipeline.local_files import make_folder

Result = dict[str, Any]


Rounds = Annotated[Count, Parameter(help="How many rounds to measure; what is compared takes turns.")]
Steps = Annotated[Count, Parameter(help="Timed steps of a round.")]
Folder = Annotated[Path | None, Parameter(help="A folder for the figures as JSON and a plot.")]
Threads = Annotated[Count | None, Parameter(help="For computing; by default all cores.")]


def counts(_: Any, tokens: Sequence[Token]) -> list[int]:
    """Whole numbers, separated by commas."""
    return [whole(1)(int, [token.evolve(value=word)]) for token in tokens for word in token.value.split(",")]


def speed(_: Any, tokens: Sequence[Token]) -> float:
    """A number that is no nonsense as a speed."""
    try:
        value = float(tokens[0].value)
    except ValueError:
        value = math.nan
    if not 1e-3 <= value <= 1e7:
        raise UserError(f"{tokens[0].value}: must be a number, at least 0.001 and at most 1e7")
    return value


def loader(
    config: Config,
    /,
    *overrides: Overrides,
    rounds: Rounds = 7,
    images: Count = 2048,
    cores: Count | None = None,
    host: Annotated[bool, Parameter(negative=())] = False,
    out: Folder = None,
    as_json: Json = False,
) -> Outcome:
    """images/s of the loader beside torchvision's and timm's, by turns, on the CPU.

    Args:
        config: A YAML file.
        images: Timed images of a round.
        cores: For each loader; by default all.
        host: Measure instead what loading takes from the process that trains, as on a GPU; none is needed.
    """
    if host:
        from pipeline.bench.host import bench_host, format_result

        return _bench(out, "host", partial(bench_host, load(config, overrides), rounds, images), format_result)

    from pipeline.bench import loader

    measure = partial(loader.bench_loader, load(config, overrides), cores, rounds, images)
    return _bench(out, "loader", measure, loader.format_result, loader.plot)


def step(
    config: Config,
    /,
    *overrides: Overrides,
    tries: Annotated[list[str] | None, Parameter(name="--try")] = None,
    rounds: Rounds = 7,
    steps: Steps = 3,
    threads: Threads = None,
    out: Folder = None,
    as_json: Json = False,
) -> Outcome:
    """images/s of the bare step on synthetic data, the part of the peak that this is, and what would help.

    Args:
        config: A YAML file.
        tries: A setting to compare with, by turns, such as model.compile=default; may be given again.
    """
    from pipeline.bench import step
    from pipeline.training.precision import emulation, hardware_of

    context = step.context_here(threads)
    variants = {step.CONFIGURED: step.settled(load(config, overrides), context.device)}
    for override in tries or []:
        variants[override] = step.settled(load(config, [*overrides, override]), context.device)
        if step.have_same_step(variants[override], variants[step.CONFIGURED]):
            fix = "try another of model., train. or optim."
            raise UserError(f"--try {override}: changes nothing of the bare step; {fix}")
    for precision in sorted({cfg.train.precision for cfg in variants.values()}):
        if text := emulation(precision, [hardware_of(context.device)]):
            warn(text)
    measure = partial(step.bench_step, variants, context, rounds, steps)
    return _bench(out, "step", measure, step.format_result, _plot("rows"))


def train(
    config: Config,
    /,
    *overrides: Overrides,
    rounds: Rounds = 10,
    steps: Steps = 10,
    threads: Threads = None,
    out: Folder = None,
    as_json: Json = False,
) -> Outcome:
    """images/s through data, training and logging beside the bare step on synthetic data, by turns.

    Args:
        config: A YAML file.
    """
    from pipeline.bench import step
    from pipeline.bench.train import bench_train

    context = step.context_here(threads)
    measure = partial(bench_train, step.settled(load(config, overrides), context.device), context, rounds, steps)
    return _bench(out, "train", measure, step.format_result, _plot("rows"))


def scale(
    config: Config,
    /,
    *overrides: Overrides,
    workers: Annotated[list[int] | None, Parameter(converter=counts, n_tokens=1)] = None,
    rounds: Rounds = 3,
    steps: Steps = 20,
    out: Folder = None,
    as_json: Json = False,
) -> Outcome:
    """images/s of whole trainings through Ray with more and more workers, by turns.

    Args:
        config: A YAML file.
        workers: Numbers of workers, separated by commas; by default 1,2.
    """
    from pipeline.bench import scaling
    from pipeline.failures import TrainingFailedError

    measure = partial(scaling.bench_scale, load(config, overrides), workers or [1, 2], rounds, steps)
    try:
        return _bench(out, "scale", measure, scaling.format_result, _plot("workers"))
    except TrainingFailedError as e:
        return {"status": "failed", "error": str(e)}, [f"failed: {e}"], FAILED


def _bench(
    out: Path | None,
    name: str,
    measure: Callable[..., Result],
    format_result: Callable[[Result], list[str]],
    plot: Callable[[Result, Path], None] | None = None,
) -> Outcome:
    """Measure, and show how far that is; the figures and their plot go to the folder `out`, which is made before.

    Args:
        measure: the benchmark, all but its `progress`.
    """
    from pipeline.cli.console import WorkView

    if out:
        make_folder(out)
    with WorkView(sys.stderr) as view:
        result = measure(view)
    if out:
        (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if plot is not None:
            plot(result, out / f"{name}.png")
    return result, format_result(result), DONE


def _plot(bars: str) -> Callable[[Result, Path], None]:
    from pipeline.bench import common

    return lambda result, file: common.plot(result[bars], common.title(result), file)


def plan(
    config: Config,
    /,
    *overrides: Overrides,
    gpus: Count,
    gpu: str,
    batch_per_gpu: Count | None = None,
    images: Count | None = None,
    images_per_s_per_gpu: Annotated[float | None, Parameter(converter=speed)] = None,
    assume: list[str] | None = None,
    measured: Path | None = None,
    as_json: Json = False,
) -> Outcome:
    """Predict images/s, hours, goodput and cost on 8 to 1,024 GPUs, on paper.

    Args:
        config: A YAML file.
        gpus: How many, such as 64.
        gpu: The card: H100, A100, ...; a wrong one lists all.
        batch_per_gpu: Weak scaling: so many images on each GPU; by default train.global_batch is kept.
        images: Of data.train; by default its index's, or ImageNet's.
        images_per_s_per_gpu: Of one GPU alone at a large batch, as measured; by default modelled.
        assume: NAME=VALUE replaces a number that the plan rests on; the answer lists all; may be given again.
        measured: The JSON of `pipeline bench scale`: predict its efficiency from one worker's figures.
    """
    from pipeline.bench.planning.plan import plan
    from pipeline.bench.planning.view import format_plan

    result = plan(
        load(config, overrides),
        gpus,
        gpu,
        assume or [],
        batch_per_gpu=batch_per_gpu,
        num_images=images,
        rate=images_per_s_per_gpu,
        measured=measured,
    )
    return result, format_plan(result), DONE
