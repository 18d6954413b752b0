"""P-Tuning: the LSTM, the prompt encoder, virtual tokens in a language model and in a vision transformer, files."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cases import batch as llama_batch
from llama_cases import llama
from safetensors.numpy import load_file
from twins import Net

from minipeft import LoraConfig, PeftModel, PromptEncoderConfig, Tensor, fit, get_peft_model, gradcheck, ops, optim
from minipeft.backend import get_namespace, to_numpy
from minipeft.methods.p_tuning import LSTM, PromptEncoder, lstm
from minipeft.models import MLP, ViT
from minipeft.quant import quantize_model

P = 3
ENCODERS = {
    "MLP": {"encoder_hidden_size": 5},
    "LSTM": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 4},
}
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]


def gaussian(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def config(kind="MLP", **options):
    return PromptEncoderConfig(**{"num_virtual_tokens": P} | ENCODERS[kind] | options)


def prompted(model=None, kind="MLP", seed=0, **options):
    return get_peft_model(model or llama(), config(kind, **options), seed=seed)


def layer_of(model):
    return next(layer for _, layer in model.adapter_layers())


def tokens_of(model):
    return layer_of(model).prompt_encoder["default"]().data


# --- the LSTM ---------------------------------------------------------------------------------------------------------


def lstm_weights(width, hidden, seed=0):
    shapes = [(4 * hidden, width), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
    return [gaussian(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_the_lstm_is_the_papers_equations_step_by_step(batch, steps, width, hidden, reverse):
    x, (W_ih, W_hh, b_ih, b_hh) = gaussian(batch, steps, width, seed=9), lstm_weights(width, hidden)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    y = lstm(x, W_ih, W_hh, b_ih, b_hh, reverse).data
    for row, out in zip(x, y, strict=True):
        h = c = np.zeros(hidden)
        for t in range(steps)[:: -1 if reverse else 1]:
            i, f, g, o = np.split(W_ih @ row[t] + b_ih + W_hh @ h + b_hh, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            np.testing.assert_allclose(out[t], h, atol=1e-13)


@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_gradients_of_the_lstm_are_central_differences(batch, steps, width, hidden, reverse):
    inputs = [gaussian(batch, steps, width, seed=9), *lstm_weights(width, hidden)]
    assert gradcheck(lambda *args: lstm(*args, reverse=reverse), [Tensor(a, requires_grad=True) for a in inputs])


def test_backwards_is_forwards_on_the_sequence_turned_round():
    x, weights = gaussian(2, 4, 3), lstm_weights(3, 2)
    np.testing.assert_array_equal(lstm(x, *weights, reverse=True).data, lstm(x[:, ::-1].copy(), *weights).data[:, ::-1])


def test_layers_take_what_both_directions_of_the_one_before_gave():
    two, x = LSTM(3, 2, 2, dtype="float64", rng=0), Tensor(gaussian(1, 4, 3))
    parts, kinds = dict(two.named_parameters()), ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    assert [parts[f"{kind}_l1_reverse"].shape for kind in kinds] == [(8, 4), (8, 2), (8,), (8,)]
    expected = x
    for layer in range(2):
        there = lstm(expected, *[parts[f"{kind}_l{layer}"] for kind in kinds])
        back = lstm(expected, *[parts[f"{kind}_l{layer}_reverse"] for kind in kinds], reverse=True)
        expected = ops.concatenate([there, back], axis=-1)
    np.testing.assert_array_equal(two(x).data, expected.data)


def test_an_lstm_whose_shapes_do_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"lstm: x \(B, T, in\) \(2, 3, 4\), W_ih \(4H, in\) \(8, 3\)"):
        lstm(gaussian(2, 3, 4), *lstm_weights(3, 2))


# --- the encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
def test_gradients_of_the_encoder_are_central_differences(kind):
    encoder = PromptEncoder(config(kind, token_dim=4), 0, "float64")
    parameters = list(encoder.parameters())
    assert len(parameters) == {"MLP": 7, "LSTM": 21}[kind]
    assert encoder().shape == (P, 4)
    assert gradcheck(lambda *_: encoder(), parameters)


def test_the_hidden_size_is_the_tokens_where_it_is_left_out():
    encoder = PromptEncoder(config(token_dim=6, encoder_hidden_size=None), 0)
    assert [p.shape for p in encoder.mlp_head.parameters()] == [(6, 6), (6,)] * 3


def test_dropout_between_the_layers_of_the_lstm_acts_in_training_alone():
    encoder = PromptEncoder(config("LSTM", token_dim=4, encoder_dropout=0.5), 0, "float64")
    assert (encoder().data != encoder().data).any()
    encoder.eval()
    assert (encoder().data == encoder().data).all()


# --- in a language model ----------------------------------------------------------------------------------------------


def with_real_tokens(ids, virtual):
    """The logits of a model whose table has the virtual tokens as words of its own, written before the prompt."""
    model, V = llama(vocab_size=61 + P), 61
    plain = llama().state_dict()
    state = {n: a for n, a in plain.items() if n not in ("model.embed_tokens.weight", "lm_head.weight")}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = np.concatenate([plain[name], virtual])
    model.load_state_dict(state)
    before = np.broadcast_to(np.arange(V, V + P), (len(ids), P))
    return model(np.concatenate([before, ids], axis=1)).data[:, P:, :V]


@pytest.mark.parametrize("kind", ENCODERS)
def test_virtual_tokens_are_words_before_the_prompt_without_places_in_the_logits(kind):
    ids, _, _ = llama_batch("none")
    model = prompted(kind=kind)
    logits = model(ids).data
    assert logits.shape == (*ids.shape, 61)
    np.testing.assert_allclose(logits, with_real_tokens(ids, tokens_of(model)), atol=1e-12)
    assert abs(logits - llama()(ids).data).max() > 0.1


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_row_gives_what_it_gives_alone(padding):
    ids, mask, _ = llama_batch(padding)
    model = prompted()
    together = model(ids, mask).data
    for row in range(len(ids)):
        seen = mask[row].astype(bool)
        np.testing.assert_allclose(together[row, seen], model(ids[row : row + 1, seen]).data[0], atol=1e-11)


def test_the_loss_counts_the_real_tokens_alone():
    ids, labels, mask = llama_batch("right")
    model = prompted()
    expected = ops.cross_entropy(model(ids, mask)[:, :-1].reshape(-1, 61), labels[:, 1:].reshape(-1)).item()
    assert model.loss(ids, labels, mask).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ENCODERS)
def test_gradients_through_the_model_are_central_differences(kind):
    ids, labels, mask = llama_batch("left")
    model = prompted(llama(num_hidden_layers=1), kind)
    parameters = [p for p in model.parameters() if p.requires_grad]
    table = layer_of(model).prompt_encoder["default"].embedding.weight
    assert any(table is p for p in parameters)
    assert gradcheck(lambda *_: model.loss(ids, labels, mask), [table], rtol=1e-4)
    assert all(p.grad is None or p.requires_grad for p in model.parameters())


def slow_greedy(model, prompt, steps):
    """Without a cache: the whole sequence anew for each token."""
    row = list(prompt)
    for _ in range(steps):
        row.append(int(model(np.array([row])).data[0, -1].argmax()))
    return row


@pytest.mark.parametrize("kind", ENCODERS)
def test_generation_with_a_cache_alone_and_in_a_batch(kind):
    model = prompted(kind=kind).eval()
    alone = [slow_greedy(model, prompt, 8) for prompt in PROMPTS]
    assert [model.generate(prompt, 8) for prompt in PROMPTS] == alone
    assert model.generate(PROMPTS, 8) == alone
    assert list(model.stream(PROMPTS[0], 8)) == alone[0][3:]
    assert alone != [slow_greedy(llama(), prompt, 8) for prompt in PROMPTS]


def test_the_context_has_room_for_fewer_tokens():
    model = prompted(llama(max_position_embeddings=10))
    assert model.context == 10 - P
    assert len(model.generate([1, 2, 3], 50)) == 10 - P
    with pytest.raises(ValueError, match=r"11 tokens, 3 of them virtual; the model's context has 10"):
        model(np.ones((1, 8), int))


@pytest.mark.parametrize("kind", ENCODERS)
def test_it_trains_a_language_model_whose_weights_stay(kind):
    ids, labels, mask = llama_batch("right")
    model = prompted(quantize_model(llama(dtype="float32", hidden_size=64, intermediate_size=64)), kind)
    before = {n: p.data.copy() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    loss = lambda model, _: model.loss(ids, labels, mask)  # noqa: E731
    history = fit(model, [0], steps=12, optimizer=optimizer, loss_fn=loss, progress=False)
    assert history.loss[-1] < history.loss[0]
    after = dict(model.named_parameters())
    assert [n for n in before if before[n].tobytes() != after[n].data.tobytes()] == []


def test_checkpointed_blocks_give_the_same_gradients():
    ids, labels, mask = llama_batch("left")
    found = []
    for checkpointing in (False, True):
        model = prompted()
        model.model.checkpointing = checkpointing
        model.loss(ids, labels, mask).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


# --- in a vision transformer ------------------------------------------------------------------------------------------


def test_virtual_patches_are_seen_by_the_others_and_are_not_in_the_mean():
    x = gaussian(4, 64)
    plain, model = ViT(rng=0, dtype="float64"), prompted(ViT(rng=0, dtype="float64"))
    tokens = tokens_of(model)
    h = plain.patch_embed(plain.patches(Tensor(x))).data + plain.position_embedding.data
    h = Tensor(np.concatenate([np.broadcast_to(tokens, (4, *tokens.shape)), h], axis=1))
    for block in plain.layers:
        h = block(h)
    expected = plain.head(plain.norm(h[:, P:]).mean(axis=1)).data
    np.testing.assert_allclose(model(x).data, expected, atol=1e-12)
    assert abs(model(x).data - plain(x).data).max() > 1e-3


def test_a_model_without_tokens_is_refused_and_left_alone():
    for model in (MLP(rng=0), Net()):
        before = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=rf"{type(model).__name__} has no place for virtual tokens; .* ViT"):
            prompted(model)
        assert [p.requires_grad for p in model.parameters()] == before


def test_it_runs_on_other_array_libraries(xp):
    ids, labels, mask = llama_batch("left")
    ours, theirs = prompted(kind="LSTM"), prompted(llama().to(xp), kind="LSTM")
    ours.loss(ids, labels, mask).backward()
    theirs.loss(*map(xp.asarray, (ids, labels, mask))).backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    assert get_namespace(next(g for g in grads.values() if g is not None)) is xp
    for name, p in ours.named_parameters():
        if p.grad is not None:
            np.testing.assert_allclose(to_numpy(grads[name]), p.grad, atol=1e-10)


# --- several, files, merging ------------------------------------------------------------------------------------------


def test_several_prompts_are_chosen_put_together_switched_off_and_deleted():
    ids, _, _ = llama_batch("none")
    model, base = prompted(), llama()(ids).data
    first = model(ids).data
    model.add_adapter("second", config("LSTM", num_virtual_tokens=2))
    np.testing.assert_array_equal(model(ids).data, first)
    model.set_adapter("second")
    assert layer_of(model).length == 2
    model.set_adapter(["default", "second"])
    assert layer_of(model).length == 5
    with model.disable_adapter():
        np.testing.assert_array_equal(model(ids).data, base)
    model.set_adapter("default")
    model.delete_adapter("second")
    np.testing.assert_array_equal(model(ids).data, first)
    np.testing.assert_array_equal(model.unload()(ids).data, base)


def test_a_copy_has_tokens_of_its_own():
    ids, _, _ = llama_batch("none")
    model = prompted()
    other = copy.deepcopy(model)
    expected = model(ids).data
    for p in other.adapter_state().values():
        p.data = 2 * p.data
    np.testing.assert_array_equal(model(ids).data, expected)
    assert (other(ids).data != expected).any()


def test_lora_stands_beside_it():
    ids, _, _ = llama_batch("none")
    model = prompted()
    first = model(ids).data
    model.add_adapter("lora", LoraConfig(r=2))
    model.set_adapter(["default", "lora"])
    np.testing.assert_allclose(model(ids).data, first, atol=1e-12)
    assert sum("lora_A" in n for n, p in model.named_parameters() if p.requires_grad) == 14


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("base", ["llama", "vit"])
def test_a_file_holds_the_tokens_and_gives_the_same_outputs(base, kind, tmp_path):
    make = llama if base == "llama" else lambda: ViT(rng=0)
    x = llama_batch("none")[0] if base == "llama" else gaussian(3, 64, dtype="float32")
    model = prompted(make(), kind, encoder_dropout=0.3).train()
    model.save_pretrained(tmp_path)
    assert all(module.training for module in model.modules())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {n: a.shape for n, a in tensors.items()} == {"prompt_embeddings": (P, 24 if base == "llama" else 48)}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["num_transformer_submodules"]) == ("P_TUNING", 1)
    assert written["task_type"] == ("CAUSAL_LM" if base == "llama" else None)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    np.testing.assert_allclose(loaded(x).data, model.eval()(x).data, rtol=0, atol=1e-12)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    np.testing.assert_array_equal(again["prompt_embeddings"], tensors["prompt_embeddings"])


def test_a_file_can_stand_beside_another_adapter_but_does_not_train(tmp_path):
    ids, _, _ = llama_batch("none")
    model = prompted(seed=4)
    model.save_pretrained(tmp_path)
    other = prompted()
    other.load_adapter(tmp_path, "second")
    other.set_adapter("second")
    np.testing.assert_allclose(other(ids).data, model(ids).data, atol=1e-12)
    with pytest.raises(ValueError, match=r"is_trainable: .* holds P_TUNING's result, not what made it; False"):
        PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)


def test_merging_is_refused_with_the_reason():
    model = prompted()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'model.virtual_tokens' cannot be merged: virtual tokens are an input"):
            merge()
    with pytest.raises(ValueError, match="virtual tokens are an input"):
        layer_of(model).merge(["default"])


def test_a_run_stopped_between_ends_with_the_same_bits(tmp_path):
    ids, labels, mask = llama_batch("right")

    def going(steps, **options):
        model = prompted(kind="LSTM", encoder_dropout=0.3)
        optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        loss = lambda model, _: model.loss(ids, labels, mask)  # noqa: E731
        fit(model, [0], steps=steps, optimizer=optimizer, loss_fn=loss, progress=False, **options)
        return tokens_of(model.eval())

    going(3, checkpoint_dir=tmp_path)
    assert going(6, checkpoint_dir=tmp_path, resume=True).tobytes() == going(6).tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": None}, r"num_virtual_tokens: got None; an int of at least 1"),
        ({"num_virtual_tokens": 0}, r"num_virtual_tokens: got 0"),
        ({"encoder_reparameterization_type": "GRU"}, r"got 'GRU'; accepted are 'MLP', 'LSTM'"),
        ({"encoder_hidden_size": 0}, r"encoder_hidden_size: got 0"),
        ({"encoder_num_layers": None}, r"encoder_num_layers: got None"),
        ({"encoder_dropout": 1.0}, r"encoder_dropout: got 1.0; a probability in \[0, 1\)"),
        ({"num_transformer_submodules": 2}, r"num_transformer_submodules: got 2; 1 is accepted"),
    ],
)
def test_a_wrong_option_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_size_that_is_not_the_models_and_unknown_entries_of_a_file_are_refused():
    with pytest.raises(ValueError, match="token_dim: got 7; the model's tokens have 24 features"):
        prompted(token_dim=7)
    with pytest.raises(ValueError, match=r"modules_to_save=.* is not supported here"):
        PromptEncoderConfig.from_dict({"num_virtual_tokens": 3, "modules_to_save": ["head"]})
