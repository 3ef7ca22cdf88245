"""The package's imports run one way, and its files and functions are of a size that can be read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vqgan_accel

PACKAGE = Path(vqgan_accel.__file__).parent
NO_MODULES = {"configs", "launch"}  # links to the repository's folders

# The rooms, from the ground up: a room may import those of its own floor, without a circle, and of the floors below. A
# module is in the room with the longest name that it begins with. (`vqgan_accel` itself stands outside: it has the
# version, and imports the public names when they are asked for.)
FLOORS = (
    (
        "files",
        "recipes",
        "compat",
        "interruption",
        "failures",
        "extras",
        "randomness",
        "words",
        "schedules",
        "data.sources",
        "data.protocols",
    ),
    ("run_folder", "sections", "config", "commented_yaml", "distributed", "accelerator", "status"),
    ("models", "losses", "data", "describe"),
    ("evaluation", "tokens"),
    ("report", "interop"),
    ("training",),
    ("new", "looking", "decisions", "doctor"),
    ("commands", "arguments", "cli", "__main__"),
)
# Imports that are no climb and close no circle, though they look like it: (importer, imported) -> why.
EXCEPTIONS = {
    ("config.*", "models.*"): "a section builds its network when it is asked to",
    ("sections", "models.*"): "and says of what type that is",
    ("sections", "losses.*"): "the same",
}

MOST_LINES = 320  # of a file
LONG_FILES: dict[str, str] = {}
MOST_LINES_OF_A_FUNCTION = 55
LONG_FUNCTIONS: dict[str, str] = {}

SOURCES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in NO_MODULES
}


def module_of(file: str) -> str:
    """data/hub.py -> data.hub; data/__init__.py -> data; the package's own -> ''"""
    return file.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")


MODULES = {module_of(file): tree for file, tree in SOURCES.items()}


def imported_by(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """The modules of ours that a file imports, wherever in it: within functions, and for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == vqgan_accel.__name__:
                yield rest if rest in modules else rest.rpartition(".")[0]


def graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> what it imports of ours, itself and `vqgan_accel` left out."""
    return {module: {*imported_by(tree, {*trees})} - {module, ""} for module, tree in trees.items() if module}


def without_exceptions(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    return {module: {name for name in names if not excepted(module, name)} for module, names in imports.items()}


def excepted(module: str, name: str) -> list[tuple[str, str]]:
    return [pair for pair in EXCEPTIONS if fnmatchcase(module, pair[0]) and fnmatchcase(name, pair[1])]


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    """One circle of modules that import one another, if there is any."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return None


def floor_of(module: str) -> int:
    rooms = {room: floor for floor, names in enumerate(FLOORS) for room in names}
    parts = module.split(".")
    beginnings = [".".join(parts[:number]) for number in range(len(parts), 0, -1)]
    return next(rooms[name] for name in beginnings if name in rooms)


def test_every_module_is_in_a_room() -> None:
    rooms = {room for floor in FLOORS for room in floor}
    homeless = [name for name in MODULES if name and not any(f"{name}.".startswith(f"{room}.") for room in rooms)]
    assert not homeless, "give these a floor in FLOORS"
    assert all(any(f"{name}.".startswith(f"{room}.") for name in MODULES) for room in rooms), "FLOORS has empty rooms"


def test_imports_make_no_circle() -> None:
    found = circle(without_exceptions(graph(MODULES)))
    assert found is None, " imports ".join(found or [])


def test_imports_do_not_climb() -> None:
    imports = without_exceptions(graph(MODULES))
    climbs = [f"{a} imports {b}" for a, names in imports.items() for b in names if floor_of(a) < floor_of(b)]
    assert not sorted(climbs)


def test_the_exceptions_are_still_needed() -> None:
    used = [pair for module, names in graph(MODULES).items() for name in names for pair in excepted(module, name)]
    assert {*used} == {*EXCEPTIONS}


@pytest.mark.seconds
def test_packages_without_a_door_import_nothing() -> None:
    """To import a part of one, data.sources say, must not import all of it."""
    for package in ("data", "models", "losses", "evaluation", "tokens", "training", "interop"):
        assert not graph(MODULES)[package], package


def test_files_and_functions_are_short() -> None:
    long_files = {file for file, lines in lengths_of_files().items() if lines > MOST_LINES}
    assert long_files == {*LONG_FILES}, "split it; or take it off the list, if it has been"
    long_functions = {name for name, lines in lengths_of_functions() if lines > MOST_LINES_OF_A_FUNCTION}
    assert long_functions == {*LONG_FUNCTIONS}, "split it; or take it off the list, if it has been"


def lengths_of_files() -> dict[str, int]:
    return {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in SOURCES}


def lengths_of_functions() -> Iterator[tuple[str, int]]:
    for file, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file} {node.name}", (node.end_lineno or 0) - node.lineno + 1


# ---- that the test itself sees what it should


@pytest.mark.parametrize(
    "statement",
    [
        "import vqgan_accel.data.hub",
        "from vqgan_accel.data import hub",
        "from vqgan_accel.data.hub import HubSource",
        "def f():\n    from vqgan_accel.data.hub import HubSource",
        "if TYPE_CHECKING:\n    import vqgan_accel.data.hub as hub",
    ],
)
def test_an_import_is_seen_wherever_it_stands(statement: str) -> None:
    trees = {"data": ast.parse(""), "data.hub": ast.parse(""), "files": ast.parse(statement)}
    assert graph(trees)["files"] == {"data.hub"}


def test_circles_and_climbs_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) in (
        ["a", "b", "c", "a"],
        ["b", "c", "a", "b"],
        ["c", "a", "b", "c"],
    )
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert floor_of("data.sources") == floor_of("files") < floor_of("config") < floor_of("data.hub") < floor_of("cli")
