"""python -m lift_ray.export: a checkpoint for open_clip, ONNX and torch.export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lift_ray.errors import exit_codes, run_verb

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or the results of tune or train: folder or URL.")
    ],
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the files.")],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="open_clip, onnx or torch; several if repeated.  [all that the tuner allows]"),
    ] = None,
    posthoc_tau: Annotated[
        float | None,
        typer.Option("--posthoc-tau", min=0, help="Post-hoc logit adjustment, inside the files.  [as trained]"),
    ] = None,
) -> None:
    """Write the model for other programs, with a model card, and compare each file's logits with the checkpoint's.

    model.onnx and model.pt2 are the whole classifier: uint8 pictures in, logits out, any batch size. open_clip/ is the CLIP
    with the tuner merged into its weights (lora, ssf, bitfit, layernorm, batchnorm, partial, full, sparse).

    \b
    Examples:
      python -m lift_ray.export runs/quickstart --to exported
      python -m lift_ray.export runs/mine --to exported --format torch --format open_clip
    """
    from lift_ray.errors import BadInput, did_you_mean

    known = ("open_clip", "onnx", "torch")
    for name in formats or []:
        if name not in known:
            raise BadInput(f"--format: unknown format '{name}'; {did_you_mean(name, known)}")
    from lift_ray.inference.export import export_checkpoint
    from lift_ray.training.checkpoint import opened

    with opened(checkpoint) as folder:
        exported, left_out = export_checkpoint(folder, to, formats or [], posthoc_tau)
    for each in exported:
        print(f"{to / each.file}: largest difference from the checkpoint's logits {each.difference:.1e}")
    if left_out:
        print(f"no open_clip/: {left_out}")
    print(f"model card: {to / 'README.md'}")


def main(argv: list[str]) -> int | None:
    """Run the verb on the words after its name."""
    return run_verb(app, "export", argv)


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
