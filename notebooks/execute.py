"""Run the notebooks from top to bottom and keep their outputs.

python notebooks/execute.py              all of them
python notebooks/execute.py 01 05        those whose names begin so

What is kept does not depend on who ran it: sliders are drawn as still pictures, nothing says when or where.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
SECONDS = 300  # for one notebook on a busy machine; on two quiet cores each takes less than 90


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs; the file stays as it is."""
    os.environ["MINIPEFT_STILL"] = "1"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small matrices: threads would only wait for each other
    notebook = nbformat.read(path, as_version=4)
    options = {"record_timing": False, "coalesce_streams": True}  # printed text is one piece, however busy the machine
    folder = {"metadata": {"path": HERE}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=folder, **options).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def chosen(beginnings: list[str]) -> list[Path]:
    """The notebooks whose names begin with one of these; all when none is given."""
    return [p for p in sorted(HERE.glob("*.ipynb")) if not beginnings or p.name.startswith(tuple(beginnings))]


def main() -> None:
    """Run those that the command line names."""
    for path in chosen(sys.argv[1:]):
        start = time.perf_counter()
        nbformat.write(execute(path), path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
