"""The ledger's table in Chinese: nothing English but names, aligned, and broken where Chinese lines may be."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from minipeft import cli, companion, ledger, ledger_table

VERDICTS = list(companion.VERDICTS)
FOUND = (
    "η = 1e-05 时，30 个随机层（float32）的损失下降，与 η‖g̃‖² 相差不超过 1.2e-05；论文（式 2、5）在“幅度”上——也一样。"
)


def verdict(id: str, kind: str) -> ledger.Verdict:
    section = next(c.section for c in ledger.claims([id]))
    return ledger.Verdict(id, section, "the statement", "found", FOUND, kind, 0.0, {})


ROWS = [
    verdict(id, kind)
    for id, kind in zip(("lora.merge", "qlora.7b", "qlora.batch", "dora.scalar", "lorapro.gap"), VERDICTS, strict=True)
]


def printed(width: int, lang: str = "zh") -> list[str]:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - the console keeps it
    console.print(ledger_table.table(ROWS, width, lang))
    console.file.close()
    return console.export_text().splitlines()


def column(lines: list[str], number: int) -> str:
    """Its cells one after the other, without spaces, which lines may have been broken at."""
    cells = [line.strip("│").split("│")[number] for line in lines if line.startswith("│")]
    return re.sub(r"\s", "", "".join(cells))


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_borders_stand_below_each_other_beside_wide_characters(width):
    lines = printed(width)
    assert {cell_len(line) for line in lines} == {width}
    at = [[cell_len(line[: m.start()]) for m in re.finditer("│", line)] for line in lines if line.startswith("│")]
    assert all(row == at[0] for row in at)


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_no_character_of_what_was_found_is_lost(width):
    assert column(printed(width), -2) == re.sub(r"\s", "", FOUND) * len(ROWS)


def test_statements_headings_and_verdicts_are_chinese():
    lines = printed(160)
    assert all(heading in lines[1] for heading in ("章节", "论断", "文档的说法", "检验结果", "判定"))
    texts = companion.contents()["claims"]
    assert column(lines, 2) == "".join(re.sub(r"\s", "", texts[v.id]["zh"]) for v in ROWS)
    assert column(lines, 4) == "".join(companion.VERDICTS[kind][0] for kind in VERDICTS)


def test_the_summary_counts_in_chinese():
    assert ledger_table.summary(ROWS[:2], 3.21, "zh").plain == "2 条论断：证实 1，在限定条件下成立 1，用时 3.2 秒"
    assert ledger_table.summary(ROWS[:1], 3.21).plain == "1 claim, 1 confirmed, 3.2 s"


@pytest.mark.parametrize("width", [2, 7, 16, 30, 45, 200])
def test_lines_fit_and_together_are_the_text(width):
    lines = ledger_table.wrap(FOUND, width)
    assert max(map(cell_len, lines)) <= width
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", FOUND)


@pytest.mark.parametrize("width", [16, 30, 45])
def test_no_line_starts_with_a_closing_mark_or_ends_with_an_opening_one(width):
    lines = ledger_table.wrap(FOUND, width)
    assert not any(line[0] in ledger_table.CLOSING or line[-1] in ledger_table.OPENING for line in lines)
    assert any("η = 1e-05" in line for line in lines)


def test_lines_are_filled_although_chinese_has_no_spaces():
    lines = ledger_table.wrap("权重的更新由两个较小的矩阵相乘得到" * 4, 20)
    assert [cell_len(line) for line in lines[:-1]] == [20] * (len(lines) - 1)


def test_the_command_prints_chinese(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["verify", "lora.row-column-rank", "--lang", "zh", "--json", "ledger.json"])
    assert result.exit_code == 0, result.output
    assert "1 条论断：证实 1，用时" in result.output
    assert "已写入 ledger.json" in result.output
    row = json.loads(Path("ledger.json").read_text(encoding="utf-8"))["claims"][0]
    assert row["found_zh"][:4] in result.output
    assert "Equal for" not in result.output


def test_another_language_is_refused_before_any_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["verify", "lora.merge", "--lang", "fr"])
    assert result.exit_code == 2
    assert "lang: got 'fr'; accepted are 'en' and 'zh'" in result.stderr
