"""Claims that need the real language model, SmolLM2-135M: `minipeft verify --full`."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import numpy as np

from .. import adapt_language as language
from .. import optim
from ..backend import count_flops
from ..data import chat, self_cognition
from ..measure import latency
from ..methods.lora import LoraConfig
from ..models.load import load_model
from ..nn import Module
from ..peft import PeftModel, get_peft_model
from ..schedules import LambdaLR
from ..tensor import no_grad
from ..tokenizer import load_tokenizer
from ..train import fit
from . import Evidence, claim

MODEL, NAME, AUTHOR = "smollm2", "Lumo", "Ada Lin"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
STEPS, SEEDS, LEARNING_RATE = 40, (0, 1), 5e-4
RANKS = {"attention": 21, "all linear layers": 8}  # 2.42 and 2.44 million trainable parameters
KINDS_ZH = {"attention": "仅注意力层", "all linear layers": "所有线性层"}


def adapted(targets: str | list[str], r: int, seed: int) -> tuple[PeftModel, list[float]]:
    """SmolLM2 after learning who it is, with adapters on these layers, and the loss of each step."""
    chats = chat.encode(self_cognition.conversations(NAME, AUTHOR), load_tokenizer(MODEL))
    model = get_peft_model(load_model(MODEL), LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets), seed=seed)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / language.WARM_UP))
    history = fit(
        model,
        chat.ChatBatches(chats, language.BATCH, seed),
        steps=STEPS,
        optimizer=optimizer,
        loss_fn=chat.chat_loss,
        scheduler=warm_up,
        progress=False,
    )
    return model.eval(), history.loss


@functools.cache
def _identities() -> dict[str, list[dict[str, Any]]]:
    """For each choice of layers and seed: the share of held-out questions answered with the name, and the last loss."""
    questions, tokenizer = self_cognition.held_out(), load_tokenizer(MODEL)
    prompts = [question.prompt for question in questions]
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, r in RANKS.items():
        for seed in SEEDS:
            model, loss = adapted(ATTENTION if kind == "attention" else "all-linear", r, seed)
            answers = language.ask(model, tokenizer, prompts)
            share = float(np.mean([self_cognition.gives_name(answer, NAME) for answer in answers]))
            trained = sum(p.size for p in model.parameters() if p.requires_grad)
            figures = {"answered": share, "loss": float(np.mean(loss[-5:])), "parameters": trained, "losses": loss}
            found.setdefault(kind, []).append(figures)
    return found


@claim("lora.all-linear", "For self-cognition, adapt all linear layers, the MLPs too.", full=True)
def all_linear() -> Evidence:
    """Attention alone and all linear layers at the same number of trainable parameters, over seeds."""
    found = _identities()
    texts, texts_zh = [], []
    for kind, runs in found.items():
        shares = [f"{run['answered']:.0%}" for run in runs]
        loss, trained = statistics.mean(run["loss"] for run in runs), f"{runs[0]['parameters']:,}"
        texts.append(f"{kind} (r = {RANKS[kind]}, {trained} parameters) {' and '.join(shares)}, loss {loss:.2f}")
        texts_zh.append(f"{KINDS_ZH[kind]}（r = {RANKS[kind]}，{trained} 个参数）{'、'.join(shares)}，损失 {loss:.2f}")
    return Evidence(
        f"SmolLM2, {STEPS} steps, held-out questions answered with the new name, by seed — {'; '.join(texts)}.",
        f"SmolLM2，{STEPS} 步，未见过的问题中用新名字回答的比例，逐个种子列出——{'；'.join(texts_zh)}。",
        figures=found,
    )


@functools.cache
def _trained() -> PeftModel:
    return adapted("all-linear", 8, 0)[0]


@claim("lora.merge", "The merged model is identical to base and adapters kept apart.", full=True)
def merge() -> Evidence:
    """SmolLM2's logits and answers with a trained adapter apart and merged; what unmerging gives back."""
    model, tokenizer = _trained(), load_tokenizer(MODEL)
    ids = np.array([tokenizer.encode(language.GENERAL.read_text(encoding="utf-8"))[:256]])
    prompts = [question.prompt for question in self_cognition.shown()]
    before = {name: layer.weight.data for name, layer in model.adapter_layers()}
    with no_grad():
        apart, answers = model(ids).data, language.ask(model, tokenizer, prompts)
        model.merge_adapter()
        merged, merged_answers = model(ids).data, language.ask(model, tokenizer, prompts)
        model.unmerge_adapter()
    difference = float(abs(merged - apart).max() / abs(apart).max())
    same = float(np.mean(merged.argmax(-1) == apart.argmax(-1)))
    returned = float(np.mean([np.mean(layer.weight.data == before[name]) for name, layer in model.adapter_layers()]))
    for name, layer in model.adapter_layers():
        layer.weight.data = before[name]
    alike = answers == merged_answers
    figures = {"difference": difference, "same_tokens": same, "returned": returned, "same_answers": alike}
    return Evidence(
        f"On SmolLM2 in float32 the logits differ by {difference:.0e} of the largest, {same:.1%} of the likeliest next "
        f"tokens are the same, and three held-out questions get {'the same' if alike else 'other'} answers; "
        f"{returned:.1%} of W's numbers come back.",
        f"float32 的 SmolLM2：logits 最多相差最大值的 {difference:.0e}，{same:.1%} 的位置上最可能的下一个词元相同，"
        f"三个未见过的问题得到{'相同' if alike else '不同'}的回答；取消合并后，W 有 {returned:.1%} 的数还原。",
        holds=difference == 0 and returned == 1,
        within=difference < 1e-4 and same > 0.99,
        figures=figures,
    )


@claim("lora.latency", "Inference costs extra time until the adapters are merged.", full=True)
def model_latency() -> Evidence:
    """Seconds a token, generating: SmolLM2 alone, with adapters beside it, and with them merged."""
    model, tokenizer = _trained(), load_tokenizer(MODEL)
    ids = np.array([tokenizer.apply_chat_template(self_cognition.shown()[0].prompt, add_generation_prompt=True)])
    before = {name: layer.weight.data for name, layer in model.adapter_layers()}
    times: dict[str, list[float]] = {"base": [], "unmerged": [], "merged": []}
    for _ in range(3):  # in turn, so that a slow moment of the machine hits all three
        with model.disable_adapter():
            times["base"].append(_seconds_a_token(model, ids))
        times["unmerged"].append(_seconds_a_token(model, ids))
        model.merge_adapter()
        times["merged"].append(_seconds_a_token(model, ids))
        model.unmerge_adapter()
        for name, layer in model.adapter_layers():
            layer.weight.data = before[name]
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    ratios = {kind: medians[kind] / medians["base"] for kind in ("unmerged", "merged")}
    speed, apart, merged = f"{1 / medians['base']:.0f}", f"{ratios['unmerged']:.2f}", f"{ratios['merged']:.2f}"
    return Evidence(
        f"SmolLM2 generates {speed} tokens a second alone; a token takes {apart} of that time with adapters (r = 8) "
        f"apart, {merged} merged.",
        f"SmolLM2 单独生成时每秒 {speed} 个词元；带着未合并的适配器（r = 8），每个词元的用时是原来的 {apart}，"
        f"合并后是 {merged}。",
        figures={"seconds_a_token": medians, **ratios},
    )


def _seconds_a_token(model: Module, ids: np.ndarray, tokens: int = 24) -> float:
    start = time.perf_counter()
    model.generate(ids, tokens)
    return (time.perf_counter() - start) / tokens


@claim("lora.backward-flops", "The backward pass is saved only in part.", full=True)
def backward_flops() -> Evidence:
    """SmolLM2's products of a step, counted: LoRA on all linear layers against full fine-tuning; and the time."""
    ids = np.random.default_rng(0).integers(0, 49152, (2, 128))
    counted, seconds = {}, {}
    for kind in ("full", "lora"):
        model = load_model(MODEL).train()
        model = get_peft_model(model, LoraConfig(r=8)) if kind == "lora" else model.requires_grad_(True)
        with count_flops() as flops:
            model.loss(ids).backward()
        counted[kind] = (flops.forward, flops.backward)
        seconds[kind] = latency(lambda model=model: model.loss(ids).backward(), repeat=3, warmup=1).median
        del model
    backward = counted["lora"][1] / counted["full"][1]
    total = sum(counted["lora"]) / sum(counted["full"])
    elapsed = seconds["lora"] / seconds["full"]
    return Evidence(
        f"On SmolLM2 LoRA (r = 8) counts {backward:.2f} of full fine-tuning's backward products, {total:.2f} of all; "
        f"forward and backward take {elapsed:.2f} of the time.",
        f"SmolLM2 上，LoRA（r = 8）反向传播的乘法是全参数微调的 {backward:.2f}，全部乘法是 {total:.2f}；"
        f"前向加反向的用时是 {elapsed:.2f}。",
        holds=backward < 1 and 2 / 3 < total < 0.72,
        figures={"backward": backward, "total": total, "time": elapsed, "counted": counted},
    )
