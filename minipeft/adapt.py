"""The run of `minipeft train`: a pre-trained digit classifier adapted to shifted digits, accuracy before and after.

Left to its defaults it is the run that the ledger judges and the figures show (ledger/runs.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from rich.console import Console
from rich.table import Table

from . import files, optim
from .checks import check_positive
from .data import digits
from .ledger.runs import BATCH, STEPS, accuracy
from .models import BASES, load_base
from .nn import Module
from .peft import PeftModel
from .recipes import METHODS, Choice, prepared
from .train import CHECKPOINT, classification_loss, fit

RUN = "run.json"


@dataclass(kw_only=True)
class MethodSettings:
    """What every run depends on, named as the command's options; what is None becomes the method's own default.

    Raises:
        ValueError: a method that does not exist, an option that it does not have, a rate that is not positive.
    """

    method: str = "lora"
    r: int | None = None
    alpha: float | None = None
    targets: str | None = None
    lr: float | None = None
    seed: int = 0

    rate: ClassVar[str] = "lr"  # what a recipe calls the learning rate of such a run

    def __post_init__(self) -> None:
        self._check_option("method", METHODS)
        self.lr = getattr(METHODS[self.method], self.rate) if self.lr is None else self.lr
        check_positive("--lr", self.lr)
        fill_options(self)

    def _check_option(self, option: str, accepted: Collection[str]) -> None:
        if getattr(self, option) not in accepted:
            raise ValueError(f"--{option}: got {getattr(self, option)!r}; accepted are {', '.join(accepted)}")

    def choice(self) -> Choice:
        """What the method's recipe is given."""
        return choice(self)


@dataclass
class Settings(MethodSettings):
    """What a run on the digits depends on.

    Raises:
        ValueError: a model, method or shift that does not exist, or an option that the method does not have.
    """

    model: str = "vit"
    shift: str = "rotated"
    steps: int = STEPS
    batch_size: int = BATCH

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_option("model", BASES)
        self._check_option("shift", digits.SHIFTS)
        if not 1 <= self.batch_size <= digits.PARTS["train"]:
            raise ValueError(f"--batch-size: got {self.batch_size}; 1 to {digits.PARTS['train']} is accepted")


def fill_options(settings: MethodSettings) -> None:
    """Give r, alpha and targets their defaults; ValueError where the method has no such options."""
    own = METHODS[settings.method].options
    for option in ("r", "alpha", "targets"):
        if option not in own and getattr(settings, option) is not None:
            why = f"its options are --{', --'.join(own)}" if own else "it trains whole weights"
            raise ValueError(f"--{option}: method {settings.method!r} has no such option, {why}")
    defaults = {"r": 8, "alpha": 2.0 * (settings.r or 8), "targets": "all-linear"}
    for option in own:
        if getattr(settings, option) is None:
            setattr(settings, option, defaults[option])


def choice(settings: Settings) -> Choice:
    """What the method's recipe is given.

    Targets that are a regular expression are passed on as they are; names with commas become a list.
    """
    targets = settings.targets or "all-linear"
    pattern = targets.lower() in ("all-linear", "all") or any(sign in targets for sign in "*+?[(|^$\\")
    names = targets if pattern else [name.strip() for name in targets.split(",")]
    given = {name: getattr(settings, name) for name in ("r", "alpha") if getattr(settings, name) is not None}
    return Choice(targets=names, steps=settings.steps, **given)


def run(settings: Settings, directory: Path, resume: bool, console: Console) -> None:
    """The run that `settings` describe: everything is checked, then trained, then written and shown.

    The directory gets `run.json` (the settings), the checkpoint, and the adapter in PEFT's format, or the whole model
    where its weights themselves trained.

    Raises:
        ValueError: the settings do not fit the model, or with `resume` not the run in the directory.
    """
    task = digits.transfer(settings.shift)
    batches = digits.batches(*task.train, batch_size=settings.batch_size, seed=settings.seed)
    model = load_base(settings.model)
    size, before = sum(p.size for p in model.parameters()), _accuracies(model, task)
    model = prepared(model, settings.method, settings.choice(), settings.seed, batches, classification_loss)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.lr)
    if resume:
        check_same_run(settings, directory, console)
    begin(settings, directory, resume)
    console.print(
        f"[bold]{settings.model}[/] ({size:,} parameters) learns {task.name} digits in {settings.steps} steps; "
        f"[bold]{settings.method}[/] trains {trained_share(model, size, '.1%')}."
    )
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that is not finite stops the run with better words
        history = fit(
            model, batches, steps=settings.steps, optimizer=optimizer, checkpoint_dir=directory, resume=resume
        )
    saved = _save(model.eval(), directory)
    console.print(_accuracy_table(task, model, before))
    if isinstance(model, PeftModel) and (report := model.method.report()):
        console.print(f"{report}.", soft_wrap=True)
    console.print(
        f"Loss {history.loss[0]:.3f} → {history.loss[-1]:.3f} in {history.seconds:.1f} s; "
        f"saved [bold]{saved}[/] ({saved.stat().st_size / 1000:,.0f} kB).",
        soft_wrap=True,
    )


def begin(settings: MethodSettings, directory: Path, resume: bool) -> None:
    """Write what the run depends on; unless one is resumed, an older checkpoint goes, which would not belong to it."""
    if not resume:
        (directory / CHECKPOINT).unlink(missing_ok=True)
    files.write_json(directory / RUN, asdict(settings))


def trained_share(model: Module, size: int, form: str) -> str:
    """How many parameters train, and which share of the base's `size` that is."""
    trains = sum(p.size for p in model.parameters() if p.requires_grad)
    share = f"{trains / size:{form}}" if trains <= size else "the weights, then the factors"
    return f"{trains:,} parameters ({share})"


def check_same_run(settings: MethodSettings, directory: Path, console: Console) -> None:
    """Raise ValueError where the directory holds a run with other settings; only more steps are welcome."""
    if not (directory / CHECKPOINT).exists():
        console.print(f"No checkpoint in {directory} yet: starting at the first step.")
    if not (directory / RUN).exists():
        return
    earlier, now = files.read_json(directory / RUN), asdict(settings)
    different = [name for name in now if name != "steps" and now[name] != earlier.get(name)]
    if different:
        shown = ", ".join(f"{name} {earlier.get(name)} (now {now[name]})" for name in different)
        raise ValueError(f"--resume: the run in {directory} has {shown}; use its settings, or another --out")
    if settings.steps < earlier["steps"]:
        raise ValueError(f"--resume: the run in {directory} has {earlier['steps']} steps; as many or more are accepted")


def _accuracies(model: Module, task: digits.Task) -> list[float]:
    """On held-out digits, shifted and as they were."""
    return [accuracy(model, *part) for part in (task.test, task.original_test)]


def _save(model: Module, directory: Path) -> Path:
    """Write the adapter in PEFT's format, or the whole model; the path of the tensors."""
    if isinstance(model, PeftModel):
        model.save_pretrained(directory)
        return directory / "adapter_model.safetensors"
    return files.write_tensors(directory / "model.safetensors", model.state_dict())


def _accuracy_table(task: digits.Task, model: Module, before: list[float]) -> Table:
    """Accuracy on shifted and on original digits: before, after, and with the adapter taken off again."""
    columns = {"before": before, "after": _accuracies(model, task)}
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            columns["adapter taken off"] = _accuracies(model, task)
    table = Table("accuracy on held-out digits")
    for name in columns:
        table.add_column(name, justify="right", style="bold green" if name == "after" else "")
    for i, name in enumerate((task.name, "original")):
        table.add_row(f"{name} ({len(task.test.y)})", *(f"{values[i]:.1%}" for values in columns.values()))
    return table
