"""The figures: written whole, deterministic, and refused by name."""

from __future__ import annotations

import pytest

from minipeft import plots


@pytest.fixture(autouse=True)
def one_seed(monkeypatch):
    """The shipped figures take five seeds; one is enough to see that they can be drawn."""
    monkeypatch.setattr(plots, "SEEDS", range(1))


def test_every_figure_is_written_as_svg_and_png(tmp_path):
    written = plots.write_figures(tmp_path)
    assert sorted(path.name for path in written) == sorted(f"{n}.{k}" for n in plots.FIGURES for k in ("svg", "png"))
    assert all(path.stat().st_size > 10_000 for path in written)
    assert (tmp_path / "adaptation.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_runs_give_the_same_bytes(tmp_path):
    first, second = (plots.write_figures(tmp_path / name, ["adaptation"]) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_an_unknown_figure_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"figure: got 'loss'.*adaptation"):
        plots.write_figures(tmp_path, ["adaptation", "loss"])
    assert not list(tmp_path.iterdir())
