"""The notebook of the documentation, executed.

python tests/notebook.py    executes it in an empty folder, and writes it back with its outputs
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorials" / "in_python.ipynb"
LIMIT_S = 400  # of a cell


def executed(folder: Path) -> nbformat.NotebookNode:
    """Return the notebook with the outputs that it has in this folder. Raises CellExecutionError for a cell that fails."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=LIMIT_S, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def shown(cell: nbformat.NotebookNode) -> str:
    """Return all text that a cell shows."""
    outputs = cell.get("outputs", [])
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


def main() -> None:
    """Execute the notebook and write it back, without what differs between machines."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(Path(folder))
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "image/jpeg" in output.get("data", {}):
                output.data.pop("image/png", None)  # the same image again
        assert not any(word in shown(cell) for word in (folder, str(Path.home()) + "/")), (
            f"a path of this machine: {shown(cell)}"
        )
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
