"""Run notebooks and store them with their outputs: python benchmarks/notebooks.py [notebooks/quickstart.ipynb …], by default all.

Nothing of this machine is stored: no warnings of the libraries, which have paths in them, no times, and no data but what is embedded.
Pictures are reduced to 256 colours.
"""

import base64
import io
import os
import sys
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"


def small(png: str) -> str:
    """A picture in base64 with a palette, if that is smaller."""
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return min(png, base64.b64encode(file.getvalue()).decode(), key=len)


def main(paths: list[Path]) -> None:
    os.environ["PYTHONWARNINGS"] = "ignore"
    os.environ.pop("BLEMISH_DATA", None)
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        metadata = dict(notebook.metadata)
        place = {"metadata": {"path": str(path.parent)}}
        nbclient.NotebookClient(notebook, timeout=1800, record_timing=False, resources=place).execute()
        for data in (out.data for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out):
            if "image/png" in data:
                data["image/png"] = small(data["image/png"])
        notebook.metadata = nbformat.from_dict(metadata)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")))
