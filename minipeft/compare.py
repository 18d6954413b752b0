"""All methods side by side: the same data, as many trained parameters, each with its best learning rate, over seeds.

    budgets   each method's size (rank …) with as many trained parameters as LoRA of rank 8, as nearly as sizes allow
    rates     each method's learning rate, by the loss on validation data, from its recipe's times 1/2, 1 and 2, and on
              while the best is at an end; two seeds (a language model: one)
    runs      the seeds that are missing at that rate; then a step's bytes, and steps' seconds measured in turn
    report    means and deviations over seeds, ranked by what the task is about

Every run is a file (compare_runs.py): what was done once is read, not done again.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, files
from .compare_runs import TOKENS, Job, Setting, Store, attached, perform, problem, trained_now
from .methods.adalora import AdaLoraConfig
from .methods.hybrid import FullThenLoraConfig
from .methods.lora import LoraConfig
from .nn import Module
from .peft import PeftModel, get_peft_model
from .recipes import METHODS, Choice

REPORT = "compare.json"
RANK = 8  # LoRA's: the budget
SWEPT = {"digits": 2, "self-cognition": 1}  # seeds that choose a learning rate
FACTOR, FURTHEST = 2.0, 5  # learning rates are the recipe's times 2^-5 … 2^5
LOWER_IS_BETTER = {"accuracy": False, "named": False, "test_loss": True, "perplexity": True}
BYTES = ("weights", "gradients", "optimizer", "activations", "peak")
POINTS = 50  # of a loss curve in the report


# --- budgets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """A method's size and what it trains then; or why it cannot take part.

    Attributes:
        size: rank, bottleneck, or width of P-Tuning's encoder; 0 for "full", which has none.
        trains: parameters that train when the run ends.
        skipped: the reason, or empty.
    """

    size: int = 0
    trains: int = 0
    skipped: str = ""


def budgets(setting: Setting, methods: Sequence[str], r: int = RANK) -> dict[str, Budget]:
    """The size with which each method trains as many parameters as LoRA of rank r, as nearly as sizes allow.

    AdaLoRA is counted by the directions that are left at the end, full-then-lora by its factors.
    """
    model = problem(setting).model()
    aim, found = _trained(model, "lora", r), {}
    for method in methods:
        try:
            found[method] = _nearest(lambda size, method=method: _trained(model, method, size), method, aim)
        except ValueError as error:
            found[method] = Budget(skipped=str(error))
    return found


def _nearest(count: Callable[[int], int], method: str, aim: int) -> Budget:
    """The size that trains nearest to `aim`. Counts grow with the size as polynomials of the second degree at most, so
    that three of them tell all."""
    if METHODS[method].config is None:
        return Budget(0, count(0))
    one, two, three = (count(size) for size in (1, 2, 3))

    def at(size: int) -> int:
        return one + (size - 1) * (two - one) + (size - 1) * (size - 2) * (three - 2 * two + one) // 2

    size = 1
    while at(size) < at(size + 1) <= aim:
        size += 1
    size = min((size, size + 1), key=lambda s: abs(at(s) - aim))
    return Budget(size, at(size))


def _trained(model: Module, method: str, size: int) -> int:
    """Parameters that `method` trains at its end; the model is given back as it was. Starts that take time (singular
    vectors, gradients, codes) are left out: they change no shape."""
    if METHODS[method].config is None or method == "p-tuning":
        adapted, share = attached(model, method, size, 100), (1, 1)
    else:
        config, share = METHODS[method].config(Choice(size, 2.0 * size, steps=100)), (1, 1)
        if isinstance(config, AdaLoraConfig):
            share = config.target_r, config.init_r
        elif type(config) in (LoraConfig, FullThenLoraConfig):
            config = LoraConfig(r=size, use_dora=config.use_dora, target_modules=config.target_modules)
        adapted = get_peft_model(model, config)
    trained = trained_now(adapted) * share[0] // share[1]
    if isinstance(adapted, PeftModel):
        adapted.unload()
    return trained


# --- doing the jobs ---------------------------------------------------------------------------------------------------

Run = Callable[[Sequence[Job]], Iterator[tuple[Job, dict[str, Any]]]]
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@contextlib.contextmanager
def workers(number: int, directory: Path) -> Iterator[Run]:
    """A function that does jobs and gives each with its result as it ends: in `number` new processes with one BLAS
    thread each, or, where that is 1, in this one.

    However the block ends, no process is left. Each keeps its own results, so what has ended is kept.
    """
    if number == 1:
        yield lambda jobs: ((job, perform(job, directory)) for job in jobs)
        return
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))  # read by a BLAS when it is loaded: new processes inherit it
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork would take over this process's BLAS, threads and all
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=_begin_worker)

    def run(jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        futures = {pool.submit(perform, job, directory): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise MemoryError(
                "a process of --jobs was killed, perhaps for memory; what was done is kept: the same command goes on, "
                "with fewer --jobs"
            ) from error

    try:
        yield run
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # idle, or stopped in the middle: files are whole at any moment
        pool.shutdown(cancel_futures=True)  # waits for their ends
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _begin_worker() -> None:
    """Ctrl-C goes to every process of a terminal; the one that started this one ends it. Where that one was killed,
    this one must not wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


# --- the comparison ---------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """What is compared, and how.

    Attributes:
        setting: the problem.
        methods: names of `recipes.METHODS`.
        seeds: runs of each method, with seeds 0, 1 …
        sweep: choose learning rates; otherwise they are the recipes'.
        directory: where results are kept.
        target: the loss that steps are counted to; left out, LoRA's after half of its steps.
        say: is told about files that are not trusted.
        stage: is called as `with stage(title, total, done) as advance:` and `advance()` after each job.
    """

    setting: Setting
    methods: list[str]
    seeds: int
    sweep: bool
    directory: Path
    target: float | None = None
    say: Callable[[str], None] = print
    stage: Callable[[str, int, int], Any] = lambda title, total, done: contextlib.nullcontext(lambda: None)
    asked: dict[Job, dict[str, Any]] = field(default_factory=dict)
    done_now: int = 0  # results that were added to the directory

    def run(self, processes: int = 1) -> dict[str, Any]:
        """Do what is not done yet; the report."""
        sizes = budgets(self.setting, dict.fromkeys([*self.methods, "lora"]))
        taking = [method for method in self.methods if not sizes[method].skipped]
        with workers(processes, self.directory) as run:
            rates, sweeps = self._rates(run, taking, sizes)
            trained = [self._job(m, sizes, rates[m], seed) for m in taking if m in rates for seed in range(self.seeds)]
            self._do(run, "runs", trained)
            costs = [Job("bytes", self.setting, method, sizes[method].size) for method in taking]
            costs += [Job("base", self.setting)]
            self._do(run, "memory", costs)
            self._do(run, "step times", self._timings(taking, sizes))
        return self._report(sizes, rates, sweeps)

    def _job(self, method: str, sizes: dict[str, Budget], lr: float, seed: int) -> Job:
        return Job("run", self.setting, method, sizes[method].size, lr, seed)

    def _timings(self, methods: list[str], sizes: dict[str, Budget]) -> list[Job]:
        """On the digits all methods take turns; language models are too large for more than two at a time."""
        pairs = [(method, sizes[method].size) for method in methods if method != "lora"]
        lora = ("lora", sizes["lora"].size)
        groups = [(lora, *pairs)] if self.setting.task == "digits" else [(lora, pair) for pair in pairs] or [(lora,)]
        return [Job("seconds", self.setting, beside=group) for group in groups]

    def _do(self, run: Run, title: str, jobs: Sequence[Job]) -> None:
        """Read the results there are, do the other jobs."""
        store, jobs = Store(self.directory), [job for job in dict.fromkeys(jobs) if job not in self.asked]
        for job in jobs:
            try:
                result = store.read(job)
            except (ValueError, OSError) as error:
                self.say(f"{error}; done again")
                result = None
            if result is not None:
                self.asked[job] = result
        missing = [job for job in jobs if job not in self.asked]
        if not missing:
            return
        with self.stage(title, len(jobs), len(jobs) - len(missing)) as advance:
            for job, result in run(missing):
                self.asked[job] = result
                self.done_now += store.path(job).exists()
                advance()

    def _rates(self, run: Run, methods: list[str], sizes: dict[str, Budget]) -> tuple[dict[str, float], dict[str, Any]]:
        """Each method's learning rate, and the mean validation loss at all that were tried.

        A method all of whose runs fail has no rate.
        """
        task, seeds = problem(self.setting), range(min(SWEPT[self.setting.task], self.seeds))
        if not self.sweep:
            return {method: task.lr(method) for method in methods}, {}
        tried = {method: [-1, 0, 1] for method in methods}
        lr = lambda method, power: float(f"{task.lr(method) * FACTOR**power:.6g}")  # noqa: E731
        jobs = lambda method, power: [self._job(method, sizes, lr(method, power), seed) for seed in seeds]  # noqa: E731
        for turn in range(1, 2 * FURTHEST + 1):
            self._do(run, f"learning rates, {turn}", [j for m in methods for power in tried[m] for j in jobs(m, power)])
            scores = {m: {power: self._score(jobs(m, power)) for power in sorted(tried[m])} for m in methods}
            best = {m: min(scores[m], key=lambda power, m=m: (scores[m][power], abs(power))) for m in methods}
            best = {m: power for m, power in best.items() if math.isfinite(scores[m][power])}
            wider = {m: power + (-1 if power == min(tried[m]) else 1) for m, power in best.items()}
            wider = {m: power for m, power in wider.items() if power not in tried[m] and abs(power) <= FURTHEST}
            for method, power in wider.items():
                tried[method].append(power)
            if not wider:
                break
        found = {m: {f"{lr(m, power):g}": _rounded(scores[m][power]) for power in sorted(scores[m])} for m in methods}
        return {method: lr(method, power) for method, power in best.items()}, found

    def _score(self, jobs: Sequence[Job]) -> float:
        """The mean validation loss; infinite where a run failed."""
        losses = [self.asked[job].get("valid_loss") for job in jobs]
        return float(np.mean(losses)) if all(x is not None and math.isfinite(x) for x in losses) else math.inf

    # the report

    def _report(self, sizes: dict[str, Budget], rates: dict[str, float], sweeps: dict[str, Any]) -> dict[str, Any]:
        runs = {
            method: [self.asked[self._job(method, sizes, rates[method], seed)] for seed in range(self.seeds)]
            for method in self.methods
            if method in rates
        }
        whole = {m: [run for run in found if not run["failed"]] for m, found in runs.items()}
        target, whose = self._target(whole)
        times: dict[str, Any] = {}
        for job, result in self.asked.items():
            if job.kind == "seconds":
                times = {**result.get("methods", {}), **times}
        metrics = problem(self.setting).metrics
        methods = {}
        for method in self.methods:
            budget = sizes[method]
            if budget.skipped:
                methods[method] = {"skipped": budget.skipped}
                continue
            row: dict[str, Any] = {"size": budget.size, "unit": unit(method), "budget": budget.trains}
            row["lr"], row["tried"] = rates.get(method), sweeps.get(method, {})
            failures = [run["failed"] for run in runs.get(method, []) if run["failed"]]
            if method not in rates:
                failures = [r["failed"] for j, r in self.asked.items() if j.kind == "run" and j.method == method]
            row["failed"] = {"runs": len(failures), "first": next(filter(None, failures), "")} if failures else None
            row |= self._figures(whole.get(method, []), metrics, target)
            held = self.asked[Job("bytes", self.setting, method, budget.size)]
            row["bytes"] = {part: held[part] for part in BYTES} if not held["failed"] else None
            row["step_time"] = _rounded(times[method]["ratio"]) if method in times else None
            row["step_seconds"] = _rounded(times[method]["seconds"]) if method in times else None
            methods[method] = row
        base = self.asked[Job("base", self.setting)]
        order = sorted(methods, key=lambda m: _place(methods[m], metrics))
        return {
            "minipeft": __version__,
            "setting": {k: v for k, v in vars(self.setting).items() if v != ""},
            "seeds": self.seeds,
            "swept": self.sweep,
            "target_loss": target,
            "target_of": whose,
            "metrics": list(metrics),
            "tested": problem(self.setting).tested,  # how many cases the first metric is a share of
            "base": {name: _rounded(base[name]) for name in metrics if name in base},
            "curve_steps": (_shown(self.setting.steps) + width(range(self.setting.steps))).tolist(),
            "methods": {method: methods[method] for method in order},
        }

    def _target(self, runs: dict[str, list[dict[str, Any]]]) -> tuple[float | None, str]:
        """The loss that steps are counted to, and where it is from."""
        if self.target is not None:
            return self.target, "given"
        method = next((m for m in ["lora", *runs] if runs.get(m)), None)
        if method is None:
            return None, ""
        at_half = [smoothed(run["loss"])[len(run["loss"]) // 2 - width(run["loss"])] for run in runs[method]]
        return float(f"{np.mean(at_half):.3g}"), method

    def _figures(self, runs: list[dict[str, Any]], metrics: Sequence[str], target: float | None) -> dict[str, Any]:
        """Means and deviations over the runs that did not fail."""
        if not runs:
            return {}
        curves = np.array([smoothed(run["loss"]) for run in runs])
        tenth = max(1, len(runs[0]["loss"]) // 10)
        first = width(runs[0]["loss"])
        reached = [np.flatnonzero(curve <= target) for curve in curves]
        steps = [int(at[0]) + first for at in reached if len(at)]
        shown = _shown(len(runs[0]["loss"]))
        return {
            "trains": runs[0]["trains"],
            "left": [min(run["left"] for run in runs), max(run["left"] for run in runs)],
            "loss": _over_seeds([float(np.mean(run["loss"][-tenth:])) for run in runs]),
            **{name: _over_seeds([run[name] for run in runs]) for name in metrics},
            "steps_to_target": {"reached": len(steps), **(_over_seeds(steps) if steps else {})},
            "curve": {  # at the report's `curve_steps`
                "mean": _rounded(curves.mean(0)[shown]),
                "low": _rounded(curves.min(0)[shown]),
                "high": _rounded(curves.max(0)[shown]),
            },
        }


def width(losses: Sequence[float]) -> int:
    """How many losses are averaged before one is read: a twentieth of them."""
    return max(1, len(losses) // 20)


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Means of neighbouring losses; the i-th is known after step i + width."""
    return np.convolve(losses, np.ones(width(losses)) / width(losses), mode="valid")


def _shown(steps: int) -> np.ndarray:
    """Which places of a smoothed curve of this many steps are in the report."""
    last = steps - width(range(steps))
    return np.unique(np.linspace(0, last, POINTS).round().astype(int))


def unit(method: str) -> str:
    """What a method's size is."""
    if METHODS[method].config is None:
        return ""
    return {"adapter": "bottleneck", "p-tuning": f"encoder of {TOKENS} tokens"}.get(method, "r")


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n − 1; none of one run) and the values."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": _rounded(np.mean(values)), "deviation": _rounded(deviation), "values": _rounded(values)}


def _rounded(value: Any) -> Any:
    """Five digits; NaN and infinity, which JSON lacks, as None."""
    if isinstance(value, list | tuple | np.ndarray):
        return [_rounded(item) for item in value]
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, int | np.integer) else float(f"{value:.5g}")


def _place(row: dict[str, Any], metrics: Sequence[str]) -> tuple[float, ...]:
    """The first metric decides, then the second; what has no figures comes last, what was skipped behind it."""
    if metrics[0] not in row:
        return (math.inf, "skipped" in row)
    values = [row[name]["mean"] * (1 if LOWER_IS_BETTER[name] else -1) for name in metrics[:2]]
    return tuple(values)


def write_report(path: Path, report: dict[str, Any]) -> Path:
    """The report as JSON, each list of numbers in one line."""
    text = json.dumps(report, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    return files.write_text(path, text + "\n")
