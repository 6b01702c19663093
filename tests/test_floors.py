"""A file imports only from floors below its own, and the floors that people read stay short."""

import ast
import itertools
from pathlib import Path

import pytest

PACKAGE = "ijepa_enhanced"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE

# Floor by floor, see docs/decisions.md. A place, which is a folder or a file beside the folders, may import places of
# lower floors, and on its own floor those that stand before it.
FLOORS = (
    (
        *("errors", "config", "files", "randomness", "schedules", "masks"),
        *("devices", "packed", "merge_plan", "batch", "distributed"),
    ),
    ("ops", "data"),
    ("models", "card", "hub", "pretrained", "encoder"),
    ("objective", "losses", "jepa", "evaluate"),
    ("train", "visualize", "embed", "serve", "export", "benchmarks", "study"),
    ("commands", "cli", "__main__"),
)
# Raise the limit only for what users asked for. Last raised by 50, for built-in images like photographs.
READ_FLOORS, MOST_LINES = range(4), 8950

FILES = sorted(ROOT.rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]


def place(parts: tuple[str, ...]) -> str:
    """The key of `FLOORS` of a module of the package, named from the package on; the package itself is its own."""
    return parts[0] if parts else "__init__"


def is_module(parts: tuple[str, ...]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported(source: str, folder: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Modules of the package that a file in `folder` imports, anywhere in it; () is the package itself."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {tuple(name.name.split(".")) for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                module = (PACKAGE, *folder[: len(folder) + 1 - node.level], *module)
            for name in node.names:
                inner = (*module[1:], name.name)
                found.add((*module, name.name) if module[:1] == (PACKAGE,) and is_module(inner) else module)
    return {module[1:] for module in found if module[:1] == (PACKAGE,)}


def height(place: str) -> tuple[int, int]:
    """The floor of a place and its number there; the package itself has everything under it."""
    found = ((floor, places.index(place)) for floor, places in enumerate(FLOORS) if place in places)
    return next(found, (len(FLOORS), 0))


def violations(source: str, parts: tuple[str, ...]) -> list[str]:
    """What a file, named from the package on, imports against the rule."""
    own = place(parts)
    wrong = [
        module
        for module in sorted(imported(source, parts[:-1]))
        if place(module) != own and not height(place(module)) < height(own)
    ]
    return [".".join((PACKAGE, *module)) for module in wrong]


def cycles(imports: dict[str, set[str]]) -> list[str]:
    """The files that import themselves by way of others, from what each file imports."""
    reached = {name: set(others) for name, others in imports.items()}
    for middle in reached:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    return sorted(name for name, others in reached.items() if name in others)


def parts_of(name: str) -> tuple[str, ...]:
    return tuple(name.removesuffix(".py").split("/"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__init__.py"])
def test_a_file_imports_only_from_floors_below_its_own(name: str) -> None:
    parts = parts_of(name)
    assert height(place(parts))[0] < len(FLOORS), f"{name} has no floor: give it one in FLOORS, and in DESIGN.md"
    assert violations((ROOT / name).read_text(encoding="utf-8"), parts) == []


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("packed.py", "from ijepa_enhanced.randomness import Purpose", []),
        ("packed.py", "import ijepa_enhanced.ops.attention", ["ijepa_enhanced.ops.attention"]),
        ("ops/attention.py", "from ijepa_enhanced.packed import Packed\nfrom ijepa_enhanced.ops import pooling", []),
        ("ops/attention.py", "from ijepa_enhanced.data import loader", ["ijepa_enhanced.data.loader"]),
        ("data/plan.py", "def f():\n    from ijepa_enhanced import jepa", ["ijepa_enhanced.jepa"]),
        ("data/plan.py", "from ..models import vit", ["ijepa_enhanced.models.vit"]),
        ("data/plan.py", "from . import index\nfrom .index import Catalog\nfrom .. import masks", []),
        ("models/vit.py", "from ijepa_enhanced import Encoder", ["ijepa_enhanced"]),
        ("evaluate/knn.py", "from ijepa_enhanced.jepa import JEPA", []),
        ("train/loop.py", "import ijepa_enhanced.visualize.curves as c", ["ijepa_enhanced.visualize.curves"]),
        ("cli.py", "from ijepa_enhanced.commands import a\nfrom ijepa_enhanced.train.loop import b\nimport torch", []),
        ("commands/study.py", "from ijepa_enhanced.cli import parse", ["ijepa_enhanced.cli"]),
    ],
)
def test_the_rule_finds_what_breaks_it(name: str, source: str, wrong: list[str]) -> None:
    assert violations(source, parts_of(name)) == wrong


def module_file(module: tuple[str, ...]) -> str:
    folder = ROOT.joinpath(*module)
    return "/".join((*module, "__init__.py") if folder.is_dir() else module) + ("" if folder.is_dir() else ".py")


def test_no_file_imports_itself_by_way_of_others() -> None:
    imports = {
        name: {
            module_file(module) for module in imported((ROOT / name).read_text(encoding="utf-8"), parts_of(name)[:-1])
        }
        for name in NAMES
        if name != "__init__.py"  # it imports `Encoder` when that is asked for
    }
    assert cycles(imports) == []


def test_a_cycle_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_every_floor_is_of_something_that_is_there() -> None:
    assert {place(parts_of(name)) for name in NAMES} == {*itertools.chain(*FLOORS), "__init__"}


def lines_of_code(source: str) -> int:
    """Lines that are not blank, a comment or a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        for before in node.body if isinstance(node, documented) else ():
            if isinstance(before, ast.Expr) and isinstance(before.value, ast.Constant):
                prose |= {*range(before.lineno, (before.end_lineno or before.lineno) + 1)}
    return sum(
        number not in prose and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in enumerate(source.splitlines(), start=1)
    )


def test_prose_is_no_code() -> None:
    module = '"""Prose\n\nof a module."""\n\nA = 1  # why\n"""Of a value."""\n\n'
    function = 'def f():\n    """Prose."""\n    # why\n    return """a\n    b"""\n'
    assert lines_of_code(module + function) == 4


def test_the_floors_that_people_read_stay_short() -> None:
    lines = sum(
        lines_of_code(path.read_text(encoding="utf-8"))
        for path, name in zip(FILES, NAMES, strict=True)
        if height(place(parts_of(name)))[0] in READ_FLOORS
    )
    assert 0 < lines < MOST_LINES


def test_there_is_no_utils() -> None:
    assert [name for name in NAMES if {"utils", "util", "helpers"} & set(parts_of(name))] == []
