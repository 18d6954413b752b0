"""The figures: written whole, the same bytes each time, in two languages, and refused by name."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from minipeft import cli, plots
from minipeft.plots import comparison, style

QUICK = "nf4-table"


@pytest.fixture(autouse=True)
def one_seed(monkeypatch):
    """The shipped figures take three seeds; one is enough to see that they can be drawn."""
    monkeypatch.setattr(comparison, "SEEDS", range(1))
    yield
    comparison._runs.cache_clear()


@pytest.mark.slow
def test_every_figure_is_written_as_svg_and_png(tmp_path):
    written = plots.write_figures(tmp_path)
    assert sorted(path.name for path in written) == sorted(f"{n}.{k}" for n in plots.FIGURES for k in ("svg", "png"))
    assert all(path.stat().st_size > 10_000 for path in written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written if path.suffix == ".png")


@pytest.mark.parametrize("name", ["reconstructions", "flops", "projection", "methods", QUICK])
def test_the_same_runs_give_the_same_bytes(tmp_path, name):
    first, second = (plots.write_figures(tmp_path / directory, [name]) for directory in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_ids_are_numbered_in_order_and_links_follow():
    text = '<path id="x91f"/><use href="#x91f" clip-path="url(#p7)"/><clipPath id="p7"/>'
    assert style.numbered(text) == '<path id="m0"/><use href="#m0" clip-path="url(#m1)"/><clipPath id="m1"/>'


def test_every_reference_in_a_figure_has_its_id():
    text, _ = plots.draw_svg(QUICK)
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    assert set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text)) <= ids


def test_an_unknown_figure_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"figure: got 'loss'.*adaptation"):
        plots.write_figures(tmp_path, ["adaptation", "loss"])
    assert not list(tmp_path.iterdir())


def test_an_unknown_language_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="lang: got 'fr'; accepted are 'en' and 'zh'"):
        plots.write_figures(tmp_path, [QUICK], "fr")
    assert not list(tmp_path.iterdir())


# --- Chinese ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(style.chinese_font() is None, reason="no Chinese font here")
def test_chinese_figures_have_names_of_their_own_and_no_missing_characters(tmp_path):
    written = plots.write_figures(tmp_path, [QUICK, "flops"], "zh")  # a missing glyph would warn, and warnings fail
    assert [path.name for path in written] == [f"{n}.zh.{k}" for n in (QUICK, "flops") for k in ("svg", "png")]


def test_without_a_chinese_font_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "chinese_font", lambda: None)
    with pytest.raises(ValueError, match="apt-get install fonts-noto-cjk"):
        plots.write_figures(tmp_path, [QUICK], "zh")
    assert not list(tmp_path.iterdir())


def test_svg_with_the_reader_s_fonts_needs_none_here(monkeypatch):
    monkeypatch.setattr(style, "chinese_font", lambda: None)
    picture, caption = plots.draw_svg("flops", "zh", "phone")
    assert "前向" in picture
    assert caption.startswith("按实际执行的计算图计数")


def test_labels_go_back_to_english_after_a_chinese_figure():
    plots.draw_svg(QUICK, "zh")
    assert style.t("weights", "权重") == "weights"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_draws_in_the_language_that_is_asked_for(tmp_path):
    language = "zh" if style.chinese_font() else "en"
    run = CliRunner().invoke(cli.app, ["figures", QUICK, "--lang", language, "--out", str(tmp_path / "pictures")])
    assert run.exit_code == 0, run.output
    suffix = ".zh" if language == "zh" else ""
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [f"{QUICK}{suffix}.png", f"{QUICK}{suffix}.svg"]


def test_the_command_refuses_another_language_in_one_line(tmp_path):
    run = CliRunner().invoke(cli.app, ["figures", QUICK, "--lang", "fr", "--out", str(tmp_path)])
    assert run.exit_code == 2
    assert run.stderr == "error: lang: got 'fr'; accepted are 'en' and 'zh'\n"
    assert not list(tmp_path.iterdir())
