"""The command `minipeft`: train on the digits, verify the document's claims, look at the machine.

The ledger and what it needs (SciPy) are imported when they run, so that `minipeft --help` answers at once.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from . import __version__, adapt, adapt_language, files
from .data import digits
from .models import BASES
from .run_state import CHECKPOINT

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
    except OSError as error:  # "[Errno 13] Permission denied: 'x'" becomes "x: Permission denied"
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except (ValueError, TypeError, ArithmeticError, MemoryError, ImportError) as error:
        fail(error)


def check_writable(path: Path, option: str, directory: bool) -> None:
    """Fail now, not after the work, where a file (or a directory of files) cannot be written. Leaves nothing behind."""
    folder = path if directory else path.parent
    try:
        if path.exists() and path.is_dir() != directory:
            fail(f"{option}: {path} is a {'file' if directory else 'directory'}")
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:  # of exists() too, in a directory that may not be looked into
        fail(f"{option}: cannot write in {folder} ({error.strerror})")


def option(text: str, default: object = None, *flags: str, **more: Any) -> Any:
    """A command's option; `default` is what its None becomes, for people to read."""
    told = "" if default is None else f"  [dim]\\[default: {default}][/]"
    return typer.Option(*flags, help=text + told, **more)


def _version(wanted: bool) -> None:
    if wanted:
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


LANGUAGE = "smollm2, a Hugging Face directory or a .gguf file"
FOR_DIGITS, FOR_LANGUAGE = ({"rich_help_panel": f"For {what}"} for what in ("digits", "a language model"))


@app.command(
    epilog="[bold]minipeft train --method lora --r 4 --targets q_proj,v_proj --out runs/attention[/]   or   "
    "[bold]minipeft train --model smollm2 --name Lumi --author 'Ada Lab'[/]"
)
def train(
    model: Annotated[
        str | None,
        option(
            f"A digit classifier ({', '.join(BASES)}) or a language model ({LANGUAGE}).",
            "vit; smollm2 with --name or --data",
        ),
    ] = None,
    method: Annotated[str, option(f"What trains: {', '.join(adapt.METHODS)}.")] = "lora",
    r: Annotated[int | None, option("Rank of BA (adapter: bottleneck; p-tuning: tokens).", 8)] = None,
    alpha: Annotated[float | None, option("α: the update is scaled by α/r (rslora: α/√r).", "2r")] = None,
    targets: Annotated[str | None, option("Layers to adapt: all-linear, or names with commas.", "all-linear")] = None,
    steps: Annotated[
        int | None, option("Optimizer steps (AdamW).", f"{adapt.STEPS}, language {adapt_language.STEPS}", min=1)
    ] = None,
    batch_size: Annotated[
        int | None, option("Digits or chats in a step.", f"{adapt.BATCH}, language {adapt_language.BATCH}", min=1)
    ] = None,
    lr: Annotated[float | None, option("Learning rate.", "the method's")] = None,
    seed: Annotated[int, option("For start values and the order of the data.", min=0)] = 0,
    shift: Annotated[
        str | None,
        option(f"The new domain, how digits are changed: {', '.join(digits.SHIFTS)}.", "rotated", **FOR_DIGITS),
    ] = None,
    data: Annotated[
        str | None, option("self-cognition, or a .jsonl file of chats.", "self-cognition", **FOR_LANGUAGE)
    ] = None,
    name: Annotated[str | None, option("The name that it learns to give.", **FOR_LANGUAGE)] = None,
    author: Annotated[str | None, option("Who made it, as it learns to say.", **FOR_LANGUAGE)] = None,
    checkpointing: Annotated[
        bool,
        option(
            "Keep only the input of each block: half the memory, more time.", None, "--checkpointing", **FOR_LANGUAGE
        ),
    ] = False,
    directory: Annotated[
        Path | None, option("Where the result and checkpoints go.", "runs/MODEL-METHOD", "--out")
    ] = None,
    resume: Annotated[bool, option("Go on from the checkpoint in that directory.", None, "--resume")] = False,
) -> None:
    """Adapt a pre-trained model: a digit classifier to changed digits, a language model to a name or your own chats."""
    language = {"data": data, "name": name, "author": author, "checkpointing": checkpointing or None}
    language = {option: value for option, value in language.items() if value is not None}
    model = model or ("smollm2" if language else "vit")
    is_digits = model in BASES
    if not is_digits and not _may_be_language_model(model):
        fail(f"--model: got {model!r}; accepted are {', '.join(BASES)}, {LANGUAGE}")
    if is_digits and language:
        fail(f"--{next(iter(language))}: only for a language model; --model {model} is a digit classifier")
    if not is_digits and shift is not None:
        fail(f"--shift: only for a digit classifier; --model {model} is a language model")
    if targets is not None and not all(name.strip() for name in targets.split(",")):
        fail(f"--targets: got {targets!r}; accepted are all-linear, or names with a comma between them")
    given = {"steps": steps, "batch_size": batch_size, "shift": shift} | language
    given = {option: value for option, value in given.items() if value is not None}
    options = {"method": method, "r": r, "alpha": alpha, "targets": targets, "lr": lr, "seed": seed} | given
    directory = directory or Path("runs") / f"{Path(model).stem or 'model'}-{method}"
    with user_errors():
        if is_digits:
            run, settings, consoles = adapt.run, adapt.Settings(model, **options), (out,)
        else:
            run, settings, consoles = adapt_language.run, adapt_language.Settings(model, **options), (out, err)
    check_writable(directory, "--out", directory=True)
    try:
        with user_errors():
            run(settings, directory, resume, *consoles)
    except KeyboardInterrupt:
        err.print(stopped(directory), soft_wrap=True)
        raise typer.Exit(130) from None


def stopped(directory: Path) -> str:
    """What an interrupted run left, for people to read."""
    if (directory / CHECKPOINT).exists():
        return f"stopped; {directory} keeps a checkpoint: the same command with --resume goes on from there"
    return "stopped before the first checkpoint, which comes after a tenth of the steps: nothing is kept"


def _may_be_language_model(model: str) -> bool:
    """Whether it is a name that is known, or a path: a misspelt name is told about both kinds."""
    return model == "smollm2" or model.endswith(".gguf") or "/" in model or "\\" in model or Path(model).exists()


# --- verify -----------------------------------------------------------------------------------------------------------


@app.command(
    epilog="[bold]minipeft verify LoRA --json ledger.json[/]   or   [bold]minipeft verify --html companion.html[/]"
)
def verify(
    sections: Annotated[
        list[str] | None,
        typer.Argument(help="Sections (LoRA) or claims (lora.merge); all when left out.", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write every claim and figure to this file.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page to read, with figures and code.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Add what needs the real language model (minutes).")] = False,
    lang: Annotated[str, typer.Option(help="The table's language: en or zh.")] = "en",
) -> None:
    """Check what the document claims, by numbers computed now; exit status 1 if a claim's check fails."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import ledger, ledger_table
    from .models.download import smollm2_file

    with user_errors():
        ledger_table.check_language(lang)
        claims = ledger.claims(sections or (), full)
        if full:
            smollm2_file()  # says what to run where it is not there
    for file, option in ((json_file, "--json"), (html_file, "--html")):
        if file:
            check_writable(file, option, directory=False)
    start, verdicts = time.perf_counter(), []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("", total=len(claims))
        for claim in claims:
            progress.update(bar, description=f"{'检验' if lang == 'zh' else 'checking'} {claim.id}")
            verdicts.append(claim.judge())
            progress.advance(bar)
    seconds = time.perf_counter() - start
    out.print(ledger_table.table(verdicts, out.width, lang))
    out.print(ledger_table.summary(verdicts, seconds, lang))
    counts = Counter(verdict.verdict for verdict in verdicts)
    drawing, written = ("绘图 …", "已写入") if lang == "zh" else ("drawing …", "written to")
    if json_file:
        with user_errors():
            _write_ledger(json_file, verdicts, dict(counts), seconds, full)
        out.print(f"{written} {json_file}", soft_wrap=True)
    if html_file:
        with user_errors(), err.status(drawing) if err.is_terminal else nullcontext():
            _write_companion(html_file, verdicts, seconds)
        out.print(f"{written} {html_file}", soft_wrap=True)
    raise typer.Exit(1 if counts["failed"] else 0)


def _write_ledger(path: Path, verdicts: list[Any], counts: dict[str, int], seconds: float, full: bool) -> None:
    """The ledger as JSON: what ran, on which machine, and every claim with its figures. Written whole or not at all."""
    from .doctor import machine_summary

    content = {"minipeft": __version__, "full": full, "seconds": round(seconds, 3), "counts": counts}
    content |= {"machine": machine_summary(), "claims": [asdict(verdict) for verdict in verdicts]}
    files.write_json(path, _plain(content))


def _write_companion(path: Path, verdicts: list[Any], seconds: float) -> None:
    from .companion import write_page
    from .doctor import machine_summary

    machine = machine_summary()
    described = f"{machine['cpu']} × {machine['cpus']}, NumPy {machine['numpy']}, Python {machine['python']}"
    write_page(path, verdicts, described, seconds)


def _plain(value: Any) -> Any:
    """`value` with nothing that JSON lacks: NumPy numbers become Python's, tuples lists, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- figures and doctor -----------------------------------------------------------------------------------------------


@app.command(epilog="[bold]minipeft figures[/]   or   [bold]minipeft figures adaptation --out pictures[/]")
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="Figures; all when left out.", show_default=False)] = None,
    directory: Annotated[Path, typer.Option("--out", help="Where the SVG and PNG files go.")] = Path("figures"),
    lang: Annotated[str, typer.Option(help="Labels: en or zh (NAME.zh.svg; needs a Chinese font).")] = "en",
) -> None:
    """Draw the figures, from runs made now."""
    from . import plots

    check_writable(directory, "--out", directory=True)
    with user_errors():
        names = plots.check_figures(names, lang)
        with err.status("drawing …") if err.is_terminal else nullcontext():
            for name in names:
                for path in plots.write_figures(directory, [name], lang):
                    out.print(f"saved [bold]{path}[/]", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Look at this machine: NumPy, its BLAS and kernel, threads, speed; warns of what makes it slow."""
    from .doctor import report, show

    with err.status("measuring …") if err.is_terminal else nullcontext():
        found = report()
    show(found, out)


from . import cli_compare, cli_language  # noqa: E402, F401 - their commands need the app
