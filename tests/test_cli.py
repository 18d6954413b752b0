"""The command line: what a person sees, what is written where, and what wrong arguments lead to."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

import minipeft
from minipeft import PeftModel, adapt, cli, ledger, ledger_table, models, no_grad
from minipeft.data import digits

QUICK = ("train", "--model", "mlp", "--steps", "20")


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def minipeft_command(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


def files_below(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


# --- help and errors --------------------------------------------------------------------------------------------------


def test_version():
    assert minipeft_command("--version").output == f"minipeft {minipeft.__version__}\n"


def test_help_names_every_command_in_one_line_each():
    output = minipeft_command("--help").output
    assert all(f" {command} " in output for command in ("train", "verify", "figures", "doctor"))


def test_the_module_runs_as_the_command():
    run = subprocess.run([sys.executable, "-m", "minipeft", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"minipeft {minipeft.__version__}\n"


def test_help_lists_the_choices():
    output = minipeft_command("train", "--help").output
    assert all(name in output for name in (*models.BASES, *adapt.METHODS, *digits.SHIFTS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "bert"], "--model: got 'bert'; accepted are mlp, vit"),
        (["train", "--method", "magic"], "--method: got 'magic'; accepted are full, lora, rslora"),
        (["train", "--shift", "bent"], "--shift: got 'bent'; accepted are rotated"),
        (["train", "--method", "full", "--r", "4"], "--r: method 'full' has no such option, it trains whole weights"),
        (
            ["train", "--method", "p-tuning", "--alpha", "4"],
            "method 'p-tuning' has no such option, its options are --r",
        ),
        (["train", "--method", "p-tuning", "--model", "mlp"], "MLP has no place for virtual tokens"),
        (["train", "--r", "0"], "r: got 0"),
        (["train", "--r", "49"], "rank at most 48"),
        (["train", "--alpha", "-1"], "lora_alpha: got -1.0"),
        (["train", "--targets", "q_prj"], "no module is called 'q_prj'; closest are 'q_proj'"),
        (["train", "--targets", ""], "--targets: got ''; accepted are all-linear"),
        (["train", "--targets", "q_proj,,v_proj"], "--targets: got 'q_proj,,v_proj'; accepted are all-linear"),
        (["train", "--targets", ".*norm"], "only Linear layers are adapted"),
        (["train", "--lr", "-1"], "lr: got -1.0"),
        (["train", "--lr", "nan"], "lr: got nan"),
        (["train", "--lr", "0"], "--lr: got 0.0; a positive number is accepted"),
        (["train", "--batch-size", "401"], "--batch-size: got 401; 1 to 400 is accepted"),
        (["train", "--out", "file"], "--out: file is a file"),
        (["verify", "Nothing"], "'Nothing'; accepted are LoRA"),
        (["figures", "nothing"], "figure: got 'nothing'; accepted are adaptation"),
        (["figures", "--out", "file"], "--out: file is a file"),
        (["verify", "--json", "."], "--json: . is a directory"),
        (["verify", "--json", "file/ledger.json"], "--json: cannot write in file"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_writes_nothing(empty_directory: Path, arguments: list[str], message: str):
    (empty_directory / "file").write_text("mine")
    result = minipeft_command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert re.fullmatch(r"error: .+\n", result.stderr)
    assert files_below(empty_directory) == {"file"}
    assert (empty_directory / "file").read_text() == "mine"


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--batch-size", "0"], ["--seed", "-1"], ["--steps", "many"]])
def test_a_number_out_of_range_is_refused(empty_directory: Path, arguments: list[str]):
    result = minipeft_command("train", *arguments)
    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[0]}'" in result.stderr
    assert files_below(empty_directory) == set()


@pytest.mark.parametrize("arguments", [["train", "--out", "closed/run"], ["verify", "--html", "closed/page.html"]])
def test_a_directory_that_may_not_be_looked_into_is_one_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str]):
    monkeypatch.setattr(Path, "exists", denied)  # as Python before 3.14 does; the superuser of a test may look anywhere
    result = minipeft_command(*arguments)
    assert result.exit_code == 2
    assert re.fullmatch(rf"error: {arguments[1]}: cannot write in closed.* \(Permission denied\)\n", result.stderr)


def test_a_file_that_may_not_be_read_is_named_first(monkeypatch: pytest.MonkeyPatch):
    Path("closed.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", denied)
    result = minipeft_command("memory", "--params", "closed.json")
    assert result.exit_code == 2
    assert result.stderr == "error: closed.json: Permission denied\n"


def denied(path: Path, **options: Any) -> Any:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_a_loss_that_is_not_finite_is_one_line_too():
    result = minipeft_command(*QUICK, "--lr", "1e30")
    assert result.exit_code == 2
    assert re.search(r"^error: loss is (nan|inf) at step \d+; .*smaller learning rate", result.stderr, re.M)
    assert "Traceback" not in result.output
    assert "Warning" not in result.output


# --- train ------------------------------------------------------------------------------------------------------------


def accuracies(output: str) -> dict[str, list[float]]:
    """The rows of the accuracy table, in per cent."""
    rows = re.findall(r"(\w+) \(400\)(.+)", output)
    return {name: [float(x) for x in re.findall(r"([\d.]+)%", rest)] for name, rest in rows}


def test_lora_learns_the_shifted_digits_and_comes_off_again():
    result = minipeft_command("train", "--model", "mlp")
    assert result.exit_code == 0
    rows = accuracies(result.output)
    before, after, off = rows["rotated"]
    assert before < 20  # chance is 10
    assert after > 85
    assert off == before
    assert rows["original"][0] == rows["original"][2] > 90


def test_the_saved_adapter_gives_the_accuracy_that_was_shown():
    result = minipeft_command(*QUICK, "--out", "here")
    model = PeftModel.from_pretrained(models.load_base("mlp"), "here")
    x, y = digits.transfer().test
    with no_grad():
        accuracy = (model(x).numpy().argmax(axis=-1) == y).mean()
    assert accuracies(result.output)["rotated"][1] == pytest.approx(100 * accuracy, abs=0.051)  # one digit is shown


@pytest.mark.parametrize("method", adapt.METHODS)
@pytest.mark.parametrize("model", models.BASES)
def test_every_method_trains_every_model(empty_directory: Path, model: str, method: str):
    if (model, method) == ("mlp", "p-tuning"):
        pytest.skip("the MLP has no tokens; that it is told so is tested above")
    result = minipeft_command("train", "--model", model, "--method", method, "--steps", "2")
    assert result.exit_code == 0, result.output
    tensors = "model" if method == "full" else "adapter_model"
    assert f"runs/{model}-{method}/{tensors}.safetensors" in files_below(empty_directory)


def test_both_phases_of_full_then_lora_are_shown_with_their_bytes():
    output = " ".join(minipeft_command(*QUICK, "--method", "full-then-lora").output.split())
    assert re.search(r"4 steps of full training: 99 kB of weights trained, .*; 16 steps of LoRA: 14 kB of", output)


def test_options_reach_the_adapter():
    minipeft_command(*QUICK, "--r", "3", "--alpha", "5", "--targets", "fc2", "--method", "rslora", "--out", "here")
    config = json.loads(Path("here/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"], config["use_rslora"]) == (3, 5, ["fc2"], True)
    assert set(load_file("here/adapter_model.safetensors")) == {
        "base_model.model.fc2.lora_A.weight",
        "base_model.model.fc2.lora_B.weight",
    }


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("all-linear", "all-linear"),
        ("ALL", "ALL"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (r".*\.(up|down)_proj", r".*\.(up|down)_proj"),
    ],
)
def test_targets_are_names_or_a_regular_expression(text: str, targets: str | list[str]):
    assert adapt.Settings(targets=text).choice().targets == targets


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        minipeft_command(*QUICK, "--seed", seed, "--out", name)
    a, b, c = (Path(name, "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped():
    minipeft_command(*QUICK, "--out", "whole")
    minipeft_command("train", "--model", "mlp", "--steps", "7", "--out", "parts")
    assert minipeft_command(*QUICK, "--out", "parts", "--resume").exit_code == 0
    whole, parts = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize(
    ("stop_at", "words"), [(1, "before the first checkpoint"), (3, "runs/mlp-lora keeps a checkpoint")]
)
def test_a_run_stopped_by_the_keyboard_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, stop_at: int, words: str):
    def interrupt(told: Any) -> None:
        if told.step == stop_at:
            raise KeyboardInterrupt

    interrupted = functools.partial(adapt.fit, callbacks=[interrupt])  # of 20 steps, a checkpoint after each second
    monkeypatch.setattr("minipeft.adapt.fit", interrupted)
    result = minipeft_command(*QUICK)
    assert result.exit_code == 130
    assert words in result.stderr.replace("\\", "/")
    assert ("--resume" in result.stderr) == Path("runs/mlp-lora/checkpoint.safetensors").exists()


def test_resume_refuses_the_run_of_other_settings_and_leaves_it_alone():
    minipeft_command(*QUICK, "--out", "here")
    before = {file.name: file.read_bytes() for file in Path("here").iterdir()}
    result = minipeft_command(*QUICK, "--r", "4", "--out", "here", "--resume")
    assert result.exit_code == 2
    assert "the run in here has r 8 (now 4)" in result.stderr
    result = minipeft_command("train", "--model", "mlp", "--steps", "10", "--out", "here", "--resume")
    assert result.exit_code == 2
    assert "has 20 steps" in result.stderr
    assert before == {file.name: file.read_bytes() for file in Path("here").iterdir()}


def test_resume_without_a_checkpoint_starts_at_the_first_step():
    result = minipeft_command(*QUICK, "--resume")
    assert result.exit_code == 0
    assert "No checkpoint in runs/mlp-lora yet" in result.output


def test_a_new_run_does_not_go_on_from_an_old_checkpoint():
    minipeft_command(*QUICK, "--out", "here", "--seed", "1")
    minipeft_command(*QUICK, "--out", "here", "--seed", "2")
    minipeft_command(*QUICK, "--out", "fresh", "--seed", "2")
    here, fresh = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("here", "fresh"))
    assert here == fresh


# --- verify -----------------------------------------------------------------------------------------------------------

FOUND = "rank(BA) ≤ r in 60 of 60 shapes [0, 1)"
FOUND_ZH = "60 种形状中有 60 种满足 rank(BA) ≤ r（区间 [0, 1)）。"


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> list[ledger.Claim]:
    """A ledger of five claims, one of each verdict."""
    outcomes = [
        ledger.Evidence(FOUND, FOUND_ZH, True, figures={"shapes": np.int64(60), "rank": np.arange(2), "worst": np.nan}),
        ledger.Evidence("it holds up to rounding", "只差舍入误差。", holds=False, within=True),
        ledger.Evidence("it is the other way round", "正好相反。", holds=False, instead=True),
        ledger.Evidence("3.1 ms", "3.1 毫秒。"),
        ledger.Evidence("it does not hold", "不成立。", holds=False),
    ]
    made = [
        ledger.Claim(
            f"lora.claim-{i}", "LoRA", f"statement {i} of the document", lambda outcome=outcome: outcome, False
        )
        for i, outcome in enumerate(outcomes)
    ]
    monkeypatch.setattr(ledger, "claims", lambda sections, full: made)
    return made


def test_the_table_has_every_claim_and_the_summary_counts_them(claims: list[ledger.Claim]):
    output = minipeft_command("verify").output
    assert all(claim.id in output for claim in claims)
    assert "5 claims, 1 confirmed, 1 confirmed within limits, 1 corrected, 1 measured, 1 failed" in " ".join(
        output.split()
    )


def test_a_failed_claim_makes_the_exit_status_1(claims: list[ledger.Claim]):
    assert minipeft_command("verify").exit_code == 1
    claims.pop()
    assert minipeft_command("verify").exit_code == 0


def test_a_check_that_raises_has_failed_and_the_others_still_run(claims: list[ledger.Claim]):
    def broken() -> ledger.Evidence:
        raise RuntimeError("no such matrix")

    claims[0] = ledger.Claim("lora.broken", "LoRA", "anything", broken, False)
    result = minipeft_command("verify", "--json", "ledger.json")
    assert result.exit_code == 1
    verdicts = [claim["verdict"] for claim in json.loads(Path("ledger.json").read_text())["claims"]]
    assert verdicts == ["failed", "confirmed within limits", "corrected", "measured", "failed"]
    assert "no such matrix" in " ".join(result.output.split())


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_the_table_fits_the_terminal_and_loses_no_word(claims: list[ledger.Claim], width: int):
    verdicts = [claim.judge() for claim in claims]
    console = cli.Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - the console keeps it
    console.print(ledger_table.table(verdicts, width))
    text = console.export_text()
    console.file.close()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = set(re.split(r"[\s│]+", text))
    for verdict in verdicts:
        assert {*verdict.found.split(), *verdict.statement.split(), *verdict.verdict.split(), verdict.id} <= words


def test_json_holds_the_claims_the_figures_and_the_machine(claims: list[ledger.Claim]):
    minipeft_command("verify", "--json", "new/ledger.json")
    content = json.loads(
        Path("new/ledger.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert (content["claims"][0]["found"], content["claims"][0]["found_zh"]) == (FOUND, FOUND_ZH)
    assert content["claims"][0]["figures"] == {"shapes": 60, "rank": [0, 1], "worst": None}
    assert content["counts"]["measured"] == 1
    assert content["machine"]["numpy"] == np.__version__
    assert files_below(Path("new")) == {"ledger.json"}


def test_the_real_ledger_judges_a_claim():
    result = minipeft_command("verify", "lora.low-rank")
    assert result.exit_code == 0
    assert "lora.low-rank" in result.output
    assert "1 claim, 1 confirmed" in result.output
