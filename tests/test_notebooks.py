"""Every notebook is stored with its outputs, and runs from top to bottom."""

import platform
import re
from pathlib import Path

import pytest
from support import CONFIGS

NOTEBOOKS = sorted((CONFIGS.parent / "notebooks").glob("*.ipynb"))
OF_A_MACHINE = r"/(?:home|root|tmp|usr|var|work|Users|private)/|site-packages|[A-Z]:\\|Traceback|Warning\b"
MOST = 500_000  # bytes


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_with_its_outputs(path: Path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "python benchmarks/notebooks.py runs and stores it"
    assert any("image/png" in out.get("data", {}) for cell in cells for out in cell.outputs)
    silent = [cell.source for cell in cells if not cell.outputs and not only_prepares(cell.source)]
    assert not silent
    for out in (out for cell in cells for out in cell.outputs):
        assert out.get("name") != "stderr", out.text
        data = out.get("data", {})
        text = "\n".join([out.get("text", ""), *(data[kind] for kind in ("text/plain", "text/html", "text/markdown") if kind in data)])
        assert out.output_type != "error"
        assert not re.search(OF_A_MACHINE, text), text
        assert platform.node() not in text
    assert path.stat().st_size <= MOST


def only_prepares(source: str) -> bool:
    """Imports, definitions and assignments: no line that begins a statement shows anything."""
    return not re.search(r"^ *(print|display|plt\.show|panel)\(", source, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the kernel's own libraries warn of one another
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) >= 3
