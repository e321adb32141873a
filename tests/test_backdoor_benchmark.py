"""The models that benchmarks/backdoor.py combines, and what it concludes."""

from __future__ import annotations

from typing import Any

import backdoor
import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def models(noise: dict[str, float]) -> tuple[Any, dict[str, Any]]:
    labels = torch.arange(4).repeat(100)
    random = torch.Generator().manual_seed(0)

    def logits(size: float) -> dict[str, torch.Tensor]:
        return {"test": torch.eye(4)[labels] + size * torch.randn(400, 4, generator=random)}

    made = {(name, "LA", seed): logits(noise[name]) for name in noise for seed in range(6)}
    return made, {
        "num_classes": 4,
        "d_groups": np.array(["many", "many", "medium", "few"]),
        "labels": labels,
        "p_groups": np.array(["many", "few", "medium", "few"]),
    }


def test_every_pair_all_and_the_control_are_combined_of_seeds_that_groups_do_not_share() -> None:
    made, data = models({"a": 1.0, "b": 1.0, "c": 1.0})
    labels = [
        "a, LA",
        "b, LA",
        "c, LA",
        "a + b, LA",
        "a + c, LA",
        "b + c, LA",
        "a + b + c, LA",
        "a x 3, LA",
        "b x 3, LA",
        "c x 3, LA",
    ]
    assert list(backdoor.combinations(made, 0)) == labels
    second = backdoor.combinations(made, 1)
    assert second["a + b, LA"] == [made["a", "LA", 3], made["b", "LA", 3]]
    assert second["c x 3, LA"] == [made["c", "LA", seed] for seed in (3, 4, 5)]
    found = {one["models"]: one for one in backdoor.summarise(made, 2, data)}
    assert found["a + b + c, LA"]["logits"]["gain_all"]["mean"] > 0.05
    assert found["a, LA"]["logits"]["gain_all"]["mean"] == 0
    assert found["a, LA"]["groups"] == 2
    cells = found["a + b + c, LA"]["crossed"]
    assert {p for row in cells.values() for p in row} == {"many", "medium", "few", "all"}
    assert cells["all"]["all"]["classes"] == 4
    assert "crossed" not in found["a, LA"]


@pytest.mark.parametrize("worse", [1.0, 0.4])
def test_three_seeds_beat_a_pair_with_an_equal_or_worse_model(worse: float) -> None:
    made, data = models({"a": 1.0, "b": worse})
    found = backdoor.summarise(made, 2, data)
    assert backdoor.verdict(found).startswith("Several backbones fall behind seeds of one and ")
    assert "a + b, LA has " in backdoor.verdict(found)
