"""One small model in minipeft and in PyTorch, with the same names, and what PEFT is asked about it.

`python tests/twins.py` made what tests/references keeps of PEFT: lora, dora and lora_ga.npz. It needs PyTorch and PEFT.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from minipeft import Tensor, nn, ops

REFERENCES = Path(__file__).parent / "references"
REFERENCE, DORA_REFERENCE, LORA_GA_REFERENCE = (REFERENCES / name for name in ("lora", "dora", "lora_ga.npz"))
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
DORA_CONFIG = CONFIG | {"use_dora": True}
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
    """LoRA, and its starts from W."""
    import peft

    kept, _ = _trained_by_peft(directory, CONFIG)
    for init in ("pissa", "olora"):
        config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["fc", "v_proj"], init_lora_weights=init)
        state = peft.get_peft_model(torch_net(Net("float32").state_dict()), config).state_dict()
        kept |= {f"{init}.{n}": t.numpy() for n, t in state.items() if ".fc." in n or ".layers.0.v_proj." in n}
    _write(directory, kept)


def dora_reference(directory: Path) -> None:
    """DoRA, with the same options, and its gradients after training."""
    kept, model = _trained_by_peft(directory, DORA_CONFIG)
    _write(directory, kept | {f"gradient.{name}": g for name, g in _gradients(model).items()})


def _trained_by_peft(directory: Path, options: dict[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
    """Let PEFT adapt the model, train it, save it; its start, losses and outputs, and the model."""
    import peft
    import torch

    torch.manual_seed(0)
    kept: dict[str, np.ndarray] = {}
    for dtype in ("float32", "float64"):
        base = Net(dtype).state_dict()
        kept |= {f"base.{name}": a for name, a in base.items() if dtype == "float64"}
        model = peft.get_peft_model(torch_net(base), peft.LoraConfig(**options))
        start = peft.get_peft_model_state_dict(model)
        if dtype == "float64":  # both runs start from the same numbers, the float32 run's
            peft.set_peft_model_state_dict(model, {n: torch.from_numpy(kept[f"start.{n}"]).double() for n in start})
        else:
            kept |= {f"start.{name}": t.numpy().copy() for name, t in start.items()}
        kept[f"losses.{dtype}"] = np.array(torch_loss_curve(model, dtype))
        kept[f"outputs.{dtype}"] = model.eval()(torch.from_numpy(batch(dtype)[0])).detach().numpy()
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    return kept, model


def _gradients(model: Any) -> dict[str, np.ndarray]:
    """Of everything that trains, by the names in the model."""
    import torch

    x, y = (torch.from_numpy(a) for a in batch("float64"))
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}


def _write(directory: Path, kept: dict[str, np.ndarray]) -> None:
    import peft
    import torch

    np.savez_compressed(directory / "values.npz", **kept)
    versions = {"torch": torch.__version__.partition("+")[0], "peft": peft.__version__}
    (directory / "versions.json").write_text(json.dumps(versions) + "\n")


LORA_GA = {"r": 2, "scaling": 1.5, "gamma": 4}


def lora_ga_problem() -> tuple[np.ndarray, np.ndarray]:
    """A gradient (10, 8) with singular values well apart, and a weight; by formula, in float32."""
    i, j = np.arange(10)[:, None], np.arange(8)
    U, V = (np.linalg.qr(np.sin(1.3 * k + 0.7 * k**2 / 5 + 0.3 * n))[0] for k, n in ((i, i.T), (j[:, None], j)))
    G = (U[:, :8] * 2.0 ** -np.arange(8)) @ V.T
    return G.astype("float32"), (3 * np.outer(V[:, 1].repeat(2)[:10], V[0]) + G).astype("float32")


def lora_ga_reference(path: Path) -> None:
    """PEFT's LoRA-GA starts, for every direction that is not random and every scale."""
    import peft
    import torch

    (G, W), kept = lora_ga_problem(), {}
    for direction in ("ArBr", "A2rBr", "ArB2r"):
        for scale in ("stable", "weight_svd", "gd_scale", "unit"):
            linear = torch.nn.Linear(8, 10, bias=False)
            linear.weight.data, linear._peft_loraga_grad = torch.from_numpy(W.copy()), torch.from_numpy(G)
            chosen = peft.LoraGAConfig(direction=direction, scale=scale, stable_gamma=LORA_GA["gamma"])
            config = peft.LoraConfig(
                r=LORA_GA["r"], lora_alpha=LORA_GA["r"] * LORA_GA["scaling"], target_modules=["fc"],
                init_lora_weights="lora_ga", lora_ga_config=chosen,
            )  # fmt: skip
            torch.manual_seed(0)
            layer = peft.get_peft_model(torch.nn.ModuleDict({"fc": linear}), config).base_model.model["fc"]
            for name, factors in (("A", layer.lora_A), ("B", layer.lora_B)):
                kept[f"{direction}.{scale}.{name}"] = factors["default"].weight.detach().numpy()
    np.savez_compressed(path, **kept)


if __name__ == "__main__":
    reference(REFERENCE)
    dora_reference(DORA_REFERENCE)
    lora_ga_reference(LORA_GA_REFERENCE)
