"""One small model in minipeft and in PyTorch, with the same names, and what PEFT is asked about it.

`reference(directory)` made tests/references/lora: `python tests/twins.py`, where PyTorch and PEFT are installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from minipeft import Tensor, nn, ops

REFERENCE = Path(__file__).parent / "references" / "lora"
FLOAT64 = np.dtype("float64")


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


# --- what PEFT gives, kept for runs without it ------------------------------------------------------------------------

CONFIG = {  # everything that changes what a file means at once
    "r": 2,
    "lora_alpha": 5,
    "use_rslora": True,
    "target_modules": ["fc", "q_proj", "v_proj"],
    "rank_pattern": {"v_proj": 3},
    "alpha_pattern": {r"layers\.1\..*": 7},
    "modules_to_save": ["head"],
    "bias": "lora_only",
}
STEPS, LR = 30, 0.02


def torch_loss_curve(model: Any, dtype: Any) -> list[float]:
    """The losses of STEPS steps of AdamW on one batch; what requires a gradient in `model` is trained."""
    import torch

    x, y = (torch.from_numpy(a) for a in batch(dtype))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def reference(directory: Path) -> None:
    """Let PEFT adapt the model, train it, save it; keep its start, its losses, its outputs, and its other inits."""
    import peft
    import torch

    torch.manual_seed(0)
    kept: dict[str, np.ndarray] = {}
    for dtype in ("float32", "float64"):
        base = Net(dtype).state_dict()
        kept |= {f"base.{name}": a for name, a in base.items() if dtype == "float64"}
        model = peft.get_peft_model(torch_net(base), peft.LoraConfig(**CONFIG))
        start = peft.get_peft_model_state_dict(model)
        if dtype == "float64":  # both runs start from the same numbers, the float32 run's
            peft.set_peft_model_state_dict(model, {n: torch.from_numpy(kept[f"start.{n}"]).double() for n in start})
        else:
            kept |= {f"start.{name}": t.numpy().copy() for name, t in start.items()}
        kept[f"losses.{dtype}"] = np.array(torch_loss_curve(model, dtype))
        kept[f"outputs.{dtype}"] = model.eval()(torch.from_numpy(batch(dtype)[0])).detach().numpy()
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    for init in ("pissa", "olora"):
        config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["fc", "v_proj"], init_lora_weights=init)
        state = peft.get_peft_model(torch_net(Net("float32").state_dict()), config).state_dict()
        kept |= {f"{init}.{n}": t.numpy() for n, t in state.items() if ".fc." in n or ".layers.0.v_proj." in n}
    np.savez_compressed(directory / "values.npz", **kept)
    versions = {"torch": torch.__version__.partition("+")[0], "peft": peft.__version__}
    (directory / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    reference(REFERENCE)
