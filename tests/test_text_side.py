"""The text side: the rebuilt text tower, the head of text embeddings and what it trains, texts per class, and its settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from made_run import run_config
from open_clip.model import CLIP, CustomTextCLIP, _build_text_tower
from torch import Tensor

from lift_ray.errors import BadInput
from lift_ray.inference.classifier import Classifier
from lift_ray.methods.world import Ranks, join_group
from lift_ray.model.backbone import Backbone, load_backbone
from lift_ray.model.heads import ZeroShotHead
from lift_ray.model.text_head import TextHead, build
from lift_ray.model.text_tower import rebuild_text
from lift_ray.model.tuners.lora.module import Lora
from lift_ray.registry import TUNERS
from lift_ray.settings.checks import read_space
from lift_ray.settings.heads import TextHeadConfig
from lift_ray.settings.run import RunConfig
from lift_ray.training.plan import memory
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

torch.set_num_threads(1)  # small tensors, and other processes of the tests beside them
VISION = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
EOS = 7
SIGLIP = {
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_bias": True,
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
NAMES = ["cat", "sea_horse", "Boeing 747"]
FEATURES = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
IN_TEXT = [kind.name for kind in TUNERS.values() if kind.changes_tower and not kind.not_in_text]


# ---- the tower


def clip_of(make: type, quick: bool = False, **text: Any) -> Any:
    """A CLIP of open_clip with random weights, biases and norms too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = make(24, dict(VISION), {**TEXT, **text}, quick_gelu=quick).eval()
        with torch.no_grad():
            for parameter in clip.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return clip


def token_ids() -> Tensor:
    """Five texts of different length; one ends at the last position."""
    ids = torch.zeros(5, 12, dtype=torch.long)
    for row, length in enumerate((1, 2, 4, 7, 10)):
        ids[row, : length + 2] = torch.tensor([98, *range(10 * row + 8, 10 * row + 8 + length), 99])
    return ids


@pytest.mark.parametrize(
    ("make", "quick", "text"),
    [
        (CLIP, False, {}),
        (CLIP, True, {}),
        (CLIP, False, {"pool_type": "eos", "eos_id": EOS}),
        (CLIP, False, {"ls_init_value": 0.1}),
        (CustomTextCLIP, False, {}),
        (CustomTextCLIP, False, {"pool_type": "first", "no_causal_mask": True}),
        (CustomTextCLIP, False, {"pool_type": "last"}),
        (CustomTextCLIP, False, {"proj_type": "none"}),
        (CustomTextCLIP, False, SIGLIP),
    ],
)
@torch.inference_mode()
def test_the_rebuilt_text_tower_equals_open_clips(make: type, quick: bool, text: dict[str, Any]) -> None:
    clip, ids = clip_of(make, quick, **text), token_ids()
    if "eos_id" in text:
        ids[ids == 99] = EOS
    tower = rebuild_text(clip)
    assert tower is not None
    expected = clip.encode_text(ids)
    assert float((tower(ids) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    theirs = {p.data_ptr() for p in clip.parameters()}
    scaled = "ls_init_value" in text  # becomes part of two weights and two biases of each block
    more = {p.data_ptr() for p in tower.parameters()} - theirs
    assert len(more) == 4 * tower.num_blocks * scaled, "no other weight is there twice"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (CustomTextCLIP, {"embed_cls": True}),
        (CustomTextCLIP, {"block_type": "custom", "qk_norm": True}),
    ],
)
def test_a_text_tower_of_another_make_is_not_rebuilt_wrongly(make: type, text: dict[str, Any]) -> None:
    assert rebuild_text(clip_of(make, **text)) is None


def test_all_text_towers_that_open_clip_builds_alone_are_rebuilt_but_those_of_coca() -> None:
    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    alone = {name: config for name, config in configs.items() if "hf_model_name" not in config["text_cfg"]}
    kinds: dict[str, list[str]] = {}  # of one block, as the number makes no difference
    for name, config in alone.items():
        kinds.setdefault(json.dumps([config["text_cfg"] | {"layers": 1}, config.get("quick_gelu", False)]), []).append(
            name
        )
    rebuilt: list[str] = []
    for kind, names in kinds.items():
        text, quick = json.loads(kind)
        with torch.device("meta"):
            whole = SimpleNamespace(text=_build_text_tower(64, text, quick))
        rebuilt += names if rebuild_text(whole) is not None else []
    assert all("coca" in name for name in alone.keys() - {*rebuilt})
    assert len(rebuilt) >= 131


@torch.inference_mode()
def test_tokens_after_the_pooled_one_are_left_out_of_a_causal_tower_alone() -> None:
    causal, both_ways = rebuild_text(clip_of(CLIP)), rebuild_text(clip_of(CustomTextCLIP, no_causal_mask=True))
    assert causal is not None
    assert both_ways is not None
    ids = token_ids()[:2]
    assert causal.needed(causal.pooled_at(ids)) == 4
    assert both_ways.needed(both_ways.pooled_at(ids)) == 12


# ---- the head


@pytest.fixture(scope="module")
def backbone(small_clip: str) -> Backbone:
    return load_backbone(small_clip)


def head_of(backbone: Backbone, **options: Any) -> Any:
    torch.manual_seed(1)
    return build(backbone, NAMES, resolved(**options))


def resolved(**options: Any) -> TextHeadConfig:
    head = RunConfig.model_validate({"head": {"kind": "text", **options}}).head
    assert isinstance(head, TextHeadConfig)
    if head.tuner is None:
        return head
    derived = {"blocks": [0]} if hasattr(head.tuner, "blocks") else {}
    tuner = head.tuner.model_copy(update=derived)
    return head.model_copy(update={"tuner": tuner.model_copy(update=tuner.derived(100, 1, 32))})


def cosines(backbone: Backbone, text: Tensor) -> Tensor:
    """The formula, from text embeddings of any length."""
    assert backbone.projection is not None
    image = FEATURES @ backbone.projection
    return torch.stack([torch.stack([z @ t / (z.norm() * t.norm()) for t in text]) for z in image])


@torch.no_grad()
def coop(clip: Any, lines: list[str], context: Tensor) -> Tensor:
    """Text embeddings with context as in CoOp's code: placeholders are tokenized, then their embeddings are replaced."""
    ids = open_clip.get_tokenizer("ViT-B-32", context_length=32)(lines)
    x = clip.token_embedding(ids)
    x = torch.cat([x[:, :1], context.expand(len(x), -1, -1), x[:, 1 + len(context) :]], dim=1)
    x = clip.ln_final(clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask))
    embedded: Tensor = x[torch.arange(len(x)), ids.argmax(-1)] @ clip.text_projection
    return embedded


def test_without_options_it_is_clips_own_classifier_and_trains_nothing(backbone: Backbone) -> None:
    head = head_of(backbone)
    assert isinstance(head, ZeroShotHead)
    assert not list(head.parameters())
    ids = open_clip.get_tokenizer("ViT-B-32", context_length=32)(
        [f"a photo of a {n.replace('_', ' ')}." for n in NAMES]
    )
    expected = backbone.logit_scale * cosines(backbone, backbone.clip.encode_text(ids))
    torch.testing.assert_close(head(FEATURES), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(head_of(backbone, scale=5.0)(FEATURES), 5 * head(FEATURES) / backbone.logit_scale)


def test_learned_context_gives_the_figures_of_coop(backbone: Backbone) -> None:
    head = head_of(backbone, context=3, scale=10.0, template="a picture of {}, a kind of thing")
    assert head.context.shape == (3, 32)
    torch.testing.assert_close(head.context, backbone.clip.token_embedding.weight[head_words("a picture of")])
    with torch.no_grad():
        head.context += torch.randn_like(head.context)
    lines = [f"X X X {name.replace('_', ' ')}, a kind of thing" for name in NAMES]
    expected = 10 * cosines(backbone, coop(backbone.clip, lines, head.context))
    torch.testing.assert_close(head(FEATURES), expected, rtol=0, atol=1e-4)


def head_words(words: str) -> Tensor:
    ids: Tensor = open_clip.get_tokenizer("ViT-B-32")([words])[0]
    return ids[1 : int(ids.argmax())]


@pytest.mark.parametrize(
    "options",
    [{"context": 4}, {"projections": True}, *({"tuner": {"kind": kind}} for kind in IN_TEXT if kind != "ssf")],
)
def test_every_text_side_starts_as_clips_own_classifier(backbone: Backbone, options: dict[str, Any]) -> None:
    expected = head_of(backbone)(FEATURES)
    torch.testing.assert_close(head_of(backbone, **options)(FEATURES), expected, rtol=0, atol=1e-3)


def test_a_context_of_another_length_than_the_words_starts_small_at_random(backbone: Backbone) -> None:
    context = head_of(backbone, context=20).context.detach()
    assert float(context.std()) == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(context[0], context[1])


@pytest.mark.parametrize("kind", IN_TEXT)
def test_a_step_changes_the_text_tuner_alone_and_the_shared_tower_never(backbone: Backbone, kind: str) -> None:
    frozen = {name: value.clone() for name, value in backbone.text_tower.state_dict().items()}
    head = head_of(backbone, tuner={"kind": kind})
    trained = {name: p for name, p in head.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    assert trained
    assert all(name.startswith((f"tuner.{kind}.0.", "tower.blocks.0.")) for name in trained)
    torch.optim.SGD(trained.values(), 0.1).zero_grad()
    logits = head(FEATURES)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 1, 0])).backward()
    torch.optim.SGD(trained.values(), 0.1).step()
    changed = {name for name, p in head.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= set(trained)
    assert not torch.equal(head(FEATURES), logits)
    assert all(torch.equal(value, frozen[name]) for name, value in backbone.text_tower.state_dict().items())


def test_both_projections_get_a_gradient_and_are_copies(backbone: Backbone) -> None:
    head = head_of(backbone, projections=True)
    assert {name for name, p in head.named_parameters() if p.requires_grad} == {"projection", "tower.projection"}
    head(FEATURES).square().sum().backward()
    assert head.projection.grad.any()
    assert head.tower.projection.grad.any()
    with torch.no_grad():
        head.projection.zero_()
        head.tower.projection.zero_()
    assert backbone.projection is not None
    assert backbone.projection.any()
    assert backbone.clip.text_projection.any()


@pytest.mark.parametrize("options", [{"tuner": {"kind": "lora", "mlp": True}}, {"projections": True}])
def test_frozen_text_blocks_are_computed_once(small_clip: str, options: dict[str, Any], tmp_path: Path) -> None:
    clip = clip_of(CLIP, vocab_size=49408, context_length=16, layers=3)
    backbone = load_backbone(small_clip)
    backbone.clip, backbone.projection = clip, torch.randn(64, 24)
    head = resolved(**options)
    if head.tuner is not None:
        head = head.model_copy(update={"tuner": head.tuner.model_copy(update={"blocks": [2]})})
    text = build(backbone, NAMES, head)
    assert isinstance(text, TextHead)
    asked: list[int] = []
    for number, block in enumerate(text.tower.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: asked.append(number))
    with torch.no_grad():
        for parameter in text.tuner.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    with torch.inference_mode():  # an evaluation may come first
        text(FEATURES)
    text(FEATURES).sum().backward()
    assert asked == ([0, 1, 2, 2] if head.tuner else [0, 1, 2])
    x = text.tower.blocks_until(text.tower.embed(text.ids), 3, 0, text.tuner.per_block)
    expected = F.normalize(text.tower.project(text.tower.pooled(x, text.at)), dim=-1)
    torch.testing.assert_close(text.text(), expected)


def test_several_texts_of_a_class_count_as_their_mean(backbone: Backbone) -> None:
    texts = {"cat": ["a small animal.", "it says meow"]}
    one, plain = head_of(backbone, projections=True, texts=texts), head_of(backbone, projections=True)
    ids = open_clip.get_tokenizer("ViT-B-32", context_length=32)(texts["cat"])
    parts = F.normalize(backbone.clip.encode_text(ids), dim=-1)
    torch.testing.assert_close(one.text()[0], F.normalize(parts[0] + parts[1], dim=-1))
    torch.testing.assert_close(one.text()[1:], plain.text()[1:])
    several = head_of(backbone, projections=True, template=["a {}.", "the {}."])
    expected = backbone.text_embeddings(NAMES, ["a {}.", "the {}."])
    torch.testing.assert_close(several.text(), expected)
    assert backbone.text_embeddings(NAMES, "a {}.", texts)[0].tolist() == pytest.approx(
        one.text()[0].tolist(), abs=1e-5
    )
    context = head_of(backbone, context=4, texts=texts)
    lines = ["X X X X a small animal.", "X X X X it says meow"]
    rows = F.normalize(coop(backbone.clip, lines, context.context), dim=-1)
    torch.testing.assert_close(context.text()[0], F.normalize(rows.sum(0), dim=-1))


def test_texts_of_classes_are_the_start_of_every_classifier(backbone: Backbone) -> None:
    plain = backbone.semantic_weights(NAMES, "a {}.")
    described = backbone.semantic_weights(NAMES, "a {}.", {"sea_horse": ["a fish that stands"]})
    assert torch.equal(described[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(described[1], plain[1], atol=1e-3)
    assert torch.equal(backbone.semantic_weights(NAMES, "a {}."), plain), "the cache tells them apart"


# ---- embeddings that are kept


def test_embeddings_are_computed_once_without_gradients_and_again_after_any_change(backbone: Backbone) -> None:
    head, asked = head_of(backbone, context=4), []
    hook = backbone.text_tower.blocks[0].register_forward_pre_hook(lambda *_: asked.append(1))
    with torch.inference_mode():
        first = head(FEATURES)
        assert torch.equal(head(FEATURES), first)
    assert len(asked) == 1
    head(FEATURES).sum().backward()
    assert len(asked) == 2, "a training step computes them itself"
    torch.optim.SGD([head.context], 0.5, fused=True).step()
    with torch.inference_mode():
        second = head(FEATURES)
        assert not torch.allclose(second, first)
        assert torch.equal(head(FEATURES), second)
    assert len(asked) == 3
    with torch.no_grad():
        head.state_dict()["context"].copy_(torch.zeros(4, 32))
        assert not torch.allclose(head(FEATURES), second)
        assert torch.equal(head.constant()(FEATURES), head(FEATURES))
    hook.remove()


# ---- a run


def settings(clip: str, **overrides: Any) -> RunConfig:
    tree = {
        "backbone": {"model": clip},
        "augment": {"kind": "none"},
        "tuner": {"kind": "linear_probe"},
        "head": {"kind": "text", "scale": 20.0},
        "optim": {"epochs": 3, "global_batch_size": 16, "lr": 0.05},
    }
    return run_config(tree, overrides)


WAYS: dict[str, dict[str, Any]] = {
    "nothing, with image tuner": {"tuner__kind": "lora"},
    "context": {"head__context": 4},
    "text tuner": {"head__tuner": {"kind": "adaptformer"}},
    "own weights": {"head__tuner": {"kind": "layernorm"}},
    "sparse": {"head__tuner": {"kind": "sparse"}},
    "projections": {"head__projections": True},
    "all, with image tuner": {
        "tuner__kind": "adaptformer",
        "head__context": 2,
        "head__tuner": {"kind": "lora"},
        "head__projections": True,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_learns_stores_what_it_trains_and_is_the_same_after_loading(
    way: str, workspace: Workspace, small_clip: str, tmp_path: Path
) -> None:
    run = Run(settings(small_clip, **WAYS[way]), workspace)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    figures = list(run.epochs())
    assert figures[-1]["train/loss"] < figures[0]["train/loss"]
    trained = set(run.model.trained())
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= trained
    kept = {"head.projection", "head.text"} if way.startswith("nothing") else set()
    assert set(run.model.stored()) == trained | kept
    run.save(tmp_path / "checkpoint")
    classifier = Classifier(tmp_path / "checkpoint", Ranks.alone())
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = workspace.forward(run.config, run.model)(images)
    torch.testing.assert_close(classifier.logits(images), expected)
    module = classifier.module
    assert isinstance(module.head, ZeroShotHead)
    assert not list(module.head.parameters())
    with torch.no_grad():
        assert float((module(images) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    resumed = Run(settings(small_clip, **WAYS[way]), workspace)
    resumed.evaluate("validation")  # its embeddings are kept before those of the checkpoint are loaded
    resumed.load(tmp_path / "checkpoint")
    assert resumed.evaluate("validation").metrics == pytest.approx(run.evaluate("validation").metrics)


def test_a_step_of_learned_context_runs_no_image_block(workspace: Workspace, small_clip: str) -> None:
    run = Run(settings(small_clip, head__context=4), workspace)
    list(run.epochs())
    again, asked = Run(settings(small_clip, head__context=4, seed=1), workspace), []
    for block in again.model.tower.blocks:
        block.register_forward_pre_hook(lambda *_: asked.append(1))
    list(again.epochs())
    assert asked == []


def test_parts_of_a_batch_and_computing_again_change_no_figure(workspace: Workspace, small_clip: str) -> None:
    def losses(**changes: Any) -> list[float]:
        run = Run(settings(small_clip, head__context=4, optim__epochs=2, **changes), workspace)
        return [figures["train/loss"] for figures in run.epochs()]

    plain = losses()
    assert losses(optim__accumulate=3) == pytest.approx(plain, abs=1e-4)
    assert losses(backbone__checkpointing=True) == pytest.approx(plain, abs=1e-4)


def train_as_rank(rank: int, port: int, data: str, config: dict[str, Any], out: str) -> None:
    torch.set_num_threads(1)
    join_group(rank, 2, "127.0.0.1", port, torch.device("cpu"))
    run = Run(RunConfig.model_validate(config), Workspace(data, Ranks(rank, 2, torch.device("cpu"))))
    losses = [figures["train/loss"] for figures in run.epochs()]
    torch.save((losses, run.model.stored()), Path(out, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_two_ranks_learn_the_text_side_that_one_does(
    workspace: Workspace, small_clip: str, as_two_ranks: Callable[..., None], tmp_path: Path
) -> None:
    config = settings(small_clip, head__context=2, head__tuner={"kind": "lora"}, head__projections=True)
    run = Run(config, workspace)
    losses = [figures["train/loss"] for figures in run.epochs()]
    as_two_ranks(train_as_rank, workspace.dataset.uri, config.to_dict(), str(tmp_path))
    (first, stored), (_, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == pytest.approx(losses, abs=1e-4)
    for name, value in run.model.stored().items():
        assert torch.equal(stored[name], others[name]), name
        torch.testing.assert_close(stored[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"head__context": 4}, {"head__projections": True}])
def test_a_compiled_text_side_gives_the_same_figures(
    workspace: Workspace, small_clip: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    changed = {**options, "augment__kind": "mda", "optim__epochs": 1, "optim__global_batch_size": 48}
    runs = [Run(settings(small_clip, backbone__compile=compiled, **changed), workspace) for compiled in (True, False)]
    compiled, plain = ([figures["train/loss"] for figures in run.epochs()] for run in runs)
    assert compiled == pytest.approx(plain, abs=1e-4)


def test_a_dry_run_counts_the_texts_of_a_step_once(workspace: Workspace, small_clip: str) -> None:
    run = Run(settings(small_clip, head__context=4), workspace)
    few, many = (memory(run.model, run.config, images)["activations"] for images in (16, 160))
    assert isinstance(run.model.head, TextHead), "it is put back"
    texts = run.model.head.ids.numel()
    assert few > texts * 32 * 4 * 8, "a block of width 32 saves at least eight values of each token"
    assert many - few < few / 4


# ---- settings


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"head": {"kind": "text"}, "backbone": {"model": "timm:vit_base_patch16_224"}},
            "head: kind text requires a text tower, but got backbone.model timm:vit_base_patch16_224; "
            "use cosine with init class_mean",
        ),
        ({"head": {"kind": "text", "init": "random"}}, "head.init: unknown value 'random'; known: semantic"),
        (
            {"head": {"kind": "text", "context": 4, "template": "ensemble"}},
            "head.context: requires a single template, but got 4 with several; set head.template to one text",
        ),
        (
            {"head": {"kind": "text", "tuner": {"kind": "vpt_deep"}}},
            "head.tuner: must have places in the blocks of a text tower, but got vpt_deep; "
            "use head.context for learned tokens of texts",
        ),
        (
            {"head": {"kind": "text", "tuner": {"kind": "batchnorm"}}},
            "head.tuner: must have places in the blocks of a text tower, but got batchnorm; "
            "use layernorm, as it has layer norms",
        ),
        (
            {"head": {"kind": "text", "tuner": {"kind": "zero_shot"}}},
            "head.tuner: must train the text tower, but got zero_shot, which trains nothing in it; use null",
        ),
        (
            {"head": {"kind": "text"}, "method": {"kind": "ulfine"}, "tuner": {"kind": "lora"}},
            "method: ulfine needs a head as its prototypes are, but got head.kind text; use cosine",
        ),
        ({"head": {"texts": {"cat": []}}}, "head.texts.cat: must have at least 1 item, but got []; change it"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        RunConfig.parse(tree)
    assert str(caught.value) == message


def test_what_the_backbone_or_the_data_do_not_allow_is_refused_in_one_line(
    workspace: Workspace, small_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = workspace.dataset.class_names[0]
    for changes, message in (
        ({"head__context": 29}, "head.context: must be at most 28, because the text tower of"),
        ({"head__texts": {f"{name}x": ["a"]}}, f"head.texts: unknown class '{name}x'; did you mean '{name}'?"),
        (
            {"head__tuner": {"kind": "lora", "blocks": [1]}},
            "head.tuner.blocks: must lie in 0 ... 0, but got [1]; name at least one",
        ),
    ):
        with pytest.raises(BadInput) as caught:
            Run(settings(small_clip, **changes), workspace)
        assert str(caught.value).startswith(message)
    backbone = load_backbone(small_clip)
    monkeypatch.setattr(Lora, "tokens", lambda self, x, number: (x, number))  # as that of a tuner from outside may be
    with pytest.raises(BadInput, match=r"^head.tuner: must not add tokens to texts, but got lora; use head.context$"):
        head_of(backbone, tuner={"kind": "lora"})
    backbone = load_backbone(small_clip)
    backbone.clip = clip_of(CustomTextCLIP, embed_cls=True)
    with pytest.raises(BadInput, match=r"head text: requires one of open_clip's own text towers .* of another make"):
        head_of(backbone, context=4)
    assert isinstance(head_of(backbone), ZeroShotHead), "frozen text embeddings need no place in the tower"


SPACE = """name: text
dataset: embedded:caltech101-lt
base:
  tuner: {kind: linear_probe}
  head: {kind: text, tuner: {kind: lora}}
space:
  head.context: {int: [0, 8]}
  head.tuner.bottleneck: {choices: [1, 2, 4]}
  head.tuner.blocks.last: {int: [1, 2]}
"""


def test_a_search_can_vary_the_text_side(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    space = read_space(tmp_path / "space.yaml")
    head = space.config({"head.context": 4, "head.tuner.bottleneck": 2, "head.tuner.blocks.last": 1}).head
    assert isinstance(head, TextHeadConfig)
    assert head.tuner is not None
    assert (head.context, head.tuner.kind) == (4, "lora")
    for changed, message in (
        (SPACE.replace("kind: lora", "kind: bitfit"), "has no effect with head.tuner.kind bitfit; remove it"),
        (SPACE.replace("{kind: text, tuner: {kind: lora}}", "{}"), "has no effect with head.kind cosine; remove it"),
        (SPACE.replace("kind: lora", "kind: lora, bottleneck: 3"), "has no effect, because the space searches it"),
    ):
        (tmp_path / "space.yaml").write_text(changed)
        with pytest.raises(BadInput) as caught:
            read_space(tmp_path / "space.yaml")
        assert message in str(caught.value)


def test_a_run_without_texts_has_the_tree_of_versions_before_them() -> None:
    assert "texts" not in RunConfig().to_dict()["head"]
    described = RunConfig.model_validate({"head": {"texts": {"cat": ["a"]}}})
    assert described.to_dict()["head"]["texts"] == {"cat": ["a"]}
    assert described.digest() != RunConfig().digest()
