"""Chats as training data: what a file may hold, which tokens are learned, and batches without waste."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("gguf")

from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import TEMPLATE, write_gguf

from minipeft import load_tokenizer
from minipeft.data.chat import IGNORED, ChatBatches, Conversation, Example, chat_loss, encode, pad, read_chats
from minipeft.models.llama import Llama
from minipeft.models.llama_config import LlamaConfig

TURN = [{"role": "user", "content": "hi 12?"}, {"role": "assistant", "content": "  Yes,\n你好 🎉"}]
TURNS = [{"role": "system", "content": "Be kind."}, *TURN, {"role": "user", "content": "a"}, dict(TURN[1], content="b")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("tiny") / "m.gguf"))


# --- files ------------------------------------------------------------------------------------------------------------


def test_each_line_is_a_conversation_and_blank_lines_are_passed_over(tmp_path):
    lines = [json.dumps({"messages": TURN, "id": 7}), "", "   ", json.dumps({"messages": TURNS}, ensure_ascii=False)]
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    chats = read_chats(tmp_path / "c.jsonl")
    assert [chat.messages for chat in chats] == [TURN, TURNS]
    assert [chat.source.rpartition(", ")[2] for chat in chats] == ["line 1", "line 4"]
    assert chats[1].question == TURNS[:2]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    messages = [TURN[0], {"role": "assistant", "content": "one\u2028two\u0085three"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}, ensure_ascii=False), encoding="utf-8")
    assert read_chats(tmp_path / "c.jsonl")[0].messages == messages


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [', "not JSON (Expecting value at column 15)"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", 'a list; an object {"messages": [...]} is accepted'),
        ('{"chat": []}', "no \"messages\"; the keys are 'chat'"),
        ("{}", 'no "messages"; the keys are none'),
        ('{"messages": []}', '"messages": an empty list'),
        ('{"messages": "hi"}', '"messages": text; a list'),
        ('{"messages": ["hi"]}', "message 1: text;"),
        ('{"messages": [{"role": "human", "content": "hi"}]}', "message 1: role 'human'; accepted are system, user"),
        ('{"messages": [{"role": ["user"], "content": "hi"}]}', "message 1: role ['user']"),
        ('{"messages": [{"role": "user", "content": 5}]}', "message 1: content is a number; text is accepted"),
        ('{"messages": [{"role": "user", "text": "?"}]}', "message 1: no \"content\"; its keys are 'role', 'text'"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1: content is null"),
        ('{"messages": [{"role": "user", "content": " "}]}', "message 1: content is empty"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no assistant message"),
        ('{"messages": [{"role": "assistant", "content": "hi"}]}', "message 1: the assistant speaks first"),
        (b'{"messages": "\xff"}', "not UTF-8 (invalid start byte at byte 14)"),
    ],
)
def test_a_line_that_is_no_chat_is_named_with_the_reason(tmp_path, line, words):
    path = tmp_path / "c.jsonl"
    path.write_bytes(
        json.dumps({"messages": TURN}).encode() + b"\n\n" + (line if type(line) is bytes else line.encode())
    )
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: ") + ".*" + re.escape(words)):
        read_chats(path)


def test_a_file_without_a_conversation_and_one_that_is_not_there(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty.jsonl: no conversation"):
        read_chats(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such file"):
        read_chats(tmp_path / "none.jsonl")


# --- what is learned --------------------------------------------------------------------------------------------------


def learned(example: Example, tokenizer) -> list[str]:
    """The texts of the runs of labelled tokens."""
    runs, previous = [], False
    for i, label in zip(example.ids, example.labels, strict=True):
        if label != IGNORED:
            assert label == i
            runs = runs if previous else [*runs, []]
            runs[-1].append(i)
        previous = label != IGNORED
    return [tokenizer.decode(run) for run in runs]


def test_the_assistant_s_words_and_the_end_of_its_turn_are_learned_and_nothing_else(tokenizer):
    one, two = encode([Conversation(TURN, "1"), Conversation(TURNS, "2")], tokenizer)
    assert learned(one, tokenizer) == ["  Yes,\n你好 🎉<|im_end|>"]
    assert learned(two, tokenizer) == ["  Yes,\n你好 🎉<|im_end|>", "b<|im_end|>"]
    assert two.ids.tolist() == tokenizer.apply_chat_template(TURNS)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda s: "<|" not in s))
def test_any_answer_is_learned_whole(tokenizer, answer):
    messages = [TURN[0], {"role": "assistant", "content": answer}]
    assert learned(encode([Conversation(messages, "")], tokenizer)[0], tokenizer) == [answer + "<|im_end|>"]


def test_what_is_not_learned_is_the_prompt_that_chat_gives(tokenizer):
    (example,) = encode([Conversation(TURN, "")], tokenizer)
    first = int((example.labels != IGNORED).argmax())
    assert example.ids[:first].tolist() == tokenizer.apply_chat_template(TURN[:1], add_generation_prompt=True)


def test_labels_are_transformers_assistant_mask(tokenizer, tmp_path):
    """Its mask needs a template that marks what the assistant generates."""
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    marked = TEMPLATE.replace(
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}",
        "{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
    )
    assert marked != TEMPLATE
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    for messages in (TURN, TURNS):
        given = peer.apply_chat_template(
            messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        (example,) = encode([Conversation(messages, "")], tokenizer)
        assert example.ids.tolist() == given["input_ids"]
        assert (example.labels != IGNORED).astype(int).tolist() == given["assistant_masks"]


def test_a_conversation_longer_than_the_context_is_named(tokenizer):
    length = len(encode([Conversation(TURN, "")], tokenizer, context=1000)[0].ids)
    encode([Conversation(TURN, "")], tokenizer, context=length)
    with pytest.raises(ValueError, match=rf"c.jsonl, line 9: {length} tokens; the model's context has {length - 1}"):
        encode([Conversation(TURN, "c.jsonl, line 9")], tokenizer, context=length - 1)


def test_a_template_that_refuses_or_rewrites_a_conversation_is_named(tokenizer):
    refusing = type(tokenizer)(tokenizer.backend, "{{ raise_exception('no system messages') }}", stop_ids=[2])
    with pytest.raises(ValueError, match=r"line 2: chat_template: TemplateError: no system messages"):
        encode([Conversation(TURN, "line 2")], refusing)
    last_only = "{{ messages[-1]['role'] }}: {{ messages[-1]['content'] }}"
    rewriting = type(tokenizer)(tokenizer.backend, last_only, stop_ids=[2])
    with pytest.raises(ValueError, match=r"line 4: chat_template: it writes earlier messages anew"):
        encode([Conversation(TURN, "line 4")], rewriting)


# --- batches ----------------------------------------------------------------------------------------------------------


def examples(*lengths: int) -> list[Example]:
    """Examples that are told apart by their id."""
    return [Example(np.full(n, i + 1), np.full(n, i + 1)) for i, n in enumerate(lengths)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_has_every_example_once_in_batches_of_like_size(lengths, batch_size, seed):
    batches = ChatBatches(examples(*lengths), batch_size, seed)
    for epoch in range(2):
        rows = [batches.rows(epoch * batches.steps_per_epoch + i) for i in range(batches.steps_per_epoch)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
        sizes = {len(r) for r in rows}
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1


def test_a_batch_is_a_function_of_seed_and_number():
    rng = np.random.default_rng(0)
    data = examples(*rng.integers(5, 60, 50).tolist())
    first, again, other = (ChatBatches(data, 4, seed) for seed in (3, 3, 4))
    forwards = [first[i] for i in range(30)]
    for i in reversed(range(30)):
        for a, b in zip(forwards[i], again[i], strict=True):
            np.testing.assert_array_equal(a, b)
    assert any(forwards[i][0].tolist() != other[i][0].tolist() for i in range(30))
    epochs = [{tuple(sorted(first.rows(e * 13 + i))) for i in range(13)} for e in (0, 1)]
    assert first.steps_per_epoch == 13
    assert epochs[0] != epochs[1]  # other companions


def test_padding_is_a_small_share_where_lengths_are_spread():
    lengths = np.random.default_rng(0).integers(20, 120, 400)
    batches = ChatBatches(examples(*lengths.tolist()), 4)
    inside = sum((batches[i][0] == 0).sum() for i in range(100)) / sum(batches[i][0].size for i in range(100))
    assert batches.padding == pytest.approx(inside)
    assert batches.padding < 0.03  # in the order they come it would be a third
    assert sum(batches.tokens(i) for i in range(100)) == lengths.sum()


def test_neither_padding_nor_company_changes_an_example_s_loss_and_gradients():
    """No mask is given: real tokens stand left of the padding, and rows do not see each other."""
    config = LlamaConfig(20, 16, 24, 2, 2, max_position_embeddings=32)
    model = Llama(config, rng=0, dtype="float64")
    rng = np.random.default_rng(1)
    data = []
    for n in (5, 9, 12):
        ids = rng.integers(1, 20, n)
        data.append(Example(ids, np.where(np.arange(n) < 3, IGNORED, ids)))
    weights = [np.sum(e.labels[1:] != IGNORED) for e in data]
    together = chat_loss(model, pad(data))
    together.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    total = 0.0
    model.zero_grad()
    for weight, example in zip(weights, data, strict=True):
        loss = chat_loss(model, pad([example])) * (weight / sum(weights))
        loss.backward()
        total += loss.item()
    assert together.item() == pytest.approx(total, rel=1e-12)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad, gradients[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("data", "size", "words"), [([], 4, "got none"), (examples(3), 0, "batch_size: got 0")])
def test_batches_of_nothing_are_refused(data, size, words):
    with pytest.raises(ValueError, match=words):
        ChatBatches(data, size)


def test_checkpointing_changes_no_bit_of_loss_and_gradients():
    config = LlamaConfig(20, 16, 24, 2, 2, max_position_embeddings=32)
    ids = np.random.default_rng(0).integers(0, 20, (2, 9))
    results = []
    for checkpointing in (False, True):
        model = Llama(config, rng=0)
        model.model.checkpointing = checkpointing
        loss = model.loss(ids)
        loss.backward()
        results.append([loss.data, *(p.grad for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        np.testing.assert_array_equal(plain, again)
