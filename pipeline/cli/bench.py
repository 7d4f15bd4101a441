"""What `pipeline bench` and `pipeline plan` do, like `commands`: results for programs, and lines for people."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.cli.commands import DONE, FAILED, Outcome, warn
from pipeline.config.loading import load
from pipeline.errors import UserError
from pipeline.storage import make_folder

Result = dict[str, Any]


def loader(args: argparse.Namespace) -> Outcome:
    from pipeline.bench import loader

    cfg = load(args.config, args.overrides)
    measure = partial(loader.bench_loader, cfg, args.cores, args.rounds, args.images)
    return _bench(args, "loader", measure, loader.format_result, loader.plot)


def step(args: argparse.Namespace) -> Outcome:
    from pipeline.bench import step
    from pipeline.training.precision import emulation, hardware_of, settle

    context = step.context_here(args.threads)
    variants = {step.CONFIGURED: settle(load(args.config, args.overrides), context.device)}
    for override in args.tries:
        variants[override] = settle(load(args.config, [*args.overrides, override]), context.device)
        if step.have_same_step(variants[override], variants[step.CONFIGURED]):
            fix = "try another of model., train. or optim."
            raise UserError(f"--try {override}: changes nothing of the bare step; {fix}")
    for precision in sorted({cfg.train.precision for cfg in variants.values()}):
        if text := emulation(precision, [hardware_of(context.device)]):
            warn(text)
    measure = partial(step.bench_step, variants, context, args.rounds, args.steps)
    return _bench(args, "step", measure, step.format_result, _plot("rows"))


def train(args: argparse.Namespace) -> Outcome:
    from pipeline.bench import step
    from pipeline.training.precision import settle

    context = step.context_here(args.threads)
    cfg = settle(load(args.config, args.overrides), context.device)
    measure = partial(step.bench_train, cfg, context, args.rounds, args.steps)
    return _bench(args, "train", measure, step.format_result, _plot("rows"))


def scale(args: argparse.Namespace) -> Outcome:
    from pipeline.bench import scaling
    from pipeline.failures import TrainingFailedError

    cfg = load(args.config, args.overrides)
    measure = partial(scaling.bench_scale, cfg, args.workers, args.rounds, args.steps)
    try:
        return _bench(args, "scale", measure, scaling.format_result, _plot("workers"))
    except TrainingFailedError as e:
        return {"status": "failed", "error": str(e)}, [f"failed: {e}"], FAILED


def _bench(
    args: argparse.Namespace,
    name: str,
    measure: Callable[..., Result],
    format_result: Callable[[Result], list[str]],
    plot: Callable[[Result, Path], None],
) -> Outcome:
    """Measure, and show how far that is; the figures and their plot go to --out, which is made before.

    Args:
        measure: the benchmark, all but its `progress`.
    """
    from pipeline.cli.console import WorkView

    if args.out:
        make_folder(args.out)
    with WorkView(sys.stderr) as view:
        result = measure(view)
    if args.out:
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        plot(result, args.out / f"{name}.png")
    return result, format_result(result), DONE


def _plot(bars: str) -> Callable[[Result, Path], None]:
    from pipeline.bench import common

    return lambda result, file: common.plot(result[bars], common.title(result), file)


def plan(args: argparse.Namespace) -> Outcome:
    from pipeline.bench.planning.plan import plan
    from pipeline.bench.planning.view import format_plan

    result = plan(
        load(args.config, args.overrides),
        args.gpus,
        args.gpu,
        args.assume,
        batch_per_gpu=args.batch_per_gpu,
        num_images=args.images,
        rate=args.images_per_s_per_gpu,
        measured=args.measured,
    )
    return result, format_plan(result), DONE
