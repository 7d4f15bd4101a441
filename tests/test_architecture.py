"""The package's shape: imports point one way, heavy libraries stay in their own modules, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pipeline"
# Each module may import those above it.
ORDER = """__init__ machine clock schema environment config failures settings web storage
    data data.sampling data.draws data.index data.request
    data.rows data.find data.shards data.parquet data.scan data.build data.cache data.groups data.read data.fetch
    data.pack data.augment data.dali data.mix data.loader data.isolate data.verify
    provenance precision schedule model optim state losses step predictions memory evaluate state_file checkpoint
    weights export retention served saver spool staging perf summary network figures charts report published
    mlflow_store system_metrics mlflow_run backlog claim tracking uploads job killers identity resume sync record votes
    watchdog trace profile train channel lock find runs listing
    infer report_run preview contestants bench assumptions outages scaling plan plan_view oom supervise starting cluster
    connection affinity worker gauges trainer launch driver probes findings doctor speed scale
    submission jobs console commands bench_commands model_commands report_commands cli""".split()  # noqa: SIM905
# Library -> the modules that may import it.
OWNERS = {
    "ray": {"launch", "trainer", "worker", "gauges", "cluster", "connection", "starting", "submission", "jobs"},
    "mlflow": {"mlflow_run", "mlflow_store", "published", "served", "system_metrics"},
    "nvidia": {"data.augment", "data.dali", "data.fetch"},
    "omegaconf": {"settings"},
    "rich": {"console"},
    "fsspec": {"web", "storage"},
    "aiohttp": {"web", "jobs"},
    "timm": {"optim", "contestants"},
    "jinja2": {"report"},
    "matplotlib": {"figures", "charts"},
    "pyarrow": {
        "web",
        "storage",
        *(f"data.{name}" for name in ("index", "parquet", "scan", "build", "groups", "read")),
    },
}


def modules() -> dict[str, Path]:
    paths = {p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): p for p in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


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
    assert sorted(modules()) == sorted(ORDER)


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
        assert owners is None or module in owners, f"{module} imports {name}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("supervise", {"ray", "torch", "mlflow", "nvidia"}),  # what the user starts
        ("launch", {"torch", "mlflow", "nvidia"}),  # the driver, before which no worker starts
        ("runs", {"torch", "mlflow", "nvidia"}),
        ("tracking", {"torch", "mlflow", "nvidia"}),
    ],
)
def test_what_starts_first_starts_fast(module: str, heavy: set[str]) -> None:
    code = f"import sys, pipeline.{module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert not heavy & set(found.stdout.split())


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert max(lengths.values()) <= 300, lengths
