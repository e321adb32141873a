"""A checkpoint as files that other programs load: open_clip weights, ONNX, torch.export, and a model card."""

from __future__ import annotations

import functools
import importlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lift_ray.errors import BadInput, RunFailed
from lift_ray.inference.classifier import Classifier
from lift_ray.inference.model_card import Exported, model_card
from lift_ray.methods.lift import Lift
from lift_ray.methods.world import Ranks
from lift_ray.model.backbone import TIMM, load_backbone
from lift_ray.model.merging import licence, merged, write_open_clip
from lift_ray.model.resnet import AnyTower
from lift_ray.model.tuners.base import BlockTuner
from lift_ray.storage.layout import BEST_METRICS

LARGEST_DIFFERENCE = 1e-4
OPEN_CLIP, ONNX, TORCH = "open_clip", "onnx", "torch"
CLASSES = "classes.json"

GetProgram = Callable[[], torch.export.ExportedProgram]
Logits = Callable[[Tensor], Tensor]


class ExportedModel(nn.Module):
    """From pictures as they are to logits: normalisation, tower, tuners, head and post-hoc adjustment.

    Args:
        mean, std: of each channel, for pictures in [0, 1].
        offset: (K,), taken off the logits.
    """

    mean: Tensor
    std: Tensor
    offset: Tensor

    def __init__(
        self,
        tower: AnyTower,
        tuners: Sequence[BlockTuner],
        head: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        offset: Tensor,
    ) -> None:
        super().__init__()
        self.tower, self.head = tower, head
        self.tuners: Any = nn.ModuleList(tuners)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))
        self.register_buffer("offset", offset)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB -> (B, K)."""
        x = (images.float() - self.mean) / self.std
        logits: Tensor = self.head(self.tower.finish(self.tower.embed(x), self.tuners))
        return logits - self.offset


def export_checkpoint(
    folder: Path, to: Path, formats: Sequence[str] = (), posthoc_tau: float | None = None
) -> tuple[list[Exported], str]:
    """Write a checkpoint's model for other programs, whole or not at all.

    Each file is loaded again and compared with the checkpoint on the same pictures, for other batch sizes than it was
    made with.

    Args:
        folder: of the checkpoint.
        to: a folder that is not there yet.
        formats: open_clip, onnx, torch; none for all that the model allows.
        posthoc_tau: as for `Classifier`.

    Returns:
        What was written, and why open_clip was left out ("" when it was not, or not asked for).

    Raises:
        BadInput: `to` is there, a format that the model or this installation does not allow, or as `Classifier`.
        RunFailed: the logits of a file differ by more than 1e-4, or the disk is full.
    """
    if to.exists():
        raise BadInput(f"--to: must be a new folder, but {to} exists; delete it, or give another")
    finished = Classifier(folder, Ranks.alone(num_cpus=torch.get_num_threads()), posthoc_tau)
    reason = not_for_open_clip(finished)
    if OPEN_CLIP in formats and reason:
        raise BadInput(f"--format open_clip: {reason}; use onnx or torch")
    wanted = formats or [name for name in WRITERS if name != OPEN_CLIP or not reason]
    if ONNX in wanted:
        check_onnx_packages()
    temporary: Path | None = None
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{to.name}.", suffix=".tmp", dir=to.parent))
        program = functools.cache(lambda: _program(finished))
        exported = [_exported(finished, name, temporary, program) for name in WRITERS if name in wanted]
        (temporary / CLASSES).write_text(json.dumps(finished.record.class_names, indent=1) + "\n")
        (temporary / "README.md").write_text(_card(finished, exported, _metrics(folder, finished)))
        temporary.chmod(0o755)
        temporary.rename(to)
    except OSError as error:
        raise RunFailed(f"{to}: must take the export, but {' '.join(str(error).split())}; check the disk") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return exported, "" if formats else reason


def not_for_open_clip(finished: Classifier) -> str:
    """Why the tower cannot be weights of open_clip; "" when it can."""
    kinds = " and ".join(tuner.kind for tuner in finished.config.tuners())
    if finished.backbone.name.startswith(TIMM):
        return f"must have a CLIP as its backbone, but got {finished.backbone.name}"
    if not all(tuner.can_merge for tuner in finished.model.tuner.per_block):
        return f"must have a tuner that can be merged into the weights, but got {kinds}"
    return ""


def check_onnx_packages() -> None:
    """Raises BadInput when what writes and checks ONNX is not installed."""
    try:
        for name in ("onnxruntime", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise BadInput(
            f"--format onnx: needs packages that are not installed, but got: {error}; pip install 'lift_ray[export]', or "
            "give --format torch"
        ) from None


def exported_model(finished: Classifier) -> ExportedModel:
    """What is exported; the tuners are merged where they can be, which saves their time."""
    model, backbone = finished.model, finished.backbone
    tower, tuners = model.tower, model.tuner.per_block
    if all(tuner.can_merge for tuner in tuners):
        tower, tuners = merged(tower, tuners), []
    whole = ExportedModel(tower, tuners, model.head, mean=backbone.mean, std=backbone.std, offset=finished.offset)
    return whole.eval()


def _exported(finished: Classifier, name: str, folder: Path, program: GetProgram) -> Exported:
    file, run = WRITERS[name](finished, folder, program)
    worst = 0.0
    for number in (1, 3):
        images = torch.randint(
            256,
            (number, 3, finished.size_px, finished.size_px),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(number),
        )
        std = torch.tensor(finished.backbone.std).view(3, 1, 1)
        normalised = (images / 255 - torch.tensor(finished.backbone.mean).view(3, 1, 1)) / std
        with torch.inference_mode():
            expected = finished.model(normalised) - finished.offset
            worst = max(worst, float((run(images) - expected).abs().max()))
    if not worst <= LARGEST_DIFFERENCE:
        raise RunFailed(
            f"{file}: the logits must be those of the checkpoint to {LARGEST_DIFFERENCE:g}, but differ by {worst:.2g}; "
            "leave this format out, and report it"
        )
    return Exported(name, file, worst)


def _open_clip(finished: Classifier, folder: Path, program: GetProgram) -> tuple[str, Logits]:
    wanted, model = finished.config.backbone, finished.model
    tower = merged(model.tower, model.tuner.per_block)
    (folder / OPEN_CLIP).mkdir()
    write_open_clip(wanted.model, wanted.pretrained, tower, folder / OPEN_CLIP)
    loaded = load_backbone(f"local-dir:{folder / OPEN_CLIP}", None)
    alone = Lift(loaded.tower, {"linear_probe": {}}, model.head)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loaded.mean, loaded.std))
    return f"{OPEN_CLIP}/", lambda images: alone((images / 255 - mean) / std) - finished.offset


def _torch(finished: Classifier, folder: Path, program: GetProgram) -> tuple[str, Logits]:
    torch.export.save(program(), folder / "model.pt2")
    loaded: Any = torch.export.load(folder / "model.pt2").module()
    return "model.pt2", loaded


def _onnx(finished: Classifier, folder: Path, program: GetProgram) -> tuple[str, Logits]:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    path = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own packages
        made = torch.onnx.export(program(), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    assert made is not None
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return path.name, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _program(finished: Classifier) -> torch.export.ExportedProgram:
    """The classifier as torch.export sees it, for any batch size."""
    whole, example = exported_model(finished), torch.zeros(2, 3, finished.size_px, finished.size_px, dtype=torch.uint8)
    with torch.no_grad():
        whole(example)  # resized positions are kept from the first use on, and must be no tensors of the exporter
        return torch.export.export(whole, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True)


def _metrics(folder: Path, finished: Classifier) -> dict[str, float]:
    """Of the checkpoint's last evaluation; and of the test split, where a search kept them beside it (best/)."""
    try:
        kept: dict[str, float] = json.loads((folder / BEST_METRICS).read_text())
    except FileNotFoundError:
        kept = {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / BEST_METRICS}: must be metrics, but got {error}; delete it") from None
    return finished.record.metrics | kept


def _card(finished: Classifier, exported: Sequence[Exported], metrics: Mapping[str, float]) -> str:
    record, wanted = finished.record, finished.config.backbone
    return model_card(
        config=finished.config.to_dict(),
        class_names=record.class_names,
        class_counts=record.class_counts,
        metrics=metrics,
        dataset=record.dataset,
        digest=record.digest,
        version=record.lift_ray_version,
        size_px=finished.size_px,
        licence=licence(wanted.model, wanted.pretrained),
        exported=exported,
        five_crops=finished.five_crops,
        trained_tau=finished.trained_tau,
    )


WRITERS: dict[str, Callable[[Classifier, Path, GetProgram], tuple[str, Logits]]] = {
    OPEN_CLIP: _open_clip,
    TORCH: _torch,
    ONNX: _onnx,
}
"""Format -> writes it into a folder; the file's name, and what makes logits of uint8 pictures with what was written."""
