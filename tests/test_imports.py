"""Imports point one way; and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "secateur"
LAYERS = [
    {"types"},
    {"graph"},
    {"counts", "criteria", "granularity", "score", "allocate", "schedules"},
    {"mask", "compact", "verify", "checkpoint", "runtime", "measure"},
    {"train", "data", "models"},
    {"export", "track", "report"},
    {"pipeline"},
    {"cli"},
]
PARTS = {  # files that carry a part of one of the names above, or stand apart from their folder
    "graph.verify": "verify",  # masks and compacts to prove
    "measure.counts": "counts",  # arithmetic on a graph: what an allocation optimises
    "trial": "verify",
    "allocation": "allocate",
    "widths": "allocate",
    "attention": "compact",
    "fit": "compact",
    "hollow": "compact",
    "fold": "compact",
    "patch": "compact",
    "sizes": "compact",
    "header": "checkpoint",
    "rebuild": "checkpoint",
    "recipe": "pipeline",
    "sections": "pipeline",
    "sharing": "pipeline",
    "problems": "pipeline",
    "conflicts": "pipeline",
    "masking": "pipeline",
    "during": "pipeline",
    "cutting": "pipeline",
    "erode": "pipeline",
    "history": "pipeline",
    "recovery": "pipeline",
    "yaml_source": "pipeline",
    "resolve": "pipeline",
    "folder": "pipeline",
    "pictures": "pipeline",
    "prune": "pipeline",
    "session": "pipeline",
    "ship": "pipeline",
    "stages": "pipeline",
    "gating": "pipeline",
    "choosing": "pipeline",
    "steering": "pipeline",
    "watching": "pipeline",
    "progressive": "pipeline",
    "infer": "pipeline",
    "bench": "pipeline",
    "look": "pipeline",
    "compare": "pipeline",
    "sweep": "pipeline",
    "grid": "pipeline",
    "launch": "pipeline",
    "attend": "pipeline",
    "cluster": "pipeline",
    "lifeline": "pipeline",
    "choice": "cli",
    "mistakes": "cli",
    "starter": "cli",
    "terminal": "cli",
}
LATE = {  # imports inside a function that look up on purpose: (from, to): why
    ("types", "graph"): "print(graph) asks for its table",
    ("graph", "verify"): "the trace of a model of unknown code ends with a trial cut",
    ("checkpoint", "models"): "a file names a model; whoever loads it pays for the builders",
}


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in files()
}


def part(path: Path) -> str:
    return place(".".join(path.relative_to(SOURCE).with_suffix("").parts))


def place(name: str) -> str:
    """The part that ``name`` (a dotted name below secateur) belongs to."""
    first, both = name.split(".")[0], ".".join(name.split(".")[:2])
    return PARTS.get(both) or PARTS.get(first) or first


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Names of secateur's own parts that a file imports, and whether it does so as it is loaded."""
    tree = ast.parse(path.read_text())
    early = {id(node) for node in _loaded(tree)}
    for node in ast.walk(tree):
        for name in _names(node):
            if name.startswith("secateur."):
                yield place(name.removeprefix("secateur.")), id(node) in early


def _loaded(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not typing and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from _loaded(node)


def _names(node: ast.AST) -> list[str]:
    """Full names of the modules a node imports; ``from a import b`` is ``a.b`` where that is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are written in full"
        whole = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else str(node.module) for name in whole]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) and isinstance(name.value, str) else []
    return []


def level(name: str) -> int:
    return next((number for number, names in enumerate(LAYERS) if name in names), len(LAYERS))


def test_every_file_has_a_place_in_the_order() -> None:
    known = set().union(*LAYERS)
    strangers = {part(p) for p in files()} - known - {"__init__", "__main__"}
    assert not strangers, f"say in LAYERS or PARTS where {strangers} belong"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    here = part(path)
    if here in ("__init__", "__main__"):
        return
    for there, early in imports(path):
        up = level(there) > level(here)
        assert not up or (not early and (here, there) in LATE), f"{path.name}: {here} must not import {there}"


def test_no_reason_for_a_late_import_is_left_over() -> None:
    used = {(part(p), there) for p in files() if part(p) != "__init__" for there, early in imports(p) if not early}
    assert set(LATE) <= used


def test_the_order_would_notice(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("import secateur.cli\ndef f():\n    from secateur.models import build\n    import torch\n")
    assert list(imports(file)) == [("cli", True), ("models", False)]


def test_no_circles_between_files() -> None:
    """Loading any one file first must work: a circle would depend on who comes first."""
    early = {
        name: {n for node in _loaded(ast.parse(p.read_text())) for n in _names(node) if n in MODULES}
        for name, p in MODULES.items()
    }
    done: set[str] = set()
    while ready := {n for n in MODULES if n not in done and not early[n] - done - {n}}:
        done |= ready
    assert not set(MODULES) - done, f"circle among {sorted(set(MODULES) - done)}"


def test_help_does_not_load_torch() -> None:
    if not (SOURCE / "cli.py").exists():
        pytest.skip("no command line yet")
    code = "import sys, secateur.cli; print([m for m in ('torch', 'torchvision') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_a_cut_spares_the_import_of_the_compiler() -> None:
    """It takes seconds, longer than most traces."""
    code = (
        "import sys, torch, secateur as sc; net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Linear(64, 2)); "
        "sc.prune(net, torch.rand(1, 4)); print('torch._dynamo' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert found.stdout.strip() == "False"
