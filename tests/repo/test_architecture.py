"""Rules about the code that reviewers would otherwise have to check."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = {"pipeline": "pipeline", "cliper_model": "model", "jobs": "jobs"}  # folder: name below `cliper`
ALLOWED = {"model": {"model"}, "pipeline": {"pipeline", "model"}, "jobs": {"jobs", "pipeline", "model"}}
FORBIDDEN_IN_MODEL = {"ray", "pyarrow", "fsspec", "s3fs", "typer"}
ORDER = (  # of the packages inside pipeline/, from the ground up: each may import those before it
    *("config", "errors", "extras", "parallel", "telemetry", "storage", "corpus", "run", "label", "flow"),
    *("report", "evaluate", "export", "review", "dataset", "predict", "results"),
)
FILES = [(package, path) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Full names of every module a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: getattr(value, "name", value))
def test_imports_go_one_way(package: str, path: Path) -> None:
    found = imported(path)
    tops = {name.split(".")[0] for name in found}
    assert not tops & {*PACKAGES, "configs", "tools", "benchmarks", "tests"}, "import it below `cliper`"
    assert {name.split(".")[1] for name in found if name.startswith("cliper.")} <= ALLOWED[PACKAGES[package]]
    if package == "cliper_model":
        assert not tops & FORBIDDEN_IN_MODEL


@pytest.mark.parametrize("path", [p for package, p in FILES if package == "pipeline"], ids=lambda p: p.name)
def test_pipeline_packages_are_in_order(path: Path) -> None:
    own = path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")
    others = {name.split(".")[2] for name in imported(path) if name.startswith("cliper.pipeline.")}
    assert own == "__init__" or all(ORDER.index(other) <= ORDER.index(own) for other in others)


def test_no_two_modules_import_each_other() -> None:
    modules = [(package, path) for package, path in FILES if path.name != "__init__.py"]
    names = {module_name(package, path): imported(path) for package, path in modules}
    arrows = {name: {m for m in names if m != name and _reaches(found, m)} for name, found in names.items()}
    circle: list[str] = []
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle, "modules import each other"


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(ROOT / package).with_suffix("").parts
    return ".".join(("cliper", PACKAGES[package], *parts))


def _reaches(found: set[str], module: str) -> bool:
    return module in found or any(name.rpartition(".")[0] == module for name in found)


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: getattr(value, "name", value))
def test_modules_and_functions_stay_readable(package: str, path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 500, "is it still one subject?"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # A command's options are its parameters: what counts is the body.
            assert (node.end_lineno or 0) - node.body[0].lineno <= 60, f"{node.name} is too long"
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"eval", "exec"})


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_reading_configs_and_help_needs_no_torch_and_no_ray() -> None:
    heavy = {"torch", "ray", "open_clip", "diffusers"}
    assert not modules_after("import cliper.jobs.cli, cliper.pipeline.config") & heavy


def test_the_model_needs_no_ray() -> None:
    assert not modules_after("import cliper.model.segmenter") & {"ray", "pyarrow"}
