"""The command `minipeft compare`. Imported by cli.py, where the app is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .adapt import METHODS
from .cli import app, check_writable, err, fail, option, out, user_errors
from .data import digits
from .models import BASES

TASKS = ("digits", "self-cognition")
DEFAULTS = {  # (in full, quick)
    "digits": {"base": ("vit",) * 2, "steps": (200, 40), "batch_size": (64, 64), "seeds": (5, 2)},
    "self-cognition": {"base": ("smollm2",) * 2, "steps": (60, 10), "batch_size": (6, 6), "seeds": (2, 1)},
}


@app.command(
    epilog="[bold]minipeft compare --base mlp --seeds 3[/]   or   [bold]minipeft compare --methods lora,dora,full[/]"
)
def compare(
    task: Annotated[str, option(f"What is learned: {' or '.join(TASKS)}.")] = "digits",
    methods: Annotated[str, option(f"all, or some of {', '.join(METHODS)}, with commas.")] = "all",
    seeds: Annotated[int | None, option("Runs of each method.", "5, language 2", min=1)] = None,
    base: Annotated[str | None, option(f"{', '.join(BASES)}, or a language model.", "vit, language smollm2")] = None,
    shift: Annotated[str, option(f"Digits: {', '.join(digits.SHIFTS)}.")] = "rotated",
    steps: Annotated[int | None, option("Steps of each run.", "200, language 60")] = None,
    sweep: Annotated[bool | None, option("Choose learning rates.", "yes, --quick no", "--sweep/--no-sweep")] = None,
    quick: Annotated[bool, option("Few short runs with the recipes' learning rates.", None, "--quick")] = False,
    target: Annotated[float | None, option("Count steps to this loss.", "LoRA's at half of its steps")] = None,
    jobs: Annotated[int | None, option("Runs side by side, in processes.", "one a CPU, language 1", min=1)] = None,
    directory: Annotated[Path | None, option("Where runs and the report go.", "runs/compare-BASE", "--out")] = None,
    lang: Annotated[str, option("Labels of the figure: en or zh.")] = "en",
) -> None:
    """Train all methods with as many parameters each, and rank them: quality, bytes, time. Can be stopped and go on."""
    if task not in TASKS:
        fail(f"--task: got {task!r}; accepted are {', '.join(TASKS)}")
    chosen = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in METHODS]
    if unknown or not chosen:
        fail(f"--methods: got {methods!r}; accepted are all, or some of {', '.join(METHODS)}, with commas")
    if target is not None and not target > 0:
        fail(f"--target: got {target}; a positive number is accepted")
    given = {"base": base, "steps": steps, "seeds": seeds}
    values = {name: pair[quick] for name, pair in DEFAULTS[task].items()}
    values |= {name: value for name, value in given.items() if value is not None}
    seeds = values.pop("seeds")
    from . import plots
    from .compare import REPORT, Comparison, write_report
    from .compare_runs import Setting, Store
    from .compare_tables import tables
    from .doctor import machine_summary, usable_cpus
    from .plots.methods import write_comparison

    directory = directory or Path("runs") / f"compare-{Path(values['base']).stem or 'model'}"
    with user_errors():
        setting = Setting(task=task, shift=shift, **values)
        plots.check_figures(None, lang)
    check_writable(directory, "--out", directory=True)
    comparison = Comparison(
        setting, list(dict.fromkeys(chosen)), seeds, not quick if sweep is None else sweep, directory, target,
        say=lambda text: err.print(text, soft_wrap=True, markup=False), stage=stage,
    )  # fmt: skip
    try:
        with user_errors():
            comparison.setting = setting.identified()
            report = comparison.run(jobs or (usable_cpus() if task == "digits" else 1))
            report["machine"] = machine_summary()
            write_report(directory / REPORT, report)
            written = write_comparison(directory, report, lang)
    except KeyboardInterrupt:
        err.print(
            f"stopped; {comparison.done_now} results of this time are kept in {directory}: the same command goes on",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    for part in tables(report, out.width):
        out.print(part)
    others = Store(directory).others(list(comparison.asked), REPORT)
    if others:
        err.print(f"{len(others)} other JSON files in {directory} (other settings, or another version) were not used")
    for path in (directory / REPORT, *written):
        out.print(f"written to {path}", soft_wrap=True)
    if all("loss" not in row for row in report["methods"].values()):
        raise typer.Exit(1)


@contextmanager
def stage(title: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; elsewhere a line after each tenth."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=err, disable=not err.is_terminal) as bar:
        shown, ended = bar.add_task(title, total=total, completed=done), done

        def advance() -> None:
            nonlocal ended
            ended += 1
            bar.advance(shown)
            if bar.disable and (ended == total or ended * 10 // total > (ended - 1) * 10 // total):
                err.print(f"{title}: {ended}/{total}")

        yield advance
