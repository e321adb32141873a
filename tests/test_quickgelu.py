"""The activation of weights, QuickGELU or GELU: derived if known, required if not, in each layout of weights without a network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lift_ray import train, tune
from lift_ray.errors import BadInput
from lift_ray.model import quickgelu
from lift_ray.model.backbone import Backbone, check_source, load_backbone
from lift_ray.model.quickgelu import Published, open_clip_activation, timm_activation
from lift_ray.model.rebuilt import quick_gelu

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
NAME, QUICK_NAME = "ViT-small", "ViT-small-quickgelu"


def clip_of(quick: bool) -> open_clip.CLIP:
    """A random CLIP whose features differ clearly by activation."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(**deepcopy(CONFIG), quick_gelu=quick).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


def assert_same(backbone: Backbone, clip: open_clip.CLIP) -> None:
    """Image and text features of a backbone are those of open_clip's model."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert backbone.projection is not None
    with torch.inference_mode():
        expected, got = clip.encode_image(images), backbone.tower(images) @ backbone.projection
        assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        text = clip.encode_text(open_clip.SimpleTokenizer(context_length=16)(["a cat"]), normalize=True)
    assert float((backbone.text_embeddings(["cat"], "a {}") - text).abs().max()) <= 1e-5


@pytest.fixture
def small_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small architecture of open_clip that is there with and without -quickgelu."""
    for name, more in ((NAME, {}), (QUICK_NAME, {"quick_gelu": True})):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**deepcopy(CONFIG), **more})


def state_of() -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in clip_of(False).state_dict().items()}


@pytest.mark.usefixtures("small_name")
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_a_file_gives_the_features_of_open_clips_model_with_the_activation_of_the_setting(
    file: str, quick: bool, tmp_path: Path
) -> None:
    path = tmp_path / file
    save_file(state_of(), path) if path.suffix == ".safetensors" else torch.save(state_of(), path)
    assert_same(load_backbone(NAME, str(path), quickgelu=quick), clip_of(quick))
    if quick:
        assert_same(load_backbone(QUICK_NAME, str(path)), clip_of(True))


@pytest.mark.usefixtures("small_name")
def test_the_archive_of_openai_is_read_by_its_digest_and_any_other_archive_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sized(torch.nn.Module):  # OpenAI's archive keeps sizes beside half precision weights
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in state_of().items():
                *at, last = name.split(".")
                here: torch.nn.Module = self
                for part in at:
                    if part not in here._modules:
                        here.add_module(part, torch.nn.Module())
                    here = here._modules[part]  # type: ignore[assignment]
                here.register_buffer(last, tensor.half())
            self.register_buffer("input_resolution", torch.tensor(16))

        def forward(self) -> int:
            return 0

    path = tmp_path / "ViT-small.pt"
    torch.jit.save(torch.jit.script(Sized()), path)
    with pytest.raises(BadInput, match=r"must be a safetensors file or a file of torch\.save, but .* is a TorchScript"):
        load_backbone(NAME, str(path), quickgelu=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for known, accepted in ((digest, True), (digest[:8], False)):
        monkeypatch.setattr(quickgelu, "_listed", lambda known=known: [Published(known, f"{NAME} openai", True)])
        if accepted:
            halves = clip_of(True)
            halves.load_state_dict({name: tensor.half().float() for name, tensor in state_of().items()})
            assert_same(load_backbone(NAME, str(path)), halves)
        else:  # eight digits can be forged, and an archive contains code
            with pytest.raises(BadInput, match="is a TorchScript archive"):
                load_backbone(NAME, str(path))


@pytest.mark.parametrize("quick", [False, True])
def test_a_folder_says_its_activation_itself(quick: bool, tmp_path: Path) -> None:
    write_folder(tmp_path, quick)
    assert_same(load_backbone(f"local-dir:{tmp_path}", None), clip_of(quick))
    with pytest.raises(BadInput) as caught:
        check_source(f"local-dir:{tmp_path}", None, True)
    assert str(caught.value) == (
        f"backbone.quickgelu: must not be given with local-dir:{tmp_path}, but got true; "
        "remove it; its open_clip_config.json says quick_gelu"
    )


def write_folder(folder: Path, quick: bool) -> None:
    config = {**CONFIG, "quick_gelu": True} if quick else CONFIG
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(state_of(), folder / "open_clip_model.safetensors")


def test_a_copied_cache_of_the_hub_is_used_without_a_network(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--mine--small"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"  # pragma: allowlist secret
    snapshot.mkdir(parents=True)
    write_folder(snapshot, True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    script = """
import open_clip, sys, torch
from lift_ray.errors import BadInput
from lift_ray.model.backbone import load_backbone
from open_clip.pretrained import _PRETRAINED, _pcfg
config = open_clip.get_model_config("hf-hub:mine/small")
open_clip.factory._MODEL_CONFIGS["ViT-small"] = {k: v for k, v in config.items() if k != "quick_gelu"}
_PRETRAINED["ViT-small"] = {"mine": _pcfg(hf_hub="mine/small/", quick_gelu=True), "none": _pcfg(hf_hub="mine/none/")}
open_clip.factory._MODEL_CONFIGS["ViT-small-quickgelu"] = config
_PRETRAINED["ViT-small-quickgelu"] = _PRETRAINED["ViT-small"]
images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
found = [load_backbone(*names) for names in (("hf-hub:mine/small",), ("ViT-small", "mine"))]
torch.save([b.tower(images) @ b.projection for b in found], sys.argv[1])
for names in (("hf-hub:mine/none",), ("ViT-small", "none")):
    try:
        load_backbone(*names)
    except BadInput as error:
        print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "features.pt")],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = clip_of(True).encode_image(images)
    for got in torch.load(tmp_path / "features.pt"):
        assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    lines = ran.stdout.splitlines()
    assert [line.split(" could not be loaded (")[0] for line in lines] == [
        "backbone.model: hf-hub:mine/none",
        "backbone.model: ViT-small",
    ]


@pytest.fixture
def weights(tmp_path: Path) -> str:
    save_file({"x": torch.zeros(1)}, tmp_path / "mine.safetensors")
    return str(tmp_path / "mine.safetensors")


UNKNOWN = (
    "backbone.quickgelu: must be true or false for a weights file of ViT-B-16, but got null; set true for weights trained with "
    "QuickGELU (as openai, dfn2b, metaclip_400m, metaclip_fullcc), false for others (as laion400m_e31, laion400m_e32, "
    "laion2b_s34b_b88k, datacomp_xl_s13b_b90k, ...)"
)


@pytest.mark.parametrize(
    ("model", "pretrained", "wanted", "message"),
    [
        ("ViT-B-16", "{file}", None, UNKNOWN),
        (
            "ViT-B-16-quickgelu",
            "{file}",
            False,
            "backbone.quickgelu: must be true for ViT-B-16-quickgelu, but got false; remove it, or use ViT-B-16",
        ),
        (
            "ViT-B-16",
            "laion2b_s34b_b88k",
            True,
            "backbone.quickgelu: must be false for laion2b_s34b_b88k, but got true; remove it",
        ),
        (
            "ViT-B-16-SigLIP",
            "{file}",
            False,
            "backbone.quickgelu: must not be given with ViT-B-16-SigLIP, which has one activation, but got false; remove it",
        ),
        (
            "embedded:lift-small",
            None,
            True,
            "backbone.quickgelu: must not be given with embedded:lift-small, but got true; ",
        ),
        (
            "timm:vit_base_patch16_clip_224",
            "{file}",
            None,
            "backbone.quickgelu: must be true or false for a weights file of timm:vit_base_patch16_clip_224, but got null; "
            "set true for weights trained with QuickGELU (as dfn2b, metaclip_2pt5b, metaclip_400m, openai), false for others (as ",
        ),
        (
            "timm:vit_base_patch16_clip_quickgelu_224.openai",
            None,
            False,
            "backbone.quickgelu: must be true for openai, but got false; remove it",
        ),
        (
            "timm:vit_base_patch16_224",
            None,
            True,
            "backbone.quickgelu: must not be given with timm:vit_base_patch16_224, which has one activation, but got true; ",
        ),
    ],
)
def test_an_activation_that_is_unknown_or_contradicts_the_weights_is_one_line_before_anything_loads(
    model: str, pretrained: str | None, wanted: bool | None, message: str, weights: str
) -> None:
    for refuses in (check_source, lambda *words: load_backbone(*words[:2], quickgelu=words[2])):
        with pytest.raises(BadInput) as caught:
            refuses(model, pretrained and pretrained.format(file=weights), wanted)  # type: ignore[operator]
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quick", [False, True])
def test_the_digest_of_a_file_decides_over_its_name(quick: bool, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    monkeypatch.setattr(quickgelu, "_listed", lambda: [Published(digest[:8], "ViT-B-16 theirs", quick)])
    assert open_clip_activation("ViT-B-16", weights, None) is quick
    assert open_clip_activation("ViT-B-16", weights, quick) is quick
    with pytest.raises(BadInput, match=r"^backbone\.quickgelu: must be (true|false) for ViT-B-16 theirs, but got"):
        open_clip_activation("ViT-B-16", weights, not quick)
    if not quick:
        with pytest.raises(BadInput, match=r"^backbone\.model: must be ViT-B-16 for the weights ViT-B-16 theirs, but"):
            open_clip_activation("ViT-B-16-quickgelu", weights, None)


def test_every_tag_of_open_clip_gets_the_activation_of_its_list() -> None:
    for model, tag in open_clip.list_pretrained():
        quick = bool(open_clip.pretrained.get_pretrained_cfg(model, tag).get("quick_gelu"))
        assert open_clip_activation(model, tag, None) is quick, f"{model} {tag}"


def test_the_digests_are_those_that_open_clip_checks_a_download_with() -> None:
    listed = {weights.name: weights for weights in quickgelu._listed()}
    assert listed["ViT-B-16 openai"].digest.startswith("5806e77cd80f8b59")  # pragma: allowlist secret
    assert listed["ViT-B-16 openai"].quick
    assert listed["ViT-B-16 laion400m_e32"][0::2] == ("55e67d44", False)
    assert listed["ViT-B-32 laion400m_e32"][0::2] == ("46683a32", True)
    assert {len(weights.digest) for weights in listed.values()} == {8, 64}
    assert "ViT-B-16 metaclip_400m" not in listed  # its URL has none


@pytest.mark.parametrize(
    ("name", "quick"),
    [
        ("vit_base_patch16_clip_224.openai", True),
        ("vit_base_patch16_clip_quickgelu_224.openai", True),
        ("vit_base_patch16_clip_224.dfn2b", True),
        ("vit_base_patch16_clip_224.laion2b", False),
        ("vit_base_patch16_clip_224.openai_ft_in1k", False),
        ("vit_huge_patch14_clip_378", True),
        ("vit_base_patch16_224", False),
    ],
)
def test_a_name_of_timm_gets_the_activation_of_its_weights(
    name: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert timm_activation(name, None, None) is quick
    create = timm.create_model

    def small(name: str, pretrained: bool, **options: Any) -> Any:
        options |= {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", small)
    tower = load_backbone(f"timm:{name}", None).tower
    assert tower.blocks[0].mlp.activation is (quick_gelu if quick else F.gelu)


def test_every_search_and_run_asks_before_it_starts(
    small_data: str, space_file: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run.yaml"
    run.write_text(f"dataset: {small_data}\noptim: {{epochs: 1, global_batch_size: 8}}\n")
    words = ["backbone.model=ViT-B-16", f"backbone.pretrained={weights}"]
    for started in (
        lambda: tune.main([str(space_file), *(f"base.{word}" for word in words), "--dry-run"]),
        lambda: tune.main([str(space_file), *(f"base.{word}" for word in words)]),
        lambda: train.main([str(run), *words, "--dry-run"]),
        lambda: train.main([str(run), *words, "--no-ray"]),
    ):
        with pytest.raises(BadInput) as caught:
            started()
        assert str(caught.value) == UNKNOWN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.safetensors", "run.yaml"]
