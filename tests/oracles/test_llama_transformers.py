"""models.llama beside transformers: logits and all gradients, saved models, adapters, generation, SmolLM2 itself."""

from __future__ import annotations

import llama_cases as cases
import numpy as np
import pytest

import minipeft
from minipeft import LoraConfig, PeftModel, get_peft_model, load_model, load_tokenizer, save_model
from minipeft.models.download import smollm2_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.mark.parametrize("padding", cases.PADDINGS)
@pytest.mark.parametrize("variant", [*cases.VARIANTS, *cases.MIXTURES])
def test_logits_and_all_gradients_in_float64(variant, padding):
    mine, theirs = cases.ours(cases.llama(variant), padding), cases.theirs(cases.exact(cases.peer(variant)), padding)
    np.testing.assert_allclose(mine[0], theirs[0], rtol=0, atol=1e-9)
    assert mine[1] == pytest.approx(theirs[1], abs=1e-10)
    assert mine[2].keys() == theirs[2].keys()
    for name, grad in theirs[2].items():
        np.testing.assert_allclose(mine[2][name], grad, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_logits_and_all_gradients_in_float32_to_rounding(variant, padding):
    """Against transformers as it is, its steps in float32 included; errors are measured against the largest number."""
    theirs = cases.theirs(cases.peer(variant, "float32"), padding)
    mine = cases.ours(cases.llama(variant, "float32"), padding)
    np.testing.assert_allclose(mine[0], theirs[0], rtol=0, atol=2e-5 * abs(theirs[0]).max())
    for name, grad in theirs[2].items():
        np.testing.assert_allclose(mine[2][name], grad, rtol=0, atol=2e-5 * abs(grad).max(), err_msg=name)


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_the_kept_numbers_are_what_transformers_gives(variant):
    values = cases.kept(*cases.theirs(cases.exact(cases.peer(variant)), "left"))
    np.testing.assert_allclose(np.load(cases.REFERENCE)[variant], values, rtol=0, atol=1e-9)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["10GB", "8KB"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_saved_by_transformers_loads(tmp_path, dtype, shard_size):
    theirs = cases.peer("biases", dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "8KB")
    mine = load_model(tmp_path)
    for name, p in theirs.named_parameters():
        np.testing.assert_array_equal(mine.state_dict()[name], p.detach().float().numpy(), err_msg=name)


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_a_model_saved_here_loads_in_transformers(tmp_path, variant):
    mine = cases.llama(variant)
    save_model(mine, tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[kind] for kind in info)
    ids, mask, _ = cases.batch("right")
    logits = cases.exact(theirs)(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.detach().numpy()
    real = mask.astype(bool)
    np.testing.assert_allclose(mine(ids, mask).data[real], logits[real], rtol=0, atol=1e-9)
    assert type(theirs) is type(cases.peer(variant))


def test_a_merged_model_answers_in_transformers_as_the_adapter_did_here(tmp_path):
    mine = get_peft_model(cases.llama(), LoraConfig(r=3, target_modules="all-linear", init_lora_weights="gaussian"))
    for _, layer in mine.adapter_layers():
        b = layer.lora_B["default"].weight
        b.data = np.random.default_rng(0).standard_normal(b.shape)
    ids, _, _ = cases.batch("none")
    adapted = mine(ids).data
    save_model(mine.merge_and_unload(), tmp_path)
    theirs = cases.exact(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64))
    assert abs(adapted - cases.llama()(ids).data).max() > 0.1
    np.testing.assert_allclose(theirs(torch.from_numpy(ids)).logits.detach(), adapted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_an_adapter_made_by_peft_gives_its_logits_here(tmp_path, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(cases.exact(cases.peer()), config).eval()
    theirs.save_pretrained(tmp_path)
    theirs = theirs.double()  # PEFT makes its adapters in float32
    ids, _, _ = cases.batch("none")
    mine = PeftModel.from_pretrained(cases.llama(), tmp_path)
    np.testing.assert_allclose(mine(ids).data, theirs(torch.from_numpy(ids)).logits.detach(), rtol=0, atol=1e-9)


def test_an_adapter_made_here_gives_its_logits_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    mine = get_peft_model(cases.llama(), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    mine.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(cases.exact(cases.peer()), tmp_path).eval()
    theirs = theirs.double()  # PEFT reads adapters into float32: hence the tolerance
    ids, _, _ = cases.batch("none")
    assert abs(mine(ids).data - cases.llama()(ids).data).max() > 1e-3
    np.testing.assert_allclose(theirs(torch.from_numpy(ids)).logits.detach(), mine(ids).data, rtol=0, atol=1e-5)


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["grouped", "llama3 rope", "qwen2"])
def test_greedy_continuations_of_prompts_of_different_lengths(variant):
    mine, theirs = cases.llama(variant), cases.exact(cases.peer(variant))
    prompts = [[5, 7, 9, 11, 2, 3], [8, 1], [4, 4, 40, 2]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected.append(out[0].tolist())
    assert mine.generate(prompts, 12) == expected
    assert [mine.generate(prompt, 12) for prompt in prompts] == expected


# --- SmolLM2 ----------------------------------------------------------------------------------------------------------

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees",
    "The three primary colours are",
    "Dear Sir or Madam,\n\n",
    "SELECT name FROM users WHERE",
    "人工智能是",
    "1, 1, 2, 3, 5, 8,",
]
# No digit here follows two spaces: transformers' conversion of a GGUF forgets that this tokenizer cuts at digits first.
TEXT = (
    "Größe 你好，世界 🎉👩‍💻 naïve\n\n  def f(x):\n\treturn x + 12  # it's\r\n<|im_start|>user\nhi<|im_end|>\nin 2024"
)


@pytest.fixture(scope="module")
def gguf():
    try:
        path = smollm2_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}


@pytest.fixture(scope="module")
def tokenizers(gguf):
    return load_tokenizer("smollm2"), transformers.AutoTokenizer.from_pretrained(**gguf)


def test_token_ids_of_a_text_with_chinese_emoji_and_code(tokenizers):
    mine, theirs = tokenizers
    assert mine.encode(TEXT) == theirs.encode(TEXT)
    assert mine.decode(mine.encode(TEXT)) == TEXT == theirs.decode(theirs.encode(TEXT))


def test_the_prompt_of_a_chat(tokenizers):
    mine, theirs = tokenizers
    for chat in ([{"role": "user", "content": TEXT}], [{"role": "system", "content": "Be brief."}] * 2):
        for prompt in (False, True):
            ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
            assert mine.apply_chat_template(chat, add_generation_prompt=prompt) == ids


@pytest.mark.slow
def test_smollm2_has_transformers_weights_and_greedy_continuations(gguf, tokenizers):
    """transformers reads each continuation once: that its likeliest token is the next one everywhere, is what greedy
    decoding would give token for token, at a twentieth of the time."""
    mine, tokenizer = load_model("smollm2"), tokenizers[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**gguf, dtype=torch.float32).eval()
    weights = dict(theirs.named_parameters())
    for name, values in mine.state_dict().items():
        np.testing.assert_array_equal(values, weights[name].detach().numpy(), err_msg=name)
    chat = [{"role": "user", "content": "Who are you?"}]
    prompts = [*map(tokenizer.encode, PROMPTS), tokenizer.apply_chat_template(chat, add_generation_prompt=True)]
    for prompt, continued in zip(prompts, mine.generate(prompts, 24), strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([continued])).logits[0]  # (T, V)
        assert continued[len(prompt) :] == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), tokenizer.decode(prompt)
        np.testing.assert_allclose(mine([continued]).data[0], logits, atol=2e-3)  # of numbers up to 30


def test_a_saved_smollm2_tokenizer_is_read_by_transformers(tmp_path, tokenizers):
    mine, _ = tokenizers
    mine.save(tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    chat = [{"role": "user", "content": TEXT}]
    assert mine.encode(TEXT) == theirs.encode(TEXT) == again.encode(TEXT)
    assert theirs.apply_chat_template(chat, tokenize=False) == mine.apply_chat_template(chat, tokenize=False)
    assert theirs.eos_token_id == mine.eos_token_id == again.eos_token_id
    assert minipeft.load_tokenizer(tmp_path).stop_ids == mine.stop_ids
