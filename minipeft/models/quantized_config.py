"""What config.json says of weights that are codes: transformers' `quantization_config`, written and read."""

from __future__ import annotations

from typing import Any

from .. import nn
from ..quant.linear import QuantizedLinear
from ..targets import output_heads

BITSANDBYTES = ("nf4", "fp4")  # the codes that bitsandbytes has as well


def quantization_config(model: nn.Module) -> dict[str, Any] | None:
    """The entry for a model with codes; None where it has none.

    All in NF4, or all in FP4, is what transformers reads through bitsandbytes. Other codes are marked "minipeft", which
    `load_model` reads and transformers refuses.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    if not layers:
        return None
    codes = sorted({layer.quantized.quant_type for layer in layers})
    if len(codes) > 1 or codes[0] not in BITSANDBYTES:
        return {"quant_method": "minipeft", "codes": codes}
    heads = output_heads(model)
    plain = [name for name, m in model.named_modules() if type(m) is nn.Linear and name not in heads]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": codes[0],
        "bnb_4bit_use_double_quant": all(layer.quantized.nested for layer in layers),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": layers[0].quantized.dtype.name,
        # By itself transformers leaves the output head alone; a list of others must name the head too.
        "llm_int8_skip_modules": sorted({*plain, *heads}) if plain else None,
    }


def stored_codes(config: Any) -> list[str]:
    """The codes that such an entry announces.

    Raises:
        ValueError: weights quantized in a way that is not read here.
    """
    config = config if isinstance(config, dict) else {"quant_method": config}
    method = config.get("quant_method")
    if method == "bitsandbytes" and config.get("load_in_4bit") and not config.get("load_in_8bit"):
        return [config.get("bnb_4bit_quant_type", "fp4")]
    if method == "minipeft" and isinstance(codes := config.get("codes"), list) and codes:
        return codes
    what = "bitsandbytes in 8 bits" if method == "bitsandbytes" else repr(method)
    raise ValueError(
        f"quantization_config: the weights are quantized by {what}; bitsandbytes in 4 bits is accepted. "
        "Take the model's unquantized version, and load_model(…, quantization='nf4')"
    )
