"""python -m lift_ray.export: the files give the checkpoint's logits, for every kind of tuner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lift_ray import export
from lift_ray.errors import BadInput, RunFailed
from lift_ray.inference.classifier import Classifier
from lift_ray.inference.export import export_checkpoint
from lift_ray.inference.model_card import markdown_code, markdown_text
from lift_ray.methods.world import Ranks
from lift_ray.model.backbone import load_backbone
from lift_ray.registry import HEADS, TUNERS
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

TORCH_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
MERGED: dict[str, dict[str, Any]] = {
    "lora": {"bottleneck": 4},
    "lora_mlp": {"bottleneck": 4, "mlp": True, "blocks": [1]},
    "dora": {"bottleneck": [4, 2]},
    "dora_mlp": {"bottleneck": 4, "mlp": True},
    "ia3": {},
    "ssf": {},
    "ssf_norms": {"norms": True},
    "bitfit": {},
    "layernorm": {},
    "sparse": {"ratio": 0.2},
    "partial": {},
    "full": {},
    "linear_probe": {},
    "zero_shot": {},
}
BESIDE: dict[str, dict[str, Any]] = {
    "adaptformer": {"bottleneck": 4},
    "adapter": {"bottleneck": 4, "blocks": [0]},
    "vpt_shallow": {"length": 3},
    "vpt_deep": {"length": 3},
    "clip_adapter": {"bottleneck": 4},
}


def config_of(name: str, options: dict[str, Any], **others: Any) -> dict[str, Any]:
    kind = name.removesuffix("_mlp").removesuffix("_norms")
    return {"tuner": {"kind": kind, **options}, **others}


def saved(data: str, clip: str, folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint whose trained tensors are far from where they start, as after a long training."""
    from lift_ray.settings.run import RunConfig

    threads = torch.get_num_threads()
    run = Run(
        RunConfig.model_validate({"backbone": {"model": clip}, "optim": {"global_batch_size": 16}, **config}),
        Workspace(data, Ranks.alone()),
    )
    torch.set_num_threads(threads)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in run.model.trained().values():
            p += 0.1 * torch.randn_like(p)
    run.save(folder)
    return folder


def test_the_tests_name_every_kind_of_tuner() -> None:
    kinds = {config_of(name, options)["tuner"]["kind"] for name, options in {**MERGED, **BESIDE}.items()}
    assert kinds == {*TUNERS} - {"batchnorm"}  # that one is for residual networks


@pytest.mark.parametrize("name", [*MERGED, *BESIDE])
@pytest.mark.slow
def test_onnx_torch_and_open_clip_give_the_logits_of_the_checkpoint(
    name: str, small_data: str, small_clip: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    options = {**MERGED, **BESIDE}[name]
    folder = saved(small_data, small_clip, tmp_path / "checkpoint", config_of(name, options))
    exported, left_out = export_checkpoint(folder, tmp_path / "out")
    assert [each.name for each in exported] == (["open_clip"] if name in MERGED else []) + ["torch", "onnx"]
    assert all(each.difference <= 1e-4 for each in exported)
    assert (name in left_out) == (name in BESIDE)
    if name in ("lora_mlp", "adaptformer"):
        assert_loads_without_lift_ray(folder, tmp_path / "out", name in MERGED)


def assert_loads_without_lift_ray(folder: Path, out: Path, merged: bool) -> None:
    import onnxruntime
    import open_clip

    classifier = Classifier(folder, Ranks.alone(num_cpus=torch.get_num_threads()))
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (classifier.backbone.mean, classifier.backbone.std))
    with torch.inference_mode():
        expected = classifier.model((images / 255 - mean) / std)
    program = torch.export.load(out / "model.pt2")
    assert "mkldnn" not in program.graph_module.code
    assert (program.module()(images) - expected).abs().max() < 1e-4
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-4
    if merged:
        clip = open_clip.create_model(f"local-dir:{out / 'open_clip'}", require_pretrained=True)
        clip.visual.proj = None
        with torch.inference_mode():
            feature = clip.visual.eval()((images / 255 - mean) / std)
            assert (classifier.model.head(feature) - expected).abs().max() < 1e-4


def test_two_tuners_merge_in_their_order_and_post_hoc_adjustment_is_inside(
    small_data: str, small_clip: str, tmp_path: Path
) -> None:
    config = {
        "tuner": {"kind": "lora", "bottleneck": 4},
        "extra_tuner": {"kind": "ssf"},
        "evaluation": {"posthoc_tau": 0.5},
    }
    folder = saved(small_data, small_clip, tmp_path / "checkpoint", config)
    exported, _ = export_checkpoint(folder, tmp_path / "out", ["open_clip"])
    classifier = Classifier(folder, Ranks.alone(num_cpus=torch.get_num_threads()))
    assert [each.name for each in exported] == ["open_clip"]
    assert not list(classifier.module.tuners)  # type: ignore[call-overload]
    counts = torch.tensor(classifier.record.class_counts)
    torch.testing.assert_close(classifier.offset, 0.5 * (counts / counts.sum()).log())


def test_another_posthoc_tau_is_in_the_file_and_in_the_card(small_data: str, small_clip: str, tmp_path: Path) -> None:
    folder = saved(small_data, small_clip, tmp_path / "checkpoint", {"evaluation": {"posthoc_tau": 0.5}})
    export.main([str(folder), "--out", str(tmp_path / "out"), "--format", "torch", "--posthoc-tau", "2"])
    classifier = Classifier(folder, Ranks.alone(num_cpus=torch.get_num_threads()))
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    own = classifier.logits(images)
    exported = torch.export.load(tmp_path / "out" / "model.pt2").module()(images)
    counts = torch.tensor(classifier.record.class_counts)
    torch.testing.assert_close(own - exported, (1.5 * (counts / counts.sum()).log()).expand(2, -1))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "measured with post-hoc tau 0.5; the exported files use tau 2." in card


def test_the_card_and_the_open_clip_files_say_how_images_are_resized(
    small_data: str, small_clip: str, tmp_path: Path
) -> None:
    config = {"tuner": {"kind": "linear_probe"}, "backbone": {"model": small_clip, "interpolation": "bilinear"}}
    export_checkpoint(saved(small_data, small_clip, tmp_path / "run", config), tmp_path / "out", ["open_clip"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "to 37 px (bilinear, antialiased), then crop the center:" in card
    assert "interpolation: bilinear" in card
    written = json.loads((tmp_path / "out" / "open_clip" / "open_clip_config.json").read_text())
    assert written["preprocess_cfg"]["interpolation"] == "bilinear"
    assert load_backbone(f"local-dir:{tmp_path / 'out' / 'open_clip'}").interpolation == "bilinear"


def test_the_card_has_the_test_metrics_if_a_search_has_measured_them(
    small_data: str, small_clip: str, tmp_path: Path
) -> None:
    folder = saved(small_data, small_clip, tmp_path / "best", {"tuner": {"kind": "linear_probe"}})
    export_checkpoint(folder, tmp_path / "before", ["open_clip"])
    (folder / "metrics.json").write_text(
        json.dumps(
            {"validation/accuracy": 0.5, "test/accuracy": 0.25, "test/mean_class_accuracy": 0.125, "test/few": 0.0625}
        )
    )
    export_checkpoint(folder, tmp_path / "after", ["open_clip"])
    before, after = ((tmp_path / name / "README.md").read_text() for name in ("before", "after"))
    assert "The test split was not evaluated before the export; `python -m lift_ray.evaluate CHECKPOINT`" in before
    assert "was not evaluated" not in after
    assert "on the validation and test splits:" in after
    assert "\n| test | 25.0 | 12.5 |  |  | 6.2 |" in after
    assert "\n| validation | 50.0 |" in after


def test_a_tuner_next_to_another_that_cannot_be_merged_is_exported(
    small_data: str, small_clip: str, tmp_path: Path
) -> None:
    config = {"tuner": {"kind": "adaptformer", "bottleneck": 4}, "extra_tuner": {"kind": "lora", "bottleneck": 4}}
    folder = saved(small_data, small_clip, tmp_path / "checkpoint", config)
    if TORCH_VERSION < (2, 14):
        with pytest.raises(RunFailed, match=r"^torch 2.13.* cannot export '.*'; install torch 2.14 or later$"):
            export_checkpoint(folder, tmp_path / "out", ["torch"])
        assert not (tmp_path / "out").exists()
        return
    exported, left_out = export_checkpoint(folder, tmp_path / "out", ["torch"])
    assert [each.name for each in exported] == ["torch"]
    assert not left_out
    with pytest.raises(
        BadInput, match=r"^--format open_clip: requires a tuner that can be merged .* adaptformer and lora"
    ):
        export_checkpoint(folder, tmp_path / "other", ["open_clip"])
    assert not (tmp_path / "other").exists()


def test_behind_the_tower_stays_while_the_blocks_are_merged(small_data: str, small_clip: str, tmp_path: Path) -> None:
    config = {"tuner": {"kind": "lora", "bottleneck": 4}, "extra_tuner": {"kind": "clip_adapter"}}
    folder = saved(small_data, small_clip, tmp_path / "checkpoint", config)
    exported, left_out = export_checkpoint(folder, tmp_path / "out", ["torch"])
    assert [each.name for each in exported] == ["torch"]
    assert exported[0].difference <= 1e-4
    assert not left_out
    module: Any = Classifier(folder, Ranks.alone(num_cpus=torch.get_num_threads())).module
    assert not list(module.tuners)
    assert [type(part).__name__ for part in module.behind] == ["ClipAdapter"]
    with pytest.raises(
        BadInput, match=r"^--format open_clip: requires a tuner that can be merged .* lora and clip_adapter"
    ):
        export_checkpoint(folder, tmp_path / "other", ["open_clip"])


TEXT_SIDE: dict[str, Any] = {"kind": "text", "scale": 20.0, "context": 4, "tuner": {"kind": "ssf"}, "projections": True}


@pytest.mark.parametrize(
    "head",
    [*({"kind": kind} for kind in sorted({*HEADS} - {"cosine"})), TEXT_SIDE],  # cosine: all tests above
)
@pytest.mark.slow
def test_every_head_is_exported(head: dict[str, Any], small_data: str, small_clip: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    config = {"tuner": {"kind": "linear_probe"}, "head": head}
    exported, _ = export_checkpoint(saved(small_data, small_clip, tmp_path / "checkpoint", config), tmp_path / "out")
    assert [each.name for each in exported] == ["open_clip", "torch", "onnx"]
    assert max(each.difference for each in exported) <= 1e-4


@pytest.mark.slow
def test_a_tower_of_timm_is_exported_as_a_whole_classifier(small_data: str, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    pytest.importorskip("onnxruntime")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", img_size=48).state_dict(), tmp_path / "vit.safetensors")
    backbone = {"model": "timm:test_vit", "pretrained": str(tmp_path / "vit.safetensors"), "resolution_px": 32}
    config = {"backbone": backbone, "head": {"init": "random"}, "tuner": {"kind": "lora", "bottleneck": 4}}
    exported, left_out = export_checkpoint(saved(small_data, "", tmp_path / "checkpoint", config), tmp_path / "out")
    assert [each.name for each in exported] == ["torch", "onnx"]
    assert max(each.difference for each in exported) <= 1e-4
    assert left_out == "requires a CLIP backbone, but got timm:test_vit"


@pytest.mark.parametrize("kind", ["ssf", "batchnorm"])
@pytest.mark.slow
def test_a_residual_network_is_merged_too(kind: str, small_data: str, tmp_path: Path) -> None:
    import open_clip

    pytest.importorskip("onnxruntime")
    from safetensors.torch import save_file

    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "clip").mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(32, vision, text)
    save_file(dict(model.state_dict()), tmp_path / "clip" / "open_clip_model.safetensors")
    about = {
        "model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(about))
    config = {"tuner": {"kind": kind}, "augment": {"patch_dropout": 0.0}}
    folder = saved(small_data, f"local-dir:{tmp_path / 'clip'}", tmp_path / "checkpoint", config)
    exported, _ = export_checkpoint(folder, tmp_path / "out")
    assert [each.name for each in exported] == ["open_clip", "torch", "onnx"]
    assert max(each.difference for each in exported) <= 1e-4


def test_the_verb_prints_differences_and_writes_a_card(
    small_data: str, small_clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(small_data, small_clip, tmp_path / "checkpoint", {})
    out = tmp_path / "new" / "out"
    export.main([str(folder), "--out", str(out), "--format", "torch"])
    assert "model.pt2: largest difference from the checkpoint's logits" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "96 training images in 8 classes, 24 to 4 per class." in card
    assert "| few | under 9 | 3 | 18 |" in card
    assert "so groups are thirds of the classes: few <= 8 training images, many >= 14." in card
    assert "unknown; ask their publisher" in card
    assert "kind: adaptformer" in card
    assert "measured with post-hoc" not in card
    assert len(json.loads((out / "classes.json").read_text())) == 8
    with pytest.raises(BadInput, match=r"^--out: must be a new folder, but .* exists; delete it, or choose another"):
        export.main([str(folder), "--out", str(out)])
    with pytest.raises(BadInput, match=r"^--format: unknown format 'onx'; did you mean 'onnx'"):
        export.main([str(folder), "--out", str(tmp_path / "x"), "--format", "onx"])


def test_a_file_that_differs_is_refused_and_nothing_is_left(
    small_data: str, small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lift_ray.inference import export

    folder = saved(small_data, small_clip, tmp_path / "checkpoint", {})
    monkeypatch.setitem(export.WRITERS, "torch", lambda *given: ("model.pt2", lambda x: torch.zeros(len(x), 8)))
    with pytest.raises(RunFailed, match=r"^model.pt2: the logits must match the checkpoint's to 0.0001, but differ"):
        export_checkpoint(folder, tmp_path / "out", ["torch"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("sea_horse", "sea_horse"),
        ("_private_", "\\_private\\_"),
        ("a|b *c* `d`", "a\\|b \\*c\\* \\`d\\`"),
        ("[lora](http://x)", "\\[lora\\](http://x)"),
        ("<script>", "\\<script\\>"),
        ("&lt;", "\\&lt;"),
        ("two\nlines\x1b[2J", "two lines\\\\x1b\\[2J"),
        ("# 1", "\\# 1"),
    ],
)
def test_a_name_is_text_in_the_card_and_opens_no_column_link_or_tag(name: str, shown: str) -> None:
    assert markdown_text(name) == shown


def test_a_dataset_with_a_backtick_in_its_path_is_code_in_the_card() -> None:
    assert (markdown_code("data/a"), markdown_code("data/`a`")) == ("`data/a`", "`` data/`a` ``")
