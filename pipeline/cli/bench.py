"""What `pipeline bench` and `pipeline plan` do, like `commands`: results for programs, and lines for people."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.cli.commands import DONE, FAILED, Outcome, say
from pipeline.config.loading import load
from pipeline.errors import UserError
from pipeline.storage import make_folder


def loader(args: argparse.Namespace) -> Outcome:
    from pipeline.bench import loader as bench_loader

    cfg = load(args.config, args.overrides)
    with _measuring(args) as view:
        result = bench_loader.bench_loader(cfg, args.cores, args.rounds, args.images, view)
    return _done(args, "loader", result, bench_loader.table(result), partial(bench_loader.plot, result))


def step(args: argparse.Namespace) -> Outcome:
    from pipeline.bench import step as bench_step
    from pipeline.training.precision import emulation, hardware_of, settle

    place = bench_step.here(args.threads)
    variants = {bench_step.CONFIGURED: settle(load(args.config, args.overrides), place.device)}
    for one in args.tries:
        variants[one] = settle(load(args.config, [*args.overrides, one]), place.device)
        if bench_step.same_step(variants[one], variants[bench_step.CONFIGURED]):
            raise UserError(f"--try {one}: changes nothing of the bare step; try another of model., train. or optim.")
    for precision in sorted({cfg.train.precision for cfg in variants.values()}):
        if text := emulation(precision, [hardware_of(place.device)]):
            say(text)
    with _measuring(args) as view:
        result = bench_step.bench_step(variants, place, args.rounds, args.steps, view)
    return _done(args, "step", result, bench_step.table(result), _bars(result, "rows"))


def train(args: argparse.Namespace) -> Outcome:
    from pipeline.bench import step as bench_step
    from pipeline.training.precision import settle

    place = bench_step.here(args.threads)
    cfg = settle(load(args.config, args.overrides), place.device)
    with _measuring(args) as view:
        result = bench_step.bench_train(cfg, place, args.rounds, args.steps, view)
    return _done(args, "train", result, bench_step.table(result), _bars(result, "rows"))


def scale(args: argparse.Namespace) -> Outcome:
    from pipeline.bench import scaling as bench_scaling
    from pipeline.failures import TrainingFailedError

    cfg = load(args.config, args.overrides)
    try:
        with _measuring(args) as view:
            result = bench_scaling.bench_scale(cfg, args.workers, args.rounds, args.steps, view)
    except TrainingFailedError as e:
        return {"status": "failed", "error": str(e)}, [f"failed: {e}"], FAILED
    return _done(args, "scale", result, bench_scaling.table(result), _bars(result, "workers"))


def _measuring(args: argparse.Namespace) -> Any:
    """Shows how far it is; what could not be written in the end is told before."""
    from pipeline.cli.console import WorkView

    if args.out:
        make_folder(args.out)
    return WorkView(sys.stderr)


def _bars(result: dict[str, Any], key: str) -> Callable[[Path], None]:
    from pipeline.bench import common

    return partial(common.plot, result[key], common.title(result))


def _done(
    args: argparse.Namespace, name: str, result: dict[str, Any], lines: list[str], plot: Callable[[Path], None]
) -> Outcome:
    """The outcome; its figures and their picture are in --out."""
    if args.out:
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        plot(args.out / f"{name}.png")
    return result, lines, DONE


def plan(args: argparse.Namespace) -> Outcome:
    from pipeline.bench.planning.plan import plan
    from pipeline.bench.planning.view import table

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
    return result, table(result), DONE
