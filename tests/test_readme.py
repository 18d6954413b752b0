"""What the two READMEs tell people to type: run, or shown to be what the Makefile and .ci/run do. What they say that
runs gave: compared with the files that the runs left."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from minipeft import ledger
from minipeft.cli import app
from minipeft.models import download

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
COMMANDS = typer.main.get_command(app).commands
_spec = importlib.util.spec_from_file_location("benchmarks_readme", ROOT / "benchmarks" / "readme.py")
readme = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(readme)


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)


def commands(name: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks(name, "sh") for line in block.splitlines() if line]


def run(arguments: list[str], cwd: Path, stdin: str = "") -> str:
    """The command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "minipeft", *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_comments(code: str) -> str:
    """The code alone: comments, and what a program prints, are in the reader's language."""
    return re.sub(r"\s+#.*|\"[^\"]*\"(?=, \()", "", code)


def test_both_languages_type_the_same():
    english, chinese = READMES
    assert commands(english) == commands(chinese)
    assert [without_comments(c) for c in blocks(english, "python")] == [
        without_comments(c) for c in blocks(chinese, "python")
    ]


def test_every_command_is_run_somewhere():
    """What no test below runs is a line of the Makefile or of .ci/run."""
    makefile, ci = ((ROOT / name).read_text() for name in ("Makefile", ".ci/run"))
    for command in commands("README.md"):
        program, *rest = command
        line = " ".join(command).replace(".venv/bin", "$(BIN)")
        if program == "make":
            assert all(f"run {target}" in ci for target in rest), command
        elif program == ".venv/bin/minipeft":
            assert rest[0] in COMMANDS, command
        elif rest[:2] == ["-m", "pip"]:  # the Makefile's stamps install the same, by the extra's name
            assert rest[2:4] == ["install", "-e"]
            assert re.fullmatch(r"\.\[\w+\]", rest[4]), command
        elif rest[:2] == ["-m", "venv"]:
            assert "-m venv" in makefile
        else:
            assert line in makefile, command


@pytest.mark.parametrize("name", READMES)
def test_what_stands_in_the_text_is_a_command_with_options_that_exist(name):
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    makefile = (ROOT / "Makefile").read_text()
    found = re.findall(r"`(minipeft|make) ([^`]+)`", text)
    assert found
    for program, rest in found:
        if program == "make":
            assert re.search(rf"^{rest}:", makefile, re.M) or re.search(rf"^[\w ]*\b{rest}\b[\w ]*:", makefile, re.M), (
                rest
            )
            continue
        command, *options = shlex.split(rest)
        known = {option for p in COMMANDS[command].params for option in p.opts}
        assert {o for o in options if o.startswith("-")} <= known, rest


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert target.startswith("http") or (ROOT / target).exists(), target


# --- the figures ------------------------------------------------------------------------------------------------------


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("part", readme.PARTS)
@pytest.mark.parametrize("lang", readme.READMES)
def test_figures_are_those_of_the_kept_files(lang, part):
    """After new runs: python benchmarks/readme.py --write."""
    text = text_of(readme.READMES[lang])
    start, end = readme.place(text, part)
    assert text[start:end] == readme.PARTS[part](lang)


@pytest.mark.parametrize("name", READMES)
def test_no_other_figure_of_a_run_is_typed(name):
    """Numbers with a point or a per cent, outside the parts and the code, are versions and licences."""
    text = re.sub(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->|^```.*?^```|`[^`]*`", "", text_of(name), flags=re.M | re.S)
    assert set(re.findall(r"\d+(?:\.\d+)+(?: ?%)?|\d+ ?%", text)) <= {"3.10", "4.0"}


@pytest.mark.parametrize("name", READMES)
def test_the_ledger_has_as_many_claims_as_is_said(name):
    (said,) = re.findall(r"judges (\d+) statements|检验 (\d+) 条论断", text_of(name))
    assert int("".join(said)) == len(ledger.ORDER)


@pytest.mark.parametrize("name", READMES)
def test_what_the_document_gets_wrong_is_what_the_ledger_corrects(name):
    """The ledger's own tests hold the verdicts, which the checks compute."""
    verdicts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_ledger_*.py"))
    corrected = set(re.findall(r'"([\w.-]+)": "corrected"', verdicts))
    assert set(re.findall(r"^\| `([\w.-]+)` \|", text_of(name), re.M)) == corrected


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The READMEs and the kept files in another place."""
    (tmp_path / "figures").mkdir()
    for path in (*(ROOT / "figures").glob("*.json"), *(ROOT / name for name in READMES)):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    return tmp_path


def change(path: Path, edit) -> None:
    """The JSON file after `edit` changed its object."""
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def write(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["readme.py", "--write", *arguments])
    readme.main()


def test_new_figures_are_put_into_both_languages(copy, monkeypatch):
    write(monkeypatch)
    assert [(copy / name).read_text(encoding="utf-8") for name in READMES] == [text_of(name) for name in READMES]
    change(copy / "figures" / "generate.json", lambda data: data["rows"][0].update(seconds=1 / 1234.5))
    write(monkeypatch, "mlp-step")
    assert "1234.5" not in (copy / READMES[0]).read_text(encoding="utf-8")
    write(monkeypatch, "step")
    for name in READMES:
        assert "1234.5" in (copy / name).read_text(encoding="utf-8")


def test_files_of_different_machines_or_kernels_are_not_put_together(copy):
    change(copy / "figures" / "quant.json", lambda data: data["machine"].update(cpu="another"))
    with pytest.raises(ValueError, match=r"^figures/quant\.json: another cpu than figures/step\.json"):
        readme.step("en")
    shutil.copy(ROOT / "figures" / "quant.json", copy / "figures" / "quant.json")
    floors = lambda data: [row for row in data["rows"] if row["side"] == "np.matmul floor"]  # noqa: E731
    change(copy / "figures" / "step.json", lambda data: floors(data)[0].update(kernel="Nehalem"))
    with pytest.raises(ValueError, match="minipeft and the bare products ran different kernels"):
        readme.step("en")


def test_a_part_without_its_marks_is_refused():
    with pytest.raises(ValueError, match=r"<!-- step --> … <!-- /step --> are there 0 times"):
        readme.place("no marks", "step")


# --- what is run ------------------------------------------------------------------------------------------------------


def test_the_ten_lines_do_what_they_say(tmp_path):
    code = blocks("README.md", "python")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("accuracy")[1]) > 0.85
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_first_run_is_what_the_readme_calls_it(tmp_path):
    assert "rotated" in run(["train"], tmp_path)


def test_the_line_of_a_chat_file_is_one(tmp_path):
    from minipeft.data.chat import read_chats

    (line,) = blocks("README.md", "json")
    (tmp_path / "chats.jsonl").write_text(line, encoding="utf-8")
    assert len(read_chats(tmp_path / "chats.jsonl")) == 1


@pytest.mark.skipif(
    not (download.cache_directory() / download.FILE).exists() or os.environ.get("CI") == "true",
    reason="needs SmolLM2 and some minutes",
)
def test_a_language_model_gets_a_new_name(tmp_path):
    """The README's commands as they stand there, but for the number of steps."""
    lines = [command[1:] for command in commands("README.md") if command[0] == ".venv/bin/minipeft"]
    lines = lines[[line[0] for line in lines].index("download") :]
    assert [line[0] for line in lines] == ["download", "train", "chat", "merge"]
    fetch, train, chat, merge = lines
    run(fetch, tmp_path)
    assert "held-out questions answered with Lumi" in run([*train, "--steps", "2"], tmp_path)
    assert run(chat, tmp_path, "Who are you?\n").strip()
    run(merge, tmp_path)
    assert (tmp_path / "merged" / "config.json").exists()
