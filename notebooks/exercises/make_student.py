"""The students' version of the exercises: without solutions, hidden tests and outputs.

python notebooks/exercises/make_student.py [DIRECTORY]        left out: build/exercises

The notebooks have nbgrader's marks and metadata, so `nbgrader generate_assignment` does the same; this needs nbformat
only.
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
SOLUTION = re.compile(r"(?ms)^(?P<indent>[ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION")
HIDDEN = re.compile(r"(?ms)^[ \t]*### BEGIN HIDDEN TESTS\n.*?^[ \t]*### END HIDDEN TESTS\n?")


def student(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy in which every solution is an empty place, and hidden tests are gone.

    Raises:
        ValueError: a cell for an answer that has no marked solution, or a mark that is left over.
    """
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        marks = cell.metadata.get("nbgrader", {})
        if marks.get("solution"):
            if not SOLUTION.search(cell.source):
                raise ValueError(f"{marks['grade_id']}: no ### BEGIN SOLUTION … ### END SOLUTION in it")
            place = _code_place(marks["grade_id"]) if cell.cell_type == "code" else "YOUR ANSWER HERE · 在此作答"
            cell.source = SOLUTION.sub(lambda match, place=place: _indented(place, match["indent"]), cell.source)
        cell.source = HIDDEN.sub("", cell.source).rstrip()
        if "### BEGIN" in cell.source or "### END" in cell.source:
            raise ValueError(f"{marks.get('grade_id', cell.id)}: a ### BEGIN or ### END has no partner")
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def _code_place(exercise: str) -> str:
    """What stands where the student writes."""
    return f'# YOUR CODE HERE\nraise NotImplementedError("{exercise}: not written yet · 还没有写")'


def _indented(text: str, indent: str) -> str:
    return "\n".join(indent + line for line in text.splitlines())


def main() -> None:
    """Write the students' version of every exercise."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent.parent / "build" / "exercises"
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(HERE.glob("*.ipynb")):
        nbformat.write(student(nbformat.read(path, as_version=4)), directory / path.name)
        print(directory / path.name)


if __name__ == "__main__":
    main()
