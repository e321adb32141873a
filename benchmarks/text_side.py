"""What the text side brings beside the image side, on the embedded long-tailed Caltech-101 with lift-small.

The base is LIFT+: AdaptFormer in the last two blocks and a cosine classifier that starts from the class means. Each other variant
changes what is named: CLIP-Adapter behind the frozen tower, a classifier by text embeddings alone or with learned context (CoOp), with
tuned text blocks or tuned projections, each with the image tower frozen or with AdaptFormer in it. All are on cached features of the
images, without augmentation. Each has its best of three learning rates by validation mean class accuracy on the first seed; the
others seeds are trained with that. Differences are paired by seed. lift-small's text tower is small, and recognizes few names.

    python benchmarks/text_side.py --out /tmp/text-side --record
"""

from __future__ import annotations

from optimization import Settings, Variants, compare

BASE: Settings = {"augment.kind": "none", "optim.schedule": "cosine_by_epoch"}
MEANS: Settings = {"head.kind": "cosine", "head.init": "class_mean"}
FROZEN: Settings = {"tuner.kind": "linear_probe"}
BLOCKS: Settings = {"tuner.kind": "adaptformer", "tuner.blocks.last": 2, "tuner.bottleneck": 16}
BEHIND: Settings = {"tuner.kind": "clip_adapter"}
TEXT: Settings = {"head.kind": "text", "head.scale": 25.0}
CONTEXT: Settings = {"head.context": 4}
TEXT_LORA: Settings = {"head.tuner.kind": "lora", "head.tuner.bottleneck": 8}
PROJECTIONS: Settings = {"head.projections": True}
SGD, LARGE = [0.01, 0.03, 0.1], [0.1, 0.3, 1.0]

VARIANTS: Variants = {
    "LIFT+": (MEANS | BLOCKS, SGD),
    "linear probe": (MEANS | FROZEN, SGD),
    "CLIP-Adapter": (MEANS | BEHIND, SGD),
    "LIFT+ and CLIP-Adapter": (MEANS | BLOCKS | {"extra_tuner.kind": "clip_adapter"}, SGD),
    "CoOp": (TEXT | FROZEN | CONTEXT, LARGE),
    "CoOp and CLIP-Adapter": (TEXT | BEHIND | CONTEXT, LARGE),
    "text LoRA": (TEXT | FROZEN | TEXT_LORA, LARGE),
    "projections": (TEXT | FROZEN | PROJECTIONS, LARGE),
    "AdaptFormer, text classifier": (TEXT | BLOCKS, SGD),
    "AdaptFormer, CoOp": (TEXT | BLOCKS | CONTEXT, SGD),
    "AdaptFormer, text LoRA": (TEXT | BLOCKS | TEXT_LORA, SGD),
    "AdaptFormer, text LoRA, projections": (TEXT | BLOCKS | TEXT_LORA | PROJECTIONS, SGD),
}

if __name__ == "__main__":
    compare("text_side", __doc__, BASE, VARIANTS)
