"""The claims of the document's QLoRA section about what comes after training: adapters, merging, inference."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np

from .. import data, nn, ops
from ..adapter_files import read_adapter
from ..methods.qlora import FinishReport, finish_qlora
from ..models import load_base
from ..models.pretrain import accuracy
from ..nn import Module
from ..peft import PeftModel
from ..quant import Linear4bit, quantize_model
from ..quant.blockwise import block_maxima
from ..quant.codes import unpack
from ..quant.nf4 import dequantize, double_quantize, quantize_nf4
from ..tensor import no_grad
from . import Evidence, claim
from .qlora_steps import dequantizations
from .qlora_training import coded_layers, train


@claim("qlora.same-adapter", "The adapters of LoRA and QLoRA have the same structure.")
def same_adapter() -> Evidence:
    """Files of both: names, shapes, dtypes, config; each loaded into the other's base."""
    runs = {"lora": train(None), "qlora": train("nf4")}
    test, stored, exchanged, sizes = data.digits.transfer().test, {}, {}, {}
    with tempfile.TemporaryDirectory() as directory:
        for kind, run in runs.items():
            path = Path(directory) / kind
            run.model.save_pretrained(path)
            stored[kind] = read_adapter(path)
            sizes[kind] = {file.name: file.stat().st_size for file in path.iterdir()}
        for base, adapter in (("lora", "qlora"), ("qlora", "lora")):
            model = load_base("mlp")
            model = PeftModel.from_pretrained(
                quantize_model(model) if base == "qlora" else model, f"{directory}/{adapter}"
            )
            unchanged = all(_equal(p.data, stored[adapter][1][name]) for name, p in model.adapter_state().items())
            exchanged[f"{adapter} into {base}"] = {"kept": unchanged, "accuracy": accuracy(model.eval(), *test)}
    (config_a, a), (config_b, b) = stored["lora"], stored["qlora"]
    shapes = {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    same = shapes and config_a.to_dict() == config_b.to_dict() and sizes["lora"] == sizes["qlora"]
    kept = sum(case["kept"] for case in exchanged.values())
    size = f"{sizes['qlora']['adapter_model.safetensors']:,}"
    of_lora, of_qlora = (f"{run.accuracy:.1%}" for run in runs.values())
    on_codes, on_full = (f"{exchanged[case]['accuracy']:.1%}" for case in ("lora into qlora", "qlora into lora"))
    return Evidence(
        f"Both have {len(a)} arrays, with {'the same' if same else 'different'} names, shapes and dtypes, configs and "
        f"sizes of files ({size} bytes), and {kept} of {len(exchanged)} load into the other's base to the bit. "
        f"Accuracy of LoRA's {of_lora}, on codes {on_codes}; of QLoRA's {of_qlora}, on full weights {on_full}.",
        f"两者都有 {len(a)} 个数组，名称、形状、数据类型、"
        f"配置和文件大小（{size} 字节）{'都相同' if same else '不尽相同'}；换到对方的基座上，"
        f"{len(exchanged)} 个中有 {kept} 个逐位载入。LoRA 的适配器准确率为 {of_lora}，放到量化权重上为 {on_codes}；"
        f"QLoRA 的为 {of_qlora}，放到全精度权重上为 {on_full}。",
        holds=same and kept == len(exchanged),
        figures={"arrays": len(a), "files": sizes, "exchanged": exchanged},
    )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


@claim("qlora.merge", "BA is merged into the 4-bit weights, and inference needs nothing more.")
def merge() -> Evidence:
    """Loss, accuracy and outputs of a trained model kept apart, merged in full precision, merged into new codes."""
    test, trained = data.digits.transfer().test, train("nf4").model.eval()
    with no_grad():
        outputs = trained(test.x).data
    found = {how: _judged(*finish_qlora(copy.deepcopy(trained), how, inputs=test.x), *test, outputs) for how in HOW}
    layers = {name: layer.delta("default") for name, layer in trained.adapter_layers()}
    starts = {name: layer.weight.data for name, layer in coded_layers(trained).items()}
    lost = {c: [_lost(starts[name], c * delta) for name, delta in layers.items()] for c in (1.0, 0.1, 0.01)}
    noise = {c: float(np.mean([error for error, _ in each])) for c, each in lost.items()}
    left = {c: float(np.mean([share for _, share in each])) for c, each in lost.items()}
    keep, full, codes = (found[how] for how in HOW)
    size = float(np.mean([np.linalg.norm(layers[name]) / np.linalg.norm(starts[name]) for name in layers]))
    rows, rows_zh = [], []
    for how, (label, label_zh) in HOW.items():
        loss, reached = f"{found[how]['loss']:.4f}", f"{found[how]['accuracy']:.1%}"
        off, kilobytes = f"{found[how]['output_error']:.0e}", f"{found[how]['bytes'] / 1e3:.0f}"
        rows.append(f"{label} {loss} ({reached}, {off}, {kilobytes} kB)")
        rows_zh.append(f"{label_zh} {loss}（{reached}，{off}，{kilobytes} kB）")
    return Evidence(
        f"Loss (accuracy, output error, size): {'; '.join(rows)}. Rounding to codes loses {noise[1.0]:.0%} of ‖ΔW‖, "
        f"where ΔW is {size:.1f} times as large as W; of an update a hundredth as large {left[0.01]:.0%} is left.",
        f"损失（准确率，输出误差，大小）：{'；'.join(rows_zh)}。舍入成编码会丢掉 ‖ΔW‖ 的 {noise[1.0]:.0%}，"
        f"此时 ΔW 是 W 的 {size:.1f} 倍大；更新量若只有它的百分之一，则留下其中的 {left[0.01]:.0%}。",
        holds=codes["output_error"] < 1e-5,
        instead=keep["output_error"] == 0
        and full["output_error"] < 1e-5 < codes["output_error"]
        and codes["bytes"] < keep["bytes"] < full["bytes"]
        and all(abs(f["output_error"] - f["reported_error"]) < 1e-6 for f in found.values()),
        figures={
            **found,
            "update_over_weight": size,
            "lost": {str(c): v for c, v in noise.items()},
            "left": {str(c): v for c, v in left.items()},
        },
    )


HOW = {
    "keep": ("apart", "分开存放"),
    "merge": ("merged in full precision", "合并到全精度"),
    "requantize": ("merged into new codes", "合并后重新量化"),
}


@no_grad()
def _judged(model: Module, report: FinishReport, x: np.ndarray, y: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """Loss and accuracy; the distance of the outputs from those of the model kept apart, ÷ their size; bytes."""
    logits = model(x)
    return {
        "loss": ops.cross_entropy(logits, y).item(),
        "accuracy": float((logits.data.argmax(axis=1) == y).mean()),
        "output_error": float(np.linalg.norm(logits.data - outputs) / np.linalg.norm(outputs)),
        "reported_error": report.rms_error,
        "bytes": report.bytes_after,
    }


def _lost(W: np.ndarray, delta: np.ndarray) -> tuple[float, float]:
    """Of an update that is merged into new codes: ‖rounding‖ ÷ ‖ΔW‖, and the share of ΔW that is left along ΔW."""
    codes = dequantize(double_quantize(quantize_nf4(W + delta)))
    change = codes - W
    return float(np.linalg.norm(change - delta) / np.linalg.norm(delta)), float(
        (change * delta).sum() / (delta**2).sum()
    )


@claim("qlora.inference-dequant", "Inference uses the 4-bit weights directly; nothing is dequantized.")
def inference_dequant() -> Evidence:
    """Dequantizations of an inference pass, apart and merged into new codes; a product from tables, without W."""
    x, model = data.digits.transfer().test.x, copy.deepcopy(train("nf4").model).eval()
    layers = len(coded_layers(model))
    numbers = sum(layer.quantized.size for layer in coded_layers(model).values())
    apart = _count(model, x)
    again = _count(finish_qlora(copy.deepcopy(model), "requantize", inputs=x)[0], x)
    full = _count(finish_qlora(model, "merge", inputs=x)[0], x)
    table_error, looked_up = _table_product()
    return Evidence(
        f"An inference pass of the trained MLP dequantizes {apart['weights']} of its {layers} coded weights "
        f"({apart['numbers']:,} numbers) with the adapters apart, and {again['weights']} when they are merged into new "
        f"codes. A fused product that sums inputs by code and never forms W gives the same within {table_error:.0e}, "
        f"but looks up all {looked_up:,} codes too. Only merged in full precision it is {full['weights']}, at 32 bits "
        "a weight.",
        f"适配器分开存放时，训练好的 MLP 推理一次要反量化 {layers} 个量化权重中的 {apart['weights']} 个（"
        f"{apart['numbers']:,} 个数）；合并后重新量化，仍是 {again['weights']} 个。融合乘法按编码把输入相加，"
        f"从不展开 W，结果相差不超过 {table_error:.0e}，但同样要查完全部 {looked_up:,} 个编码。"
        f"只有合并到全精度才是 {full['weights']} 个，每个权重则要 32 比特。",
        holds=apart["weights"] == again["weights"] == 0,
        instead=apart["weights"] == again["weights"] == layers
        and apart["numbers"] == numbers
        and full["weights"] == 0
        and table_error < 1e-5,
        figures={"apart": apart, "merged_into_codes": again, "merged_in_full": full, "table_error": table_error},
    )


def _count(model: Module, x: np.ndarray) -> dict[str, int]:
    with dequantizations() as seen, no_grad():
        model(x)
    return {"weights": len(seen), "numbers": sum(q.size for q in seen)}


def _table_product() -> tuple[float, int]:
    """y = Σ_b c_b Σ_k table[k]·(Σ x_j over the j in block b with code k): error ÷ largest, and codes looked up."""
    layer = Linear4bit.from_linear(nn.Linear(256, 128, bias=False, rng=0))
    q, x = layer.quantized, np.random.default_rng(0).standard_normal(256).astype("float32")
    codes = unpack(q.codes, 4, q.size).reshape(128, -1, q.blocksize)
    maxima, x_blocks = block_maxima(q).reshape(128, -1), x.reshape(-1, q.blocksize)
    y = np.zeros(128, "float32")
    for k, number in enumerate(q.table):
        y += number * (np.where(codes == k, x_blocks, 0).sum(axis=2) * maxima).sum(axis=1)
    expected = layer(x[None]).data[0]
    return float(np.abs(y - expected).max() / np.abs(expected).max()), codes.size
