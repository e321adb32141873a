"""One retry loop for all storage: growing random pauses, bounded patience, and the last error."""

import itertools

import pytest

from lift_ray.storage import retry as module
from lift_ray.storage.retry import LONGEST_PAUSE_S, retry


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, on a clock that only they move."""
    made: list[float] = []
    monkeypatch.setattr(module.time, "monotonic", lambda: sum(made))
    monkeypatch.setattr(module.time, "sleep", made.append)
    return made


def test_pauses_grow_up_to_the_longest_until_the_call_succeeds(pauses: list[float]) -> None:
    calls = itertools.count()

    def work(left_s: float) -> int:
        if (number := next(calls)) < 9:
            raise OSError("busy")
        return number

    assert retry(work, lambda error: True, 1000.0) == 9
    longest = [min(LONGEST_PAUSE_S, 0.2 * 2**number) for number in range(9)]
    assert all(0.5 * most <= pause <= most for pause, most in zip(pauses, longest, strict=True))


def test_the_last_error_is_raised_when_the_patience_is_over(pauses: list[float]) -> None:
    left: list[float] = []

    def work(left_s: float) -> None:
        left.append(left_s)
        raise OSError(f"failure {len(left)}")

    with pytest.raises(OSError, match=r"^failure \d$") as caught:
        retry(work, lambda error: True, 5.0)
    assert str(caught.value) == f"failure {len(left)}"
    assert sum(pauses) <= 5.0
    assert left == [max(1.0, 5.0 - sum(pauses[:number])) for number in range(len(left))]


@pytest.mark.parametrize(("patience_s", "may_pass"), [(0.0, True), (60.0, False)])
def test_without_patience_or_hope_there_is_one_call(pauses: list[float], patience_s: float, may_pass: bool) -> None:
    calls: list[float] = []

    def work(left_s: float) -> None:
        calls.append(left_s)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        retry(work, lambda error: may_pass, patience_s)
    assert (len(calls), pauses) == (1, [])
