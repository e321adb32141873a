"""The files that GitHub and a reader of the repository use are valid, and agree with the package."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import lift_ray

ROOT = Path(__file__).parents[1]
FORMS = ("bug.yml", "feature.yml", "wrong_result.yml")
ADDRESS = re.compile(r"[\w.+-]+@[\w-]+\.\w+")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version_and_names_both_papers() -> None:
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # required by the format
    assert citation["version"] == lift_ray.__version__
    assert citation["authors"] == [{"name": "The lift_ray authors"}]
    papers = {paper["identifiers"][0]["value"]: paper for paper in citation["references"]}
    assert papers.keys() == {"arXiv:2309.10019", "arXiv:2504.13282"}
    for number, paper in papers.items():
        assert {"type", "title", "authors", "year"} <= paper.keys()
        assert paper["url"].endswith(number.removeprefix("arXiv:"))


def test_the_workflow_runs_what_ci_runs_on_python_3_11() -> None:
    workflow = read(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    assert job["runs-on"].startswith("ubuntu-")
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert {"python-version": "3.11"} in [step.get("with") for step in job["steps"]]
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("name", FORMS)
def test_an_issue_form_is_one_that_github_accepts(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}")
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids)
    assert all(field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
    assert all(field["attributes"]["value"] for field in form["body"] if field["type"] == "markdown")


def test_security_says_where_to_report_and_gives_no_address() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "*Report a vulnerability*" in text
    assert not ADDRESS.search(text)
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / target).exists()
    assert "SECURITY.md" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
