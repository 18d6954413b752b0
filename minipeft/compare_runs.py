"""The pieces of `minipeft compare`, each kept in a file of its own: a training run, a step's bytes, steps' seconds.

A piece is a `Job`: everything that its result depends on, and nothing else. Its file is named after a hash of that and
holds it too, so that a result is only ever taken for the job that it is the result of.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, adapt_language, files, optim
from .data import chat, digits, self_cognition
from .ledger.runs import BATCH, STEPS
from .measure import compare_latency, memory_report, peak_memory
from .methods.adalora import AdaLora
from .methods.hybrid import FullThenLora
from .models import BASES, load_base
from .models.pretrain import accuracy
from .nn import Module
from .peft import get_peft_model
from .recipes import METHODS, Choice, prepared
from .schedules import LambdaLR
from .tensor import Tensor, no_grad
from .threads import threads
from .train import NonFiniteLossError, classification_loss, fit

TASKS = ("digits", "self-cognition")
TOKENS = 8  # P-Tuning's virtual tokens; its encoder's width is what meets the budget
TIMED = 1000  # the run that measured steps are thought to be part of: schedules change nothing while they last
NAME, AUTHOR = "Lumi", "Ada Lab"
TOGETHER = 8  # conversations whose loss is measured in one pass


@dataclass(frozen=True)
class Setting:
    """The problem that every method is given.

    Attributes:
        task: "digits" or "self-cognition".
        base: "mlp" or "vit"; or a language model as `load_model` takes it.
        shift: of the digits.
        steps, batch_size: of each run.
        contents: a fingerprint of the language model's weights and of its data, filled in by `identified`.

    Raises:
        ValueError: something else than is accepted.
    """

    task: str = "digits"
    base: str = "vit"
    shift: str = "rotated"
    steps: int = STEPS
    batch_size: int = BATCH
    contents: str = ""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"--task: got {self.task!r}; accepted are {', '.join(TASKS)}")
        if self.task == "digits" and self.base not in BASES:
            raise ValueError(f"--base: got {self.base!r}; accepted for digits are {', '.join(BASES)}")
        if self.task != "digits" and self.base in BASES:
            raise ValueError(f"--base: got {self.base!r}; --task {self.task} is for a language model, such as smollm2")
        if self.shift not in digits.SHIFTS:
            raise ValueError(f"--shift: got {self.shift!r}; accepted are {', '.join(digits.SHIFTS)}")
        if self.steps < 4:
            raise ValueError(f"--steps: got {self.steps}; at least 4 is accepted, for AdaLoRA's schedule")

    def identified(self) -> Setting:
        """The same, with the fingerprint of a language model and its data."""
        return replace(self, contents=problem(self).contents())


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        kind: "run" (train and measure), "base" (the base's own figures), "bytes" (of a step) or "seconds" (of steps).
        size: the method's rank, bottleneck or encoder width.
        beside: for "seconds": the methods that are timed in turn, each with its size; the first is compared with.
    """

    kind: str
    setting: Setting
    method: str = ""
    size: int = 0
    lr: float = 0.0
    seed: int = 0
    beside: tuple[tuple[str, int], ...] = ()

    def identity(self) -> dict[str, Any]:
        """Everything that the result depends on, as it reads in JSON."""
        return json.loads(json.dumps({"minipeft": __version__, **asdict(self)}))


# --- the problems -----------------------------------------------------------------------------------------------------


class Digits:
    """Shifted digits for a base that knows upright ones."""

    metrics = ("accuracy", "test_loss")
    loss_fn = staticmethod(classification_loss)

    def __init__(self, setting: Setting) -> None:
        self.setting, self.data = setting, digits.transfer(setting.shift)
        self.tested = len(self.data.test.y)

    def contents(self) -> str:
        """Base and data come with the package, whose version is in every file."""
        return ""

    def model(self) -> Module:
        """The base."""
        return load_base(self.setting.base)

    def batches(self, seed: int) -> Any:
        """Training batches in the order of this seed: the same for every method."""
        return digits.batches(*self.data.train, batch_size=self.setting.batch_size, seed=seed)

    def lr(self, method: str) -> float:
        """The recipe's learning rate."""
        return METHODS[method].lr

    def scheduler(self, optimizer: Any) -> Any:
        """The learning rate stays as it is."""
        return None

    def measure(self, model: Module) -> dict[str, float]:
        """Loss on the validation digits, which chooses learning rates; accuracy and loss on the test digits."""
        with no_grad():
            valid, test = (self.loss_fn(model, part).item() for part in (self.data.valid, self.data.test))
        return {"valid_loss": valid, "accuracy": accuracy(model, *self.data.test), "test_loss": test}


class SelfCognition:
    """A language model learns who it is. Of the conversations that occur once, a twentieth chooses learning rates, and
    on another twentieth the loss is measured."""

    metrics = ("named", "test_loss", "perplexity")
    loss_fn = staticmethod(chat.chat_loss)

    def __init__(self, setting: Setting) -> None:
        from .tokenizer import load_tokenizer

        self.setting, self.tokenizer = setting, load_tokenizer(setting.base)
        model, self.weights = self.model(), 0
        for p in model.parameters():
            self.weights = zlib.crc32(np.ascontiguousarray(p.data).view(np.uint8), self.weights)
        whole = adapt_language.load_task(adapt_language.Settings(setting.base, name=NAME, author=AUTHOR))
        self.questions, self.tested = whole.questions, len(whole.questions)
        keys = [json.dumps(conversation.messages) for conversation in whole.train]
        times = Counter(keys)
        single = [i for i, key in enumerate(keys) if times[key] == 1]
        order = [single[i] for i in np.random.default_rng(0).permutation(len(single))]
        part = max(1, len(order) // 20)
        held = {"valid": order[:part], "test": order[part : 2 * part]}
        held["train"] = sorted(set(range(len(keys))) - set(order[: 2 * part]))
        encoded = chat.encode(whole.train, self.tokenizer, model.config.max_position_embeddings)
        self.examples = {name: [encoded[i] for i in rows] for name, rows in held.items()}

    def contents(self) -> str:
        """Eight characters for the weights, sixteen for the tokens."""
        return f"{self.weights:08x}-{adapt_language.fingerprint(self.examples['train'])}"

    def model(self) -> Module:
        """The language model."""
        from .models.load import load_model

        return load_model(self.setting.base)

    def batches(self, seed: int) -> Any:
        """Batches of conversations in the order of this seed."""
        return chat.ChatBatches(self.examples["train"], self.setting.batch_size, seed)

    def lr(self, method: str) -> float:
        """The recipe's learning rate for a language model."""
        return METHODS[method].language_lr

    def scheduler(self, optimizer: Any) -> Any:
        """A short warm-up, as in `minipeft train`."""
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / adapt_language.WARM_UP))

    def measure(self, model: Module) -> dict[str, float]:
        """The share of held-out questions that are answered with the new name, losses, perplexity of a general text."""
        answers = adapt_language.ask(model, self.tokenizer, self.questions)
        return {
            "valid_loss": self._loss(model, "valid"),
            "named": float(np.mean([self_cognition.gives_name(answer, NAME) for answer in answers])),
            "test_loss": self._loss(model, "test"),
            "perplexity": adapt_language.perplexity(model, self.tokenizer),
        }

    def _loss(self, model: Module, part: str) -> float:
        """The mean cross-entropy of all labelled tokens; several conversations at a time, for each pass reads all of
        the weights."""
        examples = sorted(self.examples[part], key=lambda example: len(example.ids))
        batches = [examples[start : start + TOGETHER] for start in range(0, len(examples), TOGETHER)]
        labelled = [sum(int((example.labels[1:] != chat.IGNORED).sum()) for example in batch) for batch in batches]
        with no_grad():
            losses = [self.loss_fn(model, chat.pad(batch)).item() for batch in batches]
        return float(np.average(losses, weights=labelled))


def problem(setting: Setting) -> Digits | SelfCognition:
    """The problem that the setting means, read once in a process."""
    return _read(replace(setting, contents=""))


@functools.cache
def _read(setting: Setting) -> Digits | SelfCognition:
    return (Digits if setting.task == "digits" else SelfCognition)(setting)


def attached(
    model: Module, method: str, size: int, steps: int, seed: int = 0, batches: Any = None, loss_fn: Any = None
) -> Module:
    """The model as `method` trains it by its recipe, with α = 2r; P-Tuning's size is the width of its encoder."""
    if method == "p-tuning":
        config = METHODS[method].config(Choice(TOKENS))
        return get_peft_model(model, replace(config, encoder_hidden_size=size), seed=seed)
    return prepared(model, method, Choice(size, 2.0 * size, steps=steps), seed, batches, loss_fn)


# --- the work ---------------------------------------------------------------------------------------------------------


def trained_now(model: Module) -> int:
    """How many parameters train."""
    return sum(p.size for p in model.parameters() if p.requires_grad)


def train_run(job: Job) -> dict[str, Any]:
    """Train one method once, and measure it. A run that diverges is a result too: `failed` says how.

    `trains` are the parameters that train in the first step, `left` those that are left after the last.
    """
    task, steps = problem(job.setting), job.setting.steps
    batches = task.batches(job.seed)
    model = attached(task.model(), job.method, job.size, steps, job.seed, batches, task.loss_fn)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=job.lr)
    result: dict[str, Any] = {"failed": None, "loss": []}
    losses: list[float] = []
    began: list[int] = []  # after the first step: full-then-lora trains its weights then, and not yet its factors

    def watch(progress: Any) -> None:
        losses.append(float(f"{progress.loss:.5g}"))
        if not began:
            began.append(trained_now(model))

    try:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            history = fit(
                model, batches, steps=steps, optimizer=optimizer, loss_fn=task.loss_fn, callbacks=[watch],
                scheduler=task.scheduler(optimizer), progress=False,
            )  # fmt: skip
            model.eval()
            measured = task.measure(model)
    except NonFiniteLossError as error:
        return {**result, "failed": f"diverged: {error}", "loss": losses}
    if isinstance(getattr(model, "method", None), AdaLora) and model.method.settled:
        model.method.truncate(model)
    counted = {"trains": began[0], "left": trained_now(model), "seconds": round(history.seconds, 3)}
    return {**result, "loss": losses, **counted, **measured}


def base_run(job: Job) -> dict[str, Any]:
    """The figures of the base before anything is trained."""
    task = problem(job.setting)
    return {"failed": None, **task.measure(task.model())}


class Steps:
    """The steps of `fit`, one at a time on one batch, so that something can be measured inside one and between them.

    The learning rate is next to nothing: numbers stay what they are early in a run, however many steps are measured.
    """

    def __init__(self, setting: Setting, method: str, size: int) -> None:
        task = problem(setting)
        batches = task.batches(0)
        self.loss_fn, self.batch, self.step = task.loss_fn, batches[0], 0
        self.model = attached(task.model(), method, size, TIMED, 0, batches, task.loss_fn).train()
        self.optimizer = optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)
        self.method = self.model.method if hasattr(self.model, "peft_config") else None
        if self.method is not None:
            self.method.run_steps = TIMED
            self.method.start(self.model, self.optimizer)

    def forward(self) -> Tensor:
        """The loss, with what backward needs."""
        self.optimizer.zero_grad()
        return self.loss_fn(self.model, self.batch)

    def backward(self, loss: Tensor) -> None:
        """The gradients."""
        loss.backward()
        penalty = self.method.penalty(self.model) if self.method is not None else None
        if penalty is not None:
            penalty.backward()

    def update(self) -> None:
        """The optimizer's step between the method's hooks."""
        if self.method is not None:
            self.method.before_step(self.model, self.step)
        self.optimizer.step()
        if self.method is not None:
            self.method.after_step(self.model, self.step)
        self.step += 1

    def __call__(self) -> None:
        """A whole step."""
        self.backward(self.forward())
        self.update()

    def carried(self) -> int:
        """Bytes that the method carries from step to step (AdaLoRA's averages)."""
        return 0 if self.method is None else sum(np.asarray(a).nbytes for a in self.method.state_dict().values())


def bytes_run(job: Job) -> dict[str, Any]:
    """A step's bytes by part, each when it is there, and its peak: what is held between steps, and the most above it.

    Weights and activations are read after the forward pass, gradients after the backward pass. `optimizer` has what
    the method carries from step to step in it. full-then-lora is measured in its full phase, its dearest, AdaLoRA with
    the ranks that it starts with.
    """
    steps = Steps(job.setting, job.method, job.size)
    for _ in range(2):  # the optimizer's state, and what is made once
        steps()
    loss = steps.forward()
    forward = memory_report(steps.model, steps.optimizer)
    steps.backward(loss)
    del loss
    backward = memory_report(steps.model, steps.optimizer)
    steps.update()
    steps.optimizer.zero_grad()
    between, carried = memory_report(steps.model, steps.optimizer), steps.carried()
    with peak_memory() as peak:
        steps()
    return {
        "failed": None,
        "weights": forward.weights,
        "gradients": backward.gradients,
        "optimizer": backward.optimizer + carried,
        "activations": forward.activations,
        "peak": between.weights + between.gradients + between.optimizer + carried + peak.bytes,
    }


def seconds_run(job: Job) -> dict[str, Any]:
    """The median time of a step of each method, measured in turn in one run, and its ratio to the first one's.

    full-then-lora has two kinds of steps: its time is their mean, by how many there are of each.
    """
    timed = {method: Steps(job.setting, method, size) for method, size in job.beside}
    later = {}
    for method, size in job.beside:
        if isinstance(timed[method].method, FullThenLora):
            later[method] = Steps(job.setting, method, size)
            later[method].method.full_steps = 1
            later[method]()  # the only full step
    repeat, warmup = (30, 3) if job.setting.task == "digits" else (5, 1)
    every = {**timed, **{f"{method}, then": steps for method, steps in later.items()}}
    medians = {name: latency.median for name, latency in compare_latency(every, repeat=repeat, warmup=warmup).items()}
    for method in later:
        share = timed[method].method.config.fraction
        medians[method] = share * medians[method] + (1 - share) * medians.pop(f"{method}, then")
    first = medians[job.beside[0][0]]
    found = {method: {"seconds": seconds, "ratio": seconds / first} for method, seconds in medians.items()}
    return {"failed": None, "threads": threads(), "methods": found}


WORK = {
    "run": (train_run, ("loss",)),
    "base": (base_run, ("valid_loss",)),
    "bytes": (bytes_run, ("weights", "gradients", "optimizer", "activations", "peak")),
    "seconds": (seconds_run, ("methods",)),
}


# --- the files --------------------------------------------------------------------------------------------------------


class Store:
    """Results in a directory, one small JSON file each, written whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    def path(self, job: Job) -> Path:
        """The file of a job: what it is, for people, and a hash of everything that it depends on."""
        digest = hashlib.sha256(json.dumps(job.identity(), sort_keys=True).encode()).hexdigest()[:16]
        words = [job.kind, job.setting.base if job.setting.base in BASES else "language", job.method]
        words += [f"lr{job.lr:.3g}", f"seed{job.seed}"] if job.kind == "run" else []
        return self.directory / f"{'-'.join(word for word in words if word)}-{digest}.json"

    def read(self, job: Job) -> dict[str, Any] | None:
        """The result of a job that was done; None where it was not.

        Raises:
            ValueError: the file is not whole, or not the result of this job.
        """
        path = self.path(job)
        if not path.exists():
            return None
        content = files.read_json(path)
        if content.get("job") != job.identity():
            raise ValueError(f"{path}: the result of something else than its name says")
        result, needed = content.get("result"), WORK[job.kind][1]
        if not isinstance(result, dict) or not {"failed", *needed} <= result.keys():
            raise ValueError(f"{path}: not a whole result")
        return result

    def write(self, job: Job, result: dict[str, Any]) -> None:
        """Keep a result."""
        content = {"job": job.identity(), "result": result}
        files.write_text(self.path(job), json.dumps(content, ensure_ascii=False) + "\n")

    def others(self, jobs: Sequence[Job], report: str) -> list[Path]:
        """JSON files in the directory that are not results of these jobs, nor the report."""
        own = {self.path(job) for job in jobs} | {self.directory / report}
        return sorted(path for path in self.directory.glob("*.json") if path not in own)


def perform(job: Job, directory: Path) -> dict[str, Any]:
    """Do a job and keep its result. What goes wrong otherwise than by diverging is told, and not kept."""
    try:
        result = WORK[job.kind][0](job)
    except Exception as error:  # one method's error must not end the runs of the others
        return {"failed": f"{type(error).__name__}: {error}"}
    Store(directory).write(job, result)
    return result
