"""What is counted on the device, against counting image by image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lift_ray.evaluation.accumulator import MetricAccumulator
from lift_ray.evaluation.metrics import NUM_BINS, ClassGroups

torch.set_num_threads(1)  # small tensors, and other processes of the tests beside them
CPU = torch.device("cpu")
FEW = np.full(2, "few")


def tally(num_classes: int, *batches: tuple[torch.Tensor, torch.Tensor]) -> MetricAccumulator:
    out = MetricAccumulator(num_classes, CPU)
    for logits, labels in batches:
        out.add(logits, labels)
    return out


def of_confidence(confidence: float, num_classes: int = 2) -> torch.Tensor:
    """Logits (1, K) that give class 0 this probability."""
    rest = (1 - confidence) / (num_classes - 1)
    return torch.tensor([[math.log(confidence)] + [math.log(rest)] * (num_classes - 1)])


DRAWS = st.tuples(st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**20), st.floats(0.1, 8))


def drawn(draw: tuple[int, int, int, float]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    num_classes, images, seed, spread = draw
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (images,), generator=random)
    logits = spread * torch.randn(images, num_classes, generator=random)
    logits[torch.arange(images), labels] += 1
    return logits, labels, ClassGroups.of(torch.randint(1, 200, (num_classes,), generator=random)).names


@given(draw=DRAWS)
def test_the_accumulator_equals_counting_image_by_image(draw: tuple[int, int, int, float]) -> None:
    logits, labels, groups = drawn(draw)
    num_classes, images = draw[0], draw[1]
    found, classes = tally(num_classes, (logits, labels)).result(groups)
    correct, total, predicted = [0] * num_classes, [0] * num_classes, [0] * num_classes
    bins: dict[int, list[tuple[float, bool]]] = {}
    losses = [0.0] * num_classes
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        weights = [math.exp(value - max(row)) for value in row]
        best = row.index(max(row))
        confidence = weights[best] / sum(weights)
        edge = round(confidence * 15)
        assume(edge == 15 or abs(confidence * 15 - edge) > 1e-4)  # rounding decides there
        total[label] += 1
        predicted[best] += 1
        correct[label] += best == label
        losses[label] -= math.log(weights[label] / sum(weights))
        bins.setdefault(math.ceil(confidence * 15), []).append((confidence, best == label))
    assert [column.tolist() for column in classes] == [correct, total, predicted]
    assert found["accuracy"] == pytest.approx(sum(correct) / images)
    assert found["loss"] == pytest.approx(sum(losses) / images, rel=1e-4, abs=1e-5)
    of_classes = [loss / count for loss, count in zip(losses, total, strict=True) if count]
    assert found["balanced_log_loss"] == pytest.approx(sum(of_classes) / len(of_classes), rel=1e-4, abs=1e-5)
    gaps = [abs(sum(c for c, _ in bin) - sum(hit for _, hit in bin)) for bin in bins.values()]
    assert found["calibration_error"] == pytest.approx(sum(gaps) / images, abs=1e-5)
    assert all(0 <= value <= 1 + 1e-12 for name, value in found.items() if "loss" not in name)


@given(draw=DRAWS, cut=st.integers(0, 40))
def test_ranks_that_sum_their_tensors_in_place_get_what_one_rank_gets(
    draw: tuple[int, int, int, float], cut: int
) -> None:
    logits, labels, groups = drawn(draw)
    whole, whole_classes = tally(draw[0], (logits, labels)).result(groups)
    here, there = tally(draw[0], (logits[:cut], labels[:cut])), tally(draw[0], (logits[cut:], labels[cut:]))
    for mine, theirs in zip(here.tensors(), there.tensors(), strict=True):
        mine += theirs
    found, classes = here.result(groups)
    assert found == pytest.approx(whole, abs=1e-6)
    assert all((one == other).all() for one, other in zip(classes, whole_classes, strict=True))


def test_batches_add_up() -> None:
    logits, labels, groups = drawn((4, 30, 5, 2.0))
    parts = tally(4, *((logits[i : i + 7], labels[i : i + 7]) for i in range(0, 30, 7)))
    assert parts.result(groups)[0] == pytest.approx(tally(4, (logits, labels)).result(groups)[0])


def test_what_is_summed_over_ranks_is_counted_exactly() -> None:
    counts, bins, losses = tally(3, (torch.zeros(2, 3), torch.tensor([0, 1]))).tensors()
    assert (counts.shape, counts.dtype) == ((3, 3), torch.int64)
    assert (bins.shape, bins.dtype) == ((3, NUM_BINS), torch.float64)
    assert (losses.shape, losses.dtype) == ((3,), torch.float64)
    assert losses.tolist() == pytest.approx([math.log(3), math.log(3), 0])


@pytest.mark.parametrize(
    ("confidence", "place"),
    [
        (0.34, 5),
        (0.5, 7),
        (0.599, 8),
        (0.601, 9),
        (0.93, 13),
        (0.94, 14),
        (1 - 1e-7, 14),
    ],
)
def test_confidence_goes_to_one_of_15_equal_bins(confidence: float, place: int) -> None:
    _, bins, _ = tally(4, (of_confidence(confidence, 4), torch.tensor([0]))).tensors()
    assert bins[0].nonzero().flatten().tolist() == [place]
    assert bins[:, place].tolist() == pytest.approx([1.0, confidence, 1.0])


def test_full_and_uniform_confidence_have_a_bin() -> None:
    certain = torch.tensor([[1e4, 0.0]])
    uniform = torch.zeros(1, 40)
    assert int(tally(2, (certain, torch.tensor([1]))).tensors()[1][0, 14]) == 1
    assert int(tally(40, (uniform, torch.tensor([1]))).tensors()[1][0, 0]) == 1


def test_predictions_as_sure_as_they_are_right_have_no_calibration_error() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    logits = of_confidence(0.75).expand(4, 2)
    assert tally(2, (logits, labels)).result(FEW)[0]["calibration_error"] == pytest.approx(0, abs=1e-6)
    wrong, _ = tally(2, (logits, 1 - labels)).result(FEW)
    assert wrong["calibration_error"] == pytest.approx(0.5, abs=1e-6)


def test_half_precision_logits_are_counted_in_float() -> None:
    logits = of_confidence(0.7, 3).bfloat16()
    figures = tally(3, (logits, torch.tensor([0]))).tensors(), tally(3, (logits.float(), torch.tensor([0]))).tensors()
    assert all(torch.equal(half, full) for half, full in zip(*figures, strict=True))


def test_logits_that_are_not_finite_show_in_the_loss_and_break_nothing() -> None:
    logits = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    found, classes = tally(2, (logits, torch.tensor([1, 0]))).result(FEW)
    assert math.isnan(found["loss"])
    assert classes.total.tolist() == [1, 1]


def test_adding_a_batch_never_reads_a_value_on_the_host() -> None:
    """Tensors of the meta device hold no values: reading one, or a shape that depends on values, raises."""
    meta = torch.device("meta")
    counting = MetricAccumulator(5, meta)
    counting.add(torch.zeros(8, 5, device=meta), torch.zeros(8, dtype=torch.int64, device=meta))
    with pytest.raises((RuntimeError, NotImplementedError)):
        counting.result(np.full(5, "few"))


def test_an_accumulator_made_before_inference_mode_can_be_summed_after_it() -> None:
    counting = MetricAccumulator(2, CPU)
    with torch.inference_mode():
        counting.add(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    for tensor in counting.tensors():
        tensor *= 2
    assert counting.result(FEW)[1].total.tolist() == [2, 4]
