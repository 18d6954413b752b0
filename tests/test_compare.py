"""`minipeft compare`: equal budgets, no run twice, and a table that hides nothing. Runs have four steps here."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from minipeft import compare_runs
from minipeft.cli import app
from minipeft.compare import FURTHEST, RANK, REPORT, Budget, Comparison, budgets, workers, write_report
from minipeft.compare_runs import Job, Setting, Store, attached, perform, problem, trained_now
from minipeft.compare_tables import markdown, tables
from minipeft.plots.methods import comparison
from minipeft.plots.style import drawing
from minipeft.recipes import METHODS

SETTING = Setting(base="mlp", steps=4, batch_size=16)
FEW = ["lora", "dora", "full"]


def command(*arguments: object, columns: int = 140) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["compare", *map(str, arguments)])


def small(directory: Path, methods=FEW, seeds=2, sweep=False, setting=SETTING, **options) -> Comparison:
    return Comparison(setting, list(methods), seeds, sweep, directory, **options)


def shown(report: dict, width: int = 150) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        for part in tables(report, width):
            console.print(part)
    return capture.get()


@pytest.fixture
def performed(monkeypatch) -> Counter:
    """How often each job was done in this process."""
    counted = Counter()

    def counting(job, directory):
        counted[job] += 1
        return perform(job, directory)

    monkeypatch.setattr("minipeft.compare.perform", counting)
    return counted


@pytest.fixture(autouse=True)
def few_timed_steps(monkeypatch):
    once = compare_runs.compare_latency
    monkeypatch.setattr(compare_runs, "compare_latency", lambda fns, repeat, warmup: once(fns, repeat=2, warmup=0))


def test_the_markdown_table_hides_nothing_in_either_language(tmp_path):
    report = small(tmp_path, ["lora", "full", "p-tuning"]).run()
    report["methods"]["full"]["steps_to_target"] = {"reached": 1, "mean": 3.0, "deviation": None}
    report["methods"]["dora"] = {"size": 7, "unit": "r", "failed": {"runs": 2, "first": "loss is nan"}}
    for lang, words in {
        "en": ("method", "KiB", "| p-tuning | | | left out | | |", "| dora | | | failed | | |", "3 (1 of 2)"),
        "zh": ("方法", "KiB", "| p-tuning | | | 未参加 | | |", "| dora | | | 失败 | | |", "3（2 次中 1 次）"),
    }.items():
        text = markdown(report, lang)
        assert all(word in text for word in words)
        assert {line.count("|") for line in text.splitlines()} == {7}
        accuracy = report["methods"]["lora"]["accuracy"]
        assert f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['deviation']:.1f}" in text


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["mlp", "vit"])
def test_no_other_size_is_nearer_to_lora_s_number_of_parameters(base):
    setting = replace(SETTING, base=base)
    task, found = problem(setting), budgets(setting, list(METHODS))
    aim = trained_now(attached(task.model(), "lora", RANK, 100))
    cheap = [m for m in METHODS if m not in ("full", "full-then-lora", "adalora", "lora-ga", "loftq", "pissa")]
    for method in cheap:
        budget = found[method]
        if budget.skipped:
            assert (base, method) == ("mlp", "p-tuning")
            continue
        near = {
            size: trained_now(attached(task.model(), method, size, 100)) for size in range(budget.size - 1, 0, -1)[:2]
        }
        near |= {
            size: trained_now(attached(task.model(), method, size, 100)) for size in (budget.size, budget.size + 1)
        }
        assert near[budget.size] == budget.trains
        assert abs(budget.trains - aim) == min(abs(n - aim) for n in near.values())


def test_what_is_left_after_a_run_is_the_budget():
    found = budgets(SETTING, ["lora-ga", "full-then-lora", "adapter", "full", "adalora"])
    for method, budget in found.items():
        setting = replace(SETTING, steps=40) if method == "adalora" else SETTING
        run = compare_runs.train_run(Job("run", setting, method, budget.size, 1e-3))
        if method == "adalora":  # 16 directions are left; one of fc1 has fewer parameters than one of fc2
            assert run["left"] in {(64 + 128 + 1) * fc1 + (128 + 128 + 1) * (16 - fc1) for fc1 in range(17)}
            assert budget.trains == 8 * (64 + 128 + 1 + 128 + 128 + 1)
            assert run["trains"] == trained_now(attached(problem(SETTING).model(), method, budget.size, 40))
        else:
            assert run["left"] == budget.trains
    assert found["full"] == Budget(0, 24832)


def test_a_method_that_the_model_has_no_place_for_is_left_out_with_the_reason(tmp_path):
    report = small(tmp_path, ["lora", "p-tuning"], seeds=1).run()
    assert "no place for virtual tokens" in report["methods"]["p-tuning"]["skipped"]
    assert list(report["methods"])[-1] == "p-tuning"
    text = shown(report)
    assert re.search(r"p-tuning +left out", text)
    assert "no place for virtual tokens" in text


# --- no run twice -----------------------------------------------------------------------------------------------------


def comparable(report: dict) -> dict:
    """Without what is measured on the clock, and without the peak, which has Python's own objects in it."""
    methods = {}
    for method, row in report["methods"].items():
        methods[method] = {key: value for key, value in row.items() if not key.startswith("step_")}
        methods[method]["bytes"] = {part: size for part, size in row["bytes"].items() if part != "peak"}
    return {**report, "methods": methods}


def test_what_was_stopped_goes_on_and_no_run_is_done_twice(tmp_path, performed, monkeypatch):
    whole = small(tmp_path / "whole").run()
    jobs = dict(performed)
    performed.clear()

    real, left = compare_runs.WORK["run"], [3]

    def stopping(job):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real[0](job)

    monkeypatch.setitem(compare_runs.WORK, "run", (stopping, real[1]))
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "stopped").run()
    finished = set(performed) - {job for job in performed if not Store(tmp_path / "stopped").path(job).exists()}
    assert len(finished) == 3
    monkeypatch.setitem(compare_runs.WORK, "run", real)
    performed.clear()
    report = small(tmp_path / "stopped").run()
    assert comparable(report) == comparable(whole)
    assert set(performed) | finished == set(jobs)
    assert not set(performed) & finished
    assert set(performed.values()) == {1}


def test_a_second_time_nothing_is_done_and_more_seeds_add_only_theirs(tmp_path, performed):
    first = small(tmp_path).run()
    performed.clear()
    assert small(tmp_path).run() == first
    assert not performed
    small(tmp_path, seeds=3).run()
    assert {(job.kind, job.seed) for job in performed} == {("run", 2)}
    assert len(performed) == len(FEW)


def test_two_processes_give_what_one_gives(tmp_path):
    one, two = (small(tmp_path / str(n), ["lora", "full"]).run(n) for n in (1, 2))
    for method, row in one["methods"].items():
        other = two["methods"][method]
        assert other["bytes"] == pytest.approx(row["bytes"], rel=0.02)  # Python's own objects are in the peak
        assert other["loss"]["values"] == pytest.approx(row["loss"]["values"], rel=1e-3)
        assert other["accuracy"] == row["accuracy"]


def start(directory: Path) -> subprocess.Popen:
    """A comparison in two processes that writes many files."""
    line = [
        sys.executable,
        "-m",
        "minipeft",
        "compare",
        "--base",
        "mlp",
        "--methods",
        "lora,full,dora",
        "--steps",
        "300",
    ]
    return subprocess.Popen(
        [*line, "--seeds", "3", "--jobs", "2", "--out", str(directory)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_files(directory: Path, number: int, process: subprocess.Popen) -> dict[str, bytes]:
    until = time.monotonic() + 60
    while len(found := list(directory.glob("run-*.json"))) < number:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    return {path.name: path.read_bytes() for path in found}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_in_the_middle_it_leaves_whole_files(tmp_path, how):
    process = start(tmp_path)
    before = wait_for_files(tmp_path, 3, process)
    if how == signal.SIGINT:  # as Ctrl-C on a terminal: to all; a kill hits the first alone
        os.killpg(process.pid, how)
    else:
        process.kill()
    output, _ = process.communicate(timeout=60)  # ends when no process has the pipe any more
    if how == signal.SIGINT:
        assert process.returncode == 130, output
        assert re.search(r"stopped; \d+ results of this time are kept in .*: the same command goes on", output)
        assert "Traceback" not in output
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text())["result"]["loss"]
    assert not (tmp_path / REPORT).exists()
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_a_process_that_is_killed_is_told_of_and_what_was_done_is_kept(tmp_path):
    jobs = [Job("run", replace(SETTING, steps=400), "lora", 8, 1e-3, seed) for seed in range(6)]
    finished = []

    def kill_a_process_after_each():
        with workers(2, tmp_path) as run:
            for job, _ in run(jobs):
                finished.append(job)
                multiprocessing.active_children()[0].kill()

    with pytest.raises(MemoryError, match="the same command goes on, with fewer --jobs"):
        kill_a_process_after_each()
    assert all(Store(tmp_path).path(job).exists() for job in finished)
    assert 0 < len(finished) < len(jobs)
    assert not multiprocessing.active_children()


# --- files that are not trusted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text, other: text[:40], "not JSON"),
        (lambda text, other: other, "the result of something else than its name says"),
        (lambda text, other: text.replace('"loss"', '"lost"'), "not a whole result"),
        (lambda text, other: '{"job": 3}', "the result of something else"),
        (lambda text, other: "[]", "expected a JSON object"),
    ],
)
def test_a_file_that_is_broken_or_another_s_is_told_and_done_again(tmp_path, performed, damage, words):
    job = Job("run", SETTING, "lora", 8, 1e-3)
    other = replace(job, seed=1)
    store, said = Store(tmp_path), []
    for each in (job, other):
        perform(each, tmp_path)
    good = store.path(job).read_text()
    store.path(job).write_text(damage(good, store.path(other).read_text()))
    comparison = small(tmp_path, say=said.append)
    comparison._do(lambda jobs: ((j, compare_runs.perform(j, tmp_path)) for j in jobs), "runs", [job, other])
    assert len(said) == 1
    assert words in said[0]
    assert said[0].endswith("done again")
    assert comparison.done_now == 1
    assert json.loads(store.path(job).read_text())["result"]["loss"] == json.loads(good)["result"]["loss"]


def test_every_setting_has_a_file_of_its_own():
    job, store = Job("run", SETTING, "lora", 8, 1e-3), Store(Path("x"))
    others = [replace(job, seed=1), replace(job, lr=1.0000001e-3), replace(job, size=7), replace(job, method="dora")]
    others += [replace(job, setting=replace(SETTING, **{name: value})) for name, value in
               {"shift": "mirrored", "steps": 5, "batch_size": 17, "base": "vit", "contents": "0"}.items()]  # fmt: skip
    assert len({store.path(each) for each in (job, *others)}) == len(others) + 1


def test_another_version_s_results_are_not_used(tmp_path, monkeypatch):
    job = Job("run", SETTING, "lora", 8, 1e-3)
    perform(job, tmp_path)
    monkeypatch.setattr(compare_runs, "__version__", "0.0.1")
    assert Store(tmp_path).read(job) is None
    assert len(Store(tmp_path).others([job], REPORT)) == 1


# --- methods that fail ------------------------------------------------------------------------------------------------


def test_a_method_that_diverges_at_every_rate_is_shown_as_failed(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "dora", replace(METHODS["dora"], lr=1e25))
    report = small(tmp_path, sweep=True).run()
    row = report["methods"]["dora"]
    assert row["failed"]["runs"] >= 6
    assert "diverged" in row["failed"]["first"]
    assert row["lr"] is None
    assert list(report["methods"])[-1] == "dora"
    text = shown(report)
    assert re.search(r"dora +r 7 +3,392 +none +failed", text)
    assert "diverged: loss is" in text.replace("\n", " ")
    assert json.loads(write_report(tmp_path / "r.json", report).read_text()) == report


def test_a_run_that_fails_is_counted_beside_those_that_do_not(tmp_path, monkeypatch):
    real = compare_runs.WORK["run"]

    def failing(job):
        if (job.method, job.seed) == ("lora", 1):
            return {"failed": "diverged: loss is nan", "loss": [1.0]}
        return real[0](job)

    monkeypatch.setitem(compare_runs.WORK, "run", (failing, real[1]))
    report = small(tmp_path).run()
    row = report["methods"]["lora"]
    assert row["failed"] == {"runs": 1, "first": "diverged: loss is nan"}
    assert len(row["loss"]["values"]) == 1
    assert "(1 failed)" in shown(report)


def test_an_error_that_is_no_divergence_is_told_and_tried_again_next_time(tmp_path, monkeypatch):
    real = compare_runs.WORK["run"]

    def failing(job):
        if job.method == "lora":
            raise MemoryError("no room")
        return real[0](job)

    monkeypatch.setitem(compare_runs.WORK, "run", (failing, real[1]))
    report = small(tmp_path).run()
    assert "MemoryError: no room" in shown(report)
    assert report["target_of"] == "dora"
    monkeypatch.setitem(compare_runs.WORK, "run", real)
    assert small(tmp_path).run()["methods"]["lora"]["failed"] is None


# --- learning rates ---------------------------------------------------------------------------------------------------


def fake(loss):
    """Jobs that are done at once: the validation loss is a function of the learning rate ÷ the recipe's."""

    def run(jobs):
        for job in jobs:
            value = loss(job.lr / METHODS[job.method].lr)
            yield job, {"failed": None if np.isfinite(value) else "diverged", "loss": [], "valid_loss": value}

    return run


@pytest.mark.parametrize(
    ("best", "chosen", "tried"),
    [(1, 1, [0.5, 1, 2]), (4, 4, [0.5, 1, 2, 4, 8]), (0.25, 0.25, [0.125, 0.25, 0.5, 1, 2]), (1e9, 2**FURTHEST, None)],
)
def test_learning_rates_are_tried_until_the_best_is_inside(tmp_path, best, chosen, tried):
    rates, sweeps = small(tmp_path, ["lora"], sweep=True)._rates(
        fake(lambda factor: abs(np.log(factor / best))), ["lora"], {"lora": Budget(8, 1)}
    )
    lr = METHODS["lora"].lr
    assert rates["lora"] == pytest.approx(chosen * lr)
    if tried is not None:
        assert list(map(float, sweeps["lora"])) == pytest.approx([factor * lr for factor in tried])


def test_a_rate_at_which_a_run_diverges_is_not_chosen(tmp_path):
    rates, sweeps = small(tmp_path, ["lora"], sweep=True)._rates(
        fake(lambda factor: 1 / factor if factor < 2 else np.inf), ["lora"], {"lora": Budget(8, 1)}
    )
    assert rates["lora"] == METHODS["lora"].lr
    assert list(sweeps["lora"].values())[-1] is None


def test_runs_of_the_sweep_are_runs_of_the_comparison(tmp_path, performed):
    report = small(tmp_path, ["lora"], seeds=3, sweep=True).run()
    runs = [job for job in performed if job.kind == "run"]
    assert len(runs) == 2 * len(report["methods"]["lora"]["tried"]) + 1


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_has_means_and_deviations_of_what_the_files_have(tmp_path):
    comparison = small(tmp_path, setting=replace(SETTING, steps=40))
    report = comparison.run()
    runs = [comparison.asked[Job("run", comparison.setting, "lora", 8, METHODS["lora"].lr, seed)] for seed in (0, 1)]
    row = report["methods"]["lora"]
    assert row["accuracy"]["mean"] == pytest.approx(np.mean([run["accuracy"] for run in runs]), rel=1e-4)
    assert row["accuracy"]["deviation"] == pytest.approx(np.std([run["accuracy"] for run in runs], ddof=1), rel=1e-4)
    assert row["loss"]["mean"] == pytest.approx(np.mean([run["loss"][-4:] for run in runs]), rel=1e-4)
    pairs = [np.convolve(run["loss"], [0.5, 0.5], mode="valid") for run in runs]
    assert report["target_loss"] == pytest.approx(np.mean([pair[18] for pair in pairs]), rel=5e-3)  # after step 20
    steps = [int(np.argmax(pair <= report["target_loss"])) + 2 for pair in pairs]
    assert row["steps_to_target"]["values"] == steps
    reached = [found["accuracy"]["mean"] for found in report["methods"].values()]
    assert reached == sorted(reached, reverse=True)
    assert row["step_time"] == 1.0
    assert len(report["curve_steps"]) == len(row["curve"]["mean"])
    assert report["curve_steps"][-1] == 40


def test_lora_is_timed_where_it_is_not_compared(tmp_path):
    report = small(tmp_path, ["dora"], seeds=1).run()
    assert list(report["methods"]) == ["dora"]
    assert report["methods"]["dora"]["step_time"] > 0


def test_bytes_are_those_of_what_trains():
    full, lora, qlora, hybrid = (
        compare_runs.bytes_run(Job("bytes", SETTING, method, 8))
        for method in ("full", "lora", "qlora", "full-then-lora")
    )
    assert full["gradients"] == 4 * 24832
    assert full["optimizer"] == 2 * full["gradients"]
    assert lora["gradients"] == 4 * 3584
    assert qlora["weights"] < lora["weights"] / 3
    assert hybrid["gradients"] == full["gradients"]
    for found in (full, lora, qlora):
        assert found["peak"] >= found["weights"] + found["optimizer"] + max(found["gradients"], found["activations"])


def test_in_the_figure_a_method_far_below_stands_at_the_edge_with_its_value(tmp_path):
    report = small(tmp_path, setting=replace(SETTING, steps=20)).run()
    for method, share in zip(report["methods"], (0.9, 0.88, 0.4), strict=True):
        report["methods"][method]["accuracy"] = {"mean": share, "values": [share - 0.01, share + 0.01]}
    with drawing("zh", "page"):
        *curves, points = comparison(report).axes
    assert [text.get_text() for text in points.texts] == ["40.0 ↓"]
    assert points.get_ylim()[0] > 80
    assert len(points.get_legend().get_texts()) == 3
    assert points.get_ylabel() == "测试准确率，%"
    assert {line.get_label() for axes in curves for line in axes.lines} >= {"LoRA", "DoRA", "全参数微调"}


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 140])
def test_the_command_shows_the_tables_and_writes_report_and_figure(tmp_path, columns):
    options = ("--base", "mlp", "--methods", "lora,full,adalora", "--steps", 20, "--seeds", 2, "--jobs", 1)
    result = command(*options, "--no-sweep", "--out", tmp_path, columns=columns)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.replace(str(tmp_path), "").splitlines())) <= columns
    assert re.search(r"full +24,832 ", result.output)
    assert re.search(r"adalora +r 8 +5,400 → 3,\d+", result.output)
    assert re.search(r"lora .* \d+\.\d ± \d+\.\d", result.output)
    assert re.search(r"lora +116 +14 +28 +\d+ +\d+ +1\.00", result.output)
    assert "the base" in result.output
    assert re.search(r"One standard error of 400 cases at \d+%: \d\.\d points", " ".join(result.output.split()))
    report = json.loads((tmp_path / REPORT).read_text())
    assert report["machine"]["numpy"] == np.__version__
    assert (tmp_path / REPORT).stat().st_size < 20_000
    assert (tmp_path / "compare.svg").read_text().startswith("<?xml")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_files_of_other_settings_are_told_of(tmp_path):
    options = ("--base", "mlp", "--methods", "lora", "--seeds", 1, "--jobs", 1, "--no-sweep", "--out", tmp_path)
    command(*options, "--steps", 4)
    result = command(*options, "--steps", 5)
    assert "4 other JSON files" in result.output


def test_quick_is_short_unless_more_is_asked_for(tmp_path):
    result = command("--base", "mlp", "--methods", "lora", "--quick", "--seeds", 1, "--jobs", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / REPORT).read_text())
    assert (report["setting"]["steps"], report["seeds"], report["swept"]) == (40, 1, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "cats"], "--task: got 'cats'; accepted are digits, self-cognition"),
        (["--methods", "lora,magic"], "--methods: got 'lora,magic'; accepted are all, or some of full, lora"),
        (["--methods", ","], "--methods: got ','"),
        (["--base", "bert"], "--base: got 'bert'; accepted for digits are mlp, vit"),
        (["--task", "self-cognition", "--base", "mlp"], "is for a language model"),
        (["--shift", "bent"], "--shift: got 'bent'; accepted are rotated"),
        (["--steps", "3"], "--steps: got 3; at least 4"),
        (["--seeds", "0"], "Invalid value for '--seeds'"),
        (["--jobs", "0"], "Invalid value for '--jobs'"),
        (["--target", "-1"], "--target: got -1.0"),
        (["--lang", "fr"], "got 'fr'"),
        (["--out", "here.txt"], "--out: here.txt is a file"),
    ],
)
def test_wrong_arguments_are_one_clear_line_and_nothing_is_written(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("here.txt").write_text("")
    result = command(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["here.txt"]


# --- the language model -----------------------------------------------------------------------------------------------


def test_a_language_model_s_methods_are_ranked_by_the_questions_answered_with_the_name(tmp_path, monkeypatch):
    for package in ("tokenizers", "jinja2", "gguf"):
        pytest.importorskip(package)
    from test_tokenizer import write_llama

    from minipeft import adapt_language
    from minipeft.data import self_cognition

    model = write_llama(tmp_path, context=512)
    monkeypatch.setattr(adapt_language, "ANSWER", 4)
    few, whole = self_cognition.shown(), self_cognition.conversations(compare_runs.NAME, compare_runs.AUTHOR)
    monkeypatch.setattr(self_cognition, "held_out", lambda: few)
    monkeypatch.setattr(self_cognition, "conversations", lambda name, author: whole[::20])
    options = ("--task", "self-cognition", "--base", model, "--methods", "lora,p-tuning", "--steps", 4)
    result = command(*options, "--seeds", 1, "--no-sweep", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["metrics"] == ["named", "test_loss", "perplexity"]
    assert len(report["setting"]["contents"]) == 25
    lora = report["methods"]["lora"]
    assert report["methods"]["p-tuning"]["trains"] == pytest.approx(lora["trains"], rel=0.1)
    assert all(row["step_time"] and row["bytes"]["peak"] for row in report["methods"].values())
    assert {"new", "name", "given,"} <= set(result.output.split())  # a narrow table breaks the heading into lines
    assert re.search(r"\([+-]\d+\.\d%\)", result.output)
    assert report["base"]["perplexity"] > 1
    read = problem(Setting("self-cognition", model, steps=4, batch_size=6))
    assert report["base"]["test_loss"] == pytest.approx(
        adapt_language.held_out_loss(read.model(), read.examples["test"]), rel=1e-4
    )
    parts = [{example.ids.tobytes() for example in read.examples[part]} for part in ("train", "valid", "test")]
    assert all(parts)
    assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts))
