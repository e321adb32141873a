"""Command line: one Typer app whose subcommands are the verbs.

`lift-ray VERB`, `python -m lift_ray VERB` and `python -m lift_ray.VERB` are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer

from lift_ray import __version__
from lift_ray.errors import BadInput, run_and_exit
from lift_ray.terminal.results_json import say_json, stdout_to_stderr
from lift_ray.text import say

VERBS = ("tune", "train", "evaluate", "predict", "export", "serve", "report", "init", "reproduce", "convert", "cluster")
SCRIPT = "lift-ray"
PYTHON = "python -m lift_ray"
OLD_OPTIONS = {  # by command: old names that still work, which no help shows
    "export": {"--to": "--out"},
    "report": {"--to": "--out"},
    "predict": {"--column": "--image-column"},
    "serve": {"--cpus": "--cpus-per-worker", "--gpus": "--gpus-per-worker"},
    "convert": {"--names": "--class-names", "--workers": "--at-once"},
    "convert torchvision": {"--root": "--folder"},
}
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON; everything else goes to stderr.")]
ImageColumn = Annotated[
    str | None, typer.Option(help="Column of a table: image paths, in Parquet also bytes.  [by name]")
]
LabelColumn = Annotated[str | None, typer.Option(help="Column of a table: class names, or integers.  [by name]")]
SplitColumn = Annotated[str | None, typer.Option(help="Column of a table: train, val or test.  [split, if it exists]")]
Root = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Folder that the paths of a table are relative to.  [its own]")
]
Results = Mapping[str, object] | Callable[[], Mapping[str, object]]
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"lift_ray {__version__}")
        raise typer.Exit


@app.callback()
def lift_ray(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune CLIP for rare classes with LIFT, on a Ray cluster or a laptop."""


def with_json(verb: str) -> Callable[[Callable[..., Results]], Callable[..., None]]:
    """Add --json to a command of a verb. The command returns its results, or a function that reads them (docs/reference/json.md)."""

    def add(function: Callable[..., Results]) -> Callable[..., None]:
        @wraps(function)
        def command(*, as_json: bool, **given: Any) -> None:
            if not as_json:
                function(**given)
                return
            with stdout_to_stderr():
                found = function(**given)
                results = found() if callable(found) else found
            say_json(verb, results)

        signature = inspect.signature(function, eval_str=True)
        option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
        command.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), option], return_annotation=None
        )
        return command

    return add


def script() -> NoReturn:
    """Run the console script `lift-ray`."""
    run_and_exit(partial(main, program=SCRIPT))


def main(argv: list[str], program: str = PYTHON) -> int | None:
    """Run a verb, or list the verbs. Importing the module of a verb adds its command to the app.

    Args:
        argv: the words after the program.
        program: what the user typed before them: SCRIPT or PYTHON.
    """
    verb, *rest = argv or ["--help"]
    if verb in VERBS:
        import_module(f"lift_ray.{verb}")
        return run(f"lift_ray.{verb}", rest, program)
    for each in VERBS:
        import_module(f"lift_ray.{each}")
    return run("lift_ray", [verb, *rest], program)


def run(module: str, argv: list[str], program: str = PYTHON) -> int | None:
    """Run `lift_ray` or `lift_ray.VERB` with these arguments. Raises BadInput for wrong usage.

    Args:
        module: whose command is run.
        argv: its arguments.
        program: for usage, examples and errors: SCRIPT or PYTHON.
    """
    name = module.rpartition(".")[2]
    # only a script has a name that a shell can complete
    group: Any = typer.main.get_command(app) if program == SCRIPT else typer.main.get_group(app)
    command = group.commands.get(name, group)
    usage = f"python -m {module}"
    if program == SCRIPT:
        name = SCRIPT if command is group else name
        usage = SCRIPT if command is group else f"{SCRIPT} {name}"
        _name_script(command)
    try:
        result = command.main(args=renamed(name, argv), prog_name=usage, standalone_mode=False)
    except Exception as error:  # the class of usage errors differs between versions of typer; the method does not
        if not hasattr(error, "format_message"):
            raise
        raise BadInput(f"{name}: {error.format_message()} See {usage} --help") from None
    return result if isinstance(result, int) else None


def renamed(verb: str, argv: list[str]) -> list[str]:
    """Return the arguments of a verb with the new names of options for the old ones."""
    names = OLD_OPTIONS.get(verb, {}) | OLD_OPTIONS.get(f"{verb} {argv[0] if argv else ''}", {})
    split = [word.partition("=") for word in argv]
    return [f"{names.get(option, option)}{equals}{value}" for option, equals, value in split]


def _name_script(command: Any) -> None:
    """Write the examples of a command and its subcommands as the script's user types them."""
    command.help = (command.help or "").replace(f"{PYTHON}.", f"{SCRIPT} ")
    for below in getattr(command, "commands", {}).values():
        _name_script(below)
