"""The notebooks: both languages, outputs that are whole and clean; the exercises: solved, empty, and answered wrongly.

`pytest -m notebooks` also runs every notebook from top to bottom (`make notebooks`).
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent / "notebooks"
if not ROOT.is_dir():
    pytest.skip("the notebooks are not here", allow_module_level=True)

NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))
EXERCISES = sorted((ROOT / "exercises").glob("*.ipynb"))
HEADINGS = (
    "The idea",
    "The equation",
    "The function",
    "A numeric check",
    "The picture",
    "Questions",
    "In one paragraph",
)
CHINESE = re.compile(r"[\u4e00-\u9fff]")
OF_A_MACHINE = re.compile(r"/(home|root|tmp|work|Users|opt)/|site-packages|\bobject at 0x|localhost")


def module(path):
    """A script of the notebooks' folder as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def text_of(output):
    """All text that an output shows."""
    data = output.get("data", {})
    return "\n".join([output.get("text", ""), *(str(v) for kind, v in data.items() if kind.startswith("text/"))])


def check_outputs(notebook):
    """Nothing went wrong, nothing warned, and nothing says on which machine it was."""
    for output in outputs(notebook):
        assert output.output_type != "error", output
        assert not (output.output_type == "stream" and output.name == "stderr"), output.text
        assert "Warning" not in text_of(output)
        assert not OF_A_MACHINE.search(text_of(output)), text_of(output)


# --- the notebooks ----------------------------------------------------------------------------------------------------


def test_there_is_one_for_each_section_and_each_topic():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(12)]


@named(NOTEBOOKS)
def test_headings_goals_and_summaries_are_in_both_languages(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    titles = re.findall(r"(?m)^#{1,3} (.+)$", text)
    assert titles[0].startswith(path.name[:2] + " · ")
    for title in titles:
        english, _, chinese = title.rpartition(" · ")
        assert re.search("[A-Za-z]", english), title
        assert CHINESE.search(chinese), title
    for heading in HEADINGS:
        assert f"## {heading} · " in text
    assert "**After this notebook you can**" in text
    assert "**学完这一节，你能够**" in text
    summary = text.rpartition("## In one paragraph")[2].split("\n", 1)[1].strip()
    english, chinese = summary.rsplit("\n\n", 1)
    assert not CHINESE.search(english)
    assert CHINESE.search(chinese)


@named(NOTEBOOKS)
def test_outputs_are_kept_whole_and_clean(path):
    notebook = read(path)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    check_outputs(notebook)
    kinds = [kind for output in outputs(notebook) for kind in output.get("data", {})]
    assert {"image/png", "text/markdown", "text/html"} <= set(kinds)  # a picture, a source, a table of verdicts
    assert "widgets" not in notebook.metadata  # a slider that is kept shows nothing: still pictures are
    assert path.stat().st_size < 600_000


@named(NOTEBOOKS)
def test_the_verdicts_that_are_kept_are_the_ledger_s(path):
    from minipeft import ledger

    tables = "\n".join(
        output.data["text/html"] for output in outputs(read(path)) if "text/html" in output.get("data", {})
    )
    ids = re.findall(r"<code>([\w.-]+)</code>", tables)
    assert ids
    assert set(ids) <= {claim.id for claim in ledger.claims(full=True)} or path.stem.startswith("11")
    assert ("failed" in tables) == path.stem.startswith("11")  # there a claim of the reader's own fails, to show it


@pytest.mark.notebooks
@named(NOTEBOOKS)
def test_it_runs_from_top_to_bottom_without_a_warning(path):
    notebook = module(ROOT / "execute.py").execute(path)
    check_outputs(notebook)
    tables = [output.data["text/html"] for output in outputs(notebook) if "text/html" in output.get("data", {})]
    assert path.stem.startswith("11") or not any("failed" in table for table in tables)


# --- the exercises ----------------------------------------------------------------------------------------------------

student = module(ROOT / "exercises" / "make_student.py").student


def marks(cell):
    return cell.metadata.get("nbgrader", {})


def answers(notebook, stop=None):
    """Run the code cells in order; {grade_id of a graded test: the exception it ended with, or None}."""
    names, found = {"__name__": "__main__"}, {}
    for cell in code(notebook):
        try:
            exec(compile(cell.source, marks(cell)["grade_id"], "exec"), names)
            error = None
        except Exception as caught:
            error = caught
        if marks(cell)["grade"]:
            found[marks(cell)["grade_id"]] = error
        else:
            assert error is None, f"{marks(cell)['grade_id']}: {error}"
    return found


def test_there_is_one_set_for_each_section():
    assert [path.stem for path in EXERCISES] == [
        "01_lora",
        "02_qlora",
        "03_adalora",
        "04_lora_ga",
        "05_dora",
        "06_lora_pro",
    ]
    assert all((ROOT / path.name).exists() for path in EXERCISES)  # under the number of its notebook


@named(EXERCISES)
def test_cells_have_nbgrader_s_metadata(path):
    notebook = read(path)
    ids = [marks(cell)["grade_id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        m = marks(cell)
        points = {"points"} if m["grade"] else set()
        assert set(m) == {"grade", "solution", "locked", "task", "grade_id", "schema_version"} | points
        assert m["schema_version"] == 3
        assert m["locked"] != m["solution"]
        assert not (m["grade"] and m["solution"]) or cell.cell_type == "markdown"  # what a person grades is prose
        assert ("### BEGIN SOLUTION" in cell.source) == m["solution"]
        assert ("### BEGIN HIDDEN TESTS" in cell.source) == (m["grade"] and not m["solution"])
        assert not cell.get("outputs")


@named(EXERCISES)
def test_prompts_are_in_both_languages(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            assert CHINESE.search(cell.source), cell.source
            assert re.search(r"[A-Za-z]{3}", cell.source), cell.source


@named(EXERCISES)
def test_the_solutions_pass(path):
    assert all(error is None for error in answers(read(path)).values())


@named(EXERCISES)
def test_the_students_version_fails_everywhere_and_says_which_exercise_is_empty(path):
    empty = student(read(path))
    assert not any(word in cell.source for cell in empty.cells for word in ("SOLUTION", "HIDDEN"))
    found = answers(empty)
    assert len(found) >= 5
    for grade_id, error in found.items():
        assert isinstance(error, NotImplementedError), (grade_id, error)
        assert str(error) == f"{grade_id.removesuffix('-test')}: not written yet · 还没有写"
    prose = [cell for cell in empty.cells if marks(cell)["grade"] and cell.cell_type == "markdown"]
    assert all("YOUR ANSWER HERE · 在此作答" in cell.source for cell in prose)


WRONG = [  # (file, exercise, a mistake that students make, what the message says)
    ("01_lora", "lora-1", "def lora_delta(A, B, alpha, rslora=False):\n    return B @ A", "with α = 2r: differs"),
    ("01_lora", "lora-1", "def lora_delta(A, B, alpha, rslora=False):\n    B @ A", "is there a return"),
    ("01_lora", "lora-2", "def lora_forward(x, W, A, B, s):\n    return x @ (W + s * B @ A).T", "ΔW was formed"),
    ("01_lora", "lora-3", "def lora_gradients(x, A, B, s, g):\n    return A, B.T", "∂L/∂A: differs"),
    ("01_lora", "lora-5", "def dead_start(o, w, r):\n    return np.ones((r, w)), np.zeros((o, r))", "B will move"),
    ("02_qlora", "qlora-2", "def quantize(W, table, n):\n    return W, np.abs(W).max()", "absmax: shape"),
    ("02_qlora", "qlora-3", "def bits_a_weight(bits=4, blocksize=64, double=False):\n    return bits", "expected 4"),
    ("02_qlora", "qlora-6", "def wiped_out(W, table, n):\n    return 0.1 * np.outer(W[:, 0], W[0])", "half a step"),
    ("03_adalora", "adalora-3", "def gram_schmidt(P):\n    return P / np.linalg.norm(P, axis=0)", "of a triangle"),
    (
        "03_adalora",
        "adalora-6",
        "def misleading(x, out):\n    return np.eye(out, 2), np.ones(2), np.eye(2, 4)",
        "scores",
    ),
    ("04_lora_ga", "ga-5", "def accumulate(gradients, sizes):\n    return sum(gradients)", "equal sizes: differs"),
    ("04_lora_ga", "ga-6", "def peak_numbers(sizes, e, t):\n    return sum(sizes) * e, t", "one micro-batch"),
    ("05_dora", "dora-1", "def magnitude(W):\n    return np.linalg.norm(W, axis=0)", "of rows, not of columns"),
    (
        "05_dora",
        "dora-3",
        "def dora_gradients(V, m, G):\n    n = magnitude(V)\n    return (G * V).sum(1) / n, G",
        "∂L/∂V",
    ),
    ("06_lora_pro", "pro-3", "def lora_pro(A, B, gA, gB, s):\n    return gA, gB", "equivalent gradient of lora_pro"),
    ("06_lora_pro", "pro-5", "def out_of_reach(A, B):\n    return np.zeros((len(B), A.shape[1]))", "‖g‖"),
]


@pytest.mark.parametrize(
    ("name", "exercise", "answer", "message"), WRONG, ids=[f"{w[1]}-{i}" for i, w in enumerate(WRONG)]
)
def test_a_wrong_answer_is_told_what_is_wrong(name, exercise, answer, message):
    notebook = read(ROOT / "exercises" / f"{name}.ipynb")
    for cell in notebook.cells:
        if marks(cell)["grade_id"] == exercise:
            cell.source = answer
    error = answers(notebook)[f"{exercise}-test"]
    assert isinstance(error, AssertionError)
    assert message in str(error)


def test_a_solution_without_its_marks_is_not_given_away():
    notebook = read(EXERCISES[0])
    cell = next(cell for cell in notebook.cells if marks(cell)["solution"])
    cell.source = cell.source.replace("### BEGIN SOLUTION", "")
    with pytest.raises(ValueError, match="lora-1: no ### BEGIN SOLUTION"):
        student(notebook)


# --- what the notebooks share -----------------------------------------------------------------------------------------


def test_sources_name_their_file_in_the_package():
    from minipeft.methods.lora import lora_delta
    from minipeft.notebook import source

    shown = source(lora_delta)
    assert repr(shown).startswith("# minipeft/methods/lora.py\ndef lora_delta(")
    assert shown._repr_markdown_().startswith("```python\n# minipeft")


def test_verdicts_show_themselves_as_a_table_and_as_text():
    from minipeft.notebook import verdicts

    found = verdicts("lora.row-column-rank")
    assert "<code>lora.row-column-rank</code>" in found._repr_html_()
    assert all(text in found._repr_html_() for text in ("confirmed<br>证实", found[0].found_zh))
    assert repr(found).startswith("lora.row-column-rank: confirmed. ")


def _draw(r=2, kind="a"):
    from minipeft.plots.style import panels

    figure, axes = panels(1)
    axes.set_title(f"{r} {kind}")
    return figure


def test_without_widgets_a_slider_is_a_picture_of_its_defaults(monkeypatch):
    from minipeft import notebook

    monkeypatch.setattr(notebook, "_widgets", lambda: None)
    still = notebook.explore(_draw, r=[1, 2], kind="ab")
    assert still._repr_png_() == notebook.picture(_draw)._repr_png_()
    assert still._repr_png_() != notebook.picture(_draw, r=1)._repr_png_()


def test_sliders_move_the_picture_where_widgets_are(monkeypatch):
    pytest.importorskip("ipywidgets")
    from minipeft import notebook

    monkeypatch.delenv(notebook.STILL, raising=False)
    sliders = notebook.explore(_draw, r=[1, 2], kind="ab")
    assert [child.value for child in sliders.children[:2]] == [2, "a"]
    assert sliders.children[0].options == (1, 2)


@pytest.mark.parametrize("choices", [{"q": [1]}, {"r": [1, 3]}])
def test_choices_that_do_not_fit_the_function_are_refused(choices):
    from minipeft.notebook import explore

    with pytest.raises(ValueError, match="must have it, with a default among"):
        explore(_draw, **choices)
