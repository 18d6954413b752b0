"""LoRA-GA beside PEFT's: gradients, start values for every direction and scale, and files in both directions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import twins
from twins import base, outputs, torch_net

import minipeft
from minipeft import PeftModel, get_peft_model, nn
from minipeft.methods.lora_ga import DIRECTIONS, SCALES, lora_ga_init, weight_gradients
from minipeft.train import classification_loss

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
loraga = pytest.importorskip("peft.tuners.lora.loraga")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not this project's to mend
BATCHES = [twins.batch(seed=seed) for seed in (1, 2, 3)]
LINEARS = twins.LINEARS[:-1]  # without the last: three classes give its gradient a rank of 2, and 2r = 4 are needed
PEFTS = [scale for scale in SCALES if scale != "paper"]
# PEFT's SVD is a randomized one in float32: its singular vectors have lengths within 3e-5 of 1
NEAR = {"rtol": 1e-4, "atol": 1e-4}
SAME = {"rtol": 0, "atol": 1e-12}


def config(library, direction="ArB2r", scale="stable", **options):
    chosen = library.LoraGAConfig(direction=direction, scale=scale, stable_gamma=4)
    options = {"r": 2, "lora_alpha": 3, "target_modules": LINEARS, **options}
    return library.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=chosen, **options)


def losses(model):
    """What PEFT is given to make gradients."""
    for x, y in BATCHES:
        torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()


def pefts(direction="ArB2r", scale="stable", **options):
    """The twin after PEFT's preparation and get_peft_model, and the gradients that it used."""
    model, chosen = base()[1], config(peft, direction, scale, **options)
    loraga.preprocess_loraga(model, chosen, lambda: losses(model))
    gradients = {name: model.get_submodule(name)._peft_loraga_grad.numpy().copy() for name in LINEARS}
    torch.manual_seed(0)
    return peft.get_peft_model(model, chosen), gradients


def state(model):
    """What each layer has: W − s·BA, A, B."""
    if isinstance(model, nn.Module):
        arrays = model.state_dict()
    else:
        arrays = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    names = ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    return {layer: [arrays[f"base_model.model.{layer}.{name}"] for name in names] for layer in LINEARS}


def assert_same_but_for_signs(found, expected):
    """Rows of A and columns of B: a pair of singular vectors has a sign to choose."""
    for rows, others in zip(found, expected, strict=True):
        for row, other in zip(rows, others, strict=True):
            np.testing.assert_allclose(row * np.sign(row @ other), other, **NEAR)


def test_gradients_are_pefts():
    model, _ = base()
    found = dict(weight_gradients(model, LINEARS, BATCHES, classification_loss))
    for name, G in pefts()[1].items():
        np.testing.assert_allclose(found[name], G, **SAME)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("scale", PEFTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_start_values_are_pefts_on_the_same_gradients(direction, scale, rslora, monkeypatch):
    """W, A and B of every layer of a model; the random choice is given to both."""
    choice = np.random.default_rng(5)
    numbers = [choice.permutation(4) for _ in LINEARS]
    given = iter(numbers)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.from_numpy(next(given)))
    theirs, _ = pefts(direction, scale, use_rslora=rslora)
    again = iter(numbers)
    seed = np.random.default_rng(0)
    monkeypatch.setattr("minipeft.methods.lora_ga.backend.generator", lambda rng: Fixed(again) if rng is seed else rng)
    ours = get_peft_model(
        base()[0], config(minipeft, direction, scale, use_rslora=rslora), BATCHES, classification_loss, seed=seed
    )
    found, expected = state(ours), state(theirs)
    s = 3 / (2**0.5 if rslora else 2)
    for layer in LINEARS:
        (W, A, B), (their_W, their_A, their_B) = found[layer], expected[layer]
        assert_same_but_for_signs((A, B.T), (their_A, their_B.T))
        np.testing.assert_allclose(W + s * B @ A, their_W + s * their_B @ their_A, **NEAR)
        if direction == "random":  # each pair whole: no sign is left
            np.testing.assert_allclose(B @ A, their_B @ their_A, **NEAR)
    np.testing.assert_allclose(outputs(ours.eval()), outputs(theirs.eval()), rtol=0, atol=1e-4)


class Fixed:
    """A generator that gives these permutations."""

    def __init__(self, numbers):
        self.numbers = numbers

    def permutation(self, n):
        return next(self.numbers)


@pytest.mark.parametrize("scale", PEFTS)
@pytest.mark.parametrize("direction", DIRECTIONS[:3])
def test_pefts_randomized_svd_finds_the_same_vectors_of_a_larger_gradient(direction, scale):
    """40 × 30 with falling singular values, of which PEFT looks at 4r = 12."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (40, 30))
    G = ((U[:, :30] * 0.7 ** np.arange(30)) @ V.T).astype("float32")
    W = (G.T.reshape(40, 30) @ V + np.outer(U[0], V[0])).astype("float32")  # PEFT's σ₁ of a flat spectrum is too small
    linear = torch.nn.Linear(30, 40, bias=False)
    linear.weight.data = torch.from_numpy(W.copy())
    linear._peft_loraga_grad = torch.from_numpy(G)
    chosen = config(peft, direction, scale, r=3, target_modules=["fc"])
    torch.manual_seed(0)
    layer = peft.get_peft_model(torch.nn.ModuleDict({"fc": linear}), chosen).base_model.model["fc"]
    their_A, their_B = (getattr(layer, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B"))
    A, B = lora_ga_init(G, 3, scaling=1.0, gamma=4, direction=direction, scale=scale, W=W)
    size = np.linalg.norm(their_B)
    assert_same_but_for_signs((A, B.T / size), (their_A, their_B.T / size))


# --- files ------------------------------------------------------------------------------------------------------------


def moved(model):
    """In evaluation mode, with everything that trains away from its start."""
    return twins.randomize(model).eval()


def ours(**options):
    return moved(get_peft_model(base()[0], config(minipeft, **options), BATCHES, classification_loss))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_saved_here_loads_in_peft_on_an_unchanged_base(scale, rslora, tmp_path):
    model = ours(scale=scale, use_rslora=rslora, rank_pattern={"v_proj": 1}, alpha_pattern={"q_proj": 7})
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base()[1], tmp_path)
    np.testing.assert_allclose(outputs(theirs), outputs(model), **SAME)


def test_an_adapter_and_its_changed_base_load_in_peft(tmp_path):
    model = ours()
    expected = outputs(model)
    model.save_pretrained(tmp_path, changed_base=True)
    changed = torch_net(model.unload(changed_base=True).state_dict())
    theirs = peft.PeftModel.from_pretrained(changed, tmp_path)
    np.testing.assert_allclose(outputs(theirs), expected, **SAME)


def test_an_adapter_and_the_base_that_peft_changed_load_here(tmp_path):
    theirs = moved(pefts()[0])
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == "lora_ga"
    expected = outputs(theirs)
    changed = base()[0]
    changed.load_state_dict({name: t.detach().numpy() for name, t in theirs.unload().state_dict().items()})
    model = PeftModel.from_pretrained(changed, tmp_path)
    np.testing.assert_allclose(outputs(model), expected, **SAME)


def test_an_adapter_that_peft_converted_to_twice_the_rank_loads_here(tmp_path):
    theirs, _ = pefts()
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide does before it saves the start
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "lora_ga"
    moved(theirs)
    expected = outputs(theirs)
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = PeftModel.from_pretrained(base()[0], tmp_path / "end")
    np.testing.assert_allclose(outputs(model), expected, rtol=0, atol=1e-4)
