"""Run notebooks and store them with their outputs: python benchmarks/notebooks.py [notebooks/quickstart.ipynb …], by default all.

Nothing of this machine is stored: no warnings of the libraries, which have paths in them, no times, and no data but what is embedded.
"""

import os
import sys
from pathlib import Path

import nbclient
import nbformat

FOLDER = Path(__file__).parents[1] / "notebooks"


def main(paths: list[Path]) -> None:
    os.environ["PYTHONWARNINGS"] = "ignore"
    os.environ.pop("BLEMISH_DATA", None)
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        metadata = dict(notebook.metadata)
        place = {"metadata": {"path": str(path.parent)}}
        nbclient.NotebookClient(notebook, timeout=1800, record_timing=False, resources=place).execute()
        notebook.metadata = nbformat.from_dict(metadata)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")))
