"""The reading companion: complete, self-contained, and its live parts compute what Python computes.

The page is opened and used in headless Chromium where Playwright and a Chromium are here.
"""

from __future__ import annotations

import html.parser
import itertools
import json
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from minipeft import companion, ledger, measure, quant, rank
from minipeft.companion import equations, sources, widgets

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "input", "br", "hr", "img", "link", "path", "use", "stop"}


def verdicts() -> list[ledger.Verdict]:
    """One of each claim, without their checks being run: what the page does with them is what is tested here."""
    kinds = list(companion.VERDICTS)
    return [
        ledger.Verdict(
            c.id, c.section, c.statement, f"found <{i}> & 1.5", f"得到 <{i}> 与 1.5。", kinds[i % len(kinds)], 0.1, {}
        )
        for i, c in enumerate(ledger.claims(full=True))
    ]


@pytest.fixture(scope="module")
def page() -> str:
    """The whole page, with two figures that need no claim's numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(companion, "FIGURES", {n: companion.FIGURES[n] for n in ("nf4-table", "flops")})
        patch.setattr(companion.evidence, "remember", lambda verdicts: None)
        return companion.page(verdicts(), "a machine", 12.3)


# --- the texts --------------------------------------------------------------------------------------------------------


def test_every_claim_has_a_chinese_statement_and_nothing_is_left_over():
    assert list(companion.contents()["claims"]) == ledger.ORDER
    assert list(companion.contents()["sections"]) == list(ledger.SECTIONS)
    for id, text in companion.contents()["claims"].items():
        assert re.search("[\u4e00-\u9fff]", text["zh"]), id


@pytest.mark.parametrize("id", [claim.id for claim in ledger.claims(full=True)])
def test_every_claim_names_code_that_is_there(id):
    for reference in companion.contents()["claims"][id]["code"]:
        source = sources.find(reference)
        assert (Path(companion.__file__).parents[2] / source.path).is_file()


def test_every_figure_that_is_named_can_be_drawn():
    texts = companion.contents()
    named = [text["figure"] for text in texts["claims"].values() if "figure" in text]
    named += [name for section in texts["sections"].values() for name in section["figures"]]
    assert set(named) <= set(companion.FIGURES)
    assert set(texts["figures"]) == set(named)
    assert all(re.search("[\u4e00-\u9fff]", text) for text in texts["figures"].values())


# --- equations --------------------------------------------------------------------------------------------------------


def test_every_equation_is_well_formed_mathml():
    for texts in (companion.contents()["claims"], companion.contents()["sections"]):
        equation = {id: text["tex"] for id, text in texts.items() if text["tex"]}
        assert equation
        assert all(ElementTree.fromstring(equations.mathml(tex)).tag == "div" for tex in equation.values())


@pytest.mark.parametrize(
    ("tex", "expected"),
    [
        ("x_i^2", "<msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup>"),
        (r"\frac{a}{b}", "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>"),
        ("W_{4bit}", "<msub><mi>W</mi><mtext>4bit</mtext></msub>"),
        (r"\sum_i", "<munder><mo>∑</mo><mi>i</mi></munder>"),
        (r"\text{or|或}", '<mtext lang="en">or</mtext><mtext lang="zh">或</mtext>'),
        ("a < b", "<mi>a</mi><mo>&lt;</mo><mi>b</mi>"),
    ],
)
def test_tex_becomes_mathml(tex, expected):
    assert equations.mathml(tex) == f'<div class="equation"><math display="block"><mrow>{expected}</mrow></math></div>'


@pytest.mark.parametrize("tex", [r"\integral", "a}", r"\frac{a", "x^"])
def test_what_is_not_known_in_an_equation_is_an_error(tex):
    with pytest.raises(ValueError, match="tex"):
        equations.mathml(tex)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_html_whose_elements_are_closed(page):
    open_elements: list[str] = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in VOID:
                open_elements.append(tag)

        def handle_endtag(self, tag):
            assert tag in VOID or open_elements.pop() == tag, self.getpos()

        def handle_startendtag(self, tag, attrs):
            pass

    Parser().feed(page)
    assert open_elements == []


def test_the_page_asks_for_nothing_from_anywhere(page):
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)[^)]*\)", page)
    assert not re.search(r"\b(?:fetch|XMLHttpRequest|WebSocket|import)\s*\(", page)


def test_ids_are_unique_and_references_lead_somewhere(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    body = page.partition("<script")[0]
    assert set(re.findall(r'href="#([^"]+)"', body)) | set(re.findall(r"url\(#([^)]+)\)", body)) <= set(ids)


def test_claims_stand_in_the_document_s_order_with_statement_verdict_and_what_was_found(page):
    assert re.findall(r'<article class="claim" id="([^"]+)"', page) == [c.id for c in ledger.claims(full=True)]
    assert "A 或 B 至少有一个是 0" in page
    assert all(zh in page for zh, _ in companion.VERDICTS.values())
    assert '<span lang="en">found &lt;0&gt; &amp; 1.5</span><span lang="zh">得到 &lt;0&gt; 与 1.5。</span>' in page


def test_the_check_of_each_claim_is_shown_as_it_is(page):
    assert page.count("low_rank() -&gt; Evidence:") == 1
    assert page.count("How it is checked") == len(ledger.claims(full=True))


def test_a_failed_claim_has_no_picture():
    texts = {"zh": "错", "tex": "", "figure": "flops", "code": []}
    failed = ledger.Verdict("lora.forward-flops", "LoRA", "x", "stopped", "中断", "failed", 0.0, {})
    assert "<figure" not in companion._claim(failed, texts, set())


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(companion, "page", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        companion.write_page(tmp_path / "companion.html", [])
    assert not list(tmp_path.iterdir())


def test_a_long_class_is_shown_in_outline_and_short_code_as_it_is():
    assert "..." not in sources.find("methods.lora:lora_delta").text
    outline = sources.find("methods.lora_pro:FullLoraPro").text
    assert outline.startswith("class FullLoraPro")
    assert sources.highlighted('x = "<a>"  # b\nreturn') == (
        'x = <span class="s">&quot;&lt;a&gt;&quot;</span>  <span class="c"># b</span>\n<span class="k">return</span>'
    )


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(page, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("companion") / "companion.html"
    path.write_text(page, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def tab(browser, address):
    """The page at a projector's width, in English; it may ask for nothing and say nothing on the console."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light", locale="en-GB")
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file", "data")) else 0)
    tab.goto(address)
    yield tab
    context.close()
    assert said == []


def background(tab) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]]


def test_the_switch_turns_the_page_to_chinese_and_back(tab):
    assert tab.locator("h1").inner_text() == "The document, checked"
    tab.click("#language")
    assert tab.locator("h1").inner_text() == "逐条检验"
    assert tab.evaluate("document.documentElement.lang") == "zh-CN"
    assert tab.locator('[id="lora.low-rank"] h3').inner_text() == "权重的更新由两个较小的矩阵相乘得到：ΔW = BA。"
    assert tab.locator("[data-widget=rank] .result").inner_text().startswith("秩 2 保留")
    assert tab.locator('[id="lora.low-rank"] .found').inner_text() == "检验结果得到 <0> 与 1.5。"
    tab.click("#language")
    assert tab.locator("h1").inner_text() == "The document, checked"


def test_the_choice_is_remembered(tab, address):
    tab.click("#language")
    tab.goto(address)
    assert tab.locator("h1").inner_text() == "逐条检验"


def test_dark_and_light_follow_the_system_until_they_are_chosen(tab):
    assert min(background(tab)) > 200
    tab.emulate_media(color_scheme="dark")
    assert max(background(tab)) < 60
    tab.click("#theme")  # auto → dark
    tab.click("#theme")  # dark → light
    assert min(background(tab)) > 200


def test_print_is_light_and_without_controls(tab):
    tab.emulate_media(media="print", color_scheme="dark")
    assert min(background(tab)) > 200
    assert not tab.locator(".bar").is_visible()
    assert not tab.locator(".widget").first.is_visible()
    assert tab.locator(".claim").first.is_visible()


@pytest.mark.parametrize("width", [375, 768, 1280, 1920])
def test_nothing_is_wider_than_the_screen(tab, width):
    tab.set_viewport_size({"width": width, "height": 800})
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    for _ in companion.LEAD:  # each language
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        wide = tab.evaluate("""() => [...document.querySelectorAll('h1, h2, h3, p, figure, .widget, .controls *')]
            .filter((e) => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 1)
            .map((e) => e.outerHTML.slice(0, 80))""")
        assert wide == []
        tab.click("#language")


def test_a_phone_gets_the_figures_that_are_drawn_for_it(tab):
    wide, narrow = (tab.locator(f"#fig-flops svg.{layout}[lang=en]") for layout in ("page", "phone"))
    assert wide.is_visible()
    assert not narrow.is_visible()
    tab.set_viewport_size({"width": 375, "height": 800})
    assert narrow.is_visible()
    assert not wide.is_visible()


def test_a_verdict_shows_its_claims_alone_and_all_again(tab):
    everything = tab.locator(".claim:visible").count()
    button = tab.locator(".tally button[data-verdict=corrected]")
    button.click()
    assert tab.locator(".claim:visible").count() == int(button.locator("b").inner_text())
    assert tab.locator(".claim:visible .verdict.confirmed").count() == 0
    button.click()
    assert tab.locator(".claim:visible").count() == everything


def test_code_opens_by_keyboard(tab):
    summary = tab.locator('[id="lora.low-rank"] summary').first
    assert not tab.locator('[id="lora.low-rank"] pre').first.is_visible()
    summary.focus()
    tab.keyboard.press("Enter")
    assert "def lora_delta" in tab.locator('[id="lora.low-rank"] pre').first.inner_text()


def test_every_control_has_a_label_and_every_picture_a_name(tab):
    nameless = tab.evaluate("""() => [...document.querySelectorAll('input, select, button, svg[role=img], canvas')]
        .filter((e) => !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.textContent.trim())
        .map((e) => e.outerHTML.slice(0, 80))""")
    assert nameless == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_the_page_as_wcag_aa_asks(tab, theme):
    tab.emulate_media(color_scheme=theme)
    ratios = tab.evaluate("""() => {
        const light = (c) => {
            const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
                .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        const ratio = (e) => { const x = light(getComputedStyle(e).color);
            return (Math.max(x, paper) + 0.05) / (Math.min(x, paper) + 0.05); };
        const texts = document.querySelectorAll('h1, .lead, .small, .id, .verdict, figcaption, summary, nav a');
        return Object.fromEntries([...texts].map((e) => [e.className + e.tagName, ratio(e)]));
    }""")
    assert ratios
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


# --- the live parts compute what Python computes ----------------------------------------------------------------------


def test_the_memory_calculator_is_the_formula(tab):
    settings = (
        {},
        {"r": 16, "batch": 4, "seq": 1024, "dtype_bytes": 2, "checkpointing": True},
        {"r": 1, "seq": 128, "optimizer": "sgd"},
        {"optimizer": "momentum", "batch": 3},
    )
    numbers = (135_000_000, 7_000_000_000, 8_000_000_000, 70_000_000_000, 3_000_000_000)  # the last has no name
    for number, method, options in itertools.product(numbers, ("full", "lora", "qlora"), settings):
        shown = tab.evaluate("([n, m, o]) => minipeft.estimateMemory(n, m, o)", [number, method, options])
        expected = measure.estimate_memory(number, method, **options).as_dict()
        assert shown == {part: expected[part] for part in shown}, (number, method, options)


def test_the_quantizer_is_the_library_s(tab):
    values = tab.evaluate("minipeft.normalSample(5000)")
    assert abs(np.mean(values)) < 0.05
    assert abs(np.std(values) - 1) < 0.05
    for code, blocksize in itertools.product(("nf4", "nf2", "nf8", "int4", "int3", "fp4"), (32, 64, 4096)):
        back = tab.evaluate(
            "([c, b]) => [...minipeft.quantize(minipeft.normalSample(5000), minipeft.codeTable(c), b)]",
            [code, blocksize],
        )
        expected = quant.dequantize(quant.quantize(np.array(values, "float32"), code, blocksize))
        differing = np.abs(np.array(back) - expected) > 1e-6 * np.abs(expected).max()
        assert differing.sum() <= 2  # on the border of two codes float32 and float64 may part


def test_the_rank_slider_is_the_best_approximation(tab):
    for name in ("digit", "weight", "update"):
        W = np.array(tab.evaluate("(n) => [...minipeft.bestRankR(data.matrices[n], data.matrices[n].S.length)]", name))
        W = W.reshape(widgets.matrices()[name]["shape"])
        near = np.array(tab.evaluate("(n) => [...minipeft.bestRankR(data.matrices[n], 3)]", name)).reshape(W.shape)
        assert np.abs(near - rank.best_rank_r(W, 3)).max() < 2e-3 * np.abs(W).max()
        kept = tab.evaluate("(n) => minipeft.energy(data.matrices[n].S, 3)", name)
        assert kept == pytest.approx(rank.energy(W, 3), abs=1e-3)


def test_the_budget_is_adalora_s(tab):
    adalora = pytest.importorskip("minipeft.methods.adalora")
    for schedule in (
        {"total_step": 1000, "tinit": 100, "tfinal": 250, "init_budget": 144, "target_budget": 96},
        {"total_step": 30, "tinit": 0, "tfinal": 0, "init_budget": 7, "target_budget": 2},
    ):
        steps = list(range(1, schedule["total_step"] + 1))
        shown = tab.evaluate("([s, o]) => s.map((t) => minipeft.rankBudget(t, o))", [steps, schedule])
        assert shown == [adalora.rank_budget(t, **schedule) for t in steps]


@pytest.mark.parametrize(
    ("widget", "control", "value"),
    [("rank", "r", 5), ("memory", "batch", 4), ("quantize", "bits", 2), ("budget", "target", 3)],
)
def test_moving_a_slider_changes_what_is_said(tab, widget, control, value):
    result = tab.locator(f"[data-widget={widget}]")
    before = result.inner_text()
    tab.locator(f"[data-widget={widget}] input[name={control}]").fill(str(value))
    assert result.inner_text() != before


def test_a_slider_moves_by_keyboard(tab):
    slider = tab.locator("[data-widget=rank] input[name=r]")
    slider.focus()
    tab.keyboard.press("ArrowRight")
    assert slider.input_value() == "3"
    assert tab.locator('[data-widget=rank] [data-for="r"]').inner_text() == "3"


def test_the_canvas_shows_the_digit_in_grey_and_the_rest_in_colour(tab):
    tab.select_option("[data-widget=rank] select", "pca")
    tab.locator("[data-widget=rank] input[name=r]").fill("64")
    shown, near, left = tab.evaluate("""() => [...document.querySelectorAll('[data-widget=rank] canvas')].map((c) =>
        [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])""")
    assert len(shown) == 8 * 8 * 4
    assert np.abs(np.array(shown) - near).max() <= 1
    assert np.array(left).reshape(-1, 4)[:, :3].min() >= 248


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_page_and_json_together(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from minipeft import cli

    monkeypatch.chdir(tmp_path)
    arguments = ["verify", "lora.row-column-rank", "--html", "companion.html", "--json", "ledger.json"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir()) == ["companion.html", "ledger.json"]
    row = json.loads(Path("ledger.json").read_text(encoding="utf-8"))["claims"][0]
    page = Path("companion.html").read_text(encoding="utf-8")
    assert row["found"] in page
    assert row["found_zh"] in page
    assert "written to companion.html" in result.output


@pytest.mark.parametrize("where", [".", "file/companion.html"])
def test_a_page_that_cannot_be_written_is_refused_before_any_check(tmp_path, monkeypatch, where):
    from typer.testing import CliRunner

    from minipeft import cli

    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    result = CliRunner().invoke(cli.app, ["verify", "lora.low-rank", "--html", where])
    assert result.exit_code == 2
    assert "--html" in result.stderr
    assert os.listdir() == ["file"]
