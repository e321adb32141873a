"""The report in a real browser: no error in the console, no request, nothing wider than a phone."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from browser import dom_in_browser, seen_in_browser
from made_study import make_trials, with_folds, write_study

from lift_ray import report


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_a_browser_shows_the_page_without_an_error(width: int, tmp_path: Path) -> None:
    folder = with_folds(write_study(tmp_path / "out", make_trials(24)))
    assert not report.main([str(folder)])
    seen = seen_in_browser(folder / "report" / "index.html", width, tmp_path)
    assert seen.pop("legend") < 50, "a legend has more than two lines"
    assert seen.pop("contents") == (width > 700), "on a phone, the contents must start closed"
    assert seen == {"width": seen["width"], "plots": 16, "unnamed": 0, "drawn": 16, "requests": []}
    assert seen["width"] <= width


def test_the_classes_are_sorted_by_a_click_and_uncertain_ones_come_last(tmp_path: Path) -> None:
    folder = with_folds(write_study(tmp_path / "out", make_trials(3)))
    assert not report.main([str(folder)])
    page = folder / "report" / "index.html"
    click = """<script>
    const shown = () => [...document.querySelectorAll(".sortable tbody tr")].map((tr) => [...tr.cells].map((td) => td.innerText));
    const heading = (i) => document.querySelectorAll(".sortable th button")[i].click();
    const found = [shown().length];
    document.querySelector(".all").click();
    for (const i of [0, 2, 3, 3]) { heading(i); found.push(shown()); }
    document.body.append(Object.assign(document.createElement("pre"), { id: "found", textContent: JSON.stringify(found) }));
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", click))
    dom = dom_in_browser(page.as_uri(), tmp_path)
    seen = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert seen, "the table of classes was not drawn"
    first, by_name, by_images, ascending, descending = json.loads(html.unescape(seen[1]))
    assert first == 20
    names = [row[0] for row in by_name]
    assert len(names) == 100
    assert names == sorted(names)
    images = [int(row[2]) for row in by_images]
    assert images == sorted(images, reverse=True)
    for rows, is_descending in ((ascending, False), (descending, True)):
        certain = [float(row[3].split()[0]) for row in rows if "uncertain" not in row[3]]
        assert 0 < len(certain) < 100
        assert certain == sorted(certain, reverse=is_descending)
        assert all("uncertain" in row[3] for row in rows[len(certain) :])
