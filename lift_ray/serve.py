"""python -m lift_ray.serve: serve a checkpoint over HTTP. `app` is the same application for the command line of Ray Serve."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from lift_ray import cli
from lift_ray.errors import run_and_exit


def app(args: dict[str, str]) -> Any:
    """Return the Ray Serve application, for `serve run lift_ray.serve:app checkpoint=FOLDER` and `serve deploy`.

    Args:
        args: fields of `serve_http.Options`; missing ones are read from LIFT_CHECKPOINT, LIFT_TEMPERATURE, and so on.
    """
    from lift_ray.inference.serve_http import Options
    from lift_ray.inference.serve_model import application

    return application(Options.of(args))


@cli.app.command(short_help="Serve a checkpoint over HTTP.")
def serve(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="Folder or URL of a checkpoint, or of the results of tune or train."),
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines, without a password.")
    ] = "127.0.0.1",
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=100,
            help="Divides the logits; 1 for uncalibrated probabilities.  [fitted on validation images]",
        ),
    ] = None,
    posthoc_tau: Annotated[
        float | None,
        typer.Option("--posthoc-tau", min=0, help="Strength of the post-hoc logit adjustment.  [as in the run]"),
    ] = None,
    max_mb: Annotated[float, typer.Option(min=0.01, help="Largest upload, in MB.")] = 20,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Images with more pixels are refused.  [50000000]")
    ] = None,
    max_megapixels: Annotated[float | None, typer.Option(min=0.01, hidden=True)] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Number of replicas of the model.")] = 1,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Cores of each worker, a replica.")] = 1,
    gpus_per_worker: Annotated[
        float, typer.Option(min=0, help="GPUs of each worker; 0.5 puts two replicas on one GPU.")
    ] = 0,
) -> None:
    """Serve a checkpoint: POST /predict returns class names and probabilities, / is a page to drop images on.

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
        "max_pixels": max_pixels,
        "max_megapixels": max_megapixels,
        "replicas": replicas,
        "cpus_per_worker": cpus_per_worker,
        "gpus_per_worker": gpus_per_worker,
    }
    serve_until_stopped({name: value for name, value in given.items() if value is not None}, host, port)


main = partial(cli.run, "lift_ray.serve")

if __name__ == "__main__":
    run_and_exit(main)
