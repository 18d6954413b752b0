"""The command `minipeft`: train on the digits, verify the document's claims, look at the machine.

Commands import what they need when they run, so that `minipeft --help` answers at once.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

app = typer.Typer(
    help="Parameter-efficient fine-tuning (LoRA and its relatives) from scratch in NumPy, claims checked by numbers.",
    epilog="First steps:  [bold]minipeft train[/]  then  [bold]minipeft verify[/]  (each takes less than a minute).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def fail(message: object) -> NoReturn:
    """One red line on stderr, exit status 2."""
    err.print(Text.assemble(("error: ", "bold red"), " ".join(str(message).split())), soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """What the library says about a wrong argument or file, in one line instead of a traceback."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, OSError, MemoryError) as error:
        fail(error)


def check_writable(path: Path, option: str, directory: bool) -> None:
    """Fail now, not after the work, where a file (or a directory of files) cannot be written. Leaves nothing behind."""
    if path.exists() and path.is_dir() != directory:
        fail(f"{option}: {path} is a {'file' if directory else 'directory'}")
    folder = path if directory else path.parent
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"{option}: cannot write in {folder} ({error.strerror})")


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        out.print(f"minipeft {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Holds the options that come before a command."""


# --- train ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A method of `minipeft train`: how its config is made (None: everything trains, without one) and a good rate."""

    config: Callable[[int, float, str | list[str]], Any] | None
    lr: float


def _lora(r: int, alpha: float, targets: str | list[str], **variant: Any) -> Any:
    from . import LoraConfig

    return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **variant)


METHODS = {
    "full": Recipe(None, lr=1e-3),
    "lora": Recipe(_lora, lr=3e-3),
    "rslora": Recipe(partial(_lora, use_rslora=True), lr=3e-3),
}
MODELS = ("vit", "mlp")
SHIFTS = ("rotated", "mirrored", "inverted", "rotated-inverted", "transposed")  # digits.SHIFTS, without its import
RANK, ALPHA, TARGETS = 8, 16.0, "all-linear"


@app.command(epilog="[bold]minipeft train --method lora --r 4 --targets q_proj,v_proj --out runs/attention[/]")
def train(
    model: Annotated[str, typer.Option(help=f"The pre-trained base: {', '.join(MODELS)}.")] = "vit",
    method: Annotated[str, typer.Option(help=f"What trains: {', '.join(METHODS)}.")] = "lora",
    r: Annotated[int | None, typer.Option(help=f"Rank of the update BA.  [dim]\\[default: {RANK}][/]")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help=f"α: the update is scaled by α/r (rslora: α/√r).  [dim]\\[default: {ALPHA:g}][/]"),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help=f"Layers to adapt: all-linear, or names with commas.  [dim]\\[default: {TARGETS}][/]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps (AdamW).")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Digits in a step.")] = 64,
    lr: Annotated[float | None, typer.Option(help="Learning rate.  [dim]\\[default: the method's][/]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="For start values and the order of the digits.")] = 0,
    shift: Annotated[
        str, typer.Option(help=f"The new domain, how the digits are changed: {', '.join(SHIFTS)}.")
    ] = "rotated",
    directory: Annotated[
        Path | None,
        typer.Option("--out", help="Where the result and checkpoints go.  [dim]\\[default: runs/MODEL-METHOD][/]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in that directory.")] = False,
) -> None:
    """Adapt a pre-trained digit classifier to a new domain (rotated digits); show accuracy before and after."""
    if model not in MODELS:
        fail(f"--model: got {model!r}; accepted are {', '.join(MODELS)}")
    if shift not in SHIFTS:
        fail(f"--shift: got {shift!r}; accepted are {', '.join(SHIFTS)}")
    if method not in METHODS:
        fail(f"--method: got {method!r}; accepted are {', '.join(METHODS)}")
    recipe = METHODS[method]
    given = [name for name, value in (("--r", r), ("--alpha", alpha), ("--targets", targets)) if value is not None]
    if recipe.config is None and given:
        fail(f"{given[0]}: method {method!r} has no such option; it trains every parameter")
    directory = directory or Path("runs") / f"{model}-{method}"
    check_writable(directory, "--out", directory=True)
    settings = {
        "model": model,
        "method": method,
        "shift": shift,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
    }
    settings["lr"] = recipe.lr if lr is None else lr
    if recipe.config:
        settings |= {"r": RANK if r is None else r, "alpha": ALPHA if alpha is None else alpha}
        settings["targets"] = targets or TARGETS
    try:
        with user_errors():
            _train(settings, directory, resume)
    except KeyboardInterrupt:
        err.print("stopped; the same command with --resume goes on from the last checkpoint")
        raise typer.Exit(130) from None


def _train(settings: dict[str, Any], directory: Path, resume: bool) -> None:
    """The run that `settings` describe: everything is checked, then trained, then written and shown."""
    import numpy as np

    from . import files, get_peft_model, optim
    from .data import digits
    from .models import load_base
    from .train import CHECKPOINT, fit

    task = digits.transfer(settings["shift"])
    if settings["batch_size"] > len(task.train.y):
        fail(f"--batch-size: got {settings['batch_size']}; there are {len(task.train.y)} digits to train on")
    batches = digits.batches(*task.train, batch_size=settings["batch_size"], seed=settings["seed"])
    model = load_base(settings["model"])
    before = [_accuracy(model, part) for part in (task.test, task.original_test)]
    config = METHODS[settings["method"]].config
    if config:
        adapter = config(settings["r"], settings["alpha"], _targets(settings["targets"]))
        model = get_peft_model(model, adapter, seed=settings["seed"])
    else:
        model.requires_grad_(True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.AdamW(trainable, lr=settings["lr"])
    if resume:
        _check_same_run(settings, directory)
        if not (directory / CHECKPOINT).exists():
            out.print(f"no checkpoint in {directory} yet: starting at the first step")
    base, trains = sum(p.size for p in load_base(settings["model"]).parameters()), sum(p.size for p in trainable)
    out.print(
        f"[bold]{settings['model']}[/] ({base:,} parameters) on {task.name} digits, {settings['steps']} steps; ", end=""
    )
    out.print(f"[bold]{settings['method']}[/] trains {trains:,} parameters, {trains / base:.1%} of the base's")
    if not resume:  # an older run's checkpoint would not belong to these settings
        (directory / CHECKPOINT).unlink(missing_ok=True)
    files.write_json(directory / "run.json", settings)
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that is not finite stops the run with a better word
        history = fit(
            model, batches, steps=settings["steps"], optimizer=optimizer, checkpoint_dir=directory, resume=resume
        )
    model.eval()
    after = [_accuracy(model, part) for part in (task.test, task.original_test)]
    saved = _save(model, directory)
    _show_accuracy(task, model, before, after)
    out.print(f"last loss {history.loss[-1]:.4f}, {history.seconds:.1f} s; ", end="")
    out.print(f"saved [bold]{saved}[/] ({saved.stat().st_size / 1000:,.0f} kB)", soft_wrap=True)


def _targets(text: str) -> str | list[str]:
    """`all-linear`, a regular expression, or names with commas, as `LoraConfig` takes them."""
    if text.lower() in ("all-linear", "all") or any(sign in text for sign in "*+?[(|^$\\"):
        return text
    return [name.strip() for name in text.split(",")]


def _check_same_run(settings: dict[str, Any], directory: Path) -> None:
    """Fail where the directory holds a run with other settings; only more steps are welcome."""
    from . import files

    if not (directory / "run.json").exists():
        return
    earlier = files.read_json(directory / "run.json")
    different = [k for k in settings.keys() | earlier.keys() if k != "steps" and settings.get(k) != earlier.get(k)]
    if different:
        shown = ", ".join(f"{k} {earlier.get(k)} (now {settings.get(k)})" for k in sorted(different))
        fail(f"--resume: the run in {directory} has {shown}; use its settings, or another --out")
    if settings["steps"] < earlier.get("steps", 0):
        fail(f"--resume: the run in {directory} has {earlier['steps']} steps; as many or more are accepted")


def _accuracy(model: Any, examples: Any) -> float:
    """The share of the examples whose largest logit is the right digit's."""
    from . import no_grad

    with no_grad():
        return float((model(examples.x).numpy().argmax(axis=-1) == examples.y).mean())


def _save(model: Any, directory: Path) -> Path:
    """The adapter in PEFT's format, or the whole model where everything trained; the path of the tensors."""
    from . import PeftModel, files

    if isinstance(model, PeftModel):
        model.save_pretrained(directory)
        return directory / "adapter_model.safetensors"
    return files.write_tensors(directory / "model.safetensors", model.state_dict())


def _show_accuracy(task: Any, model: Any, before: list[float], after: list[float]) -> None:
    """A table: accuracy on held-out digits, shifted and upright, before and after; and with the adapter taken off."""
    from . import PeftModel

    rows = {f"{task.name} digits": task.test, "original digits": task.original_test}
    table = Table("accuracy on held-out digits", title_justify="left")
    columns = {"before": before, "after": after}
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            columns["adapter taken off"] = [_accuracy(model, part) for part in rows.values()]
    for name in columns:
        table.add_column(name, justify="right", style="bold green" if name == "after" else "")
    for i, (name, part) in enumerate(rows.items()):
        table.add_row(f"{name} ({len(part.y)})", *(f"{values[i]:.1%}" for values in columns.values()))
    out.print(table)


# --- verify -----------------------------------------------------------------------------------------------------------

COLOURS = {
    "confirmed": "green",
    "confirmed within limits": "yellow",
    "corrected": "magenta",
    "measured": "cyan",
    "failed": "bold red",
}
WIDE = 120  # columns from which the claim and its statement stand side by side


@app.command(epilog="[bold]minipeft verify[/]   or   [bold]minipeft verify LoRA --json ledger.json[/]")
def verify(
    sections: Annotated[
        list[str] | None,
        typer.Argument(help="Sections (LoRA) or claims (lora.merge); all when left out.", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write every claim and figure to this file.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Add what needs the real language model (minutes).")] = False,
) -> None:
    """Check what the document claims, by numbers computed now; exit status 1 if a claim's check fails."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import ledger

    with user_errors():
        claims = ledger.claims(sections or (), full)
    if json_file:
        check_writable(json_file, "--json", directory=False)
    start, verdicts = time.perf_counter(), []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("", total=len(claims))
        for claim in claims:
            progress.update(bar, description=f"checking {claim.id}")
            verdicts.append(claim.judge())
            progress.advance(bar)
    seconds = time.perf_counter() - start
    out.print(_table(verdicts, out.width))
    counts = Counter(verdict.verdict for verdict in verdicts)
    summary = [Text(f"{counts[name]} {name}", style=COLOURS[name]) for name in COLOURS if counts[name]]
    out.print(Text(", ").join([Text(f"{len(verdicts)} claims"), *summary, Text(f"{seconds:.1f} s")]))
    if json_file:
        with user_errors():
            _write_ledger(json_file, verdicts, dict(counts), seconds, full)
        out.print(f"written to {json_file}", soft_wrap=True)
    raise typer.Exit(1 if counts["failed"] else 0)


def _table(verdicts: list[Any], width: int) -> Table:
    """The ledger: section, claim, the document's statement, what was found, verdict; narrow terminals stack three."""
    wide = width >= WIDE
    table = Table(expand=True, show_lines=True)
    for name, ratio in (("section", None), ("claim", None), ("the document says", 4)) if wide else (("claim", 4),):
        table.add_column(name, ratio=ratio, no_wrap=wide and ratio is None)
    table.add_column("found", ratio=5)
    table.add_column("verdict", min_width=9, max_width=12 if width < 150 else None)
    previous = None
    for v in verdicts:
        claim = Text(v.id, style="bold")
        first = [Text(v.section if v.section != previous else ""), claim, Text(v.statement)]
        if not wide:
            first = [Text("\n").join([claim, Text(f"{v.section}: {v.statement}")])]
        table.add_row(*first, Text(v.found), Text(v.verdict, style=COLOURS.get(v.verdict, "")))
        previous = v.section
    return table


def _write_ledger(path: Path, verdicts: list[Any], counts: dict[str, int], seconds: float, full: bool) -> None:
    """The ledger as JSON: what ran, on which machine, and every claim with its figures. Written whole or not at all."""
    from . import __version__, files
    from .doctor import machine_summary

    content = {"minipeft": __version__, "full": full, "seconds": round(seconds, 3), "counts": counts}
    content |= {"machine": machine_summary(), "claims": [asdict(verdict) for verdict in verdicts]}
    files.write_json(path, _plain(content))


def _plain(value: Any) -> Any:
    """`value` with nothing that JSON lacks: NumPy numbers become Python's, tuples lists, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- doctor -----------------------------------------------------------------------------------------------------------


@app.command()
def doctor() -> None:
    """Look at this machine: NumPy, its BLAS and kernel, threads, speed; warns of what makes it slow."""
    from .doctor import report, show

    with err.status("measuring …") if err.is_terminal else nullcontext():
        found = report()
    show(found, out)
