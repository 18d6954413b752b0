"""checkpoint: the same values and gradients, fewer bytes between forward and backward, one more forward pass."""

from __future__ import annotations

import numpy as np
import pytest

from minipeft import Tensor, checkpoint, gradcheck, nn, no_grad, ops
from minipeft.measure import count_flops, memory_report


def block(seed: int, p: float = 0.0) -> nn.Sequential:
    rng = np.random.default_rng(seed)
    layers = nn.Linear(8, 32, dtype="float64", rng=rng), nn.ReLU(), nn.Dropout(p, rng=seed)
    return nn.Sequential(*layers, nn.Linear(32, 8, dtype="float64", rng=rng))


class Net(nn.Module):
    """Blocks one after the other, each checkpointed or not."""

    def __init__(self, saves: bool, p: float = 0.0) -> None:
        self.blocks, self.saves = [block(i, p) for i in range(4)], saves

    def forward(self, x: Tensor) -> Tensor:
        for part in self.blocks:
            x = checkpoint(part, x) if self.saves else part(x)
        return x


X = np.random.default_rng(9).standard_normal((16, 8))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("input_trains", [False, True])
def test_values_and_gradients_are_those_without_it(p, input_trains):
    plain, saving = Net(False, p), Net(True, p)
    inputs = [Tensor(X, requires_grad=input_trains) for _ in range(2)]
    losses = [(net(x) ** 2).sum() for net, x in zip((plain, saving), inputs, strict=True)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        np.testing.assert_array_equal(a.grad, b.grad, err_msg=name)
    if input_trains:
        np.testing.assert_array_equal(inputs[0].grad, inputs[1].grad)


def test_only_the_inputs_of_the_blocks_are_kept():
    kept = {}
    for saves in (False, True):
        net = Net(saves)
        loss = net(Tensor(X)).sum()
        kept[saves] = memory_report(net).activations
        loss.backward()
    assert kept[True] == 4 * X.nbytes
    assert kept[True] < kept[False] / 4


def test_it_costs_one_more_forward_pass():
    counted = {}
    for saves in (False, True):
        with count_flops() as counted[saves]:
            Net(saves)(Tensor(X)).sum().backward()
    assert counted[True].forward == counted[False].forward
    assert counted[True].backward == counted[False].backward + counted[False].forward


def test_the_random_numbers_after_it_are_those_without_it():
    plain, saving = Net(False, 0.4), Net(True, 0.4)
    for net in (plain, saving):
        net(Tensor(X)).sum().backward()
    np.testing.assert_array_equal(plain(Tensor(X)).data, saving(Tensor(X)).data)


def test_functions_of_several_tensors_and_other_arguments():
    a, b = (Tensor(np.random.default_rng(i).standard_normal((3, 4)), requires_grad=True) for i in range(2))
    assert gradcheck(lambda a, b: checkpoint(lambda a, k, b: ops.tanh(a * k) * b, a, 2.0, b), [a, b])


def test_without_anything_to_train_there_is_no_graph():
    frozen = block(0).requires_grad_(False)
    assert not checkpoint(frozen, Tensor(X)).requires_grad
    with no_grad():
        assert not checkpoint(block(0), Tensor(X)).requires_grad


def test_an_input_changed_before_backward_is_caught():
    x = Tensor(X.copy(), requires_grad=True)
    loss = checkpoint(block(0), x).sum()
    with pytest.raises(ValueError, match="read-only"):
        x.data[0] = 0
    loss.backward()


def test_a_function_that_gives_no_tensor_is_refused():
    with pytest.raises(TypeError, match="expected it to return a tensor, got float"):
        checkpoint(lambda x: 1.0, Tensor(X))
