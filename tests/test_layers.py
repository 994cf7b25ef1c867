"""The layers of the design, held by reading the sources and by looking at what an import brings along."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LARGEST_MODULE = 300

# From the bottom up: a module imports from its own layer or from those before it.
LAYERS = (
    "errors", "config", "geometry", "scans", "store", "unet", "labels", "compute", "works", "verbs", "cli", "flows",
)  # fmt: skip
TOP_FILES = {"errors": "errors", "config": "config", "demo": "cli"} | dict.fromkeys(
    ("cli", "commands", "console", "__main__"), "cli"
)

HOMES = {
    "torch": ("pipeline/unet/",),
    "zarr": ("pipeline/store/",),
    "tensorstore": ("pipeline/store/",),
    "dask": ("pipeline/compute/",),
    "distributed": ("pipeline/compute/",),
    "prefect": ("flows/",),
}

# What no import of a package may bring along. xarray is left to import dask where it finds it.
ABSENT = {
    "pipeline": ("prefect", "torch", "dask", "distributed", "zarr"),
    "pipeline.geometry": ("prefect", "torch", "dask", "distributed", "zarr", "xarray"),
    "pipeline.scans": ("prefect", "torch", "distributed", "zarr"),
    "pipeline.store": ("prefect", "torch", "distributed"),
    "pipeline.unet": ("prefect", "dask", "distributed", "zarr"),
    "pipeline.labels": ("prefect", "torch", "distributed", "zarr"),
    "pipeline.compute": ("prefect", "torch"),
}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def name_of(path: str) -> str:
    """Return the dotted name of a module by its path from the repository's root."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def layer_of(module: str) -> str:
    """Return the layer of one of our modules; a top-level file of the package that is not listed is a verb."""
    first, _, rest = module.partition(".")
    if first == "flows":
        return "flows"
    part = rest.partition(".")[0]
    if not part:
        return "errors"
    return part if part in LAYERS else TOP_FILES.get(part, "verbs")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the dotted names that a piece of source imports, and the lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"imports are absolute, got a relative one in line {node.lineno}"
            assert node.module
            yield node.module, node.lineno


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in {"pipeline", "flows"}


def broken_rules(source: str, path: str) -> list[str]:
    """Return what a module does against the layers; ``path`` is from the repository's root."""
    tree = ast.parse(source)
    return [*_out_of_home(tree, path), *_upwards(tree, path), *_inside_functions(tree, path)]


def _out_of_home(tree: ast.AST, path: str) -> Iterator[str]:
    for module, line in imports(tree):
        homes = HOMES.get(module.partition(".")[0])
        if homes and not path.startswith(homes):
            yield f"{path}:{line} imports {module}, which only {homes[0]} may"


def _upwards(tree: ast.AST, path: str) -> Iterator[str]:
    importer = name_of(path)
    at = LAYERS.index(layer_of(importer))
    for module, line in imports(tree):
        if is_ours(module) and LAYERS.index(layer_of(module)) > at:
            yield f"{path}:{line} imports {module} from a layer above its own"


def _inside_functions(tree: ast.AST, path: str) -> Iterator[str]:
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for module, line in imports(function):
                if is_ours(module):
                    yield f"{path}:{line} imports {module} inside a function"


@pytest.mark.parametrize("folder", ["pipeline", "flows"])
def test_modules_import_only_what_their_layer_may(folder):
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in modules(folder)}
    assert sources
    assert [rule for path, source in sources.items() for rule in broken_rules(source, path)] == []


@pytest.mark.parametrize("folder", ["pipeline", "flows"])
def test_modules_are_short(folder):
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules(folder)}
    assert {path: n for path, n in lengths.items() if n > LARGEST_MODULE} == {}


@pytest.mark.parametrize(
    ("path", "source", "broken"),
    [
        ("pipeline/geometry/box.py", "import torch.nn", "imports torch.nn, which only pipeline/unet/ may"),
        ("pipeline/segment.py", "from zarr.codecs import X", "imports zarr.codecs, which only pipeline/store/ may"),
        ("pipeline/compute/window.py", "import prefect", "imports prefect, which only flows/ may"),
        ("pipeline/labels/merges.py", "def f():\n    import dask", "imports dask, which only pipeline/compute/ may"),
        ("pipeline/store/image.py", "from pipeline.unet.model import M", "from a layer above its own"),
        ("pipeline/geometry/grid.py", "import pipeline.segment", "from a layer above its own"),
        ("pipeline/segment.py", "from pipeline.cli import main", "from a layer above its own"),
        ("pipeline/cli.py", "from flows.archive import run", "from a layer above its own"),
        ("pipeline/errors.py", "from pipeline.geometry import box", "from a layer above its own"),
        ("pipeline/segment.py", "def f():\n    from pipeline.errors import E", "imports pipeline.errors inside a fun"),
        ("pipeline/segment.py", "async def f():\n    import pipeline.errors", "imports pipeline.errors inside a func"),
        ("pipeline/unet/train.py", "class A:\n def f(s):\n  if s:\n   import pipeline.errors", "inside a function"),
    ],
)
def test_a_broken_rule_is_found(path, source, broken):
    (found,) = broken_rules(source, path)
    assert broken in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pipeline/unet/network.py", "import torch\nfrom pipeline.geometry.tiles import TileRule"),
        ("pipeline/compute/window.py", "from distributed import Client\nfrom pipeline.compute.runner import RETRIES"),
        ("pipeline/segment.py", "from pipeline.unet.model import Model\nfrom pipeline.compute import runner"),
        ("pipeline/cli.py", "from pipeline.segment import segment\ndef f():\n    import webbrowser"),
        ("flows/archive.py", "import prefect\nfrom pipeline.segment import segment"),
        ("pipeline/store/zarrs.py", "import zarrlike\nimport daskette"),
    ],
)
def test_what_is_allowed_is_not_found(path, source):
    assert broken_rules(source, path) == []


def brought(package: str, absent: tuple[str, ...]) -> list[str]:
    """Return which of the libraries are there after a new process has imported every module of a package."""
    folder = ROOT / package.replace(".", "/")
    names = [name_of(str(path.relative_to(ROOT))) for path in folder.glob("*.py")] if "." in package else [package]
    program = f"import sys, {', '.join(sorted(names))}; print(*sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(("package", "absent"), ABSENT.items())
def test_an_import_brings_no_library_that_is_not_its_own(package, absent):
    assert brought(package, absent) == []


def test_libraries_that_an_import_brings_are_found():
    assert brought("pipeline.compute", ("dask", "distributed", "prefect")) == ["dask", "distributed"]


def test_the_contract_of_runners_and_the_serial_one_need_no_dask():
    program = "import sys, pipeline.compute.runner, pipeline.compute.watch; print('dask' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
