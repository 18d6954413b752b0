"""The tables of `minipeft compare`: how well each method did, what it costs, and what has no figures.

`tables` are a terminal's, `markdown` is a document's, in two languages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .compare import BYTES

TITLES = {
    "accuracy": "test accuracy, %",
    "test_loss": "held-out loss",
    "named": "new name given, %",
    "perplexity": "perplexity",
}
PERCENT = ("accuracy", "named")
WIDE = 110
TITLES_ZH = {"accuracy": "测试准确率，%", "test_loss": "留出集损失", "named": "答出新名字，%", "perplexity": "困惑度"}
SHORT = {"encoder of 8 tokens": "H", "bottleneck": "b"}  # the line below the table says what they are


def tables(report: dict[str, Any], width: int) -> Iterator[Table | Text]:
    """Everything that is shown of a report, in order; where there are fewer than 110 columns sizes come apart."""
    if width < WIDE:
        yield quality(report, sizes=True, results=False)
        yield quality(report, sizes=False, results=True)
    else:
        yield quality(report)
    yield Text(_explained(report), style="dim")
    yield costs(report)
    yield Text(_costs_explained(), style="dim")
    if any("skipped" in row or row["failed"] for row in report["methods"].values()):
        yield absent(report)


def quality(report: dict[str, Any], sizes: bool = True, results: bool = True) -> Table:
    """The methods in the order of what they reached, with their sizes, with their results, or with both."""
    target, metrics = report["target_loss"], report["metrics"]
    first, second = (sizes, ["size", "trains", "lr"]), (results, ["loss", *(TITLES[name] for name in metrics)])
    second[1].append(f"steps to {target:g}" if target is not None else "steps")
    table = _table("method", [title for shown, titles in (first, second) if shown for title in titles], "#")
    for place, (method, row) in enumerate(report["methods"].items(), 1):
        cells = [
            cell for shown, cells in ((sizes, _size(row)), (results, _result(row, report))) if shown for cell in cells
        ]
        table.add_row(str(place) if "loss" in row else "", method, *cells, style="bold" if method == "lora" else "")
    if results:
        table.add_section()
        base = [_spread({"mean": report["base"].get(name)}, name) for name in metrics]
        table.add_row("", "the base", *[""] * (3 * sizes + 1), *base)
    return table


def _size(row: dict[str, Any]) -> list[Text | str]:
    """Size, trained parameters, learning rate."""
    if "skipped" in row:
        return ["", "", ""]
    size = f"{SHORT.get(row['unit'], row['unit'])} {row['size']}" if row["unit"] else ""
    return [size, _trains(row), _lr(row)]


def _result(row: dict[str, Any], report: dict[str, Any]) -> list[Text | str]:
    """Loss, the task's metrics, steps to the target; or that there are none."""
    if "skipped" in row:
        return [Text("left out", "dim")]
    if "loss" not in row:
        return [Text("failed", "bold red")]
    failed = f" ({row['failed']['runs']} failed)" if row["failed"] else ""
    metrics = [_spread(row[name], name) + _change(name, row, report) for name in report["metrics"]]
    return [_spread(row["loss"], "loss") + failed, *metrics, _steps(row, report["seeds"])]


def costs(report: dict[str, Any]) -> Table:
    """Bytes by part, and time beside LoRA's."""
    rows = {method: row for method, row in report["methods"].items() if row.get("bytes")}
    power, name = _memory_unit(rows)
    table = _table(f"a step, {name}", [*BYTES, "time ÷ LoRA's"])
    for method, row in rows.items():
        time = "–" if row["step_time"] is None else f"{row['step_time']:.2f}"
        parts = [f"{row['bytes'][part] / 2**power:,.0f}" for part in BYTES]
        table.add_row(method, *parts, time, style="bold" if method == "lora" else "")
    return table


def absent(report: dict[str, Any]) -> Table:
    """The methods that were left out, or failed, and why."""
    table = _table("left out, or failed", [])
    table.add_column("why", overflow="fold")
    for method, row in report["methods"].items():
        if "skipped" in row:
            table.add_row(method, Text(row["skipped"]))
        elif row["failed"]:
            table.add_row(method, Text(f"{row['failed']['runs']} runs; the first: {row['failed']['first']}"))
    return table


def markdown(report: dict[str, Any], lang: str = "en") -> str:
    """A Markdown table of the report: size, trained parameters, the first metric, steps to the target, peak memory.

    Args:
        lang: "en" or "zh".
    """
    t = lambda en, zh: zh if lang == "zh" else en  # noqa: E731
    metric, target = report["metrics"][0], report["target_loss"]
    power, unit = _memory_unit(report["methods"])
    steps = t("steps", "步数") if target is None else t(f"steps to loss {target:g}", f"损失降到 {target:g} 的步数")
    sizes = {"r": "r = {}", "bottleneck": t("{} wide", "宽 {}"), "": ""}
    head = [
        t("method", "方法"), t("size", "规模"), t("trained parameters", "训练的参数"),
        t(TITLES, TITLES_ZH)[metric], steps, t(f"peak memory, {unit}", f"内存峰值，{unit}"),
    ]  # fmt: skip
    absent = {"skipped": t("left out", "未参加"), "failed": t("failed", "失败")}
    rows = []
    for method, row in report["methods"].items():
        if "loss" not in row:
            rows.append([method, "", "", absent["skipped" if "skipped" in row else "failed"], "", ""])
            continue
        size = sizes.get(row["unit"], t("encoder {} wide", "编码器宽 {}")).format(row["size"])
        reached = _steps(row, report["seeds"])
        if lang == "zh":
            reached = re.sub(r" \((\d+) of (\d+)\)", r"（\2 次中 \1 次）", reached.replace("not reached", "未达到"))
        peak = f"{row['bytes']['peak'] / 2**power:,.0f}" if row["bytes"] else ""
        rows.append([method, size, _trains(row), _spread(row[metric], metric), reached, peak])
    return markdown_table(head, rows)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of a Markdown table."""
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _memory_unit(methods: dict[str, Any]) -> tuple[int, str]:
    """The power of two that bytes are divided by, and its name."""
    largest = max((row["bytes"]["peak"] for row in methods.values() if row.get("bytes")), default=0)
    return (20, "MiB") if largest >= 1 << 27 else (10, "KiB")


def _table(title: str, columns: list[str], before: str = "") -> Table:
    """Columns of figures behind the method's, and perhaps one before it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    if before:
        table.add_column(before, justify="right")
    table.add_column(title, no_wrap=True, min_width=14)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _spread(found: dict[str, Any], name: str) -> str:
    """mean ± deviation, accuracies in percent."""
    if found.get("mean") is None:
        return "–"
    scale, digits = (100, 1) if name in PERCENT else (1, 2 if name == "perplexity" else 3)
    shown = f"{scale * found['mean']:.{digits}f}"
    deviation = found.get("deviation")
    return shown if deviation is None else f"{shown} ± {scale * deviation:.{digits}f}"


def _change(name: str, row: dict[str, Any], report: dict[str, Any]) -> str:
    """By how much perplexity rose: what was forgotten."""
    before = report["base"].get(name)
    return f" ({row[name]['mean'] / before - 1:+.1%})" if name == "perplexity" and before else ""


def _trains(row: dict[str, Any]) -> str:
    """What trains at first, and what is left at the end where that is less."""
    if "trains" not in row:
        return f"{row['budget']:,}"
    first, (least, most) = row["trains"], row["left"]
    if first == least == most:
        return f"{first:,}"
    return f"{first:,} → {least:,}" if least == most else f"{first:,} → {least:,}–{most:,}"


def _lr(row: dict[str, Any]) -> str:
    """The learning rate; marked where the best is the last that was tried."""
    if row["lr"] is None:
        return "none"
    tried = [float(lr) for lr in row["tried"]]
    at_end = len(tried) > 1 and row["lr"] in (min(tried), max(tried))
    return f"{row['lr']:g}{'*' * at_end}"


def _steps(row: dict[str, Any], seeds: int) -> str:
    """Steps to the target; how many of the seeds reached it, where not all did."""
    reached = row["steps_to_target"]
    if not reached["reached"]:
        return "not reached"
    deviation = f" ± {reached['deviation']:.0f}" if reached["deviation"] is not None else ""
    count = f" ({reached['reached']} of {seeds})" if reached["reached"] < seeds else ""
    return f"{reached['mean']:.0f}{deviation}{count}"


def _explained(report: dict[str, Any]) -> str:
    chosen = "each method's best on validation data (*: the last of those tried)" if report["swept"] else "the recipe's"
    aim = {"given": "given", "": "none"}.get(
        report["target_of"], f"the mean of {report['target_of']} after half of its steps"
    )
    seeds = f"{report['seeds']} seed{'s' * (report['seeds'] > 1)}"
    return (
        f"In order of {TITLES[report['metrics'][0]].removesuffix(', %')}; mean ± standard deviation of {seeds}. size: "
        f"rank r, bottleneck b, encoder's width H. trains: at first → at the end. lr: {chosen}. loss: of the last "
        f"tenth of {report['setting']['steps']} steps. Target loss: {aim}.{_told_apart(report)}"
    )


def _told_apart(report: dict[str, Any]) -> str:
    """How near to each other shares of so many cases mean nothing."""
    share, error = standard_error(report)
    if not error:
        return ""
    return f" One standard error of {report['tested']} cases at {share:.0%}: {100 * error:.1f} points."


def standard_error(report: dict[str, Any]) -> tuple[float, float]:
    """The middle method's share of the first metric, and its standard error, √(p(1 − p)/n) of n tested cases."""
    metric = report["metrics"][0]
    shares = sorted(row[metric]["mean"] for row in report["methods"].values() if metric in row)
    middle = shares[len(shares) // 2] if shares else 0.0
    return middle, (middle * (1 - middle) / report["tested"]) ** 0.5


def _costs_explained() -> str:
    return (
        "Measured: weights, gradients, optimizer with the method's own state, what the forward pass keeps; peak: the "
        "most that existed at once. full-then-lora's bytes are those of its full phase, its time the mean of both; "
        "AdaLoRA's are with the ranks that it starts with. Time: median of steps taken in turn, in one process."
    )
