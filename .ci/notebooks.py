"""Run the notebooks of examples/ anew, and write their outputs into them.

    python .ci/notebooks.py [NOTEBOOK ...]

Each runs in a new kernel and an empty folder. What is written has no progress and no times, so that
only results make a difference. The seconds that each took are printed.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

QUIET = "ignore:IProgress not found"
"""What Python's warnings leave out in a kernel: tqdm misses a widget of its own."""
EXAMPLES = Path(__file__).parents[1] / "examples"


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run every cell of a notebook in `folder`, and return it with its outputs.

    Raises:
        CellExecutionError: a cell raised an exception.
    """
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook, kernel_name="python3", timeout=600, record_timing=False, resources=place
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if not _is_progress(each)]
    return notebook


def _is_progress(output: nbformat.NotebookNode) -> bool:
    """Whether an output is the one in which a call of Countermark shows its progress."""
    return output.output_type == "display_data" and "text/html" in output.data


def main() -> None:
    """Run those that are named, or all."""
    os.environ["PYTHONWARNINGS"] = QUIET
    for path in map(Path, sys.argv[1:] or sorted(EXAMPLES.glob("*.ipynb"))):
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
