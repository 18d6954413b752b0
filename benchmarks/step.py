#!/usr/bin/env python3
"""One training step of a 135M-parameter Llama shape: minipeft, torch + PEFT, and the bare matrix products, in one run.

    python benchmarks/step.py [--methods lora,dora,full,qlora] [--shapes 4x128,1x64,8x256] [--rounds 3] [--json FILE]
    python benchmarks/step.py --all --json figures/step.json             everything that the README's table has
    python benchmarks/step.py --generate --json figures/generate.json    tokens per second on SmolLM2, greedy

Float32, AdamW, rank 8 on all linear layers, random weights and tokens: the time does not depend on them. Each side runs
in a process of its own (the idle threads of two libraries in one process disturb each other by spinning), all in turn,
`--rounds` times; a row is the median over the rounds of the median step, with the largest peak of resident memory. The
floor is the step's own matrix products, replayed by np.matmul into arrays that are there already. Peers that are not
installed are left out. `benchmarks/readme.py` makes the README's tables from the files.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import minipeft  # noqa: F401  before NumPy: OpenBLAS chooses its kernel once, and minipeft may ask for a faster one

# isort: split
import numpy as np

from minipeft import files

SHAPE = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
PEER_METHODS = ("full", "lora", "dora", "adalora", "qlora")  # the others PEFT has no step of its own for
PEERS = ("torch", "peft", "transformers", "bitsandbytes")
PROMPT = "Explain in a few sentences why the sky is blue during the day and red in the evening."


# --- the sides: each measures itself in a process of its own ----------------------------------------------------------


def minipeft_step(method: str, ids: np.ndarray, steps: int, checkpointing: bool = False) -> Callable[[], None]:
    """The library as its users write it, the method's hooks included."""
    from minipeft import optim, recipes
    from minipeft.models.llama import Llama
    from minipeft.models.llama_config import LlamaConfig

    loss_fn = lambda model, batch: model.loss(batch)  # noqa: E731
    model = Llama(LlamaConfig(**SHAPE), rng=0)
    if method == "full":
        model.requires_grad_(True)
    else:
        model = recipes.prepared(model, method, recipes.Choice(steps=max(steps, 100)), 0, [ids], loss_fn)
    model.model.checkpointing = checkpointing
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    hooks = getattr(model, "method", None) if method != "full" else None
    if hooks is not None:
        hooks.start(model, optimizer)
    done = 0

    def step() -> None:
        nonlocal done
        optimizer.zero_grad()
        loss_fn(model, ids).backward()
        if hooks is not None:
            penalty = hooks.penalty(model)
            if penalty is not None:
                penalty.backward()
            hooks.before_step(model, done)
        optimizer.step()
        if hooks is not None:
            hooks.after_step(model, done)
        done += 1

    return step


def peft_step(method: str, ids: np.ndarray, steps: int, dtype: str = "float32") -> Callable[[], None]:
    """torch + PEFT, eager, with as many threads as there are processors, or as OMP_NUM_THREADS says."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SHAPE.items() if k != "model_type"}))
    model = model.to(getattr(torch, dtype))
    if method == "qlora":
        _to_4bit(model)
    if method == "adalora":
        config = peft.AdaLoraConfig(
            init_r=12, target_r=8, tinit=10, tfinal=25, deltaT=2, total_step=max(steps, 100), lora_alpha=24,
            target_modules="all-linear",
        )  # fmt: skip
        model = peft.get_peft_model(model, config)
    elif method != "full":
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=method == "dora")
        model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens, done = torch.from_numpy(ids), 0

    def step() -> None:
        nonlocal done
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        if method == "adalora":
            model.base_model.update_and_allocate(done)
        done += 1

    return step


def _to_4bit(model: Any) -> None:
    """Every Linear but the head in NF4 with double quantization, as bitsandbytes holds it."""
    import bitsandbytes as bnb
    import torch

    linears = [(m, n, c) for m in model.modules() for n, c in m.named_children() if isinstance(c, torch.nn.Linear)]
    for module, name, linear in linears:
        if name != "lm_head":
            coded = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            coded.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            setattr(module, name, coded.to("cpu"))


def floor_step(method: str, ids: np.ndarray, steps: int) -> Callable[[], None]:
    """The products of a step of minipeft, with the layouts they had, one after the other and nothing else."""
    from minipeft import backend

    made: list[tuple] = []
    plain = backend.matmul

    def record(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        product = plain(a, b, out)
        made.append((_like(a), _like(b), product.shape))
        return product

    step = minipeft_step(method, ids, steps)
    backend.matmul = record
    step()
    backend.matmul = plain
    del step
    arrays: dict[Any, np.ndarray] = {}

    def array(key: tuple) -> np.ndarray:
        """One array for each shape and layout, filled with ones."""
        shape, transposed = key
        if key not in arrays:
            full = np.ones((*shape[:-2], shape[-1], shape[-2]) if transposed else shape, np.float32)
            arrays[key] = full.swapaxes(-1, -2) if transposed else full
        return arrays[key]

    products = [(array(a), array(b), array((out, False))) for a, b, out in made]

    def run() -> None:
        for a, b, out in products:
            np.matmul(a, b, out=out)

    return run


def _like(a: np.ndarray) -> tuple:
    return a.shape, a.strides[-1] > a.strides[-2]


SIDES = {
    "minipeft": minipeft_step,
    "torch + PEFT": peft_step,
    "np.matmul floor": floor_step,
    "torch bfloat16": functools.partial(peft_step, dtype="bfloat16"),  # what NumPy has no products for
    "minipeft checkpointing": functools.partial(minipeft_step, checkpointing=True),
}
USUAL = ("minipeft", "torch + PEFT", "np.matmul floor")
# What the README shows: (shape, method, sides). The sides of a ratio, and methods compared with LoRA, are neighbours.
SHOWN = [
    ("4x128", "lora", tuple(SIDES)),
    ("4x128", "dora", USUAL[:2]),
    ("4x128", "qlora", USUAL[:2]),
    ("4x128", "full", USUAL[:2]),
    *(("4x128", method, USUAL[:1]) for method in ("adalora", "lora-ga", "lora-pro")),
    ("1x64", "lora", USUAL),
    ("8x256", "lora", USUAL),
]


def measure(side: str, method: str, shape: str, steps: int) -> dict[str, Any]:
    """Seconds of a step (the median after two to warm up), the peak of resident memory in GiB, and the kernel."""
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], tuple(map(int, shape.split("x"))))
    step = SIDES[side](method, ids, steps)
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times[2:]), "peak": _peak(), "kernel": kernel(side)}


def kernel(side: str) -> str | None:
    """What multiplies in this process: OpenBLAS's kernel, or for torch, which brings its own, the instructions it uses.

    The floor must run the same kernel as minipeft, or their ratio would compare the kernels.
    """
    if side.startswith(("torch", "transformers")):
        import torch

        return torch.backends.cpu.get_cpu_capability()
    from minipeft.doctor import find_blas

    return find_blas().kernel


def _peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def generate(side: str, tokens: int = 128) -> dict[str, Any]:
    """Seconds a token, greedy, with a cache, from SmolLM2's GGUF file; reading the prompt is part of it."""
    from minipeft import load_model, load_tokenizer

    tokenizer = load_tokenizer("smollm2")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    if side == "minipeft":
        model = load_model("smollm2")
        run = lambda: model.generate(np.array([ids]), tokens)  # noqa: E731
    else:
        import torch
        from transformers import AutoModelForCausalLM

        from minipeft.models.download import smollm2_file

        path = smollm2_file()
        theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
        run = lambda: theirs.generate(torch.tensor([ids]), **options)  # noqa: E731
    run()
    start = time.perf_counter()
    run()
    return {"seconds": (time.perf_counter() - start) / tokens, "peak": _peak(), "kernel": kernel(side)}


# --- the run ----------------------------------------------------------------------------------------------------------


def in_turn(jobs: list[tuple[str, ...]], rounds: int) -> dict[tuple[str, ...], dict[str, Any]]:
    """Each job in a new process, all in turn, `rounds` times; the medians. Those that cannot run are left out."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {job: [] for job in jobs}
    for number in range(rounds):
        for job in list(found):
            print(f"round {number + 1}: {' '.join(job)} …", file=sys.stderr)
            done = subprocess.run(
                [sys.executable, __file__, "--one", *job], capture_output=True, text=True, check=False
            )
            if done.returncode and job[0].startswith("minipeft"):
                raise SystemExit(done.stderr)
            if done.returncode:
                print(f"left out: {job} ({done.stderr.strip().splitlines()[-1]})", file=sys.stderr)
                del found[job]
            else:
                found[job].append(json.loads(done.stdout.strip().splitlines()[-1]))
    return {
        job: {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "peak": max(run["peak"] for run in runs),
            "kernel": runs[0]["kernel"],
        }
        for job, runs in found.items()
    }


def machine() -> dict[str, Any]:
    """The machine, and the versions of the peers that are installed."""
    from minipeft.doctor import machine_summary

    found = machine_summary()
    for peer in PEERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[peer] = metadata.version(peer)
    return found


def main() -> None:
    """Time them and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="lora", help="comma-separated; of full, lora and the other methods")
    parser.add_argument("--shapes", default="4x128", help="comma-separated batch x tokens")
    parser.add_argument("--sides", default=",".join(USUAL), help=f"comma-separated; of {', '.join(SIDES)}")
    parser.add_argument("--all", action="store_true", help="what the README's table has; about half an hour")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--generate", action="store_true", help="time generation instead")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        side, *rest = options.one
        print(json.dumps(generate(side) if rest == ["generate"] else measure(side, *rest[:2], int(rest[2]))))
        return
    shapes, methods, sides = (getattr(options, name).split(",") for name in ("shapes", "methods", "sides"))
    chosen = SHOWN if options.all else [(*pair, sides) for pair in itertools.product(shapes, methods)]
    jobs = [
        (side, method, shape, str(options.steps))
        for shape, method, sides in chosen
        for side in sides
        if not side.startswith("torch") or method in PEER_METHODS
    ]
    if options.generate:
        jobs = [(side, "generate") for side in ("minipeft", "transformers")]
    report = {"machine": machine(), "rounds": options.rounds}
    found = in_turn(jobs, options.rounds)
    print("; ".join(f"{name} {value}" for name, value in report["machine"].items() if value is not None))
    if options.generate:
        for (side, _), figures in found.items():
            speed, memory = 1 / figures["seconds"], figures["peak"]
            print(f"{side:16} {speed:6.1f} tokens/s   peak {memory:.2f} GiB   {figures['kernel']}")
    else:
        _print_steps(found)
    if options.json:
        names = ("side", "method", "shape")
        report["rows"] = [{**dict(zip(names, job, strict=False)), **figures} for job, figures in found.items()]
        files.write_json(options.json, report)


def _print_steps(found: dict[tuple[str, ...], dict[str, Any]]) -> None:
    """A row for each side, method and shape; the ratios are minipeft's time to the peer's and to the floor's."""
    print(f"{'shape':8} {'method':12} {'side':24} {'s/step':>8} {'peak GiB':>9} {'minipeft/this':>14} {'to LoRA':>8}")
    for (side, method, shape, steps), figures in found.items():
        ours = found.get(("minipeft", method, shape, steps))
        lora = found.get((side, "lora", shape, steps))
        ratio = f"{ours['seconds'] / figures['seconds']:.2f}" if ours and side != "minipeft" else ""
        relative = f"{figures['seconds'] / lora['seconds']:.2f}" if lora and method != "lora" else ""
        timed = f"{figures['seconds']:8.3f} {figures['peak']:9.2f} {ratio:>14} {relative:>8}"
        print(f"{shape:8} {method:12} {side:24} {timed}  {figures['kernel']}")


if __name__ == "__main__":
    main()
