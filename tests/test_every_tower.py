"""Every architecture of open_clip, and some of timm: accepted, and equal to its origin on random weights."""

from __future__ import annotations

import every_tower
import open_clip
import pytest
import torch
from every_tower import PAGE, TIMM, TUNERS, Compared, of_open_clip, of_timm

pytestmark = pytest.mark.slow
torch.set_num_threads(1)


def assert_equal_and_documented(tower: Compared) -> None:
    assert tower.difference is None or tower.difference <= 1e-5
    lines = [
        line
        for line in PAGE.read_text().splitlines()
        if f"`{tower.name}`" in line and line.startswith(f"| {tower.kind} |")
    ]
    assert [line.split(" | ")[1] for line in lines] == [TUNERS[tower.family]]


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_architecture_of_open_clip_is_accepted_and_equal_to_its_origin(name: str) -> None:
    assert_equal_and_documented(of_open_clip(name))


@pytest.mark.parametrize("name", TIMM)
def test_an_architecture_of_timm_is_equal_to_its_origin(name: str) -> None:
    assert_equal_and_documented(of_timm(name))


def test_the_page_counts_what_has_places() -> None:
    clips = [of_open_clip(name) for name in ("ViT-B-16", "ViTamin-S", "MobileCLIP2-S0")]
    assert "architectures of open_clip, 3 are accepted, and 2 of them have places" in every_tower.page(clips)
