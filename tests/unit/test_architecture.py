"""Imports point one way (DESIGN 4): every module has a rank and may import only from below it."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RANKS = [
    {"scmini_kernels", "scmini.errors", "scmini.quoting", "scmini"},
    {
        "scmini.config",
        "scmini.sections",
        "scmini.records",
        "scmini.json_lines",
        "scmini.yaml_text",
        "scmini.chat",
        "scmini.chat_templates",
        "scmini.store",
        "scmini.locks",
        "scmini.durable",
        "scmini.partial",
        "scmini.salvage",
        "scmini.console",
        "scmini.screen",
        "scmini.display",
        "scmini.seeding",
    },
    {"scmini.config_file"},
    {"scmini.data", "scmini.models"},
    {"scmini.training", "scmini.evaluation"},
    {"scmini.verification"},
    {"scmini.stages"},
    {
        "scmini.stage_graph",
        "scmini.outside",
        "scmini.child_process",
        "scmini.download",
        "scmini.doctor",
        "scmini.run_folder",
        "scmini.pipeline",
        "scmini.run_status",
        "scmini.view",
        "scmini.planning",
        "scmini.exporting",
        "scmini.chatting",
        "scmini.repair",
        "scmini.worker",
        "scmini.verify",
    },
    {"scmini.arguments"},
    {"scmini.cli", "scmini.__main__"},
]
RANK = {room: number for number, rooms in enumerate(RANKS) for room in rooms}
STRANGERS = [{"scmini.data", "scmini.models"}, {"scmini.training", "scmini.evaluation"}]


def _sources() -> list[Path]:
    found = [*(ROOT / "scmini").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def _module(path: Path) -> str:
    base = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    if module.split(".")[0] == "scmini_kernels":
        return "scmini_kernels"
    return ".".join(module.split(".")[:2])


def _imports(path: Path) -> set[str]:
    """Names of our own modules that a file imports, at any depth of its code."""
    modules = {_module(source) for source in _sources()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name in modules}


def _complaint(importer: str, imported: str) -> str | None:
    here, there = _room(importer), _room(imported)
    if here == there:
        return None
    if here == "scmini_kernels":
        return f"{importer} imports {imported}: the kernels know nothing of scmini"
    if there == "scmini":
        return None
    if here not in RANK or there not in RANK:
        unknown = here if here not in RANK else there
        return f"{unknown} has no rank in tests/unit/test_architecture.py; give it one"
    if any({here, there} <= pair for pair in STRANGERS):
        return f"{importer} imports {imported}: {here} and {there} may not know one another"
    if RANK[there] > RANK[here]:
        return f"{importer} imports {imported}, which stands above it"
    return None


def test_imports_point_down() -> None:
    complaints = [
        complaint
        for path in _sources()
        for imported in sorted(_imports(path))
        if (complaint := _complaint(_module(path), imported))
    ]
    assert not complaints, "\n".join(complaints)


def test_the_rule_can_fail() -> None:
    assert "stands above it" in str(_complaint("scmini.store", "scmini.cli"))
    assert "may not know" in str(_complaint("scmini.data.zoo", "scmini.models.loading"))
    assert "know nothing" in str(_complaint("scmini_kernels.tree", "scmini.config"))
    assert _complaint("scmini.cli", "scmini.store") is None


def test_no_circles() -> None:
    graph = {_module(path): _imports(path) - {"scmini"} for path in _sources()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_kernels_is_a_plain_folder() -> None:
    """`import kernels` belongs to another project, which transformers imports where it finds it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = {_module(path.parent / "__init__.py") for path in _sources()}
    assert found <= listed, f"pyproject.toml does not list {sorted(found - listed)}"


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_size(path: Path) -> None:
    """Files under 400 lines (kernels 600), functions under 60 without their docstring.

    A GPU kernel may have 120: it takes each tensor, stride and constant by name, and all of its
    loops share what lives in registers.
    """
    text = path.read_text(encoding="utf-8")
    limit = 600 if "kernels" in path.relative_to(ROOT).parts else 400
    assert len(text.splitlines()) <= limit, f"{path.name} has over {limit} lines; split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno - docstring.count("\n")
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            most = 120 if "triton.jit" in decorators else 60
            assert length <= most, f"{path.name}: {node.name} has {length} lines"
