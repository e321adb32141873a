"""Live page of a running search: its contents, and the files that it serves to whom."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_monitoring import get

from lift_ray.errors import BadInput
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.searching.live_page import live_page, served
from lift_ray.settings.checks import read_space
from lift_ray.settings.space import SpaceFile

SPACE = """\
name: watched
dataset: embedded:caltech101-lt
space:
  optim.lr: {float: [1.0e-3, 3.0e-1], log: true}
search: {trials: 300, scheduler: {kind: none}}
"""


@pytest.fixture
def space(tmp_path: Path) -> SpaceFile:
    (tmp_path / "space.yaml").write_text(SPACE)
    return read_space(tmp_path / "space.yaml")


def test_the_page_gives_out_its_report_and_nothing_else_and_only_under_its_own_name(
    space: SpaceFile, tmp_path: Path
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with served(space, {}, tmp_path, 0) as address:
        assert address is not None
        assert "The report appears after the first trials." in get(address)[1]
        (tmp_path / "report").mkdir()
        (tmp_path / "report" / "index.html").write_text("the figures")
        assert 'href="/report/"' in get(address)[1]
        assert get(f"{address}/report/") == (200, "the figures")
        for path in (
            "/secret.txt",
            "/report/../secret.txt",
            "/report/%2e%2e/secret.txt",
            "/report/..",
            "/report//etc/passwd",
        ):
            assert get(address + path)[0] == 404, path
        assert get(address, Host="localhost:9000")[0] == 200  # by way of a tunnel
        assert get(address, Host="example.org")[0] == 403
        with (
            pytest.raises(BadInput, match=r"^--live-port: must be a free port, but got \d+ \(Address already in use\)"),
            served(space, {}, tmp_path, int(address.rsplit(":", 1)[1])),
        ):
            pass
    with served(space, {}, tmp_path, None) as none:
        assert none is None


def test_the_page_shows_settings_and_errors_as_text(space: SpaceFile, tmp_path: Path) -> None:
    rows = {
        number: TrialRow(number, {"tuner.kind": "<b>", "optim.lr": 0.1}, 3, state="failed", error="a < b")
        for number in range(205)
    }
    page = live_page(space, rows, tmp_path, 12.0)
    assert "&lt;b&gt;, lr 0.1 a &lt; b" in page
    assert "<b>" not in page
    assert page.count('<tr class="failed">') == 200
    assert "and 5 more" in page
