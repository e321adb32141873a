"""What benchmarks/scaling.py makes of measured steps. Nothing is trained."""

from __future__ import annotations

from typing import Any

import pytest
import scaling


def figures(step_s: float, num_bytes: float) -> dict[str, Any]:
    return {"step_s": step_s, "processor_s": step_s, "bytes": num_bytes, "trained": 1000, "data_wait_frac": 0.0}


def test_speed_up_is_taken_within_a_round_and_bytes_against_the_trained_parameters() -> None:
    rounds = [{1: figures(1.0, 0), 2: figures(0.5, 4008)}, {1: figures(2.0, 0), 2: figures(1.25, 4008)}]
    two = scaling.summary(rounds, 100)[2]
    assert (two["speedup_least"], two["speedup"], two["speedup_most"]) == pytest.approx((1.6, 1.8, 2.0))
    assert two["efficiency"] == pytest.approx(0.9)
    assert two["images_per_s"] == pytest.approx((200 + 80) / 2)
    assert two["bytes_times_trained"] == pytest.approx(1.002)


def test_the_model_is_a_ring_of_gpus() -> None:
    found = scaling.model(step_s=0.1, num_bytes=1.25e6, gbit_s=10.0, latency_s=1e-5)
    assert found[8]["communication_s"] == pytest.approx(2 * 7 / 8 * 1e-3 + 14e-5)
    assert found[8]["weak"] == pytest.approx(0.1 / (0.1 + 1.89e-3))
    assert found[8]["strong"] == pytest.approx(0.1 / (0.1 + 8 * 1.89e-3))
    assert found[64]["weak"] < found[8]["weak"]
