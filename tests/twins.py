"""One small model in minipeft and in PyTorch, with the same names, and the questions that both are asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minipeft import Tensor, fit, nn, ops, optim

FLOAT64 = np.dtype("float64")
STEPS, LR = 30, 0.02


class Block(nn.Module):
    """Two projections and a norm."""

    def __init__(self, rng: np.random.Generator, dtype: Any) -> None:
        self.q_proj, self.v_proj = (nn.Linear(6, 6, dtype=dtype, rng=rng) for _ in range(2))
        self.norm = nn.LayerNorm(6, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v_proj(ops.tanh(self.q_proj(self.norm(x))))


class Net(nn.Module):
    """Layers in a list, norms with a bias, a Linear without one, an output head."""

    output_head = "head"

    def __init__(self, dtype: Any = "float64", seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.fc = nn.Linear(5, 6, bias=False, dtype=dtype, rng=rng)
        self.layers = [Block(rng, dtype) for _ in range(2)]
        self.head = nn.Linear(6, 3, dtype=dtype, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


LINEARS = ["fc", "layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]  # but the head


def torch_net(weights: dict[str, np.ndarray]) -> Any:
    """`Net` in PyTorch, with these weights."""
    import torch

    class TorchBlock(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
            self.norm = torch.nn.LayerNorm(6)

        def forward(self, x: Any) -> Any:
            return x + self.v_proj(torch.tanh(self.q_proj(self.norm(x))))

    class TorchNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(5, 6, bias=False)
            self.layers = torch.nn.ModuleList([TorchBlock(), TorchBlock()])
            self.head = torch.nn.Linear(6, 3)

        def forward(self, x: Any) -> Any:
            x = self.fc(x)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    model = TorchNet().to(torch.from_numpy(weights["fc.weight"]).dtype)
    model.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in weights.items()})
    return model


def batch(dtype: Any = FLOAT64, n: int = 16, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (n, 5) and classes (n,)."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 5)).astype(dtype), rng.integers(0, 3, n)


def base(dtype: Any = "float64") -> tuple[Net, Any]:
    """`Net` and its twin, with the same weights."""
    model = Net(dtype)
    return model, torch_net(model.state_dict())


# --- of a model of either library -------------------------------------------------------------------------------------


def outputs(model: Any) -> np.ndarray:
    """Of `batch`, in the model's dtype."""
    return _array(model(_batch_for(model)[0]))


def randomize(model: Any, seed: int = 3) -> Any:
    """Move everything that trains away from its start, by the same numbers in both libraries."""
    rng = np.random.default_rng(seed)
    for _, p in sorted(model.named_parameters(), key=lambda item: item[0]):
        if p.requires_grad:
            change = 0.3 * rng.standard_normal(tuple(p.shape))
            p.data = p.data + (change.astype(p.dtype) if isinstance(p, Tensor) else p.data.new_tensor(change))
    return model


def values(model: Any) -> dict[str, np.ndarray]:
    """Every parameter."""
    return {name: _array(p) for name, p in model.named_parameters()}


def kinds(model: Any) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Every parameter's shape, and whether it trains."""
    return {n: (tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()}


def gradients(model: Any) -> dict[str, np.ndarray]:
    """Of the cross entropy of `batch`, for every parameter that gets one."""
    model.zero_grad()
    _loss(model).backward()
    return {name: np.asarray(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def loss_curve(model: Any) -> list[float]:
    """The losses of STEPS steps of AdamW on `batch`; what requires a gradient is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if isinstance(model, nn.Module):
        optimizer = optim.AdamW(trained, lr=LR)
        return fit(model, [_batch_for(model)], steps=STEPS, optimizer=optimizer, progress=False).loss
    import torch

    losses, optimizer = [], torch.optim.AdamW(trained, lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _batch_for(model: Any) -> tuple[Any, Any]:
    x, y = batch(str(next(model.parameters()).dtype).removeprefix("torch."))
    if isinstance(model, nn.Module):
        return Tensor(x), y
    import torch

    return torch.from_numpy(x), torch.from_numpy(y)


def _loss(model: Any) -> Any:
    x, y = _batch_for(model)
    if isinstance(model, nn.Module):
        return ops.cross_entropy(model(x), y)
    import torch

    return torch.nn.functional.cross_entropy(model(x), y)


def _array(tensor: Any) -> np.ndarray:
    return tensor.data if isinstance(tensor, Tensor) else tensor.detach().numpy()


# --- beside PEFT ------------------------------------------------------------------------------------------------------


def peft_state(model: Any) -> dict[str, np.ndarray]:
    """What PEFT would save of its model's adapter."""
    import peft

    return {name: tensor.numpy().copy() for name, tensor in peft.get_peft_model_state_dict(model).items()}


def start_from(model: Any, state: Mapping[str, np.ndarray]) -> None:
    """Give minipeft's adapter the values that PEFT's has."""
    for name, p in model.adapter_state().items():
        nn.assign(p, state[name])


def assert_all_close(found: Mapping[str, Any], expected: Mapping[str, Any], rtol: float = 0, atol: float = 0) -> None:
    """The same names, and under each the same numbers to these tolerances."""
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=rtol, atol=atol, err_msg=name)
