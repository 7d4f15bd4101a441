"""The package's shape: imports point one way, heavy libraries stay in their own modules, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pipeline"
# Rooms and, within them, modules; each may import what stands above it.
ROOMS = {
    "": "__init__ machine clock errors text events environment failures local_files http_storage storage versions",
    "config": "fields data training running schema reference loading",
    "data": "stream augment_params index batch_spec",
    "data.indexing": "rows find shards parquet scan build",
    "data.loading": """cache groups read child fetch shared_memory reader_process bad_images readers augment graph
        held dali to_device mix loader isolate""",
    "data.": "pack verify preview",
    "runs": "claim spec manifest state_file checkpoint retention host_copy async_checkpointer resume lock listing",
    "models": "resnet state_dict pretrained export",
    "tracking": "ledger metrics summary records outbox staging system_metrics mlflow_store pyfunc_model registry",
    "tracking.report": "charts page",
    "tracking.": "mlflow_run backlog mlflow_logger uploads find sync",
    "training": """precision backends compilation schedule optim state step microbatch evaluation ddp control watchdog
        sample_log profiler replicas stragglers crashing_images losses broken_images attempt recorder setup loop
        open_run inference checkpoint_report""",
    "cluster": """oom ending supervisor ray_start ray_cluster connection affinity channel worker prometheus trainer
        controller driver""",
    "cluster.doctor": """node_checks node_hardware check_results check_gpus check_network examine kubectl manifests
        placement check_volumes check_kubernetes stuck examine_kubernetes""",
    "cluster.jobs": "submission client",
    "bench.planning": "assumptions failure_model cost_model plan view",
    "bench": "common loader_baselines loader_process loader host verdict step train scaling",
    "cli": "console common train data models cluster bench app",
}
ORDER = [f"{room.strip('.')}.{name}".strip(".") for room, names in ROOMS.items() for name in names.split()]
# Library -> the rooms and modules that may import it.
OWNERS = {
    "torch": {
        *("versions", "data.loading", "models", "training", "cluster", "bench"),
        *("runs.spec", "runs.checkpoint", "runs.state_file", "runs.host_copy"),
        *("tracking.ledger", "tracking.pyfunc_model"),
    },
    "ray": {"cluster"},
    "mlflow": {"tracking"},
    "nvidia": {"data.loading", "bench.host"},
    "pynvml": {"cluster.doctor"},
    "omegaconf": {"config.loading"},
    "pyarrow": {"storage", "http_storage", "data.index", "data.indexing", "data.loading"},
    "rich": {"cli.console", "text"},
    "cyclopts": {"cli"},
    "fsspec": {"storage", "http_storage"},
    "aiohttp": {"http_storage", "cluster.jobs"},
    "timm": {"training.optim", "bench.loader_baselines"},
    "jinja2": {"tracking.report"},
    "matplotlib": {"tracking.report", "bench.common"},
}


def modules() -> dict[str, Path]:
    return {p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): p for p in PACKAGE.rglob("*.py")}


def imports(path: Path) -> list[str]:
    """What a file imports, as dotted names."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_every_module_has_its_place() -> None:
    rooms = {f"{room}.__init__" for room in ROOMS if room and not room.endswith(".")}
    assert sorted(modules()) == sorted({*ORDER, *rooms})


def test_a_room_says_its_charge_and_imports_nothing() -> None:
    for name, path in modules().items():
        if name.endswith("__init__"):
            assert ast.get_docstring(ast.parse(path.read_text())), name
            assert not imports(path), name


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_to_modules_above(module: str) -> None:
    above = set(ORDER[: ORDER.index(module)])
    for name in imports(modules()[module]):
        if name.startswith("pipeline."):
            inner = name.removeprefix("pipeline.")
            candidates = {inner, inner.rpartition(".")[0] or "__init__"}
            assert candidates & above, f"{module} imports {name}, which is not above it"


@pytest.mark.parametrize("module", ORDER)
def test_libraries_stay_with_their_owners(module: str) -> None:
    for name in imports(modules()[module]):
        owners = OWNERS.get(name.partition(".")[0])
        parts = module.split(".")
        places = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        assert owners is None or places & owners, f"{module} imports {name}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("cluster.supervisor", {"ray", "torch", "mlflow", "nvidia"}),  # what the user starts
        ("cluster.controller", {"torch", "mlflow", "nvidia"}),  # the driver, before which no worker starts
        ("training.open_run", {"torch", "mlflow", "nvidia"}),
        ("tracking.mlflow_logger", {"torch", "mlflow", "nvidia"}),
    ],
)
def test_what_starts_first_starts_fast(module: str, heavy: set[str]) -> None:
    code = f"import sys, pipeline.{module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert not heavy & set(found.stdout.split())


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert max(lengths.values()) <= 300, lengths
