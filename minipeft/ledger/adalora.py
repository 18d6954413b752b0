"""The claims of the document's AdaLoRA section."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from .. import data, nn, ops, optim
from ..measure import compare_latency
from ..methods import adalora as formulas
from ..methods.adalora import AdaLoraConfig
from ..methods.lora import LoraConfig, lora_delta
from ..models import load_base
from ..models.pretrain import accuracy
from ..nn import Module
from ..peft import get_peft_model
from ..tensor import Tensor, no_grad
from ..train import Progress, classification_loss, fit
from . import Evidence, chinese_marks, claim
from .runs import BATCH

STEPS, RATES = 100, (1e-2, 2e-2, 5e-2)
FORMS = {"penalty": "penalty", "Gram–Schmidt": "gram-schmidt"}
SCORES = ("sensitivity", "magnitude")
NAMES_ZH = {
    "LoRA": "LoRA",
    "penalty": "惩罚项",
    "Gram–Schmidt": "Gram–Schmidt",
    "neither": "都不用",
    "magnitude score": "按幅度评分",
}


@dataclass(frozen=True)
class Run:
    """A small network adapted to the shifted digits.

    Attributes:
        model: as trained.
        loss: mean of the last ten steps.
        test, gap: accuracy on the test digits; the test loss minus the training loss.
        distances: every tenth step, the largest ‖PᵀP − I‖_F or ‖QQᵀ − I‖_F of any layer.
        kept: after every step, by layer, which λ are not zero.
        lowest: at no step has one that is zero a higher score than one that is not.
    """

    model: Module
    loss: float
    test: float
    gap: float
    distances: list[float]
    kept: list[dict[str, list[bool]]]
    lowest: bool


def _config(init_r: int, target_r: int, steps: int = STEPS, **options: Any) -> AdaLoraConfig:
    """s = 2, as LoRA's here; a tenth of the steps before pruning, a quarter after."""
    schedule = {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 4, "deltaT": 2, **options}
    return AdaLoraConfig(init_r=init_r, target_r=target_r, lora_alpha=2 * init_r, **schedule)


@functools.cache
def train(
    r: int = 4, init_r: int | None = None, seed: int = 0, lr: float = 2e-2, few: int | None = None, **options: Any
) -> Run:
    """LoRA of rank r, or, with an `init_r`, AdaLoRA that ends at r on average; on `few` training digits or on all."""
    task, model = data.digits.transfer(), load_base("mlp")
    config = LoraConfig(r=r, lora_alpha=2 * r) if init_r is None else _config(init_r, r, **options)
    model = get_peft_model(model, config, seed=seed)
    x, y = task.train.x[:few], task.train.y[:few]
    distances: list[float] = []
    kept: list[dict[str, list[bool]]] = []
    lowest = [True]
    watch = [] if init_r is None else [_watch(distances, kept, lowest)]
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    batches = data.digits.batches(x, y, batch_size=min(BATCH, len(x)), seed=seed)
    history = fit(model, batches, steps=STEPS, optimizer=optimizer, callbacks=watch, progress=False)
    model.eval()
    gap = _loss(model, *task.test) - _loss(model, x, y)
    return Run(
        model, float(np.mean(history.loss[-10:])), accuracy(model, *task.test), gap, distances, kept, all(lowest)
    )


def _loss(model: Module, x: Any, y: Any) -> float:
    with no_grad():
        return classification_loss(model, (x, y)).item()


def _watch(distances: list[float], kept: list[dict[str, list[bool]]], lowest: list[bool]) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        method = progress.model.method
        layers = dict(method.layers(progress.model))
        factors = {name: layer.factors("default") for name, layer in layers.items()}
        kept.append({name: (lam != 0).tolist() for name, (_, lam, _) in factors.items()})
        zero = ~np.concatenate(list(kept[-1].values()))
        if zero.any() and method.averages and method.rank_history[-1][0] == progress.step:
            scores = np.concatenate([method._scores(name, layer) for name, layer in layers.items()])
            lowest.append(bool(scores[zero].max() < scores[~zero].min()))
        if progress.step % 10 == 0:
            grams = [M @ M.T for P, _, Q in factors.values() for M in (P.T, Q)]
            distances.append(max(float(np.linalg.norm(gram - np.eye(len(gram)))) for gram in grams))

    return watch


def _triplets(count: int = 30) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Random P (out, r), λ (r,), Q (r, in) with r ≤ min(out, in)."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        r = int(rng.integers(1, 6))
        out, width = rng.integers(r, 20, 2)
        found.append(tuple(rng.standard_normal(shape) for shape in ((out, r), (r,), (r, width))))
    return found


@claim("adalora.svd-form", "ΔW = PΛQ, a singular value decomposition; h = Wx + PΛQx.")
def svd_form() -> Evidence:
    """LoRA's product with B = P and A = ΛQ; the layer's output; singular values where P and Q are orthonormal."""
    product, values = [], []
    for P, lam, Q in _triplets():
        delta = formulas.adalora_delta(P, lam, Q)
        product.append(float(np.abs(delta - lora_delta(np.diag(lam) @ Q, P, 1.0)).max()))
        delta = formulas.adalora_delta(formulas.orthonormalize(P), lam, formulas.orthonormalize(Q.T).T)
        singular = np.linalg.svd(delta, compute_uv=False)[: len(lam)]
        values.append(float(np.abs(singular - np.sort(np.abs(lam))[::-1]).max()))
    model = train(4, 6, orthogonality="gram-schmidt").model
    layer, x = next(module for _, module in model.method.layers(model)), data.digits.transfer().test.x
    P, lam, Q = layer.factors("default")
    document = x @ layer.weight.data.T + layer.base_layer.bias.data + layer.factor("default") * (x @ Q.T * lam @ P.T)
    forward = float(np.abs(layer(x).data - document).max() / np.abs(document).max())
    off = f"{max(product):.1e}"
    near, near_zh = (f"within {off}", f"相差不超过 {off}") if max(product) else ("to the bit", "逐位相同")
    return Evidence(
        f"PΛQ is LoRA's BA with B = P, A = ΛQ {near}; with orthonormal P and Q the |λ| are ΔW's singular values within "
        f"{max(values):.1e} ({len(product)} random layers). A trained float32 layer gives Wx + s·PΛQx within "
        f"{forward:.1e} of its largest output.",
        f"PΛQ 就是 LoRA 的 BA（B = P，A = ΛQ），{near_zh}；P 的列、Q 的行标准正交时，"
        f"|λ| 就是 ΔW 的奇异值，相差不超过 {max(values):.1e}（{len(product)} 个随机层）。"
        f"训练过的 float32 层给出 Wx + s·PΛQx，误差不超过最大输出的 {forward:.1e}。",
        holds=max(product) < 1e-12 and max(values) < 1e-12 and forward < 1e-5,
        figures={"product": product, "singular_values": values, "forward": forward},
    )


@claim("adalora.orthogonal", "P and Q are orthogonal matrices: they are projected back after each gradient step.")
def orthogonal() -> Evidence:
    """‖PᵀP − I‖ along training with the paper's penalty, with Gram–Schmidt after each step, and with neither."""
    options: dict[str, dict[str, Any]] = {
        "penalty": {}, "Gram–Schmidt": {"orthogonality": "gram-schmidt"}, "neither": {"orth_reg_weight": 0.0},
    }  # fmt: skip
    runs = {name: [train(4, 6, seed, **own) for seed in range(2)] for name, own in options.items()}
    end = {name: max(run.distances[-1] for run in found) for name, found in runs.items()}
    loss = {name: [run.loss for run in found] for name, found in runs.items()}
    rng = np.random.default_rng(0)
    P, Q = (rng.standard_normal(shape).astype("float32") for shape in ((576, 8), (8, 576)))
    seconds = compare_latency(
        {
            "penalty": lambda: formulas._penalty([nn.Parameter(P)], [nn.Parameter(Q)], 0.5).backward(),
            "Gram–Schmidt": lambda: (formulas.orthonormalize(P), formulas.orthonormalize(Q.T)),
        },
        repeat=20,
    )
    exact, near = end["Gram–Schmidt"] < 1e-5, end["penalty"] < 0.1 * end["neither"]
    works = all(np.mean(loss[name]) < np.mean(loss["neither"]) for name in FORMS)
    ends = {name: (f"{end[name]:.1e}", f"{np.mean(loss[name]):.3f}") for name in runs}
    shown = ", ".join(f"{name} {distance} (loss {reached})" for name, (distance, reached) in ends.items())
    shown_zh = "，".join(f"{NAMES_ZH[name]} {distance}（损失 {reached}）" for name, (distance, reached) in ends.items())
    ratio = f"{seconds.ratios['Gram–Schmidt']:.1f}"
    return Evidence(
        "The paper adds ‖PᵀP − I‖² + ‖QQᵀ − I‖² to the loss (eq. 4); projecting works too. Largest ‖PᵀP − I‖ after "
        f"{STEPS} steps: {shown}; Gram–Schmidt takes {ratio} times the penalty's time.",
        f"论文是在损失中加上 ‖PᵀP − I‖² + ‖QQᵀ − I‖²（式 4）；投影也行得通。{STEPS} 步后最大的 ‖PᵀP − I‖：{shown_zh}；"
        f"Gram–Schmidt 的用时是惩罚项的 {ratio} 倍。",
        holds=exact and end["penalty"] < 1e-5,
        instead=exact and near and works,
        figures={
            "distances": {name: [run.distances for run in found] for name, found in runs.items()},
            "loss": loss,
            "seconds": {name: latency.median for name, latency in seconds.items()},
        },
    )


@functools.cache
def _scored(seed: int) -> dict[str, Any]:
    """By several scores, all directions of a trained model that was not pruned, and what removing each one costs."""
    task, model = data.digits.transfer(), train(12, 12, seed, orthogonality="gram-schmidt").model
    layers = [layer for _, layer in model.method.layers(model)]
    states: list[Any] = [None] * len(layers)
    batches = data.digits.batches(*task.train, batch_size=BATCH, seed=seed)
    for number in range(30):
        model.zero_grad()
        classification_loss(model, batches[number]).backward()
        sensitivity = []
        for i, layer in enumerate(layers):
            P, E, Q = layer.parameters_of("default")
            gradients = P.grad, E.grad[:, 0], Q.grad
            S, states[i] = formulas.importance_sensitivity(*layer.factors("default"), *gradients, states[i])
            sensitivity.append(S)
    magnitude = [formulas.importance_magnitude(*layer.factors("default")) for layer in layers]
    scores = {"sensitivity": np.concatenate(sensitivity), "magnitude": np.concatenate(magnitude)}
    count = scores["magnitude"].size
    costs = np.array([_without(model, layers, [i]) for i in range(count)])
    rng = np.random.default_rng(seed)
    orders = {name: [np.argsort(score)] for name, score in {**scores, "cost": costs}.items()}
    orders["at random"] = [rng.permutation(count) for _ in range(5)]
    pruned = {
        name: [float(np.mean([_without(model, layers, o[:k]) for o in own])) for k in range(0, count, count // 4)]
        for name, own in orders.items()
    }
    rank = lambda a, b: float(spearmanr(a, b).statistic)  # noqa: E731
    return {
        "between": rank(*scores.values()),
        "against cost": {name: rank(score, costs) for name, score in scores.items()},
        "pruned": pruned,
        "scores": {name: score.tolist() for name, score in {**scores, "cost": costs}.items()},
    }


def _without(model: Module, layers: list[Any], directions: Any) -> float:
    """The training loss with these directions' λ at zero; they are numbered over the layers."""
    whole = [layer.lora_E["default"].data for layer in layers]
    mask = np.ones(sum(len(E) for E in whole), bool)
    mask[directions] = False
    parts = np.split(mask, np.cumsum([len(E) for E in whole])[:-1])
    for layer, E, part in zip(layers, whole, parts, strict=True):
        layer.lora_E["default"].data = E * part[:, None]
    try:
        return _loss(model, *data.digits.transfer().train)
    finally:
        for layer, E in zip(layers, whole, strict=True):
            layer.lora_E["default"].data = E


@claim("adalora.importance", "The importance of a singular value is sᵢ = λᵢ²·‖Pᵢ‖²·‖Qᵢ‖².")
def importance() -> Evidence:
    """How the document's score and the paper's rank directions, and what removing a direction really costs."""
    found = [_scored(seed) for seed in range(3)]
    between = [one["between"] for one in found]
    truth = {name: [one["against cost"][name] for one in found] for name in SCORES}
    half = {name: [one["pruned"][name][2] for one in found] for name in found[0]["pruned"]}
    nearer = all(paper > document for paper, document in zip(*truth.values(), strict=True))
    lower = all(paper < document for paper, document in zip(half["sensitivity"], half["magnitude"], strict=True))
    whole = [one["pruned"]["cost"][0] for one in found]
    agree, document, paper = (f"{np.mean(rho):.2f}" for rho in (between, truth["magnitude"], truth["sensitivity"]))
    by_document, by_paper, random, none = (
        f"{np.mean(losses):.2f}" for losses in (half["magnitude"], half["sensitivity"], half["at random"], whole)
    )
    return Evidence(
        "The paper scores by |w·∂L/∂w|, smoothed, times its uncertainty (eqs. 7–11). Rank correlation of the two, 24 "
        f"directions, 3 seeds: {agree}; with what removing a direction costs: document {document}, paper {paper}. "
        f"Training loss with half of them pruned: {by_document} and {by_paper} (at random {random}, none pruned "
        f"{none}).",
        "论文用平滑后的 |w·∂L/∂w| 乘以其不确定度来评分（式 7–11）。两种评分的秩相关系数（24 个方向，"
        f"3 个种子）为 {agree}；与逐个移除方向的真实代价相比，文档的评分为 {document}，论文的为 {paper}。"
        f"裁剪一半方向后的训练损失分别为 {by_document} 和 {by_paper}（随机裁剪 {random}，不裁剪 {none}）。",
        holds=min(between) > 0.999,
        instead=nearer and lower,
        figures={"seeds": found},
    )


class Languages(Module):
    """One Linear for each language pair, side by side: the document's translation model without the translation."""

    def __init__(self, ranks: dict[str, int], width: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.pairs = {name: nn.Linear(width, width, bias=False, rng=rng) for name in ranks}

    def forward(self, x: Any) -> list[Tensor]:
        """(batch, width) -> as many of them as pairs"""
        return [layer(x) for layer in self.pairs.values()]


UNEQUAL = {"English–French": 12, "English–German": 6, "English–Russian": 3, "English–Icelandic": 3}
EQUAL = dict.fromkeys(UNEQUAL, 6)


@dataclass(frozen=True)
class Planted:
    """A task where the right answer is known: the final loss, the ranks found, and the record of ranks."""

    loss: float
    ranks: dict[str, int]
    record: list[tuple[int, dict[str, int]]]


@functools.cache
def planted(method: str, equal: bool, seed: int = 0, steps: int = 200, width: int = 24) -> Planted:
    """Each pair's weight must change by a matrix of its own rank, with singular values 1; six directions a pair.

    Learning rates: LoRA's best of 1, 2, 5 ·1e-2; the penalty starts from small P and Q and takes the largest.
    """
    ranks, lr = EQUAL if equal else UNEQUAL, {"LoRA": 1e-2, "penalty": 5e-2, "Gram–Schmidt": 2e-2}[method]
    model, rng = Languages(ranks, width, seed), np.random.default_rng([seed, 1])
    targets = []
    for layer, r in zip(model.pairs.values(), ranks.values(), strict=True):
        P, Q = (np.linalg.qr(rng.standard_normal((width, r)))[0] for _ in range(2))
        targets.append((layer.weight.data + P @ Q.T).astype("float32"))
    config: Any = LoraConfig(r=6, lora_alpha=6)
    if method != "LoRA":
        schedule = {"total_step": steps, "tinit": steps // 4, "tfinal": steps // 4, "deltaT": 5}
        config = AdaLoraConfig(init_r=12, target_r=6, lora_alpha=12, orthogonality=FORMS[method], **schedule)
    model = get_peft_model(model, config, seed=seed)

    def batch(number: int) -> np.ndarray:
        return np.random.default_rng([seed, 2, number]).standard_normal((64, width)).astype("float32")

    def loss_fn(model: Module, x: np.ndarray) -> Tensor:
        outputs, wanted = ops.concatenate(model(x), axis=1), np.concatenate([x @ W.T for W in targets], axis=1)
        return ops.mse_loss(outputs, Tensor(wanted)) * len(targets)

    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    history = fit(model, batch, steps=steps, optimizer=optimizer, loss_fn=loss_fn, progress=False)
    record = getattr(model.method, "rank_history", [])
    record = [(step, {name.removeprefix("pairs."): r for name, r in now.items()}) for step, now in record]
    return Planted(float(np.mean(history.loss[-10:])), record[-1][1] if record else dict.fromkeys(ranks, 6), record)


@claim("adalora.prune", "At intervals the singular values with the lowest scores are set to zero.")
def prune() -> Evidence:
    """λ that are not zero against the cubic budget and the scores, step by step; how often one came back; at which
    steps there are zeros with a longer interval."""
    warm, fall, left, back, cut, lowest = STEPS // 10, STEPS - STEPS // 10 - STEPS // 4, [], {}, {}, True
    for name, options in (
        ("penalty", {}),
        ("Gram–Schmidt", {"orthogonality": "gram-schmidt"}),
        ("magnitude score", {"importance": "magnitude"}),
    ):
        runs = [train(4, 12, seed, deltaT=1, **options) for seed in range(2)]
        kept = np.array([[np.concatenate(list(now.values())) for now in run.kept[warm:]] for run in runs])
        back[name] = int((~kept[:, :-1] & kept[:, 1:]).sum())
        cut[name] = int((kept[:, :-1] & ~kept[:, 1:]).sum())
        left += kept.sum(axis=2).tolist()
        lowest &= all(run.lowest for run in runs)
    step = np.arange(1, STEPS - warm + 1)
    cubic = np.floor(8 + (24 - 8) * np.clip(1 - step / fall, 0, None) ** 3 + 1e-9).tolist()
    off = max(abs(b - c) for one in left for b, c in zip(one, cubic, strict=True))
    interval, settled, kept = 20, STEPS - STEPS // 4, train(4, 6, 0, deltaT=20).kept
    zeros = [step for step, now in enumerate(kept, 1) if not all(map(all, now.values()))]
    regular = zeros == [*range(interval, settled, interval), *range(settled, STEPS + 1)]
    before = [str(step) for step in zeros if step < settled]
    shown = ", ".join(f"{name} {back[name]} of {cut[name]}" for name in back)
    shown_zh = "，".join(f"{NAMES_ZH[name]} {cut[name]} 个中的 {back[name]} 个" for name in back)
    return Evidence(
        f"After every step as many of 24 λ are left as the cubic from 24 to 8 asks (largest difference {off:.0f}), "
        f"{'always those' if lowest else 'not always those'} with the highest scores. With an interval of {interval} "
        f"there are zeros after steps {', '.join(before)} and from {settled} on, where the ranks are settled. Until "
        f"then zero is not for good; of those cut came back: {shown} (2 seeds each).",
        f"每步之后，24 个 λ 中留下的个数都符合从 24 到 8 的三次曲线（最大相差 {off:.0f}），"
        f"{'留下的总是' if lowest else '但留下的并不总是'}评分最高的那些。间隔为 {interval} 时，"
        f"在第 {'、'.join(before)} 步之后出现零，从第 {settled} 步起秩固定下来。在此之前，置零的还能回来："
        f"{shown_zh}（各 2 个种子）。",
        holds=off == 0 and lowest and regular and back["penalty"] + back["Gram–Schmidt"] > 0,
        figures={"left": left, "cubic": cubic, "back": back, "cut": cut, "zeros": zeros},
    )


@claim("adalora.reallocate", "The freed rank goes to the modules that matter: 12 for English–French, 3 for Icelandic.")
def reallocate() -> Evidence:
    """The document's example with ranks that are known, 12, 6, 3, 3: the ranks found; LoRA with 6 everywhere."""
    runs = {name: [planted(name, False, seed) for seed in range(2)] for name in ("LoRA", *FORMS)}
    off = {name: max(abs(run.ranks[pair] - r) for run in runs[name] for pair, r in UNEQUAL.items()) for name in FORMS}
    loss = {name: [run.loss for run in found] for name, found in runs.items()}
    lower = all(ada < lora for name in FORMS for ada, lora in zip(loss[name], loss["LoRA"], strict=True))
    wanted, found = (list(map(str, ranks.values())) for ranks in (UNEQUAL, runs["Gram–Schmidt"][0].ranks))
    lora, penalty, projected = (
        f"{np.mean(loss[name]):{form}}" for name, form in (("LoRA", ".2f"), ("penalty", ".2f"), ("Gram–Schmidt", ".1e"))
    )
    return Evidence(
        f"Planted {', '.join(wanted)}: with Gram–Schmidt {', '.join(found)} are found (largest difference over 2 seeds "
        f"{off['Gram–Schmidt']}); with the penalty it is {off['penalty']} after the same 200 steps. Loss at the same "
        f"budget: LoRA {lora}, penalty {penalty}, Gram–Schmidt {projected}.",
        f"实际需要的秩为 {'、'.join(wanted)}：Gram–Schmidt 找到 {'、'.join(found)}（2 个种子中最大相差 "
        f"{off['Gram–Schmidt']}）；同样 200 步后，惩罚项最大相差 {off['penalty']}。预算相同时的损失：LoRA {lora}，"
        f"惩罚项 {penalty}，Gram–Schmidt {projected}。",
        holds=off["Gram–Schmidt"] <= 1 and lower,
        figures={
            "planted": UNEQUAL,
            "found": {name: [run.ranks for run in runs[name]] for name in FORMS},
            "record": {name: [[step, ranks] for step, ranks in runs[name][0].record] for name in FORMS},
            "loss": loss,
        },
    )


@claim("adalora.overhead", "The decomposition and the projection add 10 to 20 % to the training time.")
def overhead(width: int = 384, rows: int = 512) -> Evidence:
    """Steps of LoRA and AdaLoRA with the same r, all parts of a step, in one run."""
    options: dict[str, dict[str, Any]] = {"penalty": {}, "Gram–Schmidt": {"orthogonality": "gram-schmidt"}}
    options["magnitude score"] = {"importance": "magnitude"}
    configs: dict[str, Any] = {"LoRA": LoraConfig(r=8, lora_alpha=16)}
    configs |= {name: _config(8, 4, 10**6, tinit=0, deltaT=1, **own) for name, own in options.items()}
    x = Tensor(np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32))
    steps = {name: functools.partial(_step, *_stack(config, width), x) for name, config in configs.items()}
    ratios = compare_latency(steps, repeat=9, warmup=1).ratios
    shown = ", ".join(f"{name} {ratios[name]:.2f}" for name in options)
    shown_zh = "，".join(f"{NAMES_ZH[name]} {ratios[name]:.2f}" for name in options)
    return Evidence(
        f"Time of a step ÷ LoRA's, r = 8, four {width}² layers, {rows} rows, ranks allocated at every step: {shown}. "
        "No singular value decomposition is computed: P, λ and Q are trained.",
        f"一步的用时 ÷ LoRA 一步的用时，r = 8，四个 {width}² 的层，{rows} 行，每步都重新分配秩：{shown_zh}。"
        "其中并不计算奇异值分解：P、λ、Q 是训练出来的。",
        figures={"time": ratios},
    )


def _stack(config: Any, width: int) -> tuple[Module, optim.Optimizer]:
    model = get_peft_model(nn.Sequential(*(nn.Linear(width, width, rng=i) for i in range(4))), config)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.method.start(model, optimizer)
    return model, optimizer


def _step(model: Module, optimizer: optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    ops.mse_loss(model(x), x).backward()
    penalty = model.method.penalty(model)
    if penalty is not None:
        penalty.backward()
    optimizer.step()
    model.method.after_step(model, 0)


def _left(model: Module) -> int:
    """Numbers in the adapter, without the directions that AdaLoRA has pruned."""
    if not hasattr(model.method, "ranks"):
        return model.get_nb_trainable_parameters()[0]
    layers, ranks = model.method.layers(model), model.method.ranks(model)
    return sum(ranks[name] * (sum(layer.weight.shape) + 1) for name, layer in layers)


@claim("adalora.params", "Better than LoRA at the same budget; 30 % of the parameters reach LoRA's result.")
def params() -> Evidence:
    """Loss and accuracy by final budget, over seeds, each at its best rate on the validation digits."""
    valid, found = data.digits.transfer().valid, {}
    for r in (2, 8):
        for name, init_r in (("LoRA", None), ("AdaLoRA", r + r // 2)):
            reached = {lr: accuracy(train(r, init_r, 0, lr).model, *valid) for lr in RATES}
            lr = max(reached, key=lambda lr: reached[lr])
            runs = [train(r, init_r, seed, lr) for seed in range(3)]
            losses, tests = [run.loss for run in runs], [run.test for run in runs]
            numbers = _left(runs[0].model)
            found[f"{name} r={r}"] = {"lr": lr, "loss": losses, "accuracy": tests, "parameters": numbers}
    shown = ", ".join(
        f"{name} {np.mean(own['loss']):.3f} ({np.mean(own['accuracy']):.1%} ± {np.std(own['accuracy']):.1%})"
        for name, own in found.items()
    )
    tried, tried_zh = (comma.join(f"{lr:g}" for lr in RATES) for comma in (", ", "、"))
    share = found["AdaLoRA r=2"]["parameters"] / found["LoRA r=8"]["parameters"]
    return Evidence(
        f"MLP on rotated digits, {STEPS} steps, 3 seeds, each at its best of lr {tried} for validation digits and the "
        f"first seed; loss (test accuracy ± deviation): {shown}. AdaLoRA's r = 2 ends with {share:.0%} of the "
        "parameters of LoRA's r = 8.",
        f"MLP，旋转的手写数字，{STEPS} 步，3 个种子，各用 lr {tried_zh} 中在验证集上最好的（以第一个种子选取）；"
        f"损失（测试准确率 ± 标准差）：{chinese_marks(shown)}。AdaLoRA 在 r = 2 时，"
        f"最终参数量是 LoRA 在 r = 8 时的 {share:.0%}。",
        figures=found,
    )


@claim("adalora.regularize", "Pruning directions that matter little regularizes: less overfitting.")
def regularize(few: int = 60) -> Evidence:
    """Test loss minus training loss on few digits: pruned, not pruned, and LoRA of the final rank."""
    kinds = {"12 → 2": (2, 12), "12, not pruned": (12, 12), "LoRA r=2": (2, None)}
    runs = {name: [train(r, init_r, seed, few=few) for seed in range(3)] for name, (r, init_r) in kinds.items()}
    shown = "; ".join(
        f"{name}: {np.mean([run.gap for run in found]):.2f} ± {np.std([run.gap for run in found]):.2f} "
        f"({np.mean([run.test for run in found]):.0%})"
        for name, found in runs.items()
    )
    return Evidence(
        f"Test loss − training loss (test accuracy) after training on {few} digits, 3 seeds: {shown}.",
        f"只用 {few} 个数字训练后，测试损失 − 训练损失（测试准确率），3 个种子："
        f"{chinese_marks(shown.replace('not pruned', '不裁剪'))}。",
        figures={
            name: {"gap": [r.gap for r in found], "accuracy": [r.test for r in found]} for name, found in runs.items()
        },
    )


@claim("adalora.uniform", "Where modules matter equally, plain LoRA serves as well.")
def uniform() -> Evidence:
    """The planted task with rank 6 in every module: LoRA with r = 6 against AdaLoRA at the same budget."""
    runs = {name: [planted(name, True, seed) for seed in range(2)] for name in ("LoRA", *FORMS)}
    loss = {name: [run.loss for run in found] for name, found in runs.items()}
    off = {name: max(abs(r - 6) for run in runs[name] for r in run.ranks.values()) for name in FORMS}
    lowest = np.mean(loss["LoRA"]) <= min(np.mean(loss[name]) for name in FORMS)
    shown = ", ".join(f"{name} {np.mean(values):.1e}" for name, values in loss.items())
    shown_zh = "，".join(f"{NAMES_ZH[name]} {np.mean(values):.1e}" for name, values in loss.items())
    return Evidence(
        f"Loss after 200 steps, 2 seeds: {shown}; LoRA's is {'the lowest' if lowest else 'not the lowest'}. AdaLoRA's "
        f"ranks are within {off['Gram–Schmidt']} of 6 with Gram–Schmidt, within {off['penalty']} with the penalty.",
        f"200 步后的损失，2 个种子：{shown_zh}；LoRA 的{'最低' if lowest else '并非最低'}。AdaLoRA 找到的秩，"
        f"用 Gram–Schmidt 与 6 相差不超过 {off['Gram–Schmidt']}，用惩罚项不超过 {off['penalty']}。",
        figures={"loss": loss, "ranks": {name: [run.ranks for run in runs[name]] for name in FORMS}},
    )


@claim("adalora.sensitive", "Sensitive to the initial rank, the interval of pruning and the threshold.")
def sensitive() -> Evidence:
    """The loss over a sweep of each, the others held; the threshold is what the final budget makes of it."""
    losses = lambda r=4, init_r=6, **options: [train(r, init_r, seed, **options).loss for seed in range(2)]  # noqa: E731
    found = {
        "init_r": {init_r: losses(init_r=init_r) for init_r in (4, 6, 16)},
        "deltaT": {1: losses(deltaT=1), 2: losses(), 20: losses(deltaT=20)},
        "r": {r: losses(r) for r in (2, 4, 6)},
    }
    words = {"init_r": ("initial rank", "初始秩"), "deltaT": ("interval", "间隔"), "r": ("final rank", "最终秩")}
    swept = {
        name: ", ".join(f"{value}: {np.mean(own):.3f}" for value, own in by_value.items())
        for name, by_value in found.items()
    }
    shown = "; ".join(f"{words[name][0]} {losses}" for name, losses in swept.items())
    shown_zh = "；".join(f"{words[name][1]} {chinese_marks(losses)}" for name, losses in swept.items())
    noise = max(abs(a - b) for by_value in found.values() for a, b in by_value.values())
    return Evidence(
        f"Loss, mean of 2 seeds (apart by up to {noise:.3f}), about initial rank 6, final 4, interval 2: {shown}.",
        f"损失，2 个种子的平均（两者最多相差 {noise:.3f}），以初始秩 6、最终秩 4、间隔 2 为中心：{shown_zh}。",
        figures={name: {str(value): own for value, own in by.items()} for name, by in found.items()},
    )
