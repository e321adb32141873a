"""How many augmented views of each training image are worth keeping, for tuners of the last blocks on cached features.

AdaptFormer in the last two blocks of lift-small on the embedded long-tailed Caltech-101, as the quickstart trains it, but for 8 epochs.
`none` trains on the evaluation crops, `mda_V` on V views of each image, used one after another, and `mda` draws anew in every epoch, so
that nothing can be cached. Each has three learning rates on the first seed; the best on validation is then trained with the other
seeds. Differences are paired by seed. The features of V views take V times the memory of those of the evaluation crops.

    python benchmarks/views.py --epochs 8 --out /tmp/views --record
"""

from __future__ import annotations

from optimization import BASE, SGD, Variants, compare

VIEWS = (1, 2, 4, 8)
VARIANTS: Variants = {
    "none": ({}, SGD),
    **{f"mda_{views}": ({"augment.kind": "mda", "augment.views": views}, SGD) for views in VIEWS},
    "mda": ({"augment.kind": "mda"}, SGD),
}

if __name__ == "__main__":
    compare("views", __doc__, {**BASE, "backbone.cache_gib": 16.0}, VARIANTS)
