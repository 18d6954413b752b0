"""fit: what a step is, what is written, what a killed run leaves, and what it says when something is wrong."""

import contextlib
import copy
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import killed_run
import numpy as np
import pytest
from safetensors.numpy import load_file, safe_open, save_file

from minipeft import LoraConfig, PeftModel, Tensor, blas, fit, get_peft_model, nn, ops, optim
from minipeft.data import digits
from minipeft.methods.base import Method
from minipeft.models import MLP
from minipeft.train import CHECKPOINT, NonFiniteLossError


def data(n=24, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 4)).astype(dtype), rng.integers(0, 3, n)


def batches_of(size, n=24):
    x, y = data(n)
    return [(Tensor(x[i : i + size]), y[i : i + size]) for i in range(0, n, size)]


def mlp(seed=0):
    return MLP((4, 6, 3), rng=seed, dtype="float64")


def sgd(model, lr=0.1, **options):
    return optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, **options)


def weights(model):
    return {name: array.copy() for name, array in model.state_dict().items()}


def run(model, batches, steps, **options):
    options = {"optimizer": None, "progress": False} | options
    options["optimizer"] = options["optimizer"] or sgd(model)
    return fit(model, batches, steps=steps, **options)


def assert_same(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=atol, err_msg=name)


# --- a step -----------------------------------------------------------------------------------------------------------


def test_a_run_is_forward_backward_and_the_optimizers_step():
    model, other = mlp(), mlp()
    history = run(model, batches_of(8), 5, optimizer=sgd(model, momentum=0.9))
    optimizer, losses = sgd(other, momentum=0.9), []
    for step in range(5):
        x, y = batches_of(8)[step % 3]
        optimizer.zero_grad()
        loss = ops.cross_entropy(other(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_same(weights(model), weights(other))
    assert history.loss == losses


def test_accumulated_small_batches_are_one_large_batch():
    small, large = mlp(), mlp()
    a = run(small, batches_of(4), 6, grad_accumulation=3, clip_norm=1.0)
    b = run(large, batches_of(12), 6, clip_norm=1.0)
    # 1e-13: the same sum of 12 gradients in another order, over six steps
    assert_same(weights(small), weights(large), atol=1e-13)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-13)
    np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-12)


def test_clipping_bounds_the_whole_gradient_and_the_history_has_it_before():
    model = mlp()
    before, history = weights(model), run(model, batches_of(8), 1, optimizer=sgd(model, lr=1.0), clip_norm=0.01)
    moved = np.sqrt(sum(((after - before[name]) ** 2).sum() for name, after in weights(model).items()))
    assert moved == pytest.approx(0.01, rel=1e-4)  # PyTorch's + 1e-6 below the fraction line
    assert history.grad_norm[0] > 0.1
    assert run(mlp(), batches_of(8), 2).grad_norm == []


def test_the_schedule_is_stepped_once_a_step():
    model = mlp()
    optimizer = sgd(model, lr=0.8)
    scheduler = optim.CosineAnnealingLR(optimizer, T_max=4)
    history = run(model, batches_of(4), 5, optimizer=optimizer, scheduler=scheduler, grad_accumulation=2)
    np.testing.assert_allclose(history.lr, 0.8 * (1 + np.cos(np.pi * np.arange(5) / 4)) / 2, rtol=1e-14)


def test_the_history_has_one_entry_a_step():
    history = run(mlp(), batches_of(8), 7, clip_norm=1.0)
    assert len(history.loss) == len(history.lr) == len(history.grad_norm) == 7
    assert history.seconds > 0


def test_callbacks_see_each_step_after_it():
    seen, model = [], mlp()
    history = run(
        model, batches_of(8), 3, callbacks=[lambda p: seen.append((p.step, p.steps, p.loss, p.model is model))]
    )
    assert seen == [(i + 1, 3, history.loss[i], True) for i in range(3)]


def test_a_callback_can_stop_the_run():
    def stop(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    model = mlp().eval()
    with pytest.raises(KeyboardInterrupt):
        run(model, batches_of(8), 9, callbacks=[stop])
    assert not model.training


def test_a_loss_function_of_ones_own():
    model = mlp()
    target = Tensor(np.zeros((8, 3)))
    history = run(model, [b[0] for b in batches_of(8)], 60, loss_fn=lambda m, x: ops.mse_loss(m(x), target))
    assert history.loss[-1] < 0.1 * history.loss[0]


def test_training_on_a_device(xp):
    x, y = data()
    model = mlp().to(xp)
    history = run(model, [(Tensor(xp.asarray(x)), xp.asarray(y))], 4, clip_norm=0.5)
    expected = run(mlp(), [(Tensor(x), y)], 4, clip_norm=0.5)
    np.testing.assert_allclose(history.loss, expected.loss, rtol=1e-12)


# --- batches ----------------------------------------------------------------------------------------------------------


class Endless:
    """A sequence without a length."""

    def __getitem__(self, number):
        return batches_of(8)[number % 3]


class Again:
    """An iterable that starts again each time."""

    def __iter__(self):
        return iter(batches_of(8))


KINDS = {
    "function": lambda: lambda number: batches_of(8)[number % 3],
    "list": lambda: batches_of(8),
    "tuple": lambda: tuple(batches_of(8)),
    "endless": Endless,
    "iterable": Again,
    "generator": lambda: (b for _ in range(9) for b in batches_of(8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_as_function_sequence_or_iterable_are_taken_in_turn(kind):
    model, other = mlp(), mlp()
    run(model, KINDS[kind](), 8)
    run(other, batches_of(8), 8)
    assert_same(weights(model), weights(other))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "generator"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_goes_on_with_the_batch_it_stopped_at(kind, accumulation, tmp_path):
    model, other = mlp(), mlp()
    options = {"checkpoint_dir": tmp_path, "grad_accumulation": accumulation}
    run(mlp(), KINDS[kind](), 4, **options)
    run(model, KINDS[kind](), 9, resume=True, **options)
    run(other, batches_of(8), 9, grad_accumulation=accumulation)
    assert_same(weights(model), weights(other))


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "batches: got an empty sequence"),
        (iter([]), "batches: ended before the last step"),
        ((b for b in batches_of(8)), "batches: ended before the last step"),
    ],
)
def test_batches_that_end_are_explained(batches, words):
    model = mlp().eval()
    with pytest.raises(ValueError, match=words):
        run(model, batches, 5)
    assert not model.training


def test_a_data_set_given_for_batches_is_explained():
    x, y = data()
    with pytest.raises(TypeError, match=r"batches: each must be a pair \(x, y\)"):
        run(mlp(), (Tensor(x), y), 5)


# --- what fit asks of its arguments -----------------------------------------------------------------------------------


def fingerprint(model):
    return [(n, p.data.tobytes(), p.requires_grad) for n, p in model.named_parameters()], [
        m.training for m in model.modules()
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"steps": 2.5}, "steps: got 2.5"),
        ({"grad_accumulation": 0}, "grad_accumulation: got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every: got 0"),
        ({"clip_norm": 0}, "clip_norm: got 0"),
        ({"clip_norm": -1.0}, "clip_norm: got -1.0"),
        ({"clip_norm": float("nan")}, "clip_norm: got nan"),
        ({"clip_norm": "1"}, "clip_norm: got '1'"),
        ({"resume": True}, "resume: needs checkpoint_dir"),
        ({"checkpoint_every": 2}, "checkpoint_every: needs checkpoint_dir"),
    ],
)
def test_an_argument_out_of_range_is_named_before_anything_happens(options, words):
    model = mlp()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=words):
        run(model, batches_of(8), **({"steps": 3} | options))
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": 5}, "model: got 5; a Module"),
        ({"batches": None}, "batches: got None; a function of a number, a sequence or an iterable"),
        ({"optimizer": "adam"}, "optimizer: got 'adam'; an optimizer"),
        ({"loss_fn": "mse"}, "loss_fn: got 'mse'; a function"),
        ({"scheduler": "cosine"}, "scheduler: got 'cosine'; a schedule"),
        ({"callbacks": print}, "callbacks: got <built-in function print>; a list of functions"),
        ({"callbacks": [1]}, r"callbacks: got \(1,\); a list of functions"),
    ],
)
def test_an_argument_of_another_kind_is_named_before_anything_happens(options, words):
    model = mlp()
    before = fingerprint(model)
    arguments = {"model": model, "batches": batches_of(8), "optimizer": sgd(model), "steps": 3} | options
    with pytest.raises(TypeError, match=words):
        fit(arguments.pop("model"), arguments.pop("batches"), **arguments)
    assert fingerprint(model) == before


def test_a_schedule_of_another_optimizer_is_refused():
    """It would leave the lr of this one as it is."""
    model = mlp()
    with pytest.raises(ValueError, match="scheduler: it sets the lr of another optimizer"):
        run(model, batches_of(8), 1, scheduler=optim.CosineAnnealingLR(sgd(model), 3))


def test_callbacks_may_come_from_a_generator():
    seen = []
    run(mlp(), batches_of(8), 3, callbacks=(call for call in [lambda progress: seen.append(progress.step)]))
    assert seen == [1, 2, 3]


def test_a_checkpoint_dir_that_is_a_file_is_told_before_the_first_step(tmp_path):
    model, path = mlp(), tmp_path / "file"
    path.touch()
    before = fingerprint(model)
    with pytest.raises(FileExistsError, match="file"):
        run(model, batches_of(8), 3, checkpoint_dir=path)
    assert fingerprint(model) == before


def test_a_frozen_model_has_nothing_to_train():
    model = mlp()
    optimizer = sgd(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(model, batches_of(8), steps=1, optimizer=optimizer)


@pytest.mark.parametrize("bias", ["none", "all"])  # with "all" some parameters are the base's own and known
def test_an_optimizer_made_before_get_peft_model_is_refused(bias):
    base = mlp()
    optimizer = sgd(base)
    model = get_peft_model(base, LoraConfig(r=2, bias=bias))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"trainable parameters are not in it .*make it after get_peft_model"):
        fit(model, batches_of(8), steps=1, optimizer=optimizer)
    assert fingerprint(model) == before


@pytest.mark.parametrize("loss", [None, 1.5, np.float64(2)])
def test_a_loss_function_that_gives_no_tensor_is_explained(loss):
    with pytest.raises(TypeError, match="loss_fn: expected a Tensor"):
        run(mlp(), batches_of(8), 1, loss_fn=lambda model, batch: loss)


def test_a_loss_of_many_numbers_is_explained():
    with pytest.raises(TypeError, match=r"loss_fn: expected a Tensor with one element, got shape \(8, 3\)"):
        run(mlp(), batches_of(8), 1, loss_fn=lambda model, batch: model(batch[0]))


@pytest.mark.parametrize(("low", "high"), [(0, 3), (-1, 2)])
def test_labels_out_of_range_are_explained_and_nothing_is_touched(low, high, tmp_path):
    model, (x, _) = mlp(), data()
    before = fingerprint(model)
    y = np.resize([low, high], len(x))
    with pytest.raises(ValueError, match=rf"targets: got classes from {low} to {high}; logits have classes 0 to 2"):
        run(model, [(Tensor(x), y)], 3, checkpoint_dir=tmp_path)
    assert fingerprint(model) == before
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("fail", [False, True])
def test_every_modules_mode_is_given_back(fail):
    model = nn.Sequential(
        nn.Linear(4, 6, dtype="float64", rng=0), nn.Dropout(0.5, rng=0), nn.Linear(6, 3, dtype="float64")
    )
    model[1].eval()
    during = []
    batches = batches_of(8) if not fail else [batches_of(8)[0], None]

    def watch(progress):
        during.append([m.training for m in model.modules()])

    if fail:
        with pytest.raises(TypeError):
            run(model, batches, 2, callbacks=[watch])
    else:
        run(model, batches, 1, callbacks=[watch])
    assert during == [[True] * 4]
    assert [m.training for m in model.modules()] == [True, True, False, True]


# --- hooks ------------------------------------------------------------------------------------------------------------


class Recorder(Method):
    def __init__(self, log):
        super().__init__(None)
        self.log = log

    def penalty(self, model):
        self.log.append("penalty")
        return (model.head.weight * model.head.weight).sum() * 0.5

    def before_step(self, model, step):
        self.log.append(("before", step, model.head.weight.grad is not None))

    def after_step(self, model, step):
        self.log.append(("after", step))


class LoggedSGD(optim.SGD):
    log: list

    def step(self):
        self.log.append("optimizer")
        super().step()


def test_a_methods_hooks_are_called_in_order_and_its_penalty_is_trained():
    log, model, other = [], mlp(), mlp()
    optimizer = LoggedSGD(list(model.parameters()), lr=0.1)
    optimizer.log = log
    history = run(model, batches_of(8), 2, optimizer=optimizer, method=Recorder(log), grad_accumulation=2)
    step = lambda i: ["penalty", ("before", i, True), "optimizer", ("after", i)]  # noqa: E731
    assert log == step(0) + step(1)
    decayed = optim.SGD([{"params": [other.head.weight], "weight_decay": 1.0}, {"params": [
        p for n, p in other.named_parameters() if n != "head.weight"]}], lr=0.1)  # fmt: skip
    expected = run(other, batches_of(8), 2, optimizer=decayed, grad_accumulation=2)
    assert_same(weights(model), weights(other), atol=1e-14)  # ½‖w‖² has the gradient w, as weight decay 1
    np.testing.assert_allclose(history.loss, expected.loss, rtol=1e-13)  # without the penalty


def test_fit_finds_the_method_on_a_peft_model():
    log, model = [], get_peft_model(mlp(), LoraConfig(r=2, modules_to_save=["head"]))
    method = model.methods["default"]
    method.after_step = lambda m, step: log.append((m is model, step))
    run(model, batches_of(8), 2)
    assert log == [(True, 0), (True, 1)]


# --- a loss that is not finite ----------------------------------------------------------------------------------------


def files_of(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_names_the_step_and_the_first_module(bad, wrap, tmp_path):
    model = MLP((4, 6, 6, 3), rng=0, dtype="float64")
    inner = model.fc2
    if wrap:
        model = get_peft_model(model, LoraConfig(r=2))
    kept = {}

    def spoil(progress):
        if progress.step == 2:
            inner.weight.data = np.full_like(inner.weight.data, bad)
            kept.update(weights=weights(model), files=files_of(tmp_path))

    name = "base_model.model.fc2" if wrap else "fc2"
    words = rf"loss is nan at step 3; the first module whose output is not finite: '{re.escape(name)}"
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1, "callbacks": [spoil], "clip_norm": 1.0}
    with np.errstate(all="ignore"), pytest.raises(NonFiniteLossError, match=words):
        run(model, batches_of(8), 5, **options)
    assert_same(weights(model), kept["weights"])  # no step was taken
    assert files_of(tmp_path) == kept["files"]
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_loss_that_explodes_by_itself_is_caught(tmp_path):
    model = mlp()
    with np.errstate(all="ignore"), pytest.raises(NonFiniteLossError, match=r"Try a smaller learning rate"):
        run(model, batches_of(8), 500, optimizer=sgd(model, lr=1e200), checkpoint_dir=tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_loss_itself_may_be_what_is_not_finite():
    def loss_fn(model, batch):
        return ops.log((model(batch[0]) * 0.0).sum() + 0.0) * 1.0

    with (
        np.errstate(all="ignore"),
        pytest.raises(NonFiniteLossError, match="loss is -inf at step 1; every module's output"),
    ):
        run(mlp(), batches_of(8), 1, loss_fn=loss_fn)


def test_a_forward_of_ones_own_survives_the_diagnosis():
    model = mlp()
    own = model.fc1.forward
    model.fc1.forward = lambda x: own(x) * float("nan")
    mine = model.fc1.forward
    with np.errstate(all="ignore"), pytest.raises(NonFiniteLossError, match="'fc1'"):
        run(model, batches_of(8), 1)
    assert model.fc1.forward is mine


@pytest.mark.parametrize("steps", [1, 4])
def test_weights_that_are_not_finite_are_neither_kept_nor_handed_back(steps, tmp_path):
    """A finite loss with an infinite gradient: √x at 0."""
    model = mlp()

    def loss_fn(m, batch):
        at_zero = ops.sqrt((m.head.bias * 0.0).sum())
        return ops.cross_entropy(m(batch[0]), batch[1]) + at_zero * 0.0

    words = "head.bias is not finite after step 1"
    with np.errstate(all="ignore"), pytest.raises(NonFiniteLossError, match=words):
        run(model, batches_of(8), steps, loss_fn=loss_fn, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert not any(tmp_path.iterdir())


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_written_when_asked_and_after_the_last_step(tmp_path):
    written = []

    def watch(progress):
        path = tmp_path / CHECKPOINT
        if path.exists():
            with safe_open(path, "np") as file:
                written.append(int(file.metadata()["step"]))

    run(mlp(), batches_of(8), 7, checkpoint_dir=tmp_path, checkpoint_every=3, callbacks=[watch])
    assert written == [3, 3, 3, 6, 7]
    assert list(files_of(tmp_path)) == [CHECKPOINT]


def test_left_out_a_checkpoint_is_written_every_tenth_of_the_steps(tmp_path):
    written = set()
    watch = lambda progress: written.update(str(p.stat().st_mtime_ns) for p in tmp_path.iterdir())  # noqa: E731
    run(mlp(), batches_of(8), 20, checkpoint_dir=tmp_path, callbacks=[watch])
    assert len(written) == 10


def test_a_checkpoint_holds_what_trains_and_not_the_frozen_base(tmp_path):
    model = get_peft_model(mlp(), LoraConfig(r=2))
    run(model, batches_of(8), 1, optimizer=sgd(model, momentum=0.9), checkpoint_dir=tmp_path)
    names = {n.partition(".")[2] for n in load_file(tmp_path / CHECKPOINT) if n.startswith("model.")}
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}


class Stop(Exception):  # noqa: N818 - no error
    pass


def stop_at(step):
    def callback(progress):
        if progress.step == step:
            raise Stop

    return callback


@pytest.mark.parametrize("kind", ["adamw", "sgd", "full-then-lora"])
@pytest.mark.parametrize("stops", [(1,), (4,), (7, 8, 149), (29, 30, 31), (150,)])
def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not(kind, stops, tmp_path):
    results = []
    for name, interruptions in (("whole", ()), ("stopped", stops)):
        for stop in (*interruptions, None):
            model, optimizer, scheduler = killed_run.build(kind)
            options = {"optimizer": optimizer, "scheduler": scheduler, "clip_norm": 0.5, "checkpoint_every": 3}
            options |= {"checkpoint_dir": tmp_path / name, "resume": True, "progress": False}
            try:
                history = fit(model, killed_run.batch, steps=150, callbacks=[stop_at(stop)], **options)
            except Stop:
                continue
        results.append(killed_run.digest(model, optimizer, history))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["adamw", "sgd", "full-then-lora"])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_that_was_not(kind, tmp_path):
    """Each step writes a checkpoint, so most kills hit a write. A life lasts a random number of steps, and a moment
    more; six lives cannot reach the end, on a machine of any speed."""
    model, optimizer, scheduler = killed_run.build(kind)
    options = {"optimizer": optimizer, "scheduler": scheduler, "clip_norm": 0.5, "grad_accumulation": 2}
    expected = killed_run.digest(model, optimizer, fit(model, killed_run.batch, steps=killed_run.STEPS, **options))
    command = [sys.executable, str(Path(killed_run.__file__)), str(tmp_path), kind]
    rng, steps = random.Random(kind), [0]
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(rng.randint(1, 30)):
            assert process.stdout.readline().strip().isdigit()
        time.sleep(rng.uniform(0, 0.005))
        process.kill()
        process.communicate()
        assert process.returncode == -9
        with safe_open(tmp_path / CHECKPOINT, "np") as file:  # whole, whatever was being written
            steps.append(int(file.metadata()["step"]))
    assert steps == sorted(set(steps))
    last = subprocess.run(command, capture_output=True, text=True, check=True)
    assert last.stdout.splitlines()[-1] == expected


def test_a_finished_run_that_is_resumed_does_nothing_more(tmp_path):
    model, again = mlp(), mlp(seed=1)
    history = run(model, batches_of(8), 4, checkpoint_dir=tmp_path)
    before = files_of(tmp_path)
    assert run(again, batches_of(8), 4, checkpoint_dir=tmp_path, resume=True).loss == history.loss
    assert_same(weights(again), weights(model))
    assert files_of(tmp_path) == before


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path):
    model, other = mlp(), mlp()
    run(model, batches_of(8), 3, checkpoint_dir=tmp_path / "new", resume=True)
    run(other, batches_of(8), 3)
    assert_same(weights(model), weights(other))


def test_without_resume_a_checkpoint_is_replaced(tmp_path):
    model, other = mlp(), mlp()
    run(mlp(seed=1), batches_of(8), 5, checkpoint_dir=tmp_path)
    run(model, batches_of(8), 3, checkpoint_dir=tmp_path)
    run(other, batches_of(8), 3)
    assert_same(weights(model), weights(other))


def test_a_generator_that_keeps_its_state_in_an_array_goes_on(tmp_path):
    def build():
        rng = np.random.Generator(np.random.MT19937(0))
        return nn.Sequential(nn.Dropout(0.5, rng=rng), nn.Linear(4, 3, dtype="float64", rng=0))

    whole, stopped = build(), build()
    run(whole, batches_of(8), 6)
    run(build(), batches_of(8), 3, checkpoint_dir=tmp_path)
    run(stopped, batches_of(8), 6, checkpoint_dir=tmp_path, resume=True)
    assert_same(weights(stopped), weights(whole))


def lora(seed=0, base=0, **options):
    return get_peft_model(mlp(base), LoraConfig(**{"r": 2, "init_lora_weights": "both"} | options), seed=seed)


def adam(model):
    return optim.Adam([p for p in model.parameters() if p.requires_grad])


OTHER_RUNS = {
    "another rank": (lambda: lora(r=1), sgd, "parameter .*lora_A.* is"),
    "other targets": (lambda: lora(target_modules=["head"]), sgd, "another run: parameter"),
    "full training": (mlp, sgd, "another run: parameter"),
    "another optimizer": (lora, adam, "optimizer is SGD there and Adam here"),
    "another base": (lambda: lora(base=1), sgd, "frozen weights"),
    "a base that gave up something else": (lambda: lora(seed=1), sgd, "frozen weights"),
    "another generator": (
        lambda: set_rng(lora(), np.random.Generator(np.random.SFC64(0))), sgd, "generator .* is PCG64 there and SFC64",
    ),
}  # fmt: skip


def set_rng(model, rng):
    model.fc1.lora_dropout["default"].rng = rng
    return model


@pytest.mark.parametrize("other", OTHER_RUNS)
def test_the_checkpoint_of_another_run_is_refused_and_nothing_is_touched(other, tmp_path):
    build, optimizer, words = OTHER_RUNS[other]
    model = lora()
    run(model, batches_of(8), 3, optimizer=sgd(model, momentum=0.9), checkpoint_dir=tmp_path)
    model = build()
    before, files = fingerprint(model), files_of(tmp_path)
    with pytest.raises(ValueError, match=words):
        run(model, batches_of(8), 5, optimizer=optimizer(model), checkpoint_dir=tmp_path, resume=True)
    assert fingerprint(model) == before
    assert files_of(tmp_path) == files


def test_another_kernel_gives_a_warning_and_the_run_goes_on(tmp_path, monkeypatch):
    run(mlp(), batches_of(8), 3, checkpoint_dir=tmp_path)
    monkeypatch.setattr(blas, "running_kernel", lambda: "Prescott")
    with pytest.warns(UserWarning, match="going on with .* kernel Prescott, .*: the last bits may differ"):
        history = run(mlp(), batches_of(8), 5, checkpoint_dir=tmp_path, resume=True)
    assert len(history.loss) == 5


def test_fewer_steps_than_the_checkpoint_has_done_are_refused(tmp_path):
    run(mlp(), batches_of(8), 5, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"steps: got 3; the checkpoint .* has done 5 already"):
        run(mlp(), batches_of(8), 3, checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"nonsense" * 9, "truncated", "tensors"])
def test_a_file_that_is_no_checkpoint_is_refused_and_left_alone(content, tmp_path):
    path, model = tmp_path / CHECKPOINT, mlp()
    if content == "truncated":
        run(mlp(), batches_of(8), 2, checkpoint_dir=tmp_path)
        content = path.read_bytes()[:-1]
    if content == "tensors":
        save_file({"x": np.ones(3)}, path)
    else:
        path.write_bytes(content)
    before, files = fingerprint(model), files_of(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        run(model, batches_of(8), 5, checkpoint_dir=tmp_path, resume=True)
    assert fingerprint(model) == before
    assert files_of(tmp_path) == files


# --- the bar ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def terminal(monkeypatch, shown):
    """stderr is a pseudo-terminal inside; afterwards `shown` has what it got, without the control codes."""
    pty = pytest.importorskip("pty")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = pty.openpty()
    received = bytearray()

    def drain():
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while part := os.read(master, 4096):
                received.extend(part)

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield
    reader.join(timeout=5)
    os.close(master)
    shown.append(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received.decode()))


def test_on_a_terminal_a_bar_shows_step_loss_and_speed(monkeypatch):
    shown = []
    with terminal(monkeypatch, shown):
        history = run(mlp(), batches_of(8), 30, progress=None)
    assert "training" in shown[0]
    assert re.search(rf"30/30 loss {history.loss[-1]:.4f}  [\d,]+ samples/s", shown[0])


def test_the_bar_of_a_resumed_run_starts_where_it_goes_on(monkeypatch, tmp_path):
    shown = []
    run(mlp(), batches_of(8), 3, checkpoint_dir=tmp_path)
    with terminal(monkeypatch, shown):
        run(mlp(), batches_of(8), 4, checkpoint_dir=tmp_path, resume=True, progress=None)
    assert "4/4" in shown[0]
    assert "1/4" not in shown[0]


def test_the_bar_is_taken_down_when_the_run_fails(monkeypatch):
    shown = []
    with terminal(monkeypatch, shown), pytest.raises(Stop):
        run(mlp(), batches_of(8), 5, progress=None, callbacks=[stop_at(2)])
    assert "2/5" in shown[0]
    assert shown[0].endswith("\r\n")  # what is printed next begins on a line of its own


def test_without_a_terminal_nothing_is_shown_unless_asked(capsys):
    run(mlp(), batches_of(8), 2, progress=None)
    assert capsys.readouterr() == ("", "")
    run(mlp(), batches_of(8), 2, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_on_a_terminal_the_bar_can_be_turned_off(monkeypatch):
    shown = []
    with terminal(monkeypatch, shown):
        run(mlp(), batches_of(8), 2, progress=False)
    assert shown == [""]


# --- the whole --------------------------------------------------------------------------------------------------------


def test_lora_learns_digits_and_its_adapter_gives_the_accuracy_back(tmp_path):
    task = digits.transfer("rotated")
    base = MLP((64, 32, 10), rng=0)
    upright = digits.batches(*digits.load().part("pretrain"), batch_size=64, seed=0)
    fit(base, upright, steps=100, optimizer=optim.Adam(list(base.parameters()), lr=0.01), progress=False)
    accuracy = lambda m: float((m(Tensor(task.test.x)).data.argmax(axis=1) == task.test.y).mean())  # noqa: E731
    before, plain = accuracy(base), copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8))
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = digits.batches(*task.train, batch_size=64, seed=0)
    fit(model, batches, steps=100, optimizer=optim.AdamW(trained, lr=0.01), progress=False)
    after = accuracy(model)
    assert after > before + 0.2
    model.save_pretrained(tmp_path)
    assert accuracy(PeftModel.from_pretrained(plain, tmp_path)) == after
