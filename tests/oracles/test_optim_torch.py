"""Optimizers, clipping and schedules against PyTorch and transformers, step for step."""

from __future__ import annotations

import sys
from pathlib import Path

import cases
import numpy as np
import pytest
from cases import OPTIMIZERS

from minipeft import Tensor, optim

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "references"))

import make  # noqa: E402 - it stands beside the files it writes


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 5e-6)])
def test_every_one_of_fifty_steps(name, dtype, tolerance):
    """Groups with rates of their own, rates that change, parameters without a gradient at some of the steps."""
    for step, (found, expected) in enumerate(
        zip(cases.trajectory(name, dtype), make.torch_trajectory(name, dtype), strict=True), start=1
    ):
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype == dtype
            # the numbers are about 1 and each step rounds once or twice
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f"step {step}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_reference_file_has_what_pytorch_gives(name):
    found = cases.kept(make.torch_trajectory(name))
    np.testing.assert_allclose(cases.references("optim")[name], found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_longer_than_a_unit(name):
    kind, options = OPTIMIZERS[name]
    values = np.random.default_rng(0).standard_normal((3, optim.UNIT // 2 + 5))
    ours, theirs = Tensor(values.copy(), requires_grad=True), torch.tensor(values, requires_grad=True)
    small, small_theirs = Tensor(np.ones(3), requires_grad=True), torch.ones(3, dtype=torch.float64, requires_grad=True)
    pair = getattr(optim, kind)([small, ours], **options), getattr(torch.optim, kind)([small_theirs, theirs], **options)
    for t in range(4):
        g = np.random.default_rng([1, t]).standard_normal(values.shape)
        ours.grad, theirs.grad = g, torch.from_numpy(g)
        small.grad, small_theirs.grad = g[0, :3].copy(), torch.from_numpy(g[0, :3])
        for optimizer in pair:
            optimizer.step()
    np.testing.assert_allclose(ours.data, theirs.detach().numpy(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(small.data, small_theirs.detach().numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("float32", 1e-6)])
def test_clipping(max_norm, dtype, tolerance):
    ours = [Tensor(np.zeros(shape, dtype), requires_grad=True) for shape in cases.SHAPES]
    theirs = [torch.tensor(p.data, requires_grad=True) for p in ours]
    for i, (p, q) in enumerate(zip(ours[:-1], theirs, strict=False)):  # the last one has no gradient
        p.grad = cases.numbers(p.shape, i).astype(dtype)
        q.grad = torch.tensor(p.grad)
    norm = optim.clip_grad_norm_(ours, max_norm)
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), rel=tolerance)
    for p, q in zip(ours[:-1], theirs, strict=False):
        np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=tolerance)


def rates(library, make_schedule, steps):
    """The rates of two groups before each of the steps."""
    parameter = (lambda: torch.zeros(1, requires_grad=True)) if library is torch.optim else (lambda: Tensor([0.0]))
    optimizer = library.SGD([{"params": [parameter()], "lr": 0.1}, {"params": [parameter()], "lr": 0.4}])
    schedule, found = make_schedule(optimizer), []
    for _ in range(steps):
        found.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    return np.array(found)


@pytest.mark.parametrize(("length", "eta_min"), [(1, 0.0), (10, 0.0), (13, 0.02)])
def test_cosine_annealing_beyond_its_end_too(length, eta_min):
    found = rates(optim, lambda o: optim.CosineAnnealingLR(o, length, eta_min), 3 * length)
    expected = rates(torch.optim, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, length, eta_min), 3 * length)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-15)  # theirs multiplies rate by rate


def test_lambda():
    found = rates(optim, lambda o: optim.LambdaLR(o, lambda t: 0.9**t), 20)
    expected = rates(torch.optim, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t), 20)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["get_linear_schedule_with_warmup", "get_cosine_schedule_with_warmup"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 20), (5, 5), (7, 4)])
def test_warm_up(name, warmup, total):
    """Up to the last step: beyond it transformers' cosine rises again, here the rate stays 0."""
    transformers = pytest.importorskip("transformers")
    found = rates(optim, lambda o: getattr(optim, name)(o, warmup, total), total)
    expected = rates(torch.optim, lambda o: getattr(transformers, name)(o, warmup, total), total)
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-16)
