"""The run of `minipeft train --model smollm2`: a language model learns who it is, or the chats of a JSONL file.

Before and after the training the same is measured: how many held-out questions are answered with the new name (of a
file: the loss on the tenth that was held out), three answers, and the perplexity of a fixed general text, which says
what the model forgot.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import optim
from .adapt import MethodSettings, begin, check_same_run, trained_share
from .data import chat, self_cognition
from .nn import Module
from .peft import PeftModel
from .recipes import METHODS, prepared
from .schedules import LambdaLR
from .tensor import no_grad
from .train import Progress, fit

STEPS, BATCH = 60, 6
WARM_UP = 10  # steps in which the learning rate grows to its value, where it stays: a run can go on with more steps
SELF_COGNITION = "self-cognition"
GENERAL = Path(__file__).with_name("data") / "general.txt"
WINDOW = 256  # tokens of the general text that are read at a time
ANSWER = 48  # tokens of an answer at most
ASKED = 26  # questions answered at a time


@dataclass
class Settings(MethodSettings):
    """What a run on a language model depends on.

    Raises:
        ValueError: a method that does not exist, an option that it or the data does not have, or one that is missing.
    """

    model: str = "smollm2"
    data: str = SELF_COGNITION
    name: str | None = None
    author: str | None = None
    steps: int = STEPS
    batch_size: int = BATCH
    checkpointing: bool = False
    contents: str | None = None  # the data's fingerprint, filled in by the run: it is not resumed with other data

    rate: ClassVar[str] = "language_lr"

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.data != SELF_COGNITION
        for option in ("name", "author"):
            given = getattr(self, option) is not None
            if given and own:
                raise ValueError(f"--{option}: only the data {SELF_COGNITION!r} has a place for it")
            if not given and not own:
                raise ValueError(f"--{option}: missing; with --data {SELF_COGNITION} the model learns to give it")


# --- the data ---------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What is learned, and what shows whether it was.

    Attributes:
        train: the conversations that are learned.
        test: conversations of the same kind that are not, whose loss is measured.
        questions: prompts that are answered before and after; of these the ones at `shown` are printed.
        wanted: what answers are to have in them: (title, words, which questions).
    """

    train: list[chat.Conversation]
    test: list[chat.Conversation] = field(default_factory=list)
    questions: list[list[dict[str, str]]] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    wanted: list[tuple[str, str, list[int]]] = field(default_factory=list)


def load_task(settings: Settings) -> Task:
    """The self-cognition set with its held-out questions, or a user's file, of which a seeded tenth is held out.

    Raises:
        FileNotFoundError, ValueError: as `read_chats`; or a file of one conversation, from which none can be held out.
    """
    if settings.data == SELF_COGNITION:
        return _identity(settings.name, settings.author)
    chats = chat.read_chats(settings.data)
    if len(chats) < 2:
        raise ValueError(f"{settings.data}: 1 conversation; 2 or more are accepted, since one in ten is held out")
    order = np.random.default_rng(settings.seed).permutation(len(chats))
    test = order[: max(1, round(len(chats) / 10))]
    held = [chats[i] for i in sorted(test)]
    train = [chats[i] for i in sorted(order[len(test) :])]
    questions = [conversation.question for conversation in held[:3]]
    return Task(train, held, questions, list(range(len(questions))))


def _identity(name: str, author: str) -> Task:
    train, held_out = self_cognition.conversations(name, author), self_cognition.held_out()
    at = lambda **wanted: [i for i, q in enumerate(held_out) if wanted.items() <= vars(q).items()]  # noqa: E731
    wanted = [
        (f"held-out questions answered with {name}", name, at()),
        ("  in English", name, at(language="en")),
        ("  in Chinese", name, at(language="zh")),
        (f"those about its maker, with {author}", author, at(kind="maker")),
    ]
    shown = [held_out.index(question) for question in self_cognition.shown()]
    return Task(train, [], [question.prompt for question in held_out], shown, [row for row in wanted if row[2]])


def fingerprint(examples: Sequence[chat.Example]) -> str:
    """Sixteen characters that differ where any token does."""
    return hashlib.sha256(b"|".join(example.ids.tobytes() for example in examples)).hexdigest()[:16]


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """A model before or after: perplexity of the general text, its answers, the loss on held-out conversations."""

    perplexity: float
    answers: list[str]
    loss: float | None


def measure(model: Module, tokenizer: Any, task: Task, test: Sequence[chat.Example]) -> Measured:
    """The figures of a model as it is; it is left in the mode that it was in."""
    answers = ask(model, tokenizer, task.questions)
    with no_grad():
        return Measured(perplexity(model, tokenizer), answers, held_out_loss(model, test) if test else None)


def perplexity(model: Module, tokenizer: Any, text: str | None = None) -> float:
    """exp of the mean cross-entropy of a text's tokens, each given those before it in windows of 256.

    Args:
        text: left out, data/general.txt.
    """
    ids = tokenizer.encode(GENERAL.read_text(encoding="utf-8") if text is None else text, add_special_tokens=False)
    window = min(WINDOW, model.config.max_position_embeddings - 1)
    total = 0.0
    with no_grad():
        for start in range(0, len(ids) - 1, window):
            part = ids[start : start + window + 1]  # the first of a window is only read
            total += model.loss(np.array([part])).item() * (len(part) - 1)
    return float(np.exp(total / (len(ids) - 1)))


def held_out_loss(model: Module, examples: Sequence[chat.Example]) -> float:
    """The mean cross-entropy of all labelled tokens of the examples."""
    weights = [int((example.labels[1:] != chat.IGNORED).sum()) for example in examples]
    with no_grad():
        losses = [chat.chat_loss(model, chat.pad([example])).item() for example in examples]
    return float(np.average(losses, weights=weights))


def ask(model: Module, tokenizer: Any, questions: Sequence[list[dict[str, str]]]) -> list[str]:
    """The likeliest answer to each prompt, up to 48 tokens, many at a time: those of like length together."""
    prompts = [tokenizer.apply_chat_template(question, add_generation_prompt=True) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), ASKED):
        part = order[start : start + ASKED]
        found = model.generate([prompts[i] for i in part], ANSWER, stop_ids=tokenizer.stop_ids)
        for i, ids in zip(part, found, strict=True):
            new = ids[len(prompts[i]) :]
            ended = new[-1] in tokenizer.stop_ids
            answers[i] = tokenizer.decode(new, skip_special_tokens=True).strip().rstrip("\ufffd") + " …" * (not ended)
    return answers


# --- the run ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, directory: Path, resume: bool, console: Console, err: Console) -> None:
    """The run that `settings` describe: everything is checked, then trained, then written and shown.

    The directory gets `run.json` (the settings), the checkpoint, and the adapter in PEFT's format; where the weights
    themselves trained, the whole model as a Hugging Face directory.

    Raises:
        FileNotFoundError: there is no such model or data.
        ValueError: the data is not what is accepted, the settings do not fit the model, or with `resume` not the run in
            the directory.
    """
    from .models.load import load_model
    from .tokenizer import load_tokenizer

    task = load_task(settings)
    tokenizer = load_tokenizer(settings.model)
    with waiting(err, "reading the model"):
        model = load_model(settings.model, quantization=METHODS[settings.method].quantize)  # never whole in full
        context = model.config.max_position_embeddings
        examples, test = (chat.encode(chats, tokenizer, context) for chats in (task.train, task.test))
    batches = chat.ChatBatches(examples, settings.batch_size, settings.seed)
    settings.contents = fingerprint(examples)
    if resume:
        check_same_run(settings, directory, console)
    asked = f"{len(task.questions)} held-out questions" if task.wanted else "held-out conversations"
    with waiting(err, f"before training: {asked}, perplexity"):
        before = measure(model, tokenizer, task, test)
    size = sum(p.size for p in model.parameters())
    model = prepared(model, settings.method, settings.choice(), settings.seed, batches, chat.chat_loss)
    if batches.lengths.max() > model.context:  # virtual tokens take places too
        longest = batches.lengths.max()
        raise ValueError(f"{settings.data}: a conversation has {longest} tokens; {model.context} are accepted")
    model.model.checkpointing = settings.checkpointing
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.lr)
    begin(settings, directory, resume)
    console.print(
        f"[bold]{settings.model}[/] ({size:,} parameters) learns {len(examples)} conversations from {settings.data}; "
        f"[bold]{settings.method}[/] trains {trained_share(model, size, '.2%')}."
    )
    console.print(
        f"{settings.steps} steps of {settings.batch_size} conversations, {batches.lengths.mean():.0f} tokens each; "
        f"{batches.steps_per_epoch} steps see all; {batches.padding:.1%} of a batch is padding."
    )
    with training_bar(settings.steps, batches, err) as show, np.errstate(over="ignore", invalid="ignore"):
        fit(
            model,
            batches,
            steps=settings.steps,
            optimizer=optimizer,
            loss_fn=chat.chat_loss,
            scheduler=LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP)),
            checkpoint_dir=directory,
            resume=resume,
            callbacks=[show],
            progress=False,
        )
    if isinstance(model, PeftModel) and (report := model.method.report()):
        console.print(f"{report}.", soft_wrap=True)
    model.eval()
    model.model.checkpointing = False
    saved = save(model, directory, tokenizer)
    with waiting(err, f"after training: {asked}, perplexity"):
        after = measure(model, tokenizer, task, test)
    console.print(answers_table(task, before, after))
    console.print(figures_table(task, before, after))
    console.print(f"Saved [bold]{saved}[/] ({saved.stat().st_size / 1e6:,.1f} MB). What next:", soft_wrap=True)
    for line in next_commands(model, directory):
        console.print(f"  [bold]{line}[/]", soft_wrap=True)


def save(model: Module, directory: Path, tokenizer: Any) -> Path:
    """Write the adapter in PEFT's format, or the whole model with its tokenizer; the path of the tensors."""
    if isinstance(model, PeftModel):
        model.save_pretrained(directory)
        return directory / "adapter_model.safetensors"
    from .models.load import save_model

    return save_model(model, directory, tokenizer) / "model.safetensors"


def next_commands(model: Module, directory: Path) -> list[str]:
    """How to talk with what was trained, and how to merge it where weights can take it over."""
    if not isinstance(model, PeftModel):
        return [f"minipeft chat --model {directory}"]
    chatting = f"minipeft chat --adapter {directory}"
    if any(layer.unmergeable for _, layer in model.adapter_layers()):
        return [chatting]
    return [chatting, f"minipeft merge --adapter {directory} --out {directory}-merged"]


# --- what is shown ----------------------------------------------------------------------------------------------------


def answers_table(task: Task, before: Measured, after: Measured) -> Table:
    """Three held-out questions and their answers."""
    table = Table(show_lines=True, expand=True)
    for title, ratio in (("held-out question", 3), ("before", 4), ("after", 4)):
        table.add_column(title, ratio=ratio, style="bold green" if title == "after" else "", overflow="fold")
    for i in task.shown:
        question = task.questions[i][-1]["content"]
        table.add_row(*(Text(_short(text)) for text in (question, before.answers[i], after.answers[i])))
    return table


def figures_table(task: Task, before: Measured, after: Measured) -> Table:
    """The share of answers with the name, or the held-out loss; and the perplexity."""
    table = Table("what it learned and forgot", "before", "after")
    for column, style in zip(table.columns[1:], ("", "bold green"), strict=True):
        column.justify, column.style = "right", style
    for title, words, which in task.wanted:
        found = [[self_cognition.gives_name(m.answers[i], words) for i in which] for m in (before, after)]
        table.add_row(Text(f"{title} ({len(which)})"), *(f"{np.mean(row):.1%}" for row in found))
    if task.test:
        table.add_row(f"loss on held-out conversations ({len(task.test)})", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_section()
    change = after.perplexity / before.perplexity - 1
    table.add_row("perplexity of a general text", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}")
    table.add_row("  change", "", f"{change:+.1%}")
    return table


def _short(text: str, length: int = 240) -> str:
    """One paragraph of a text, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length].rstrip() + " …"


@contextmanager
def waiting(err: Console, what: str) -> Iterator[None]:
    """A spinner on a terminal, a line elsewhere, while something without a bar goes on."""
    if not err.is_terminal:
        err.print(f"{what} …")
    with err.status(f"{what} …") if err.is_terminal else nullcontext():
        yield


@contextmanager
def training_bar(steps: int, batches: chat.ChatBatches, err: Console) -> Iterator[Callable[[Progress], None]]:
    """A callback for `fit` that shows step, loss, tokens per second (means of the last ten steps), and the time left.

    On a terminal it is a bar; elsewhere a line after each tenth of the steps. Padding is not counted as tokens.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[left]} left"),
        console=err,
        expand=True,
        disable=not err.is_terminal,
    )
    ends, tokens = deque([time.perf_counter()], 11), deque(maxlen=10)
    with bar:
        shown = bar.add_task("", total=steps, loss="–", speed="–", left="–:––")

        def show(progress: Progress) -> None:
            ends.append(time.perf_counter())
            tokens.append(batches.tokens(progress.step - 1))
            seconds = ends[-1] - ends[0]
            left = round(seconds / len(tokens) * (steps - progress.step))
            fields = {
                "loss": f"{np.mean(progress.history.loss[-10:]):.3f}",
                "speed": f"{sum(tokens) / seconds:,.0f}",
                "left": f"{left // 60}:{left % 60:02}",
            }
            bar.update(shown, completed=progress.step, **fields)
            if bar.disable and (progress.step % max(1, steps // 10) == 0 or progress.step == steps):
                err.print(
                    "step {}/{}  loss {loss}  {speed} tokens/s  {left} left".format(progress.step, steps, **fields)
                )

        yield show
