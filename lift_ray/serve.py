"""python -m lift_ray.serve: a checkpoint behind HTTP; `app` is the same for Ray Serve's own tools."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from lift_ray.errors import exit_codes, run_verb

verb = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def app(args: dict[str, str]) -> Any:
    """The Ray Serve application, for `serve run lift_ray.serve:app checkpoint=FOLDER` and `serve deploy`.

    Args:
        args: fields of `gate.Options`; what is missing is taken from LIFT_CHECKPOINT, LIFT_TEMPERATURE, and so on.
    """
    from lift_ray.inference.serve_http import Options
    from lift_ray.inference.serve_model import application

    return application(Options.of(args))


@verb.command()
def serve(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or the results of tune or train: folder or URL.")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 8000,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 to be reached from other machines: there is no password.")
    ] = "127.0.0.1",
    temperature: Annotated[
        float | None,
        typer.Option(min=0.01, max=100, help="Divides the logits; 1: not calibrated.  [fitted on validation images]"),
    ] = None,
    posthoc_tau: Annotated[
        float | None, typer.Option("--posthoc-tau", min=0, help="Post-hoc logit adjustment.  [as trained]")
    ] = None,
    max_mb: Annotated[float, typer.Option(min=0.01, help="Largest upload, in MB.")] = 20,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="Largest picture.")] = 50,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model.")] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="Cores of each.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each; 0.5 for two on one.")] = 0,
) -> None:
    """Answer POST /predict with class names and probabilities; / is a page to drop a picture on, /health says ok.

    \b
    Examples:
      python -m lift_ray.serve runs/quickstart
      curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8000/predict?top=3'
      serve run lift_ray.serve:app checkpoint=runs/quickstart replicas=2
    """
    from lift_ray.inference.serve_run import serve_until_stopped

    given = {
        "checkpoint": checkpoint,
        "temperature": temperature,
        "posthoc_tau": posthoc_tau,
        "max_mb": max_mb,
        "max_megapixels": max_megapixels,
        "replicas": replicas,
        "cpus": cpus,
        "gpus": gpus,
    }
    serve_until_stopped({name: value for name, value in given.items() if value is not None}, host, port)


def main(argv: list[str]) -> int | None:
    """Run the verb on the words after its name."""
    return run_verb(verb, "serve", argv)


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
