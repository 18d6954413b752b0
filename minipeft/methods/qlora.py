"""QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers et al. 2023 (arXiv 2305.14314).

    y = dequant(codes) x + s·B A x        W lies in memory as 4-bit codes, A and B train in full precision    (eq. 5)

The adapter is LoRA's, over a base that `quantize_model`, or `load_model(…, quantization="nf4")`, holds as codes: no
layer and no config of its own. What is here comes before and after: LoftQ's start, the preparation of a coded base, and
three ways to finish, each of which says how far it moves the outputs.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, get_namespace
from ..checks import check_choice, check_count
from ..module import in_mode
from ..nn import Dropout, Linear, Module
from ..quant.blocks import flat_floats
from ..quant.blockwise import QuantizedTensor, dequantize
from ..quant.linear import QuantizedLinear
from ..quant.model import coded, coded_layer, dequantize_model, frozen_in_full_precision
from ..tensor import no_grad
from .base import AdapterLayer, with_own_weight
from .lora import Lora, LoraLinear, check_r, lora_delta, lora_scaling

# --- LoftQ ------------------------------------------------------------------------------------------------------------


def loftq_init(
    W: Array,
    r: int,
    *,
    quant_type: str = "nf4",
    bits: int | None = None,
    iterations: int = 5,
    scaling: float = 1.0,
    blocksize: int = 64,
    double_quant: bool = False,
) -> tuple[QuantizedTensor, Array, Array]:
    """Codes Q and factors A (r, in), B (out, r) with dequant(Q) + s·B A near W (out, in).

        Q_t = quant(W − s·B_{t−1} A_{t−1}),   s·B_t A_t = SVD_r(W − dequant(Q_t)),   B₀ A₀ = 0,   t = 1 … iterations

    Li et al. 2023 (arXiv 2310.08659), algorithm 1, with LoRA's s, which the paper takes as 1 (and PEFT leaves out). The
    second half of a step is the best there is for its Q_t; the first is a rounding, so the error need not fall in every
    step. One step is the codes of W itself and the best B A beside them.

    Args:
        quant_type: a code of `codes.table_of`.
        bits: use the same kind of code with this many bits: 2 makes "nf4" into "nf2".
        double_quant: the block maxima of codes up to 4 bits are coded too, in every step.

    Raises:
        TypeError, ValueError: W is no finite float matrix; r outside 1 … min(out, in); iterations below 1; an unknown
            code or blocksize; a scaling that is not positive.
    """
    if getattr(W, "ndim", None) != 2:
        raise ValueError(f"W: expected a matrix (out, in), got {getattr(W, 'shape', type(W).__name__)}")
    flat_floats("W", W)
    check_r("r", r, *W.shape)
    check_count("iterations", iterations)
    if not 0 < scaling < float("inf"):
        raise ValueError(f"scaling: got {scaling!r}; a positive number is accepted")
    code = quant_type if bits is None else f"{str(quant_type).rstrip('0123456789')}{bits}"
    target, delta = W.astype(np.promote_types(W.dtype, np.float32), copy=False), 0.0
    for _ in range(iterations):
        q = coded(target - delta, code, blocksize, double_quant)
        B, A = _best_factors(target - dequantize(q), r)
        A, B = A * scaling**-0.5, B * scaling**-0.5
        delta = lora_delta(A, B, scaling)
    return q.to(dtype=W.dtype), A, B


def _best_factors(R: Array, r: int) -> tuple[Array, Array]:
    """U√S (m, r) and √S Vᵀ (r, n) of R's first r singular directions.

    From the eigenvectors of the smaller of R Rᵀ and Rᵀ R, in float64: a seventh of the time of a whole SVD (25 ms
    against 180 ms for 576 × 1536). Squaring costs digits of the small singular values only, which are not asked for.
    """
    xp, wide = get_namespace(R), R.astype("float64")
    tall = R.shape[0] > R.shape[1]
    wide = wide.T if tall else wide
    U = _eigenvectors(backend.matmul(wide, wide.T), r)  # (m, r)
    SVt = backend.matmul(U.T, wide)  # (r, n)
    root = xp.maximum((SVt * SVt).sum(axis=1), np.finfo(np.float64).tiny) ** 0.25  # √S; never 0, to divide by it
    left, right = (U * root).astype(R.dtype), (SVt / root[:, None]).astype(R.dtype)
    return (right.T, left.T) if tall else (left, right)


def _eigenvectors(G: Array, r: int) -> Array:
    """Of a symmetric G, those of the r largest eigenvalues, as columns, the largest first."""
    if get_namespace(G) is np:
        from scipy.linalg import eigh  # unlike NumPy's it can leave out those that are not asked for

        return eigh(G, subset_by_index=[len(G) - r, len(G) - 1])[1][:, ::-1]
    return get_namespace(G).linalg.eigh(G)[1][:, : -r - 1 : -1]


@dataclass(frozen=True)
class LoftQConfig:
    """LoftQ's choices under PEFT's names, for `LoraConfig(init_lora_weights="loftq", loftq_config=…)`.

    Args:
        loftq_bits: of the normal-float code, 2 to 8 (PEFT: 4 or 8).
        loftq_iter: alternations; the paper has 5.

    Raises:
        ValueError: outside these.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (("loftq_bits", 2, 8), ("loftq_iter", 1, None)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low or value > (high or value):
                accepted = f"{low} to {high}" if high else f"an int of at least {low}"
                raise ValueError(f"{name}: got {value!r}; {accepted} is accepted")


def loftq_config(given: Any) -> dict[str, int]:
    """A `LoftQConfig`, PEFT's dictionary of one, or None for its defaults, as a checked dictionary.

    Raises:
        ValueError: anything else.
    """
    try:
        return asdict(given if isinstance(given, LoftQConfig) else LoftQConfig(**(given or {})))
    except TypeError as error:
        raise ValueError(
            f"loftq_config: got {given!r}; LoftQConfig(loftq_bits, loftq_iter), or a dictionary of the two, is accepted"
        ) from error


class LoftQ(Lora):
    """LoRA over layers that it quantizes itself: W becomes codes Q, and A and B start as what Q lacks.

    The base is the quantized one from then on: unloading the adapter leaves Q, and the adapter belongs to this Q. A
    saved adapter is loaded into the unquantized model, where the same steps give the same Q, or into the model with Q,
    saved by `save_model`.
    """

    def check(self, name: str, linear: Module) -> None:
        """Raise ValueError where the weight is not whole any more, or not this adapter's alone."""
        super().check(name, linear)
        if isinstance(getattr(linear, "base_layer", linear), QuantizedLinear):
            raise ValueError(
                f"init_lora_weights: 'loftq' quantizes the weight itself, and {name!r} holds codes already; the "
                "unquantized model is accepted"
            )
        if isinstance(linear, AdapterLayer):
            raise ValueError(
                f"init_lora_weights: 'loftq' changes the weight of {name!r} under its adapters {linear.adapters}; a "
                "model without adapters is accepted"
            )

    def wrap(self, name: str, linear: Module) -> LoraLinear:
        """The layer's weight as codes, with the adapter beside it."""
        config, W = self.config, linear.weight.data
        r, chosen = config.rank_of(name), loftq_config(config.loftq_config)
        scaling = lora_scaling(config.alpha_of(name), r, config.use_rslora)
        q, A, B = loftq_init(
            W, r, bits=chosen["loftq_bits"], iterations=chosen["loftq_iter"], scaling=scaling, double_quant=True
        )
        layer = LoraLinear(coded_layer(q, linear.bias))
        dropout = Dropout(config.lora_dropout, rng=int(self.rng.integers(2**62)))
        layer.add(self.adapter, A, B, scaling, dropout, offset=False)
        return layer


# --- before training --------------------------------------------------------------------------------------------------


def prepare_model_for_kbit_training(model: Module, use_gradient_checkpointing: bool = False) -> Module:
    """PEFT's preparation of a quantized base: everything is frozen; norms, output head, embeddings, biases and what the
    codes dequantize to become float32 where they are half precision. The model is changed and returned.

    `quantize_model` and `load_model(…, quantization=…)` do as much themselves. Numbers of 32 bits and more stay.

    Args:
        use_gradient_checkpointing: blocks that can (a Llama's) keep only their input for backward. PEFT's default is
            True; it costs a second forward pass and changes no number.

    Raises:
        TypeError: the model has adapters, which would be frozen: prepare first, then `get_peft_model`.
    """
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise TypeError("model: it has adapters, which would be frozen; prepare the base, then get_peft_model")
    for module in model.modules():
        if use_gradient_checkpointing and hasattr(module, "checkpointing"):
            module.checkpointing = True
    return frozen_in_full_precision(model)


# --- after training ---------------------------------------------------------------------------------------------------

WAYS = ("keep", "merge", "requantize")


@dataclass(frozen=True)
class FinishReport:
    """What finishing cost, against the model with its adapters apart.

    Attributes:
        how: the way that was taken.
        max_error: max |y − y₀| ÷ max |y₀| over all outputs on the given inputs.
        rms_error: √mean((y − y₀)²) ÷ √mean(y₀²).
        bytes_before, bytes_after: of parameters and codes.
    """

    how: str
    max_error: float
    rms_error: float
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{self.how}: outputs off by {self.rms_error:.1e} (rms) and {self.max_error:.1e} (max) of the unmerged "
            f"model's; {self.bytes_before / 1e6:,.2f} MB before, {self.bytes_after / 1e6:,.2f} MB after"
        )


def finish_qlora(peft_model: Module, how: str = "keep", *, inputs: Any) -> tuple[Module, FinishReport]:
    """Finish QLoRA training in one of three ways, and measure what it does to the outputs.

    | how            | the model                                  | bytes a weight | error                         |
    |----------------|--------------------------------------------|----------------|-------------------------------|
    | `"keep"`       | the PeftModel: codes, with B A beside them | ½, and B A     | none                          |
    | `"merge"`      | plain Linears, dequant(codes) + s·B A      | 4              | rounding                      |
    | `"requantize"` | new codes, quant(dequant(codes) + s·B A)   | ½              | a part of B A is rounded away |

    The new codes are of the kind that the layer had. In both merges the active adapters go into the weights and the
    PeftModel is used up; all is computed before anything is changed.

    Args:
        peft_model: from `get_peft_model` on a base that holds codes.
        inputs: one batch that the model takes (a tuple: its arguments), on which the outputs are compared.

    Raises:
        TypeError: not a PeftModel.
        ValueError: an unknown way; no adapters beside codes, as after merging once; adapters that are merged; a merged
            weight that is not finite.
    """
    check_choice("how", how, WAYS)
    if not hasattr(peft_model, "adapter_layers"):
        raise TypeError(f"peft_model: got {type(peft_model).__name__}; a PeftModel is accepted")
    if peft_model.merged_adapters:
        raise ValueError(f"peft_model: {peft_model.merged_adapters} are merged; call unmerge_adapter() first")
    layers = {n: m for n, m in peft_model.adapter_layers() if isinstance(m.base_layer, QuantizedLinear)}
    if not layers:
        raise ValueError(
            "peft_model: it has no adapters beside weights that are codes (any more); finish a model once, and one "
            "whose weights are not codes with merge_and_unload()"
        )
    expected, bytes_before = _outputs(peft_model, inputs), _nbytes(peft_model)
    model = peft_model if how == "keep" else _merged(peft_model, layers, requantize=how == "requantize")
    y = _outputs(model, inputs)
    xp, off = get_namespace(y), abs(y.astype("float64") - expected)
    size = float(abs(expected).max()), float(xp.sqrt((expected.astype("float64") ** 2).mean()))
    errors = float(off.max()), float(xp.sqrt((off**2).mean()))
    relative = [error / of if of else error for error, of in zip(errors, size, strict=True)]
    return model, FinishReport(how, *relative, bytes_before, _nbytes(model))


def _outputs(model: Module, inputs: Any) -> Array:
    """The model's outputs in eval mode; its modes are left as they were."""
    with no_grad(), in_mode(model, training=False):
        return model(*(inputs if isinstance(inputs, tuple) else (inputs,))).data


def _nbytes(model: Module) -> int:
    coded_bytes = sum(m.quantized.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
    return sum(p.data.nbytes for p in model.parameters()) + coded_bytes


def _merged(peft_model: Module, layers: dict[str, AdapterLayer], requantize: bool) -> Module:
    """The base with the active adapters inside, as codes again or in full precision."""
    names = list(peft_model.active_adapters)
    adapted = {n: m for n, m in peft_model.adapter_layers() if n in layers or set(names) & set(m.adapters)}
    bases = {name: _merged_base(name, layer, names, requantize) for name, layer in adapted.items()}
    for name, layer in adapted.items():
        layer.base_layer, layer.merged = bases[name], [n for n in names if n in layer.adapters]
    model = peft_model.merge_and_unload()
    return model if requantize else dequantize_model(model)


def _merged_base(name: str, layer: AdapterLayer, names: list[str], requantize: bool) -> Linear:
    """The layer's new base; the layer itself stays as it is, and so does what shares its weight, as embeddings do."""
    old, trial = layer.base_layer, copy.copy(layer)
    is_coded = isinstance(old, QuantizedLinear)
    trial.merged = []
    if is_coded:
        trial.base_layer = old.to_linear()
    elif not layer.unmergeable:
        trial.base_layer = with_own_weight(old, layer.weight.data)
    trial.merge(names)
    if not get_namespace(trial.weight.data).isfinite(trial.weight.data).all():
        raise ValueError(
            f"peft_model: {name} with its adapters {names} merged is not finite; finite weights are accepted"
        )
    if not (requantize and is_coded):
        return trial.base_layer
    q = old.quantized
    code = coded(trial.weight.data, q.quant_type, q.blocksize, q.nested)
    return coded_layer(code.to(dtype=q.dtype), old.bias)
