"""Full training, then LoRA: two phases, one optimizer, the same bits after every stop."""

import copy
import json

import numpy as np
import pytest
from llama_cases import batch as llama_batch
from llama_cases import llama
from safetensors.numpy import load_file
from twins import Net, batch

from minipeft import FullThenLoraConfig, LoraConfig, PeftModel, Tensor, fit, get_peft_model, nn, optim
from minipeft.backend import to_numpy
from minipeft.measure import memory_report
from minipeft.methods.hybrid import full_steps
from minipeft.quant import quantize_model

STEPS, SWITCH = 10, 3
OPTIMIZERS = {
    "adamw": lambda params: optim.AdamW(params, lr=0.02),
    "sgd": lambda params: optim.SGD(params, lr=0.05, momentum=0.9),
    "paged": lambda params: optim.PagedAdamW(params, lr=0.02),
}


def batches(number):
    x, y = batch(n=8, seed=number)
    return Tensor(x), y


def hybrid(fraction=0.3, seed=0, base=None, **options):
    config = FullThenLoraConfig(fraction=fraction, r=2, lora_alpha=4, **options)
    return get_peft_model(base or Net(), config, seed=seed)


def optimizer_of(model, kind="adamw"):
    return OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])


def run(model, steps=STEPS, optimizer=None, **options):
    options = {"progress": False} | options
    return fit(model, batches, steps=steps, optimizer=optimizer or optimizer_of(model), **options)


def arrays(model):
    return {name: to_numpy(array).copy() for name, array in model.state_dict().items()}


def base_arrays(model):
    """Without the factors, under the base's own names."""
    plain = {n.replace("base_model.model.", "").replace("base_layer.", ""): a for n, a in arrays(model).items()}
    return {name: a for name, a in plain.items() if ".lora_" not in name}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []


def outputs(model):
    return model(Tensor(batch(seed=9)[0])).data


# --- the phases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "total", "expected"), [(0.1, 100, 10), (0.3, 200, 60), (0, 7, 0), (1, 7, 7), (0.25, 10, 2)]
)
def test_the_full_phase_is_a_share_of_the_steps(fraction, total, expected):
    assert full_steps(fraction, total) == expected


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_first_phase_is_full_training_to_the_bit(kind):
    full = Net()
    losses = run(full, SWITCH, optimizer_of(full, kind)).loss
    model, at_switch = hybrid(), {}
    history = run(
        model,
        optimizer=optimizer_of(model, kind),
        callbacks=[lambda p: at_switch.update(base_arrays(model)) if p.step == SWITCH else None],
    )
    assert history.loss[:SWITCH] == losses
    assert_same_bits(at_switch, arrays(full))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_second_phase_is_lora_on_what_was_learned_with_a_fresh_optimizer(kind):
    model = hybrid()
    history = run(model, optimizer=optimizer_of(model, kind))
    full = Net()
    run(full, SWITCH, optimizer_of(full, kind))
    learned = arrays(full)
    lora = get_peft_model(full, LoraConfig(r=2, lora_alpha=4))
    optimizer = optimizer_of(lora, kind)
    later = fit(lora, lambda i: batches(i + SWITCH), steps=STEPS - SWITCH, optimizer=optimizer, progress=False)
    assert history.loss[SWITCH:] == later.loss
    assert_same_bits(arrays(model), arrays(lora))
    assert_same_bits(base_arrays(model), learned)


@pytest.mark.parametrize(("fraction", "peer"), [(0, "lora"), (1, "full")])
def test_at_the_ends_it_is_lora_and_full_training(fraction, peer):
    model, other = hybrid(fraction), Net()
    if peer == "lora":
        other = get_peft_model(other, LoraConfig(r=2, lora_alpha=4))
    assert run(model).loss == run(other).loss
    assert_same_bits(base_arrays(model), base_arrays(other))


def test_one_optimizer_serves_both_and_frees_what_it_knew_of_the_weights():
    model = hybrid()
    optimizer = optimizer_of(model)
    sizes, ages = [], []

    def look(progress):
        sizes.append(optimizer.nbytes)
        ages.append({int(a[0]) for n, a in optimizer.state_dict().items() if n.endswith("step")})

    run(model, optimizer=optimizer, callbacks=[look])
    weights = sum(a.nbytes for a in base_arrays(model).values())
    factors = sum(a.nbytes for n, a in arrays(model).items() if ".lora_" in n)
    assert sizes == [2 * weights] * (SWITCH - 1) + [0] + [2 * factors] * (STEPS - SWITCH)
    assert ages == [{1}, {2}, set(), *({i} for i in range(1, STEPS - SWITCH + 1))]


def test_an_optimizer_forgets_large_and_small_parameters_and_goes_on_with_the_rest():
    rng = np.random.default_rng(0)
    shapes = [(3,), (optim.UNIT + 5,), (4, 2), (2 * optim.UNIT,), (7,)]
    starts, gradients = ([rng.standard_normal(shape) for shape in shapes] for _ in range(2))
    kept = [0, 1, 4]

    def going(forgets):
        params = [nn.Parameter(start.copy()) for start in starts]
        optimizer = optim.AdamW(params, lr=0.1)
        for step in range(6):
            for i, p in enumerate(params):
                p.grad = None if step in (3, 4) and i not in kept else np.cos(step) * gradients[i]
            optimizer.step()
            if step == 2 and forgets:
                optimizer.forget([p for i, p in enumerate(params) if i not in kept])
                assert optimizer.nbytes == sum(2 * params[i].data.nbytes for i in kept)
        return params, optimizer.state_dict()

    (usual, before), (forgotten, after) = going(False), going(True)
    for i in kept:
        assert usual[i].data.tobytes() == forgotten[i].data.tobytes()
    assert [int(after[f"{i}.step"][0]) for i in range(5)] == [6, 6, 1, 1, 6]
    assert int(before["2.step"][0]) == 4


def test_after_the_switch_no_weight_has_a_gradient_and_the_learning_rate_goes_on():
    model = hybrid()
    optimizer = optimizer_of(model)
    seen = []
    schedule = optim.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    history = run(
        model,
        optimizer=optimizer,
        scheduler=schedule,
        callbacks=[lambda p: seen.append({n for n, q in model.named_parameters() if q.grad is not None})],
    )
    factors = {n for n in arrays(model) if ".lora_" in n}
    assert [names & factors for names in seen[:SWITCH]] == [set()] * SWITCH
    assert seen[SWITCH - 1] == set()
    assert seen[SWITCH:] == [factors] * (STEPS - SWITCH)
    np.testing.assert_allclose(history.lr, 0.02 * (1 - np.arange(STEPS) / STEPS))


def test_the_output_head_may_stay_out_of_the_full_phase():
    before, free, kept = arrays(Net()), hybrid(), hybrid(train_head=False)
    for model in (free, kept):
        run(model)
    assert (base_arrays(free)["head.weight"] != before["head.weight"]).any()
    assert_same_bits({"w": base_arrays(kept)["head.weight"]}, {"w": before["head.weight"]})


def test_biases_and_saved_modules_that_lora_trains_keep_their_moments():
    model = hybrid(bias="all", modules_to_save=["head"], base=Net())
    optimizer = optimizer_of(model)
    run(model, optimizer=optimizer)
    names = {id(p): n for n, p in model.named_parameters()}
    order = [names[id(p)] for p in optimizer.param_groups[0]["params"]]
    ages = {order[int(n.partition(".")[0])]: int(a[0]) for n, a in optimizer.state_dict().items() if "step" in n}
    assert {age for n, age in ages.items() if n.endswith("bias") or "modules_to_save" in n} == {STEPS}
    assert {age for n, age in ages.items() if ".lora_" in n} == {STEPS - SWITCH}
    assert not any("original_module" in n for n in ages)


def test_both_phases_are_recorded_with_their_bytes():
    model, reports = hybrid(), {}
    optimizer = optimizer_of(model)
    run(model, optimizer=optimizer, callbacks=[lambda p: reports.update({p.step: memory_report(model, optimizer)})])
    full, lora = model.method.record["full"], model.method.record["lora"]
    assert (full.steps, lora.steps) == (SWITCH, STEPS - SWITCH)
    for phase, report in ((full, reports[SWITCH - 1]), (lora, reports[STEPS])):
        assert phase.weights == phase.gradients == report.trainable_weights == report.gradients
        assert phase.optimizer == report.optimizer == 2 * phase.weights
    assert lora.weights < full.weights / 2
    assert "3 steps of full training: " in model.method.report()
    assert "; 7 steps of LoRA: 1 kB of weights trained, 1 kB of gradients, 2 kB of" in model.method.report()


def test_a_second_run_of_a_model_that_has_switched_is_lora(tmp_path):
    model = hybrid()
    run(model)
    before = base_arrays(model)
    run(model, optimizer=optimizer_of(model), checkpoint_dir=tmp_path)
    assert_same_bits(base_arrays(model), before)


# --- stops ------------------------------------------------------------------------------------------------------------


class StopError(Exception):
    """In place of a kill."""


def stop_after(step):
    def callback(progress):
        if progress.step == step:
            raise StopError

    return callback


def finished(model, optimizer, history):
    return arrays(model), optimizer.state_dict(), (history.loss, history.lr), model.method.record


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_stopped_anywhere_ends_with_the_bits_of_one_that_was_not(stop, kind, tmp_path):
    options = {"clip_norm": 0.5, "grad_accumulation": 2}

    def going(model, **more):
        optimizer = optimizer_of(model, kind)
        schedule = optim.get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
        return finished(model, optimizer, run(model, optimizer=optimizer, scheduler=schedule, **options, **more))

    expected = going(hybrid(lora_dropout=0.2))
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(StopError):
        going(hybrid(lora_dropout=0.2), callbacks=[stop_after(stop)], **kept)
    found = going(hybrid(lora_dropout=0.2), resume=True, **kept)
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert_same_bits(a, b)
    assert found[2:] == expected[2:]


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_the_same_model_goes_back_to_its_checkpoint_too(stop, tmp_path):
    """In a notebook: interrupted after the switch, the last checkpoint from before it."""
    model = hybrid()
    optimizer = optimizer_of(model)
    expected = finished(model, optimizer, run(model, optimizer=optimizer))
    model = hybrid()
    optimizer = optimizer_of(model)
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(StopError):
        run(model, optimizer=optimizer, callbacks=[stop_after(stop)], **kept)
    found = finished(model, optimizer, run(model, optimizer=optimizer, resume=True, **kept))
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert_same_bits(a, b)


def test_a_run_of_another_length_is_not_taken_up(tmp_path):
    run(hybrid(), 4, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"trains in full for 1 steps, this one for 3; the same"):
        run(hybrid(), STEPS, checkpoint_dir=tmp_path, resume=True)
    first = hybrid(total_step=STEPS)
    run(first, 4, checkpoint_dir=tmp_path)
    whole, parts = hybrid(), hybrid(total_step=STEPS)
    run(whole)
    run(parts, checkpoint_dir=tmp_path, resume=True)
    assert_same_bits(arrays(whole), arrays(parts))


# --- files and merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, STEPS])
def test_a_saved_run_gives_the_same_outputs_on_the_base_it_began_with(tmp_path, steps):
    model = hybrid(total_step=STEPS)
    run(model, steps)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert outputs(loaded).tobytes() == outputs(model.eval()).tobytes()
    assert not any(p.requires_grad for p in loaded.parameters())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "FULL_THEN_LORA"
    assert config["fraction"] == (0.3 if steps == 2 else 0.0)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {n.replace("base_model.model.", "").replace("base_layer.", "") for n in tensors if ".lora_" not in n} == set(
        Net().state_dict()
    )


def test_training_goes_on_from_a_file_as_lora(tmp_path):
    model = hybrid()
    run(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    before = base_arrays(loaded)
    losses = run(loaded).loss
    assert_same_bits(base_arrays(loaded), before)
    assert losses == run(model).loss
    loaded.save_pretrained(tmp_path / "again")
    assert_same_bits(arrays(PeftModel.from_pretrained(Net(), tmp_path / "again")), arrays(loaded))


def test_merging_gives_a_plain_model_with_the_same_outputs():
    model = hybrid()
    run(model)
    expected = outputs(model.eval())
    merged = model.merge_and_unload()
    assert type(merged) is Net
    np.testing.assert_allclose(outputs(merged), expected, atol=1e-13)


def test_saved_while_merged_it_is_the_same(tmp_path):
    model = hybrid()
    run(model)
    expected = outputs(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(outputs(PeftModel.from_pretrained(Net(), tmp_path)), expected, atol=1e-13)


def test_with_the_adapter_off_it_is_what_the_full_phase_made():
    full, model = Net(), hybrid()
    run(full, SWITCH)
    run(model)
    with model.disable_adapter():
        assert outputs(model).tobytes() == outputs(full).tobytes()
    assert_same_bits(arrays(model.unload()), arrays(full))


@pytest.mark.parametrize("variant", ["grouped", "no grouping, tied"])
def test_it_trains_saves_and_merges_a_language_model(variant, tmp_path):
    ids, labels, mask = llama_batch("right")
    loss = lambda model, _: model.loss(ids, labels, mask)  # noqa: E731
    config = FullThenLoraConfig(fraction=0.2, r=2, total_step=10)
    model = get_peft_model(llama(variant), config)
    history = fit(model, [0], steps=10, optimizer=optimizer_of(model), loss_fn=loss, progress=False)
    assert history.loss[-1] < history.loss[2] < history.loss[0]
    model.save_pretrained(tmp_path)
    expected = model.eval()(ids).data
    assert PeftModel.from_pretrained(llama(variant), tmp_path)(ids).data.tobytes() == expected.tobytes()
    np.testing.assert_allclose(model.merge_and_unload()(ids).data, expected, atol=1e-9)


def test_it_runs_on_other_array_libraries(xp):
    ours = hybrid()
    run(ours)
    theirs = hybrid(base=Net().to(xp))
    data = lambda i: (Tensor(xp.asarray(batch(n=8, seed=i)[0])), xp.asarray(batch(n=8, seed=i)[1]))  # noqa: E731
    fit(theirs, data, steps=STEPS, optimizer=optimizer_of(theirs), progress=False)
    for name, array in arrays(ours).items():
        np.testing.assert_allclose(arrays(theirs)[name], array, atol=1e-10, err_msg=name)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.5}, r"fraction: got 1.5; a number in \[0, 1\]"),
        ({"fraction": "a"}, r"fraction: got 'a'"),
        ({"fraction": float("nan")}, r"fraction: got nan"),
        ({"total_step": 0}, r"total_step: got 0; an int of at least 1"),
        ({"train_head": 1}, r"train_head: got 1; True and False"),
        ({"use_dora": True}, r"use_dora: its magnitude is made of W"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights: got 'pissa'; LoRA begins here at B A = 0"),
        ({"init_lora_weights": False}, r"init_lora_weights: got False"),
        ({"r": 0}, r"r: got 0"),
    ],
)
def test_a_wrong_option_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        FullThenLoraConfig(**options)


def test_weights_as_codes_and_weights_under_another_adapter_do_not_train_in_full():
    with pytest.raises(ValueError, match=r"holds its weight as codes, which cannot train in full"):
        get_peft_model(quantize_model(nn.Sequential(nn.Linear(64, 64))), FullThenLoraConfig())
    model = get_peft_model(Net(), LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"has the adapters \['default'\]"):
        model.add_adapter("second", FullThenLoraConfig(r=2))


def test_an_optimizer_that_lacks_a_phase_is_refused_before_anything_is_changed():
    model = hybrid()
    before = arrays(model)
    factors = [p for n, p in model.named_parameters() if ".lora_" in n]
    with pytest.raises(ValueError, match=r"optimizer: .* make it after get_peft_model, from model.parameters\(\)"):
        run(model, optimizer=optim.AdamW(factors))
    model.method.run_steps = 5
    with pytest.raises(ValueError, match=r"optimizer: 15 of the 25 parameters that train in one of the phases"):
        model.method.start(model, optim.AdamW(factors))
    assert_same_bits(arrays(model), before)
    run(model, optimizer=optim.AdamW(model.parameters()))


def test_a_schedule_shorter_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"steps: got 10, more than total_step = 5"):
        run(hybrid(total_step=5))


def test_a_step_before_the_start_is_refused():
    model = hybrid()
    with pytest.raises(ValueError, match=r"after_step: needs start\(model, optimizer\) first"):
        model.method.after_step(model, 0)


def test_a_copy_of_a_model_between_its_phases_goes_on_by_itself():
    model = hybrid(total_step=STEPS)
    run(model, 2)
    other = copy.deepcopy(model)
    before = arrays(model)
    run(other, STEPS, optimizer=optim.AdamW(other.parameters()))
    assert other.method.phase == "lora"
    assert model.method.phase == "full"
    assert_same_bits(arrays(model), before)


def test_state_of_another_method_is_refused():
    with pytest.raises(ValueError, match=r"FullThenLora did not write it; got \['x'\]"):
        hybrid().method.load_state_dict({"x": np.zeros(1)})
