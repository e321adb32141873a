"""Export of a checkpoint to files for other programs: open_clip weights, ONNX, torch.export, and a model card."""

from __future__ import annotations

import functools
import importlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lift_ray.errors import BadInput, RunFailed, one_line
from lift_ray.inference.classifier import Classifier
from lift_ray.inference.model_card import Exported, model_card
from lift_ray.methods.lift import Lift
from lift_ray.methods.world import Ranks
from lift_ray.model.backbone import TIMM, load_backbone
from lift_ray.model.hosted import StagedTower
from lift_ray.model.merging import merged, write_open_clip
from lift_ray.storage.layout import BEST_METRICS

LARGEST_DIFFERENCE = 1e-4
OPEN_CLIP, ONNX, TORCH = "open_clip", "onnx", "torch"
CLASSES = "classes.json"

GetProgram = Callable[[], torch.export.ExportedProgram]
Logits = Callable[[Tensor], Tensor]


def export_checkpoint(
    folder: Path, to: Path, formats: Sequence[str] = (), posthoc_tau: float | None = None
) -> tuple[list[Exported], str]:
    """Write a checkpoint's model for other programs; if a format fails, nothing is left behind.

    Each file is loaded again, and its logits are compared with those of the checkpoint on the same images, with batch sizes
    that differ from the one used for tracing.

    Args:
        folder: folder of the checkpoint.
        to: folder to create.
        formats: any of open_clip, onnx, torch; empty for all that the model supports.
        posthoc_tau: strength of the post-hoc adjustment; None for the value of the run.

    Returns:
        The exported formats, and the reason for leaving out open_clip ("" if it was written, or if `formats` was given).

    Raises:
        BadInput: `to` exists, the model or this installation does not support a format, or the checkpoint cannot be read.
        RunFailed: the logits of a file differ by more than 1e-4, or writing fails.
    """
    if to.exists():
        raise BadInput("--out", "must be a new folder", but=f"{to} exists", remedy="delete it, or choose another")
    classifier = Classifier(folder, Ranks.alone(num_cpus=torch.get_num_threads()), posthoc_tau)
    reason = not_for_open_clip(classifier)
    if OPEN_CLIP in formats and reason:
        raise BadInput("--format open_clip", reason, remedy="use onnx or torch")
    wanted = formats or [name for name in WRITERS if name != OPEN_CLIP or not reason]
    if ONNX in wanted:
        check_onnx_packages()
    temporary: Path | None = None
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{to.name}.", suffix=".tmp", dir=to.parent))
        program = functools.cache(lambda: _program(classifier))
        exported = [_exported(classifier, name, temporary, program) for name in WRITERS if name in wanted]
        (temporary / CLASSES).write_text(json.dumps(classifier.record.class_names, indent=1) + "\n")
        (temporary / "README.md").write_text(
            model_card(classifier, exported, _metrics(folder, classifier)), encoding="utf-8"
        )
        temporary.chmod(0o755)
        temporary.rename(to)
    except OSError as error:
        raise RunFailed(f"{to}: could not write the export: {one_line(error)}; check the disk") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return exported, "" if formats else reason


def not_for_open_clip(classifier: Classifier) -> str:
    """Return why the model cannot be written as open_clip weights; "" if it can."""
    kinds = " and ".join(tuner.kind for tuner in classifier.config.tuners())
    if classifier.backbone.name.startswith(TIMM):
        return f"requires a CLIP backbone, but got {classifier.backbone.name}"
    if isinstance(classifier.model.tower, StagedTower):
        return f"requires a backbone with the blocks of a plain transformer, or CLIP's ResNet, but got {classifier.backbone.name}"
    if not all(tuner.can_merge for tuner in classifier.model.tuner.per_block):
        return f"requires a tuner that can be merged into the weights, but got {kinds}"
    return ""


def check_onnx_packages() -> None:
    """Raise BadInput if the packages that write and check ONNX are not installed."""
    try:
        for name in ("onnxruntime", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise BadInput(
            "--format onnx",
            "requires onnxruntime and onnxscript",
            but=f"the import failed ({one_line(error)})",
            remedy="pip install 'lift_ray[export]', or use --format torch",
        ) from None


def _exported(classifier: Classifier, name: str, folder: Path, program: GetProgram) -> Exported:
    file, run = WRITERS[name](classifier, folder, program)
    worst = 0.0
    for number in (1, 3):
        images = torch.randint(
            256,
            (number, 3, classifier.size_px, classifier.size_px),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(number),
        )
        std = torch.tensor(classifier.backbone.std).view(3, 1, 1)
        normalized = (images / 255 - torch.tensor(classifier.backbone.mean).view(3, 1, 1)) / std
        with torch.inference_mode():
            expected = classifier.model(normalized) - classifier.offset
            worst = max(worst, float((run(images) - expected).abs().max()))
    if not worst <= LARGEST_DIFFERENCE:
        raise RunFailed(
            f"{file}: the logits must match the checkpoint's to {LARGEST_DIFFERENCE:g}, but differ by {worst:.2g}; "
            "leave out this format, and report a bug"
        )
    return Exported(name, file, worst)


def _open_clip(classifier: Classifier, folder: Path, program: GetProgram) -> tuple[str, Logits]:
    wanted, model = classifier.config.backbone, classifier.model
    tower = merged(model.tower, model.tuner.per_block)
    (folder / OPEN_CLIP).mkdir()
    write_open_clip(
        wanted.model,
        wanted.pretrained,
        tower,
        folder / OPEN_CLIP,
        quickgelu=wanted.quickgelu,
        interpolation=wanted.interpolation,
    )
    loaded = load_backbone(f"local-dir:{folder / OPEN_CLIP}", None)
    alone = Lift(loaded.tower, {"linear_probe": {}}, model.head)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loaded.mean, loaded.std))
    return f"{OPEN_CLIP}/", lambda images: alone((images / 255 - mean) / std) - classifier.offset


def _torch(classifier: Classifier, folder: Path, program: GetProgram) -> tuple[str, Logits]:
    torch.export.save(program(), folder / "model.pt2")
    loaded: Any = torch.export.load(folder / "model.pt2").module()
    return "model.pt2", loaded


def _onnx(classifier: Classifier, folder: Path, program: GetProgram) -> tuple[str, Logits]:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    path = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the packages of the exporter
        made = torch.onnx.export(program(), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    assert made is not None
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return path.name, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _program(classifier: Classifier) -> torch.export.ExportedProgram:
    """Trace the classifier with torch.export, for any batch size. Raises RunFailed if this torch cannot."""
    module = classifier.module
    example = torch.zeros(2, 3, classifier.size_px, classifier.size_px, dtype=torch.uint8)
    with torch.no_grad():
        # The first call caches the resized position embeddings. Cached while tracing, they would be the tracer's fake tensors.
        module(example)
        batch = torch.export.Dim("batch")
        try:
            return torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=True)
        except KeyError as error:
            # torch 2.13 loses parameters that a model reaches in two ways, such as those of a second tuner
            raise RunFailed(f"torch {torch.__version__} cannot export {error}; install torch 2.14 or later") from None


def _metrics(folder: Path, classifier: Classifier) -> dict[str, float]:
    """Return the metrics of the checkpoint's last evaluation, and those of the test split if a search stored them in best/."""
    try:
        kept: dict[str, float] = json.loads((folder / BEST_METRICS).read_text())
    except FileNotFoundError:
        kept = {}
    except (OSError, ValueError) as error:
        raise BadInput(str(folder / BEST_METRICS), "must hold metrics", one_line(error), "delete this file") from None
    return classifier.record.metrics | kept


WRITERS: dict[str, Callable[[Classifier, Path, GetProgram], tuple[str, Logits]]] = {
    OPEN_CLIP: _open_clip,
    TORCH: _torch,
    ONNX: _onnx,
}
"""Format -> a function that writes it into a folder, and returns its name and the loaded file as a function of images."""
