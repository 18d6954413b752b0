"""AdaLoRA beside PEFT on the same PyTorch weights: outputs, gradients, scores, budgets, masks, files both ways."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import (
    LINEARS,
    LR,
    Net,
    assert_all_close,
    base,
    batch,
    gradients,
    kinds,
    outputs,
    peft_state,
    randomize,
    start_from,
)

from minipeft import AdaLoraConfig, PeftModel, Tensor, fit, get_peft_model, optim
from minipeft.methods.adalora import rank_budget

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("peft.tuners.adalora")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not this project's to mend
X, Y = batch()
# float64; PEFT divides by ranknum + 1e-5 in the weights' dtype and in another order
SAME = {"rtol": 0, "atol": 1e-12}
SCHEDULE = {"total_step": 40, "tinit": 5, "tfinal": 10, "deltaT": 3}

configs = st.fixed_dictionaries(
    {
        "init_r": st.integers(2, 5),
        "target_r": st.just(1),
        "total_step": st.just(40),
        "tinit": st.integers(0, 9),
        "tfinal": st.integers(0, 9),
        "deltaT": st.integers(1, 4),
        "lora_alpha": st.sampled_from([1, 3, 8, 16]),
        "init_lora_weights": st.booleans(),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "modules_to_save": st.sampled_from([None, ["head"]]),
        "target_modules": st.sampled_from([LINEARS, ["fc"], ["q_proj", "fc"], r".*\.[qv]_proj"]),
    }
)


def pair(config, directory):
    """The same adapter in both libraries, by a file from here."""
    ours, theirs = base()
    ours = randomize(get_peft_model(ours, AdaLoraConfig(**config)))
    ours.save_pretrained(directory)
    return ours, peft.PeftModel.from_pretrained(theirs, directory, is_trainable=True)


@settings(max_examples=15)
@given(configs)
def test_names_shapes_and_flags_are_pefts(config):
    ours, theirs = base()
    ours = get_peft_model(ours, AdaLoraConfig(**config))
    theirs = peft.get_peft_model(theirs, peft.AdaLoraConfig(**config))
    ranks = {n: p.item() for n, p in theirs.named_parameters() if ".ranknum." in n}
    assert kinds(ours) == {n: kind for n, kind in kinds(theirs).items() if n not in ranks}
    layers = dict(ours.adapter_layers())
    assert ranks == {f"base_model.model.{n}.ranknum.default": layer.ranknum["default"] for n, layer in layers.items()}
    for name, layer in layers.items():
        peer = theirs.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == peer.scaling["default"]


@settings(max_examples=20)
@given(configs)
def test_outputs_and_gradients_of_a_file_from_here_are_pefts(tmp_path, config):
    ours, theirs = pair(config, tmp_path)
    np.testing.assert_allclose(outputs(ours), outputs(theirs), **SAME)
    expected = {n: g for n, g in gradients(theirs).items() if ".ranknum." not in n}
    assert_all_close(gradients(ours), expected, rtol=1e-9, atol=1e-11)


@settings(max_examples=10)
@given(configs)
def test_the_merged_and_unloaded_weights_are_pefts(tmp_path, config):
    ours, theirs = pair(config, tmp_path)
    found, expected = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    assert_all_close(found, expected, rtol=1e-12, atol=1e-13)


def train_pefts(config, steps, seen=None):
    """PEFT's model trained with its allocator called as in its example; (model, start, gradients by step).

    ranknum is held fixed: PEFT 0.21 lets it train and does not save it, so that its own files give other outputs.
    """
    torch.manual_seed(0)
    model = peft.get_peft_model(base()[1], peft.AdaLoraConfig(**config))
    start = peft_state(model)
    for name, p in model.named_parameters():
        p.requires_grad = p.requires_grad and ".ranknum." not in name
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=LR)
    gradients, x, y = [], torch.from_numpy(X), torch.from_numpy(Y)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        gradients.append({n: p.grad.numpy().copy() for n, p in trained.items()})
        optimizer.step()
        moved = {n: p.detach().numpy().copy() for n, p in trained.items()}
        model.base_model.update_and_allocate(step)
        if seen is not None:
            seen.append((moved, {n: p.detach().numpy().copy() for n, p in trained.items()}, allocator_of(model)))
    return model, start, gradients


def allocator_of(model):
    """PEFT's averages, and its last rank pattern."""
    allocator = model.base_model.rankallocator
    averages = {
        n: (a.numpy().copy(), allocator.exp_avg_unc[n].numpy().copy()) for n, a in allocator.exp_avg_ipt.items()
    }
    return averages, dict(model.peft_config["default"].rank_pattern or {})


RUNS = [
    {"init_r": 3, "target_r": 1, "lora_alpha": 5, "target_modules": LINEARS, **SCHEDULE},
    {"init_r": 5, "target_r": 2, "target_modules": ["fc", "v_proj"], **SCHEDULE, "deltaT": 1, "tfinal": 0},
    {"init_r": 4, "target_r": 3, "target_modules": LINEARS, **SCHEDULE, "beta1": 0.5, "beta2": 0.95, "tinit": 0},
]


@pytest.mark.parametrize("config", RUNS)
def test_a_whole_run_fed_pefts_gradients_has_its_scores_budgets_and_masks(config):
    seen = []
    _, start, gradients = train_pefts(config, config["total_step"], seen)
    model = get_peft_model(Net(), AdaLoraConfig(**config, orth_reg_weight=0))
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start_from(model, start)
    method = model.method
    method.start(model, None)
    last, pattern = config["total_step"] - config["tfinal"], {}
    for step, (moved, masked, (averages, theirs)) in enumerate(seen):
        for name, p in ours.items():
            p.data, p.grad = moved[name].copy(), gradients[step][name]
        method.after_step(model, step)
        for name, p in ours.items():
            np.testing.assert_array_equal(p.data, masked[name], err_msg=f"{name} after {step + 1}")
        if step + 1 < last:
            assert len(averages) == 3 * len(method.averages)
            for name, parts in method.averages.items():
                for part, (mean, uncertainty) in zip("BEA", parts, strict=True):
                    expected = averages[f"{name}.lora_{part}.default"]
                    np.testing.assert_allclose(mean, expected[0], rtol=1e-14)
                    np.testing.assert_allclose(uncertainty, expected[1], rtol=1e-9, atol=1e-20)
        if theirs and theirs != pattern:
            pattern = theirs
            found = {f"{name}.lora_E.default": mask.tolist() for name, mask in method.masks.items()}
            assert found == pattern
            assert method.rank_history[-1][1] == {
                name.removesuffix(".lora_E.default"): sum(kept) for name, kept in pattern.items()
            }
    assert pattern
    assert method.settled
    assert len({tuple(ranks.values()) for _, ranks in method.rank_history}) > 2


@settings(max_examples=50)
@given(st.data())
def test_the_budget_is_pefts_at_every_step(data):
    total = data.draw(st.integers(1, 60))
    tinit = data.draw(st.integers(0, total - 1))
    tfinal = data.draw(st.integers(0, total - 1 - tinit))
    init_r = data.draw(st.integers(1, 5))
    config = {"total_step": total, "tinit": tinit, "tfinal": tfinal, "init_r": init_r}
    config["target_r"] = data.draw(st.integers(1, init_r))
    theirs = peft.get_peft_model(base()[1], peft.AdaLoraConfig(**config, target_modules=LINEARS))
    allocator = theirs.base_model.rankallocator
    for step in range(1, total + 1):
        budget = rank_budget(
            step, total_step=total, tinit=tinit, tfinal=tfinal,
            init_budget=init_r * len(LINEARS), target_budget=config["target_r"] * len(LINEARS),
        )  # fmt: skip
        assert budget == allocator.budget_schedule(step)[0]


@pytest.mark.parametrize("config", RUNS)
def test_training_follows_pefts_losses_and_ends_at_its_ranks(config):
    theirs, start, _ = train_pefts(config, config["total_step"])
    ours = get_peft_model(Net(), AdaLoraConfig(**config, orth_reg_weight=0))
    start_from(ours, start)
    optimizer = optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=LR)
    fit(ours, [(Tensor(X), Y)], steps=config["total_step"], optimizer=optimizer, progress=False)
    np.testing.assert_allclose(outputs(ours.eval()), outputs(theirs.eval()), rtol=0, atol=1e-9)
    pattern = theirs.peft_config["default"].rank_pattern
    assert ours.method.ranks(ours) == {n.removesuffix(".lora_E.default"): sum(kept) for n, kept in pattern.items()}


@pytest.mark.parametrize("config", RUNS[:2])
def test_a_pruned_file_from_peft_gives_the_same_outputs_here(config, tmp_path):
    theirs, _, _ = train_pefts(config, config["total_step"])
    expected = outputs(theirs.eval())
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(Net(), tmp_path)
    np.testing.assert_allclose(outputs(ours), expected, **SAME)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert ours.peft_config["default"].rank_pattern == written["rank_pattern"]
    ours.save_pretrained(tmp_path / "again")
    np.testing.assert_allclose(outputs(PeftModel.from_pretrained(Net(), tmp_path / "again")), expected, **SAME)


@pytest.mark.parametrize("importance", ["sensitivity", "magnitude"])
@pytest.mark.parametrize("target_r", [1, 2])
@pytest.mark.parametrize("truncated", [False, True])
def test_a_pruned_file_from_here_gives_the_same_outputs_in_peft(importance, target_r, truncated, tmp_path):
    config = AdaLoraConfig(init_r=4, target_r=target_r, importance=importance, target_modules=LINEARS, **SCHEDULE)
    ours = get_peft_model(Net(), config)
    optimizer = optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.05)
    fit(ours, [(Tensor(X), Y)], steps=config.total_step, optimizer=optimizer, progress=False)
    expected = outputs(ours.eval())
    if truncated:
        ours.method.truncate(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base()[1], tmp_path)
    np.testing.assert_allclose(outputs(theirs), expected, **SAME)
    ranks = {
        n.split(".lora_E")[0].removeprefix("base_model.model."): len(p)
        for n, p in theirs.named_parameters()
        if ".lora_E" in n
    }
    assert ranks == ours.method.ranks(ours)
