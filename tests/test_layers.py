"""The shape of the code: who may import whom."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lift_ray"
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
VERBS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "errors"))

# room -> the rooms it may import from when it runs; `errors` may be used everywhere
ROOMS = {
    "settings": {"settings"},
    "data": {"data"},
    "model": {"model"},
    "methods": {"methods", "model", "data"},
    "results": {"results"},
    "distributed": {"distributed", "settings", "data", "model", "methods", "results"},
    "verbs": {"settings", "data", "distributed", "results"},
}
# library -> the places that may import it anywhere, and those that may only inside a function
LIBRARIES = {
    "ray": ({"lift_ray/distributed/"}, set()),
    "optuna": ({"lift_ray/search/study", "lift_ray/reporting/importance"}, {"lift_ray/settings/space"}),
    "open_clip": (set(), {"lift_ray/model/backbone", "lift_ray/model/loading", "lift_ray/model/merging"}),
    "timm": (set(), {"lift_ray/model/backbone", "lift_ray/model/loading", "lift_ray/model/merging"}),
    "pydantic": ({"lift_ray/settings/"}, set()),
    "pydantic_core": ({"lift_ray/settings/"}, set()),
    "ruamel": ({"lift_ray/settings/"}, {"lift_ray/train"}),
    "rich": ({"lift_ray/results/", "lift_ray/distributed/"}, {"lift_ray/tune", "lift_ray/convert"}),
    "typer": ({f"lift_ray/{verb}" for verb in VERBS}, {"lift_ray/errors"}),
}


@dataclass(frozen=True)
class Import:
    """One import: what, and whether inside a function or for the type checker only."""

    name: str
    in_function: bool
    for_types: bool


@cache
def imports_of(module: str) -> list[Import]:
    return list(_imports(ast.parse((ROOT / f"{module}.py").read_text()), False, False))


def _imports(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, in_function, for_types) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (Import(f"{child.module}.{alias.name}", in_function, for_types) for alias in child.names)
        else:
            types = isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, in_function or function, for_types or types)


def room(module: str) -> str:
    """`lift_ray/data/batches` or `lift_ray.data.batches` -> data; the verbs are a room of their own."""
    parts = module.replace(".", "/").split("/")
    if parts[1] in ROOMS:
        return parts[1]
    return "verbs" if parts[1] in VERBS else parts[1]


def test_the_walk_sees_every_module_and_every_kind_of_import(tmp_path: Path) -> None:
    assert len(MODULES) > 25
    assert {room(module) for module in MODULES} == {*ROOMS, "errors", "__init__"}
    source = "import a.b\nif TYPE_CHECKING:\n    from c import d\ndef f():\n    if x:\n        import e\nclass G:\n    import h\n"
    assert list(_imports(ast.parse(source), False, False)) == [
        Import("a.b", False, False),
        Import("c.d", False, True),
        Import("e", True, False),
        Import("h", False, False),
    ]


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_only_from_the_rooms_before_them(module: str) -> None:
    here = room(module)
    if here in ("errors", "__init__"):
        assert not [found for found in imports_of(module) if found.name.startswith("lift_ray")]
        return
    for found in imports_of(module):
        if not found.name.startswith("lift_ray."):
            continue
        there = room(found.name)
        types_are_free = found.for_types and here not in ("data", "model")
        assert there in ROOMS[here] | {"errors"} or types_are_free, f"{module} imports {found.name}"


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in ("data", "model")])
def test_data_and_model_know_neither_ray_nor_pydantic_nor_settings(module: str) -> None:
    for found in imports_of(module):
        assert found.name.split(".")[0] not in ("ray", "pydantic", "pydantic_core", "optuna"), module
        assert not found.name.startswith("lift_ray.settings"), module


@pytest.mark.parametrize("module", MODULES)
def test_each_library_is_imported_only_where_it_belongs(module: str) -> None:
    for found in imports_of(module):
        library = found.name.split(".")[0]
        if library not in LIBRARIES or found.for_types:
            continue
        anywhere, in_functions = LIBRARIES[library]
        at_home = any(module == place or (place.endswith("/") and module.startswith(place)) for place in anywhere)
        assert at_home or (found.in_function and module in in_functions), f"{module} imports {library}"


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_each_place_named_for_a_library_uses_it(library: str) -> None:
    anywhere, in_functions = LIBRARIES[library]
    users = {module for module in MODULES for found in imports_of(module) if found.name.split(".")[0] == library}
    for place in anywhere | in_functions:
        assert any(user == place or (place.endswith("/") and user.startswith(place)) for user in users), place


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_a_drawer_for_leftovers(module: str) -> None:
    assert not {"utils", "util", "common", "helpers", "helper", "misc"} & set(module.split("/"))


def test_importing_the_verbs_loads_neither_ray_nor_torch() -> None:
    code = (
        "import importlib, json, sys\n"
        f"for verb in {VERBS}: importlib.import_module('lift_ray.' + verb)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "typer" in loaded
    assert not {"ray", "torch", "torchvision", "open_clip", "optuna", "pyarrow", "pydantic"} & loaded


def test_help_answers_in_under_a_second_without_ray_and_torch() -> None:
    code = (
        "import sys, time\n"
        "from lift_ray.tune import main\n"
        "main(['--help'])\n"
        "print('CPU', time.process_time(), [name for name in ('ray', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "python -m lift_ray.tune search_spaces/quickstart.yaml" in done.stdout
    _, seconds, loaded = done.stdout.splitlines()[-1].split(maxsplit=2)
    assert float(seconds) < 1.0
    assert loaded == "[]"
