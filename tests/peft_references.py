"""What PEFT gave for the twins, kept in tests/references for runs without it: lora, dora and lora_ga.npz.

`python tests/peft_references.py` made them. It needs PyTorch and PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from twins import Net, gradients, loss_curve, outputs, peft_state, torch_net

REFERENCES = Path(__file__).parent / "references"
REFERENCE, DORA_REFERENCE, LORA_GA_REFERENCE = (REFERENCES / name for name in ("lora", "dora", "lora_ga.npz"))

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


def kept_in(directory: Path) -> dict[str, np.ndarray]:
    """The numbers that are kept there, by name."""
    with np.load(directory / "values.npz", allow_pickle=False) as values:
        return dict(values)


def part(kept: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Those whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): a for name, a in kept.items() if name.startswith(prefix)}


def base_of(kept: Mapping[str, np.ndarray], dtype: Any) -> Net:
    """The model that PEFT adapted."""
    model = Net(dtype, seed=9)
    model.load_state_dict(part(kept, "base."))
    return model


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
    _write(directory, kept | {f"gradient.{name}": g for name, g in gradients(model).items()})


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
        start = peft_state(model)
        if dtype == "float64":  # both runs start from the same numbers, the float32 run's
            peft.set_peft_model_state_dict(model, {n: torch.from_numpy(kept[f"start.{n}"]).double() for n in start})
        else:
            kept |= {f"start.{name}": a for name, a in start.items()}
        kept[f"losses.{dtype}"] = np.array(loss_curve(model))
        kept[f"outputs.{dtype}"] = outputs(model.eval())
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    return kept, model


def _write(directory: Path, kept: dict[str, np.ndarray]) -> None:
    import peft
    import torch

    np.savez_compressed(directory / "values.npz", **kept)
    versions = {"torch": torch.__version__.partition("+")[0], "peft": peft.__version__}
    (directory / "versions.json").write_text(json.dumps(versions) + "\n")


LORA_GA = {"r": 2, "scaling": 1.5, "gamma": 4}


def lora_ga_problem() -> tuple[np.ndarray, np.ndarray]:
    """A gradient (10, 8) with singular values well apart, and a weight, in float32."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((n, 8)))[0] for n in (10, 8))
    G = U @ np.diag(2.0 ** -np.arange(8)) @ V.T
    return G.astype("float32"), (3 * np.outer(U[:, 1], V[:, 0]) + G).astype("float32")


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
