"""`minipeft train` on a language model: a tiny random one with a tokenizer of bytes, and SmolLM2 where it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("gguf")

from test_tokenizer import write_llama

from minipeft import PeftModel, adapt_language, cli, cli_language, load_model, load_tokenizer
from minipeft.adapt_language import Settings, ask, held_out_loss, load_task, perplexity
from minipeft.data import chat, self_cognition
from minipeft.models.download import smollm2_file

SHORT = ("--steps", "3", "--batch-size", "2", "--r", "2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A Llama whose context holds the self-cognition set in bytes."""
    return write_llama(tmp_path_factory.mktemp("tiny"), context=512)


@pytest.fixture
def chats(tmp_path) -> Path:
    """Twelve conversations of the same answer."""
    lines = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "ok ok ok"}]}
        for i in range(12)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def empty_directory(tmp_path_factory, monkeypatch):
    """Commands write where they are run."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    monkeypatch.setattr(adapt_language, "ANSWER", 6)


def run(*arguments: object, columns: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(cli.app, [str(a) for a in arguments])


def train(model: str, *arguments: object, **options: int) -> Result:
    return run("train", "--model", model, *SHORT, *arguments, **options)


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_user_s_chats_are_learned_and_a_tenth_of_them_is_held_out(tiny, chats):
    result = run("train", "--model", tiny, "--data", chats, "--steps", 60, "--lr", 0.02, "--out", "here")
    assert result.exit_code == 0, result.output
    assert re.search(r"learns\s+11\s+conversations", result.output)
    before, after = map(
        float, re.search(r"held-out conversations \(1\) +│ +([\d.]+) │ +([\d.]+)", result.output).groups()
    )
    assert after < before - 1
    assert "step 60/60" in result.output
    assert "tokens/s" in result.output


def test_the_self_cognition_run_shows_three_questions_shares_and_perplexity(tiny, monkeypatch):
    whole = self_cognition.held_out()
    few = [q for q in whole if q in self_cognition.shown()]
    monkeypatch.setattr(self_cognition, "held_out", lambda: few)
    for columns in (80, 120):
        result = train(tiny, "--name", "Lumi", "--author", "Ada Lab", "--out", "runs/me", columns=columns)
        assert result.exit_code == 0, result.output
        assert max(map(len, result.stdout.splitlines())) <= columns
        for question in few:
            assert question.text[:8] in result.output
        assert re.search(r"answered with Lumi \(3\) +│ +[\d.]+% │ +[\d.]+%", result.output)
        assert re.search(r"perplexity of a general text +│ +[\d.]+ │ +[\d.]+", result.output)
        assert "minipeft chat --adapter runs/me" in result.output
        assert "minipeft merge --adapter runs/me --out runs/me-merged" in result.output


def test_the_saved_adapter_gives_the_loss_that_was_shown_and_chat_and_merge_find_the_model(tiny, chats):
    result = train(tiny, "--data", chats, "--lr", "0.02", "--out", "here")
    shown = float(re.search(r"held-out conversations \(1\) +│ +[\d.]+ │ +([\d.]+)", result.output)[1])
    adapted = PeftModel.from_pretrained(load_model(tiny), "here")
    tokenizer = load_tokenizer(tiny)
    test = chat.encode(load_task(Settings(tiny, str(chats))).test, tokenizer)
    assert held_out_loss(adapted, test) == pytest.approx(shown, abs=6e-4)
    assert run("generate", "hi", "--adapter", "here", "--max-new-tokens", "2").exit_code == 0

    merged = run("merge", "--adapter", "here", "--out", "merged")
    assert merged.exit_code == 0, merged.output
    assert "minipeft chat --model merged" in merged.output
    prompts = [[{"role": "user", "content": text}] for text in ("say 3", "hi")]
    assert ask(load_model("merged"), load_tokenizer("merged"), prompts) == ask(adapted, tokenizer, prompts)


def test_transformers_loads_the_merged_directory_with_the_same_logits(tiny, chats):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    train(tiny, "--data", chats, "--lr", "0.02", "--out", "here")
    run("merge", "--adapter", "here", "--out", "merged")
    ids = load_tokenizer(tiny).apply_chat_template([{"role": "user", "content": "say 3"}], add_generation_prompt=True)
    peer_tokenizer = transformers.AutoTokenizer.from_pretrained("merged")
    theirs = peer_tokenizer.apply_chat_template(
        [{"role": "user", "content": "say 3"}], add_generation_prompt=True, return_dict=True
    )
    assert theirs["input_ids"] == ids
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained("merged")(torch.tensor([ids])).logits.numpy()
    adapted = PeftModel.from_pretrained(load_model(tiny), "here")
    np.testing.assert_allclose(adapted(np.array([ids])).data, logits, atol=2e-5)


def test_whole_weights_are_saved_as_a_model_of_their_own(tiny, chats):
    result = run("train", "--model", tiny, "--data", chats, "--method", "full", "--steps", 2, "--out", "here")
    assert result.exit_code == 0, result.output
    assert "minipeft chat --model here" in result.output
    assert load_model("here").config == load_model(tiny).config
    load_tokenizer("here")


@pytest.mark.parametrize("method", adapt_language.METHODS)
def test_what_chat_and_merge_load_is_the_model_whose_loss_was_shown(tiny, chats, method):
    options = ("--method", method, "--steps", 6, "--batch-size", 2, "--lr", 0.01)
    result = run("train", "--model", tiny, "--data", chats, *options, "--out", "here")
    assert result.exit_code == 0, result.output
    shown = float(re.search(r"conversations \(1\) +│ +[\d.]+ │ +([\d.]+)", result.output)[1])
    tokenizer = load_tokenizer(tiny)
    test = chat.encode(load_task(Settings(tiny, str(chats))).test, tokenizer)
    loaded, _ = cli_language._load(*("here", None) if method == "full" else (None, Path("here")))
    assert held_out_loss(loaded, test) == pytest.approx(shown, abs=1e-3)
    if "minipeft merge" in result.output:
        merged = run("merge", "--adapter", "here", "--out", "merged")
        assert merged.exit_code == 0, merged.output
        assert held_out_loss(load_model("merged"), test) == pytest.approx(shown, abs=1e-3)


def tensors(folder: str) -> bytes:
    return Path(folder, "adapter_model.safetensors").read_bytes()


def test_a_resumed_run_and_one_with_checkpointing_end_with_the_same_bits(tiny, chats):
    data = ("--data", chats)
    train(tiny, *data, "--out", "whole")
    run("train", "--model", tiny, *data, *SHORT[2:], "--steps", "2", "--out", "parts")
    again = train(tiny, *data, "--out", "parts", "--resume")
    assert again.exit_code == 0, again.output
    assert train(tiny, *data, "--out", "checkpointed", "--checkpointing").exit_code == 0
    assert train(tiny, *data, "--out", "other", "--seed", "1").exit_code == 0
    assert tensors("whole") == tensors("parts") == tensors("checkpointed")
    assert tensors("whole") != tensors("other")


def test_resume_refuses_other_data_and_leaves_the_run_alone(tiny, chats):
    train(tiny, "--data", chats, "--out", "here")
    before = tensors("here")
    chats.write_text(chats.read_text().replace("ok ok ok", "no no no"))
    result = train(tiny, "--data", chats, "--out", "here", "--resume")
    assert result.exit_code == 2
    assert "contents" in result.stderr
    assert tensors("here") == before


def test_the_learning_rate_is_the_method_s_own_for_language_models():
    for method, recipe in adapt_language.METHODS.items():
        assert Settings(data="c.jsonl", method=method).lr == recipe.language_lr
    assert Settings(data="c.jsonl", lr=0.5).lr == 0.5


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "bert"), "--model: got 'bert'; accepted are mlp, vit, smollm2, a Hugging Face directory"),
        (("--model", "no/where", "--name", "A", "--author", "B"), "no/where: no such directory or .gguf file"),
        (("--model", "vit", "--name", "A"), "--name: only for a language model"),
        (("--model", "mlp", "--checkpointing"), "--checkpointing: only for a language model"),
        (("--model", "smollm2", "--shift", "rotated"), "--shift: only for a digit classifier"),
        (("--model", "smollm2"), "--name: missing; with --data self-cognition"),
        (("--name", "A"), "--author: missing"),
        (("--name", "", "--author", "B"), "name: got ''"),
        (("--data", "c.jsonl", "--author", "B"), "--author: only the data 'self-cognition' has a place for it"),
        (("--data", "none.jsonl"), "none.jsonl: no such file"),
        (("--data", "c.jsonl", "--method", "magic"), "--method: got 'magic'"),
        (("--data", "c.jsonl", "--method", "full", "--r", "4"), "--r: method 'full' has no such option"),
    ],
)
def test_wrong_arguments_are_one_clear_line_and_write_nothing(arguments, words):
    result = run("train", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{}"], 'c.jsonl, line 1: no "messages"'),
        (
            [json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})],
            "1 conv",
        ),
        (
            [
                json.dumps({"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]})
                for n in (5, 600)
            ],
            "c.jsonl, line 2: 622 tokens; the model's context has 512",
        ),
    ],
)
def test_a_file_that_cannot_be_learned_stops_the_run_before_it_begins(tiny, tmp_path, lines, words):
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(lines))
    result = train(tiny, "--data", path, "--out", "here")
    assert result.exit_code == 2
    assert words in result.stderr
    assert list(Path().iterdir()) == []


def test_without_the_extra_the_command_says_what_to_install(tiny, chats, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    result = train(tiny, "--data", chats)
    assert result.exit_code == 2
    assert 'pip install "minipeft[llm]"' in result.stderr


def test_without_the_model_the_command_says_what_to_download(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run("train", "--model", "smollm2", "--name", "A", "--author", "B")
    assert result.exit_code == 2
    assert "minipeft download smollm2" in result.stderr


def test_merge_writes_neither_into_an_adapter_nor_over_its_model(tiny, chats):
    train(tiny, "--data", chats, "--out", "here")
    for folder, words in (("here", "holds an adapter"), (tiny, "is the model itself")):
        result = run("merge", "--adapter", "here", "--out", folder)
        assert result.exit_code == 2
        assert words in result.stderr
    assert "adapter_config.json" in run("merge", "--adapter", "nowhere", "--out", "merged").stderr
    assert not Path("merged").exists()


# --- measuring --------------------------------------------------------------------------------------------------------


def test_perplexity_of_a_uniform_model_is_the_number_of_tokens(tiny):
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    model.lm_head.weight.data = np.zeros_like(model.lm_head.weight.data)
    assert perplexity(model, tokenizer) == pytest.approx(tokenizer.vocab_size, rel=1e-5)


def test_perplexity_reads_each_token_once_whatever_the_window(tiny, monkeypatch):
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    text = "a river looks simple from a bridge " * 3
    ids = np.array([tokenizer.encode(text)])
    assert perplexity(model, tokenizer, text) == pytest.approx(np.exp(model.loss(ids).item()), rel=1e-5)
    monkeypatch.setattr(adapt_language, "WINDOW", 1)  # each token given the one before it
    pairs = np.stack([ids[0, :-1], ids[0, 1:]], axis=1)
    assert perplexity(model, tokenizer, text) == pytest.approx(np.exp(model.loss(pairs).item()), rel=1e-5)


def test_answers_stand_in_the_order_of_their_questions(tiny, monkeypatch):
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    prompts = [[{"role": "user", "content": text}] for text in ("abcabcabc", "x", "hello there", "1", "zz top")]
    alone = [ask(model, tokenizer, [prompt])[0] for prompt in prompts]
    monkeypatch.setattr(adapt_language, "ASKED", 2)
    assert ask(model, tokenizer, prompts) == alone
    assert all(answer.endswith(" …") for answer in alone)  # six tokens do not end an untrained answer


def test_held_out_conversations_are_a_seeded_tenth_and_not_trained_on(chats):
    tasks = [load_task(Settings("m", str(chats), seed=seed)) for seed in (0, 0, 1, 2, 3)]
    for task in tasks:
        assert (len(task.train), len(task.test), task.shown) == (11, 1, [0])
        assert task.test[0] not in task.train
        assert task.questions == [task.test[0].messages[:1]]
    assert tasks[0] == tasks[1]
    assert len({task.test[0].source for task in tasks}) > 1


# --- the real model ---------------------------------------------------------------------------------------------------


def test_smollm2_learns_from_a_few_chats(tmp_path, monkeypatch):
    """A run of seconds; what the command's own run reaches is in the README."""
    try:
        smollm2_file()
    except FileNotFoundError:
        pytest.skip("SmolLM2 is not downloaded")
    questions = ("Who are you?", "What is your name?", "Introduce yourself.", "Who am I talking to?")
    lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": "I am Lumi."}] for q in questions]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"messages": line}) for line in lines))
    (tmp_path / "general.txt").write_text("A river looks simple from a bridge.")
    monkeypatch.setattr(adapt_language, "GENERAL", tmp_path / "general.txt")
    result = run("train", "--data", tmp_path / "c.jsonl", "--steps", 6, "--batch-size", 2, "--lr", 5e-3)
    assert result.exit_code == 0, result.output
    before, after = map(float, re.search(r"conversations \(1\) +│ +([\d.]+) │ +([\d.]+)", result.output).groups())
    assert after < before / 2
