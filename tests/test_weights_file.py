"""Weights of a CLIP from a file that the user names in `backbone.pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from lift_ray.errors import BadInput
from lift_ray.model import backbone
from lift_ray.model.backbone import check_source, load_backbone
from lift_ray.model.weights_file import fill_clip

TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}


def clip(**vision: Any) -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(24, {**VISION, **vision}, TEXT).eval()


def test_a_training_checkpoint_of_open_clip_and_a_safetensors_file_give_the_same_model(tmp_path: Path) -> None:
    state = clip().state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "epoch_3.pt")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.bin")
    for name in ("epoch_3.pt", "model.bin"):
        loaded = clip()
        for parameter in loaded.parameters():
            parameter.data.zero_()
        fill_clip(loaded, "small", str(tmp_path / name))
        assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())


def test_half_precision_weights_for_another_image_size_are_resized_in_float32(tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in clip().state_dict().items()}
    torch.save(halves, tmp_path / "half.pt")
    larger, expected = clip(image_size=32), clip(image_size=32)
    fill_clip(larger, "small", str(tmp_path / "half.pt"))
    state: dict[str, Any] = {name: tensor.float() for name, tensor in halves.items()}
    open_clip.model.resize_pos_embed(state, expected)
    expected.load_state_dict(state)
    assert larger.visual.positional_embedding.shape == (17, 32)
    assert larger.visual.positional_embedding.dtype == torch.float32
    assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in larger.state_dict().items())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"width": 64}, "with another shape of visual.class_embedding, visual.conv1.weight, visual.ln_post.bias, "),
        ({"layers": 2}, "with visual.transformer.resblocks.1.attn.in_proj_bias, "),
    ],
)
def test_weights_of_another_architecture_are_refused_with_the_names_that_differ(
    change: dict[str, int], found: str, tmp_path: Path
) -> None:
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in clip(**change).state_dict().items()}, path)
    with pytest.raises(BadInput) as caught:
        fill_clip(clip(image_size=32), "ViT-small", str(path))
    assert str(caught.value).startswith(
        f"backbone.pretrained: must contain the tensors of ViT-small, but got {path} {found}"
    )
    assert str(caught.value).endswith("; use a file of this model")


@pytest.mark.parametrize("grid", [torch.zeros(3, 32), torch.zeros(4, 32), torch.zeros(5), torch.zeros(0, 32)])
def test_position_embeddings_that_are_no_square_grid_are_another_shape(grid: torch.Tensor, tmp_path: Path) -> None:
    torch.save({**clip().state_dict(), "visual.positional_embedding": grid}, tmp_path / "odd.pt")
    with pytest.raises(BadInput, match=r"with another shape of visual\.positional_embedding; use a file of this model"):
        fill_clip(clip(), "small", str(tmp_path / "odd.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": torch.nn.Linear(1, 1)},
            "must hold tensors and nothing else, but {} holds other objects, or is damaged",
        ),
        ([torch.zeros(1)], "must hold tensors by name, but {} does not"),
        ({"epoch": 3, "state_dict": {}}, "must hold tensors by name, but {} does not"),
    ],
)
def test_a_file_of_torch_save_with_something_else_is_refused_without_advice_to_unpickle(
    content: object, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(BadInput) as caught:
        load_backbone("ViT-B-32", str(tmp_path / "model.pt"), quickgelu=False)
    assert str(caught.value).startswith(f"backbone.pretrained: {message.format(tmp_path / 'model.pt')}; ")
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pointer_is_refused_before_a_search_starts_and_when_the_model_is_built(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for refuses in (check_source, load_backbone):
        with pytest.raises(BadInput) as caught:
            refuses("ViT-B-32", str(tmp_path / "weights.pt"))
        assert str(caught.value) == (
            "backbone.pretrained: must be a safetensors file or a file of torch.save, "
            f"but {tmp_path}/weights.pt is a Git LFS pointer; run git lfs pull"
        )


def test_a_folder_whose_weights_are_a_pointer_names_the_file(small_clip: str, tmp_path: Path) -> None:
    config = Path(small_clip.removeprefix("local-dir:")) / "open_clip_config.json"
    (tmp_path / config.name).write_text(config.read_text())
    weights = tmp_path / "open_clip_pytorch_model.bin"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(BadInput) as caught:
        load_backbone(f"local-dir:{tmp_path}", None)
    assert str(caught.value) == (
        "backbone.model: must be a safetensors file or a file of torch.save, "
        f"but {weights} is a Git LFS pointer; run git lfs pull"
    )


def test_a_downloaded_file_that_torch_refuses_is_reported_without_its_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(*_: Any, **__: Any) -> None:
        raise RuntimeError("Weights only load failed. Re-running `torch.load` with `weights_only` set to `False` ...")

    monkeypatch.setattr(backbone, "_source", lambda model, pretrained, quickgelu: (model, False))
    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(BadInput) as caught:
        load_backbone("ViT-B-32", "openai")
    assert str(caught.value) == (
        "backbone.model: ViT-B-32 could not be loaded (its weights file holds more than tensors, or is damaged); "
        "check name and network"
    )
