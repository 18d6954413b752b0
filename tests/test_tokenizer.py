"""Tokenizers and chat templates: round trips, streaming, GGUF vocabularies, and what a template must not reach."""

from __future__ import annotations

import json

import pytest

from minipeft.chat_template import render_chat
from minipeft.models.download import smollm2_file

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
gguf = pytest.importorskip("gguf")

from minipeft import load_tokenizer, save_model  # noqa: E402
from minipeft.models.llama import Llama  # noqa: E402
from minipeft.models.llama_config import LlamaConfig  # noqa: E402
from minipeft.tokenizer import CUTS  # noqa: E402

TEXT = "Größe 你好，世界 🎉👩‍💻 naïve\n\n  def f(x):\n\treturn x + 12  # it's\r\n"
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_letters():
    """GPT-2's way to write every byte as a letter."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + rest.index(b)) for b in range(256)]


def write_gguf(path, pre="smollm", model="gpt2", merges=("Ġ Ġ", "h i", "1 2", "Ġ 1"), **more):
    """A vocabulary of all bytes, a few merges, two special tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_letters(), *(m.replace(" ", "") for m in merges)]
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, value in more.items():
        getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llama(folder, context):
    """A directory with a random Llama of two layers and a tokenizer of bytes, which other files' tests use."""
    tokenizer = load_tokenizer(write_gguf(folder / "vocabulary.gguf"))
    config = LlamaConfig(tokenizer.vocab_size, 16, 32, 2, 2, max_position_embeddings=context, eos_token_id=2)
    save_model(Llama(config, rng=0), folder / "model", tokenizer)
    return str(folder / "model")


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(write_gguf(tmp_path / "m.gguf"))


# --- ids and text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", CUTS)
def test_every_text_comes_back(tmp_path, pre):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", pre))
    for text in (TEXT, "", " ", "hi hi  12", "<|im_start|>user\n<|im_end|>", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_in_a_text_are_one_token_each(tokenizer):
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.decode([1, 3 + ord("a"), 2], skip_special_tokens=True) == "a"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.stop_ids) == (1, 2, [2])


def test_smollm_takes_digits_one_by_one_and_before_anything_else(tmp_path):
    smollm = load_tokenizer(write_gguf(tmp_path / "s.gguf"))
    pieces = [smollm.decode([i]) for i in smollm.encode("hi  12")]
    assert pieces == ["hi", "  ", "1", "2"]
    gpt2 = load_tokenizer(write_gguf(tmp_path / "g.gguf", "gpt-2"))
    assert [gpt2.decode([i]) for i in gpt2.encode("hi  12")] == ["hi", " ", " ", "12"]


def test_llama3_starts_with_its_start_token_and_the_others_do_not(tmp_path):
    llama3 = load_tokenizer(write_gguf(tmp_path / "3.gguf", "llama-bpe"))
    assert llama3.encode("hi")[0] == 1
    assert llama3.encode("hi", add_special_tokens=False)[0] != 1
    told = load_tokenizer(write_gguf(tmp_path / "t.gguf", add_add_bos_token=True))
    assert told.encode("hi")[0] == 1
    assert load_tokenizer(write_gguf(tmp_path / "s.gguf")).encode("hi")[0] != 1


def test_streamed_text_comes_in_whole_characters_and_is_the_decoded_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    pieces = list(tokenizer.stream(iter(ids)))
    assert "".join(pieces) == TEXT
    assert "🎉" in pieces  # four tokens
    assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_keeps_the_spaces_that_a_decoder_strips_from_the_first_token(tmp_path):
    """Llama 2's tokenizer.json writes a space as ▁ and takes the one at the start of a text away again."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {piece: i for i, piece in enumerate(["▁a", "▁b", "\n", "<0xC3>", "<0xA9>"])}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer, ids = load_tokenizer(tmp_path), [0, 1, 2, 1, 3, 4, 2, 2, 0, 1]
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids) == "a b\n bé\n\n a b"


def test_streaming_ends_with_what_is_left_of_a_broken_character(tokenizer):
    ids = tokenizer.encode("a🎉")[:-1]
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_streamed_text_leaves_special_tokens_out(tokenizer):
    assert "".join(tokenizer.stream(tokenizer.encode("hi<|im_end|>"))) == "hi"


def test_a_saved_tokenizer_is_the_same_when_read_again(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)
    assert (again.bos_token, again.eos_token, again.stop_ids) == ("<|im_start|>", "<|im_end|>", [2])
    assert again.vocab_size == tokenizer.vocab_size


def test_a_directory_may_keep_its_template_in_a_file_and_name_more_stop_tokens(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "<|im_end|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    again = load_tokenizer(tmp_path)
    assert again.apply_chat_template(CHAT, tokenize=False) == "Hi?"
    assert again.stop_ids == [0, 2]
    assert again.eos_token_id == 2


def test_smollm2_reads_its_own_vocabulary():
    try:
        smollm2_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.vocab_size == 49152
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True)
    assert tokenizer.decode(prompt).endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.stop_ids == [2]


# --- chats ------------------------------------------------------------------------------------------------------------


def test_a_chat_becomes_its_prompt(tokenizer):
    text = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text
    assert tokenizer.apply_chat_template(CHAT) == tokenizer.encode(text)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert prompt == text + "<|im_start|>assistant\n"


def test_what_templates_expect_is_there():
    template = (
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}{{ nothing }}"
    )
    assert render_chat(template, CHAT) == '{"role": "user", "content": "Hi?"}'
    assert render_chat("{{ bos_token }}{{ eos_token }}", CHAT, bos_token="<s>") == "<s>"
    assert len(render_chat("{{ strftime_now('%Y') }}", CHAT)) == 4
    assert render_chat("{{ messages[0].content.strip().upper() }}", CHAT) == "HI?"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''|attr('__class__') }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
    ],
)
def test_a_template_that_reaches_for_python_is_stopped(template):
    messages = [dict(m) for m in CHAT]
    with pytest.raises(ValueError, match="chat_template"):
        render_chat(template, messages)
    assert messages == CHAT


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
        ("{% include 'etc/passwd' %}", "chat_template"),
    ],
)
def test_a_template_that_fails_says_why(template, said):
    with pytest.raises(ValueError, match=said):
        render_chat(template, CHAT)


def test_a_tokenizer_without_a_template_says_so(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="none"):
        tokenizer.apply_chat_template(CHAT)


@pytest.mark.parametrize(
    "messages",
    [[], "hi", None, ["hi"], [{"role": "user"}], [{"content": "x"}], [*CHAT, {"role": "user", "content": None}]],
)
def test_messages_that_are_no_chat(tokenizer, messages):
    with pytest.raises(ValueError, match="messages"):
        tokenizer.apply_chat_template(messages)


# --- bad files --------------------------------------------------------------------------------------------------------


def test_a_gguf_vocabulary_of_another_kind_says_what_is_read(tmp_path):
    for more in ({"model": "llama"}, {"pre": "unheard-of"}):
        with pytest.raises(ValueError, match=r"accepted is 'gpt2'.*tokenizer\.json"):
            load_tokenizer(write_gguf(tmp_path / "m.gguf", **more))


def test_merges_that_the_vocabulary_lacks(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"h i", b"h\xc3\xa9", 1) if b"h i" in data else data)
    with pytest.raises(ValueError, match=r"merge|vocabulary"):
        load_tokenizer(path)


def test_a_directory_without_tokenizer_json_and_one_with_a_broken_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_name_that_is_not_known(tmp_path):
    with pytest.raises(FileNotFoundError, match="smollm2"):
        load_tokenizer(tmp_path / "nothing")
