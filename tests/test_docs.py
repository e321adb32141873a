"""The documentation site: it builds, its links lead somewhere, it loads nothing from other hosts, and nothing is missing in it."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import duckdb
import nbformat
import pyarrow.parquet as pq
import pytest
import typer
from browser import CHROME
from made_study import make_trials, with_folds, write_study
from notebook import NOTEBOOK, executed, shown

import lift_ray
from lift_ray import cli
from lift_ray.epoch_metrics import METRICS, TRAINED_PARAMETERS
from lift_ray.registry import HEADS, LOSSES, METHODS, SAMPLERS, TUNERS
from lift_ray.settings.checks import known_paths, read_space
from lift_ray.settings.run_file import RunFile
from lift_ray.settings.space import SpaceFile
from lift_ray.storage import layout

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """What a page says: its text, what it links to and loads, and the places in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.paragraphs: list[str] = []  # below the title; code in one starts with `
        self.text = ""
        self._in_article = self._in_paragraph = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if address := given.get("id"):
            self.ids.add(address)
        if tag == "a" and (target := given.get("href")) is not None:
            self.links.append(target)
        if tag in LOADED and (source := given.get(LOADED[tag])):
            self.loaded.append(source)
        self._in_article = self._in_article or tag == "h1"
        if tag == "p" and self._in_article:
            self._in_paragraph = True
            self.paragraphs.append("")
        if tag == "code" and self._in_paragraph:
            self.paragraphs[-1] += "`"

    def handle_endtag(self, tag: str) -> None:
        self._in_paragraph = self._in_paragraph and tag != "p"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_paragraph:
            self.paragraphs[-1] += data


def pages(site: Path) -> Iterator[tuple[Path, Page]]:
    """Every page of the site but that for a missing one, which only a server shows."""
    return ((path, Page(path)) for path in sorted(site.rglob("*.html")) if path.name != "404.html")


def test_every_file_of_the_documentation_is_a_page(site: Path) -> None:
    written = {path.relative_to(DOCS).with_suffix(".html") for path in (*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb"))}
    generated = {Path("reference/settings.html"), Path("reference/cli.html")}
    assert {path.relative_to(site) for path, _ in pages(site)} == written | generated


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[nowhere](nowhere.md)", "'nowhere.md'"),
        ("[nowhere](concepts/tau.md#nowhere)", "does not contain an anchor '#nowhere'"),
    ],
)
def test_a_link_that_leads_nowhere_fails_the_build(text: str, message: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    with (tmp_path / "docs" / "tried.md").open("a") as file:
        file.write(f"\n{text}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert message in done.stderr


def test_links_inside_the_site_lead_to_a_place_that_exists(site: Path) -> None:
    places = {path: page.ids for path, page in pages(site)}
    broken = []
    for path, page in pages(site):
        for link in page.links:
            target, place = urldefrag(link)
            if urlsplit(target).scheme:
                continue
            found = (path.parent / unquote(target)).resolve() if target else path
            if not found.exists() or (place and found in places and unquote(place) not in places[found] - {""}):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    loaded = {source for _, page in pages(site) for source in page.loaded}
    assert loaded
    assert [source for source in loaded if urlsplit(source).scheme not in ("", "data") or source.startswith("//")] == []
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_every_page_says_first_whom_it_is_for(site: Path) -> None:
    assert [str(path) for path, page in pages(site) if not page.paragraphs[0].startswith("For people ")] == []


def test_pages_opened_as_files_fit_a_phone_and_find_words_without_a_network(site: Path) -> None:
    if CHROME is None and not os.environ.get("CI"):
        pytest.skip("needs Chromium or Chrome")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(
            executable_path=CHROME, args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND"]
        )
        page = browser.new_page(viewport={"width": 390, "height": 844})
        requests: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        for path, _ in pages(site):
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == 390, path
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto((site / "index.html").as_uri())
        page.keyboard.press("f")
        page.keyboard.type("bottleneck")
        page.wait_for_selector(".md-search-result__item")
        found = page.locator(".md-search-result__link").evaluate_all("links => links.map(link => link.href)")
        browser.close()
    assert any("/reference/settings.html" in link for link in found), found
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert problems == []


def test_no_command_has_become_prose(site: Path) -> None:
    words = ("python -m", "lift-ray ", "ray ", "pip install", "import ")
    assert [text for _, page in pages(site) for text in page.paragraphs if text.startswith(words)] == []


# ---- nothing is missing


def settings(schema: dict[str, Any], section: dict[str, Any], before: str = "") -> Iterator[str]:
    """The dotted name of every setting of a section and those below it, kinds included."""
    for part in (*section.get("anyOf", ()), *section.get("oneOf", ())):
        yield from settings(schema, part, before)
    if "$ref" in section:
        yield from settings(schema, schema["$defs"][section["$ref"].rpartition("/")[2]], before)
    for name, below in section.get("properties", {}).items():
        yield f"{before}{name}"
        yield from settings(schema, below, f"{before}{name}.")


def test_the_settings_page_has_every_setting_and_every_kind(site: Path) -> None:
    page = Page(site / "reference" / "settings.html")
    run, space = RunFile.model_json_schema(), SpaceFile.model_json_schema(by_alias=True)
    names = {*known_paths(), *settings(run, run), *settings(space, space)}
    assert {"tuner.bottleneck", "search.scheduler.min_trials", "scale.refit_workers", "train_on"} <= names
    said = ("extra_tuner", "head.tuner.")  # in words: they take the settings of tuner
    apart = {name for name in names if name.startswith(said) or name.endswith(".blocks.last")}
    sections = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    missing = [name for name in names - apart if not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", page.text)]
    assert [name for name in missing if name not in sections] == []
    for section, kinds in (("tuner", TUNERS), ("head", HEADS), ("loss", LOSSES), ("method", METHODS)):
        assert {f"{section}-{kind}" for kind in kinds} <= page.ids
    assert "z_k = <f, w_k / |w_k|>" in page.text  # and not taken for HTML
    assert all(sampler in page.text for sampler in SAMPLERS)


def test_every_setting_has_a_value_and_a_meaning(site: Path) -> None:
    text = (site / "reference" / "settings.html").read_text()
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>", text)
    assert len(rows) > 100
    assert [name for name, value, _, meaning in rows if not value or value == "any" or not meaning] == []
    shown = {re.sub("<.*?>", "", name): tuple(re.sub("<.*?>", "", cell) for cell in cells) for name, *cells in rows}
    assert shown["optim.lr"][:2] == ("number, over 0", "0.02")
    assert shown["search.trials"][:2] == ("integer, at least 1", "32")
    assert shown["tuner.blocks"][0] == "list of integers or {last: K}"
    assert shown["backbone.precision"][:2] == ("fp32, bf16, fp16", "fp32")


def test_the_page_of_the_command_line_has_every_verb_and_option(site: Path) -> None:
    page = Page(site / "reference" / "cli.html")
    for verb in cli.VERBS:
        importlib.import_module(f"lift_ray.{verb}")
    group: Any = typer.main.get_group(cli.app)
    commands = {verb: group.commands[verb] for verb in cli.VERBS}
    commands |= {
        f"{verb}-{name}": below
        for verb, command in commands.items()
        for name, below in getattr(command, "commands", {}).items()
    }
    assert commands.keys() <= page.ids
    shown = [each for command in commands.values() for each in command.params if not getattr(each, "hidden", False)]
    options = {name for each in shown for name in each.opts}
    assert {"--dry-run", "--resume", "--short-side"} <= options
    assert [name for name in options if name.startswith("--") and name != "--help" and name not in page.text] == []
    assert "SRC/<train|val|test>/<class>/..." in page.text  # and not taken for HTML
    examples = [
        line.strip().replace("python -m lift_ray.", "lift-ray ", 1)
        for command in commands.values()
        for line in (command.help or "").partition("Examples:\n")[2].splitlines()
    ]
    assert examples
    assert [line for line in examples if line not in page.text] == []


def test_the_page_of_the_api_has_every_public_name(site: Path) -> None:
    page = Page(site / "reference" / "api.html")
    assert [
        name for name in lift_ray.__all__ if name != "__version__" and not re.search(rf"\b{name}\b", page.text)
    ] == []
    for name in ("open_dataset", "search", "fit", "Classifier", "SearchSpace", "FinishedStudy", "add_tuner"):
        assert any(place.endswith(f".{name}") for place in page.ids), name


def test_the_pages_of_files_and_metrics_name_all_of_them() -> None:
    files, metrics = ((DOCS / "reference" / name).read_text() for name in ("files.md", "metrics.md"))
    names = [value for name, value in vars(layout).items() if name.isupper()]
    assert "study.json" in names
    assert [name for name in names if name not in files] == []
    assert [name for name in (*METRICS, TRAINED_PARAMETERS) if f"`{name}`" not in metrics] == []


# ---- what is shown runs


def test_the_code_about_own_metrics_and_trials_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_folds(write_study(tmp_path / "out", make_trials(9)))
    code, *_ = re.findall("```python\n(.*?)```", (DOCS / "how-to" / "own-metric.md").read_text(), re.DOTALL)
    exec(code.replace("runs/mine", str(folder)), {})
    top, worst = capsys.readouterr().out.splitlines()
    by_class: dict[int, list[bool]] = {}
    for row in pq.read_table(folder / "best" / "out_of_fold.parquet").to_pylist():
        better = sum(logit > row["logits"][row["label"]] for logit in row["logits"])
        by_class.setdefault(row["label"], []).append(better < 3)
    accuracies = {label: sum(hits) / len(hits) for label, hits in by_class.items()}
    assert float(top.removeprefix("top-3, mean class: ")) == pytest.approx(sum(accuracies.values()) / len(accuracies))
    assert list(eval(worst).values()) == sorted(accuracies.values())[:3]
    (query,) = re.findall("```sql\n(.*?)```", (DOCS / "how-to" / "trials.md").read_text(), re.DOTALL)
    rows = duckdb.sql(query.replace("runs/mine", str(folder))).fetchall()
    assert {row[0] for row in rows} == {"adaptformer", "lora", "linear_probe"}
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)


def test_the_search_space_of_the_how_to_is_valid(tmp_path: Path) -> None:
    (text,) = re.findall("```yaml\n(name: .*?)```", (DOCS / "how-to" / "space-file.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    space = read_space(tmp_path / "mine.yaml")
    assert (space.num_trials, set(space.baseline_labels())) == (24, {"linear probe"})


def test_the_notebook_is_kept_with_its_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert sum(bool(cell.outputs) for cell in cells) >= 8


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs_and_shows_what_it_showed(tmp_path: Path) -> None:
    """Trials may end in another order, so what a search finds may differ; its data and shapes may not."""
    before, now = nbformat.read(NOTEBOOK, as_version=4).cells, executed(tmp_path).cells
    assert [cell.source for cell in before] == [cell.source for cell in now]
    certain = ("from pathlib", "data = lr.open_dataset", "study.report()", "photos =", "import torch")
    for was, cell in zip(before, now, strict=True):
        if cell.cell_type == "code" and cell.source.startswith(certain):
            assert shown(cell) == shown(was), cell.source
    printed = "".join(map(shown, now))
    assert "Test accuracy (%), held out from the search" in printed
    assert (tmp_path / "runs" / "mine" / "report" / "index.html").is_file()
