"""models.llama and generate: what the numbers must be, what a cache and padding must not change, what is refused."""

from __future__ import annotations

import llama_cases as cases
import numpy as np
import pytest

from minipeft import LoraConfig, Tensor, fit, get_peft_model, nn, ops, optim
from minipeft.backend import to_numpy
from minipeft.generate import next_token
from minipeft.models.llama import Llama
from minipeft.models.llama_config import LlamaConfig, from_hugging_face, rotary_frequencies, to_hugging_face
from minipeft.tensor import is_grad_enabled, no_grad

SIZES = {name: size for name, size in cases.BASE.items() if name not in ("model_type", "rms_norm_eps")}
IDS = cases.batch("none")[0]
PROMPTS = [[5, 7, 9, 11, 2, 3], [8, 1], [4, 4, 40, 2]]


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_logits_loss_and_gradients_are_those_that_transformers_gave(variant):
    values = cases.kept(*cases.ours(cases.llama(variant), "left"))
    np.testing.assert_allclose(values, np.load(cases.REFERENCE)[variant], rtol=0, atol=1e-9)


def test_parameters_have_hugging_faces_names():
    names = [name for name, _ in cases.llama("biases").named_parameters()]
    layer = "model.layers.1."
    assert names[0] == "model.embed_tokens.weight"
    assert {layer + f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")} <= set(names)
    assert {layer + f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")} <= set(names)
    assert {layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight"} <= set(names)
    assert {"model.norm.weight", "lm_head.weight"} <= set(names)


def test_a_tied_head_is_the_embedding_table_and_has_no_parameter_of_its_own():
    model = cases.llama("qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_qwen2_has_biases_on_q_k_and_v_alone():
    names = [name for name, _ in cases.llama("qwen2").named_parameters() if name.endswith("bias")]
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj"}


def test_a_later_token_changes_no_earlier_logits():
    model, changed = cases.llama(), IDS.copy()
    changed[:, 6] = (changed[:, 6] + 1) % 61
    before, after = model(IDS).data, model(changed).data
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert abs(before[:, 6:] - after[:, 6:]).max() > 1e-3


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_changes_nothing_for_the_tokens_beside_it(padding):
    model = cases.llama()
    ids, mask, _ = cases.batch(padding)
    together = model(ids, mask).data
    for row in range(len(ids)):
        real = mask[row].astype(bool)
        np.testing.assert_allclose(together[row, real], model(ids[row : row + 1, real]).data[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cuts", [[9], [1, 9], [4, 5, 6, 9], list(range(1, 10))])
def test_a_cache_filled_in_pieces_gives_the_logits_of_the_whole(cuts):
    model = cases.llama("llama3 rope")
    cache, pieces, start = model.new_cache(3, 9), [], 0
    with no_grad():
        for stop in cuts:
            pieces.append(model(IDS[:, start:stop], cache=cache).data)
            start = stop
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), model(IDS).data, rtol=0, atol=1e-12)


def test_the_loss_is_the_cross_entropy_of_the_next_tokens():
    for padding in cases.PADDINGS:
        model = cases.llama()
        ids, mask, labels = cases.batch(padding)
        loss = model.loss(ids, labels, mask)
        loss.backward()
        _, expected, grads = cases.ours(cases.llama(), padding)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.grad, grads[name], rtol=0, atol=1e-12, err_msg=name)


def test_the_loss_of_a_model_with_an_adapted_head_uses_the_adapter():
    model = get_peft_model(cases.llama(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    logits = model(IDS)[:, :-1].reshape(-1, 61)
    expected = ops.cross_entropy(logits, IDS[:, 1:].reshape(-1)).item()
    assert model.loss(IDS).item() == pytest.approx(expected, abs=1e-12)
    assert abs(expected - cases.llama().loss(IDS).item()) > 1e-6


def test_lists_arrays_and_tensors_of_ids_are_the_same_to_it():
    model = cases.llama()
    for ids in (IDS.tolist(), Tensor(IDS), IDS.astype("int32")):
        np.testing.assert_array_equal(model(ids).data, model(IDS).data)


def test_it_runs_on_any_array_library(xp):
    model = cases.llama().to(xp)
    np.testing.assert_allclose(to_numpy(model(IDS).data), cases.llama()(IDS).data, rtol=0, atol=1e-12)
    model.loss(IDS).backward()
    assert model.generate(PROMPTS, 5) == cases.llama().generate(PROMPTS, 5)


def test_float32_stays_float32():
    model = cases.llama(dtype="float32")
    assert model(IDS).dtype == np.float32
    model.loss(IDS).backward()
    assert {p.grad.dtype for p in model.parameters()} == {np.dtype("float32")}


def test_a_frozen_weight_gets_no_gradient_and_adapters_do():
    model = get_peft_model(cases.llama(), LoraConfig(r=2, target_modules="all-linear"))
    model.loss(IDS).backward()
    with_gradient = {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"lora_A", "lora_B"}
    assert len(list(model.adapter_layers())) == 2 * 7  # the head is left out


def test_lora_learns_a_short_text_by_heart():
    model = get_peft_model(cases.llama(dtype="float32"), LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    ids = np.arange(1, 13)[None]
    optimizer = optim.AdamW(model.parameters(), lr=2e-2)
    fit(model, [ids] * 60, steps=60, optimizer=optimizer, loss_fn=lambda m, batch: m.loss(batch))
    assert model.generate([1, 2], 10) == list(range(1, 13))


# --- rotary positions and configs -------------------------------------------------------------------------------------


def test_rotary_frequencies_are_the_papers():
    config = LlamaConfig(**SIZES, head_dim=8, rope_theta=100.0)
    np.testing.assert_allclose(rotary_frequencies(config), [100 ** (-2 * i / 8) for i in range(4)], rtol=1e-15)


def test_linear_scaling_makes_position_4_what_position_1_was():
    plain, scaled = cases.llama(), cases.llama("linear rope")  # factor 4
    x = np.zeros(1)
    np.testing.assert_allclose(scaled.model._rotary(4, 5, x), plain.model._rotary(1, 2, x), rtol=0, atol=1e-15)


def test_llama3_scaling_keeps_fast_frequencies_slows_slow_ones_and_goes_over_between():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    plain = rotary_frequencies(LlamaConfig(**SIZES, head_dim=64, rope_theta=500000.0))
    scaled = rotary_frequencies(LlamaConfig(**SIZES, head_dim=64, rope_theta=500000.0, rope_scaling=scaling))
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-15)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_a_config_written_and_read_again_is_the_same(variant):
    config = cases.llama(variant).config
    assert from_hugging_face(to_hugging_face(config, "float32")) == config


def test_rope_settings_of_transformers_4_and_5_mean_the_same():
    old = {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}}
    a, b = (rotary_frequencies(from_hugging_face(cases.BASE | rope)) for rope in (old, new))
    np.testing.assert_array_equal(a, b)


def test_a_sliding_window_ends_the_context_where_it_would_begin_to_matter():
    config = cases.BASE | {"model_type": "mistral", "sliding_window": 16}
    assert from_hugging_face(config).max_position_embeddings == 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "'gpt2'.*'llama', 'mistral', 'qwen2'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act.*'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_size": "24"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads.*divisor"),
        ({"head_dim": 7}, "head_dim.*even"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'.*\"llama3\""),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' needs 'low_freq_factor'"),
    ],
)
def test_configs_that_are_not_llamas_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        from_hugging_face(cases.BASE | change)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        ([1, 2], None, r"ids: got shape \(2,\)"),
        (np.zeros((2, 0), int), None, "at least one token"),
        ([[61]], None, "0 to 60"),
        ([[-1]], None, "-1"),
        ([[0] * 65], None, "65 tokens; the model's context has 64"),
        (IDS, np.ones((3, 8)), r"attention_mask: got shape \(3, 8\).*\(3, 9\)"),
    ],
)
def test_ids_and_masks_that_do_not_fit(ids, mask, said):
    with pytest.raises(ValueError, match=said):
        cases.llama()(ids, mask)


def test_ids_that_are_no_integers():
    with pytest.raises(TypeError, match="integers"):
        cases.llama()(np.ones((1, 3)))


def test_a_full_cache_says_so():
    model = cases.llama()
    with pytest.raises(ValueError, match="room for 8 tokens, 9 are needed"), no_grad():
        model(IDS, cache=model.new_cache(3, 8))


# --- generation -------------------------------------------------------------------------------------------------------


def slow_greedy(model, prompt, n):
    """Without a cache, one full pass for each token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model([ids]).data[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("variant", ["grouped", "llama3 rope", "qwen2"])
def test_greedy_is_the_likeliest_token_again_and_again(variant):
    model = cases.llama(variant)
    for prompt in PROMPTS:
        assert model.generate(prompt, 10) == slow_greedy(model, prompt, 10)


def test_prompts_of_different_lengths_continue_as_each_alone():
    model = cases.llama()
    assert model.generate(PROMPTS, 12) == [model.generate(prompt, 12) for prompt in PROMPTS]


def test_sampling_in_a_batch_gives_a_prompt_what_its_place_gives_and_the_same_seed_the_same():
    model = cases.llama()
    once = model.generate(PROMPTS, 12, temperature=1.0, seed=3)
    assert once == model.generate(PROMPTS, 12, temperature=1.0, seed=3)
    assert once != model.generate(PROMPTS, 12, temperature=1.0, seed=4)
    assert once[0] == model.generate(PROMPTS[0], 12, temperature=1.0, seed=3)


def test_a_stop_token_ends_its_continuation_and_no_other():
    model = cases.llama()
    free = model.generate(PROMPTS, 12)
    stop = free[0][len(PROMPTS[0]) + 2]
    stopped = model.generate(PROMPTS, 12, stop_ids=[stop])
    for prompt, long, short in zip(PROMPTS, free, stopped, strict=True):
        new = long[len(prompt) :]
        assert short == prompt + (new[: new.index(stop) + 1] if stop in new else new)
    assert len(stopped[0]) < len(free[0])


def test_an_array_gives_an_array_filled_up_with_the_token_that_ended_the_row():
    model = cases.llama()
    free = model.generate(IDS, 6)
    assert free.shape == (3, 15)
    stop = int(free[0, 10])
    stopped = model.generate(IDS, 6, stop_ids=[stop])
    assert (stopped[0, 10:] == stop).all()
    assert model.generate(IDS[0], 6).tolist() == free[0].tolist()


def test_streaming_gives_the_same_tokens_one_by_one():
    model, seen = cases.llama(), []
    expected = model.generate(PROMPTS[0], 8)[len(PROMPTS[0]) :]
    assert list(model.stream(PROMPTS[0], 8)) == expected
    together = model.generate(PROMPTS, 8, on_token=lambda row, token: seen.append((row, token)))
    for row, prompt in enumerate(PROMPTS):
        assert [token for r, token in seen if r == row] == together[row][len(prompt) :]


def test_the_first_streamed_token_costs_no_later_one():
    model, calls = cases.llama(), []
    hidden_states = model.hidden_states
    model.hidden_states = lambda *args, **kwargs: calls.append(1) or hidden_states(*args, **kwargs)
    next(model.stream(PROMPTS[0], 50))
    assert len(calls) == 1


def test_generating_leaves_gradients_and_training_as_they_were():
    model = get_peft_model(cases.llama(), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)).train()
    for _, layer in model.adapter_layers():
        layer.lora_B["default"].weight.data = np.ones_like(layer.lora_B["default"].weight.data)
    tokens = []
    for token in model.stream(PROMPTS[0], 5):
        assert is_grad_enabled()
        assert all(module.training for module in model.modules())
        tokens.append(token)
    assert tokens == list(model.eval().stream(PROMPTS[0], 5))  # no dropout took part


def test_generation_ends_with_the_context():
    model = cases.llama(max_position_embeddings=10)
    assert len(model.generate([1, 2, 3], 50)) == 10


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        ([], {}, "empty prompt"),
        ([[1], []], {}, "empty prompt"),
        ([0] * 64, {}, "a prompt of 64 tokens; the model's context of 64"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_p": 1.5}, "top_p"),
        (np.ones(3), {}, "integers"),
    ],
)
def test_generation_checks_before_it_begins(ids, options, said):
    model = cases.llama()
    model.hidden_states = None  # would fail otherwise
    with pytest.raises(ValueError, match=said):
        model.generate(ids, **{"max_new_tokens": 3} | options)


def test_generation_wants_ids_and_no_text():
    with pytest.raises(TypeError, match="str"):
        cases.llama().generate("hello", 3)
    with pytest.raises(ValueError, match="one prompt"):
        cases.llama().stream(PROMPTS, 3)


def test_sampling_follows_the_probabilities():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    rng = np.random.default_rng(0)
    counts = np.bincount([next_token(np.log(p), 1.0, 1.0, rng) for _ in range(20000)], minlength=4)
    np.testing.assert_allclose(counts / 20000, p, atol=4 * 0.5 / 20000**0.5)  # four deviations


def test_top_p_keeps_the_likeliest_that_reach_it_in_their_proportions():
    p = np.array([0.15, 0.5, 0.05, 0.3])
    rng = np.random.default_rng(0)
    counts = np.bincount([next_token(np.log(p), 1.0, 0.7, rng) for _ in range(20000)], minlength=4)
    np.testing.assert_allclose(counts / 20000, [0, 0.5 / 0.8, 0, 0.3 / 0.8], atol=4 * 0.5 / 20000**0.5)


def test_a_small_top_p_is_greedy_and_a_low_temperature_nearly_so():
    logits = np.random.default_rng(0).standard_normal(50)
    assert {next_token(logits, 5.0, 1e-9, np.random.default_rng(i)) for i in range(50)} == {int(logits.argmax())}
    assert {next_token(logits, 1e-3, 1.0, np.random.default_rng(i)) for i in range(50)} == {int(logits.argmax())}


def test_start_values_give_logits_of_order_one():
    model = Llama(LlamaConfig(**SIZES, tie_word_embeddings=True), rng=0)
    assert 0.01 < model(IDS).data.std() < 2
    assert isinstance(model.lm_head, nn.Linear)
