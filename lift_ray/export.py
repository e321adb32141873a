"""python -m lift_ray.export: export a checkpoint to open_clip, ONNX and torch.export."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lift_ray import cli
from lift_ray.errors import BadInput, did_you_mean, run_and_exit
from lift_ray.text import say


@cli.app.command(short_help="Export a checkpoint to open_clip, ONNX and torch.export.")
@cli.with_json("export")
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="Folder or URL of a checkpoint, or of the results of tune or train."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create.")],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="open_clip, onnx or torch; repeat for several.  [all that the model supports]"),
    ] = None,
    posthoc_tau: Annotated[
        float | None,
        typer.Option(
            "--posthoc-tau", min=0, help="Strength of the post-hoc logit adjustment in the files.  [as in the run]"
        ),
    ] = None,
) -> dict[str, object]:
    """Export the model for other programs with a model card, and compare each file's logits with the checkpoint's.

    model.onnx and model.pt2 are the whole classifier: uint8 images in, logits out, any batch size. open_clip/ is the CLIP model
    with the tuner merged into its weights (lora, ssf, bitfit, layernorm, batchnorm, partial, full, sparse).

    \b
    Examples:
      python -m lift_ray.export runs/quickstart --out exported
      python -m lift_ray.export runs/mine --out exported --format torch --format open_clip
    """
    known = ("open_clip", "onnx", "torch")
    for name in formats or []:
        if name not in known:
            raise BadInput("--format", f"unknown format '{name}'", remedy=did_you_mean(name, known))
    from lift_ray.terminal.waiting import waiting

    with waiting("writing and comparing the files"):
        from lift_ray.inference.export import export_checkpoint
        from lift_ray.training.checkpoint import opened

        with opened(checkpoint) as folder:
            exported, left_out = export_checkpoint(folder, out, formats or [], posthoc_tau)
    for each in exported:
        say(f"{out / each.file}: largest difference from the checkpoint's logits {each.difference:.1e}")
    if left_out:
        say(f"open_clip/ was left out: it {left_out}")
    card = out / "README.md"
    say(f"model card: {card}")
    files = [{"format": each.name, "file": out / each.file, "difference": each.difference} for each in exported]
    return {"out": out, "files": files, "left_out": left_out or None, "model_card": card}


main = partial(cli.run, "lift_ray.export")

if __name__ == "__main__":
    run_and_exit(main)
