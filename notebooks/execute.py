"""Executes every notebook here from its first cell to its last, each in a fresh kernel, and writes the results into a
folder: python execute.py FOLDER. A cell that raises ends it with that cell's traceback."""

import base64
import io
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

HERE = Path(__file__).resolve().parent


def smaller(png):
    """The same picture with 256 colours, a third of the size."""
    picture, target = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(target, "png", optimize=True)
    return base64.b64encode(target.getvalue()).decode()


def execute(path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(HERE)}})
    client.extra_arguments = ["--log-level=ERROR"]
    client.execute()
    for cell in notebook.cells:  # when a cell ran says nothing, and differs every time
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(HERE.glob("*.ipynb")):
        start = time.time()
        try:
            notebook = execute(path)
        except CellExecutionError as error:
            sys.exit(f"{path.name}: {error}")
        nbformat.write(notebook, folder / path.name)
        print(f"ok  {path.name}: {len(notebook.cells)} cells, {time.time() - start:.0f} s")


main()
