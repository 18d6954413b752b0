"""The claims of the document's QLoRA section about training: what 4 bits change in what is learned."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .. import data, optim
from ..methods.lora import LoraConfig
from ..models import load_base
from ..models.pretrain import accuracy
from ..nn import Module
from ..peft import get_peft_model
from ..quant import QuantizedLinear, QuantizedTensor, quantize_model
from ..recipes import METHODS
from ..train import fit
from .runs import BATCH

STEPS = 200


@dataclass(frozen=True)
class QloraRun:
    """The MLP adapted to the shifted digits on codes, or on full weights.

    Attributes:
        model: as trained.
        codes: the bytes of all codes and scales by layer, before training.
        losses: of the steps.
        accuracy: on the shifted test set.
    """

    model: Module
    codes: dict[str, bytes]
    losses: list[float]
    accuracy: float


@functools.cache
def train(quant: str | None = "nf4", r: int = 8, seed: int = 0, steps: int = STEPS) -> QloraRun:
    """LoRA on the MLP whose weights are held in `quant` (None: in full precision), as `runs.adapt` trains it."""
    task, model = data.digits.transfer(), load_base("mlp")
    if quant is not None:
        quantize_model(model, quant)
    codes = {name: coded_bytes(layer.quantized) for name, layer in coded_layers(model).items()}
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r), seed=seed)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=METHODS["lora"].lr)
    batches = data.digits.batches(*task.train, batch_size=BATCH, seed=seed)
    history = fit(model, batches, steps=steps, optimizer=optimizer, progress=False)
    return QloraRun(model, codes, history.loss, accuracy(model.eval(), *task.test))


def coded_layers(model: Module) -> dict[str, QuantizedLinear]:
    """The layers that hold codes, under the names that they have without adapters."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def coded_bytes(q: QuantizedTensor) -> bytes:
    """All bytes that the codes consist of."""
    return b"".join(x.tobytes() for x in (q.codes, q.absmax, q.nested_absmax, q.offset) if x is not None)
