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

from lift_ray import cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lift_ray"
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
VALUES_OF_THE_PACKAGE = {"lift_ray.__version__"}
BASE = ("epoch_metrics", "errors", "registry", "text")  # used everywhere
VERBS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__", "cli", *BASE))
SLOW_TO_LOAD = ("ray", "torch", "torchvision", "open_clip", "optuna", "pyarrow", "pydantic")

BELOW_TRAINING = {"settings", "storage", "data", "model", "methods", "evaluation", "terminal"}
# room -> the rooms it may import from
ROOMS = {
    "settings": {"storage"},
    "storage": set(),
    "data": {"storage"},
    "model": {"storage"},
    "methods": {"model"},
    "evaluation": {"storage", "data", "model", "methods"},
    "terminal": {"evaluation"},
    "ray_runtime": {"settings", "storage", "data"},
    "training": {*BELOW_TRAINING, "ray_runtime"},
    "ensembles": {*BELOW_TRAINING, "training"},
    "reporting": {"storage", "data", "evaluation", "terminal"},
    "tracking": {"settings", "training", "reporting", "terminal"},
    "inference": {*BELOW_TRAINING, "training", "ensembles", "ray_runtime"},
    "searching": {*BELOW_TRAINING, "training", "ensembles", "reporting", "tracking", "ray_runtime"},
    "clusters": {"settings", "ray_runtime", "data", "terminal", "tracking", "training"},
}
ROOMS["api"] = set(ROOMS)
ROOMS["verbs"] = {*ROOMS, "cli"}
ROOMS |= {"cli": {"terminal"}, "__main__": {"cli"}}
# library -> the places that may import it anywhere, and those that may only inside a function
LIBRARIES: dict[str, tuple[set[str], set[str]]] = {
    "ray": (
        {
            *("lift_ray/ray_runtime/", "lift_ray/training/ray_train", "lift_ray/training/run_channel"),
            *(
                "lift_ray/searching/tune_run",
                "lift_ray/searching/engine",
                "lift_ray/searching/slot",
                "lift_ray/tracking/prometheus",
            ),
            *("lift_ray/inference/serve_http", "lift_ray/inference/serve_model"),
        },
        {
            *(
                "lift_ray/clusters/kuberay",
                "lift_ray/clusters/kubernetes",
                "lift_ray/clusters/monitoring",
                "lift_ray/clusters/ray_up",
            ),
            *("lift_ray/clusters/schemas", "lift_ray/searching/live_page"),
            *("lift_ray/inference/serve_run", "lift_ray/inference/evaluate", "lift_ray/inference/predict"),
        },
    ),
    "optuna": (
        {*(f"lift_ray/searching/{name}" for name in ("study", "journal", "samplers")), "lift_ray/reporting/importance"},
        {"lift_ray/settings/space"},
    ),
    "open_clip": (
        set(),
        {
            f"lift_ray/model/{name}"
            for name in ("backbone", "rebuild_open_clip", "merging", "quickgelu", "text_tower", "weights_file")
        },
    ),
    "timm": (
        set(),
        {f"lift_ray/model/{name}" for name in ("backbone", "positions", "rebuild_timm", "merging", "quickgelu")},
    ),
    "pydantic": ({"lift_ray/settings/", "lift_ray/registry", "lift_ray/model/tuners/"}, set()),
    "pydantic_core": ({"lift_ray/settings/"}, set()),
    "ruamel": ({"lift_ray/settings/"}, {"lift_ray/train"}),
    "rich": ({"lift_ray/terminal/", "lift_ray/searching/progress_table", "lift_ray/training/progress"}, set()),
    "jinja2": ({"lift_ray/reporting/", "lift_ray/inference/model_card"}, set()),
    "plotly": ({"lift_ray/reporting/page"}, set()),
    "typer": ({"lift_ray/cli", *(f"lift_ray/{verb}" for verb in VERBS)}, set()),
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
    assert {room(module) for module in MODULES} == {*ROOMS, *BASE, "__init__"}
    source = "import a.b\nif TYPE_CHECKING:\n    from c import d\ndef f():\n    if x:\n        import e\nclass G:\n    import h\n"
    assert list(_imports(ast.parse(source), False, False)) == [
        Import("a.b", False, False),
        Import("c.d", False, True),
        Import("e", True, False),
        Import("h", False, False),
    ]


@pytest.mark.parametrize("module", sorted({*MODULES} - {"lift_ray/text", "lift_ray/terminal/tables"}))
def test_output_goes_through_say_and_console_which_escape_names(module: str) -> None:
    calls = [
        node.func for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())) if isinstance(node, ast.Call)
    ]
    named = {func.id if isinstance(func, ast.Name) else getattr(func, "attr", "") for func in calls}
    plain = {func.id for func in calls if isinstance(func, ast.Name)}
    assert not named & {"Console", "Table", "Panel", "from_markup"}
    assert "print" not in plain


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_only_from_the_rooms_below_them(module: str) -> None:
    here = room(module)
    if here == "__init__":  # the public names are loaded when they are used
        assert all(found.for_types for found in imports_of(module) if found.name.startswith("lift_ray"))
        return
    if here in BASE:
        ours = {room(found.name) for found in imports_of(module) if found.name.startswith("lift_ray")}
        assert ours <= {"registry": {"errors"}, "errors": {"text"}}.get(here, set())
        return
    for found in imports_of(module):
        if found.name.startswith("lift_ray.") and found.name not in VALUES_OF_THE_PACKAGE:
            there = room(found.name)
            assert there in ROOMS[here] | {here, *BASE}, f"{module} imports {found.name}"


def test_the_rooms_stand_above_each_other() -> None:
    assert circle({name: below & set(ROOMS) for name, below in ROOMS.items()}) == []


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: {home for found in imports_of(module) if not found.for_types if (home := module_of(found.name))}
        for module in MODULES
    }
    assert circle(graph) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"a"}}) == ["a", "a"]


def module_of(name: str) -> str | None:
    """The module that an import reaches: `lift_ray.data.order.stretch` -> lift_ray/data/order; None for other packages."""
    path = name.replace(".", "/")
    while path not in MODULES and "/" in path:
        path = path.rpartition("/")[0]
    return path if path in MODULES else None


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One way from a node back to itself, or nothing."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for below in sorted(graph.get(node, ())):
            if found := walk(below, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


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
def test_no_module_is_a_collection_of_leftovers(module: str) -> None:
    assert not {"utils", "util", "common", "helpers", "helper", "misc"} & set(module.split("/"))


def test_the_report_is_read_without_torch_and_ray() -> None:
    modules = [module.replace("/", ".") for module in MODULES if room(module) in ("reporting", "settings", "storage")]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pyarrow" in done.stdout.split()
    assert not {"torch", "ray"} & set(done.stdout.split())


def test_the_driver_of_a_search_does_without_torch() -> None:
    code = "import lift_ray.api.search, lift_ray.searching.driver, lift_ray.searching.result_text, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ray" in done.stdout.split()
    assert "torch" not in done.stdout.split()


def test_importing_the_verbs_loads_neither_ray_nor_torch() -> None:
    code = (
        "import importlib, json, sys\n"
        f"for verb in {VERBS}: importlib.import_module('lift_ray.' + verb)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "typer" in loaded
    assert not {*SLOW_TO_LOAD} & loaded


def test_the_command_line_has_every_verb() -> None:
    assert sorted(cli.VERBS) == VERBS


@pytest.mark.parametrize(
    ("module", "line"),
    [("tune", "python -m lift_ray.tune search_spaces/quickstart.yaml"), ("cli", "tune       Search")],
)
def test_help_answers_without_what_is_slow_to_load(module: str, line: str) -> None:
    code = (
        "import sys\n"
        f"from lift_ray.{module} import main\n"
        "main(['--help'])\n"
        f"print([name for name in {SLOW_TO_LOAD} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert line in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
