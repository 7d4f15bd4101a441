"""What a job on a cluster is to be, checked before anything is sent.

It is `pipeline train` with the run's name on its command line: sent again, it resumes. Whoever may ask the cluster sees
a job's command line and environment, so neither carries a secret, only the name of one that the cluster has.
"""

import logging
import re
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env import packaging  # Ray does not tell what it would send otherwise

from pipeline.config.fields import refuse_credentials
from pipeline.config.loading import flatten, load, parse_override
from pipeline.config.running import RunConfig
from pipeline.errors import UserError

logging.getLogger("ray._private.runtime_env").setLevel(logging.ERROR)  # it tells of each .gitignore, several times

MAX_TREE_MB = 200  # the head keeps it in memory, and every node gets it
PLACES = ("run.storage", "data.train", "data.val", "data.cache_dir")


@dataclass(frozen=True)
class Submission:
    """A job to be. tree: the folder that is sent along; None: the cluster's image is used as it is."""

    run: str
    entrypoint: str
    tree: Path | None


def plan(config: str, overrides: Sequence[str], secrets: Sequence[str], image: bool) -> Submission:
    """Check what is asked for as `pipeline train` would, and for what means nothing on a cluster.

    Args:
        secrets: names of variables that the cluster's environment has.
        image: `config` is a path in the cluster's image; else one in the working tree.

    Raises:
        UserError: it would not work.
    """
    if image and not Path(config).exists():  # only the job can check the rest
        settings = dict(map(parse_override, overrides))
    else:
        settings = flatten(load(config, overrides))
    check_places(settings)
    name = settings.get("run.name")
    run = f"{Path(config).stem}-{time.strftime('%Y%m%d-%H%M%S')}" if name is None else str(name)
    RunConfig(name=run)
    tree = None if image else Path.cwd()
    if tree is not None:
        config = _in_tree(config, tree)
    needs = [word for name in secrets for word in ("--needs", name)]
    others = [word for word in overrides if not word.startswith("run.name=")]
    words = ["pipeline", "train", *needs, config, *others, f"run.name={run}"]
    return Submission(run, f"exec {shlex.join(words)}", tree)  # no shell between it and the signal to stop


def check_places(settings: Mapping[str, Any]) -> None:
    """Refuse secrets, and places that only the machine knows on which the command was written.

    Raises:
        UserError: there is one.
    """
    for key, value in settings.items():
        refuse_credentials(key, value)
        relative = key in PLACES and isinstance(value, str) and "://" not in value and not value.startswith("/")
        if relative or (key == "mlflow.uri" and re.match(r"sqlite:///(?!/)", str(value))):
            raise UserError(
                f"{key}={value}: means nothing on a cluster; give an absolute path that every node mounts, or a URI"
            )
    if settings.get("cluster.address"):
        raise UserError(f"cluster.address={settings['cluster.address']}: leave it out; a job trains where it is sent")


def _in_tree(config: str, tree: Path) -> str:
    """The path of `config` in `tree`, which is small enough to be sent."""
    sizes: Counter[str] = Counter()
    files: set[Path] = set()

    def add(path: Path) -> None:
        if path.is_file():
            files.add(path)
            sizes[path.relative_to(tree).parts[0]] += path.stat().st_size

    excludes = [packaging._get_excludes(tree, get_runtime_env_default_excludes())]
    packaging._dir_travel(tree, excludes, add, include_gitignore=True)
    if (path := Path(config).resolve()) not in files:
        raise UserError(
            f"{config}: is not in what is sent, the folder {tree} without what its .gitignore names; "
            "submit from the folder that holds it, or use --image"
        )
    if (total := sizes.total() / 1e6) > MAX_TREE_MB:
        largest, size = sizes.most_common(1)[0]
        raise UserError(
            f"{tree} has {total:.0f} MB, and at most {MAX_TREE_MB} MB are sent; the largest is {largest}, "
            f"{size / 1e6:.0f} MB; name it in .gitignore or .rayignore, or use --image"
        )
    return str(path.relative_to(tree))
