"""Progress bars on stderr: of a training run, and of work that is counted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class progress_bar:  # noqa: N801
    """A progress bar on stderr: step, loss, examples per second, time left. Called as show(done, loss, examples)."""

    def __init__(self, steps: int, first: int, progress: bool | None) -> None:
        self.steps, self.first, self.bar = steps, first, None
        self.wanted = sys.stderr.isatty() if progress is None else progress

    def __enter__(self) -> Callable[[int, float, int], None]:
        if not self.wanted:
            return lambda done, loss, examples: None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.bar.start()
        task = self.bar.add_task("", total=self.steps, completed=self.first, told="")
        start, seen = time.perf_counter(), 0

        def show(done: int, loss: float, examples: int) -> None:
            nonlocal seen
            seen += examples
            speed = seen / (time.perf_counter() - start)
            self.bar.update(task, completed=done, told=f"loss {loss:.4f}  {speed:,.0f} samples/s")

        return show

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def counting_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr that moves on by one whenever what it gives is called; on a terminal only, and gone at the end.

    While another bar of rich is shown there is none: two of them would write over each other.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.file_proxy import FileProxy
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    shown = isinstance(sys.stderr, FileProxy)  # rich's stand-in for it, as long as it shows something
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=shown) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
