"""Command line: one Typer app whose subcommands are the verbs. `python -m lift_ray VERB` is the same as `python -m lift_ray.VERB`."""

from __future__ import annotations

from importlib import import_module

import typer

from lift_ray.errors import BadInput

VERBS = ("tune", "train", "evaluate", "predict", "export", "serve", "report", "convert", "cluster")
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def lift_ray() -> None:
    """Fine-tune CLIP for rare classes with LIFT, on a Ray cluster or a laptop."""


def main(argv: list[str]) -> int | None:
    """Run a verb, or list the verbs. Importing the module of a verb adds its command to the app."""
    verb, *rest = argv or [""]
    if verb in VERBS:
        import_module(f"lift_ray.{verb}")
        return run(f"lift_ray.{verb}", rest)
    for each in VERBS:
        import_module(f"lift_ray.{each}")
    return run("lift_ray", argv)


def run(module: str, argv: list[str]) -> int | None:
    """Run `python -m lift_ray` or `python -m lift_ray.VERB` with these arguments. Raises BadInput for wrong usage."""
    name = module.rpartition(".")[2]
    group = typer.main.get_group(app)
    command = group.commands.get(name, group)
    try:
        result = command.main(args=argv, prog_name=f"python -m {module}", standalone_mode=False)
    except Exception as error:  # the class of usage errors differs between versions of typer; the method does not
        if not hasattr(error, "format_message"):
            raise
        raise BadInput(f"{name}: {error.format_message()} See python -m {module} --help") from None
    return result if isinstance(result, int) else None
