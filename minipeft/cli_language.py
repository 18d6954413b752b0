"""The commands for language models: download, generate, chat, merge, memory. Imported by cli.py, where the app is."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli import app, check_writable, err, fail, option, out, user_errors
from .files import read_json

MODELS = ("smollm2",)
Model = Annotated[
    str | None, option("smollm2, a Hugging Face directory, or a .gguf file.", "the adapter's, or smollm2")
]
Adapter = Annotated[Path | None, typer.Option(help="A directory with a saved adapter, put on the model.")]
Length = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Stop after this many tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the likeliest token; 1: as the model says.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample among tokens that hold this share of the probability.")]
Seed = Annotated[int, typer.Option(min=0, help="For sampling.")]


@app.command(epilog="[bold]minipeft download smollm2[/]")
def download(name: Annotated[str, typer.Argument(help=f"What to fetch: {', '.join(MODELS)}.")]) -> None:
    """Fetch a language model (SmolLM2-135M-Instruct, 98 MB) into the user's cache, checked by its SHA-256."""
    if name not in MODELS:
        fail(f"name: got {name!r}; accepted are {', '.join(MODELS)}")
    from .models.download import download_smollm2

    with user_errors():
        try:
            path = download_smollm2(say=err.print)
        except RuntimeError as error:
            fail(error)
    out.print(f"ready: {path}", soft_wrap=True)


@app.command(epilog='[bold]minipeft generate "The capital of France is"[/]')
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: Model = None,
    adapter: Adapter = None,
    length: Length = 100,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Continue a text with a language model, as it comes."""
    with user_errors():
        network, tokenizer = _load(model, adapter)
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop_ids": tokenizer.stop_ids}
        ids = tokenizer.encode(prompt)
        tokens = network.stream(ids, length, **sampling)
        _show([prompt], tokenizer, tokens)


@app.command(epilog="[bold]minipeft chat[/]   end with Ctrl-D")
def chat(
    model: Model = None,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    length: Length = 300,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk with a language model; it remembers the conversation until its context is full."""
    with user_errors():
        network, tokenizer = _load(model, adapter)
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop_ids": tokenizer.stop_ids}
    messages = [{"role": "system", "content": system}] if system else []
    if sys.stdin.isatty():
        err.print(f"[dim]{model or _model_of(adapter)}{f' with {adapter}' if adapter else ''}; Ctrl-D ends[/]")
    while (text := _ask()) is not None:
        messages.append({"role": "user", "content": text})
        with user_errors():
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            tokens = network.stream(ids, length, **sampling)
            answer = _show([], tokenizer, (token for token in tokens if token not in tokenizer.stop_ids))
        messages.append({"role": "assistant", "content": answer})


@app.command(epilog="[bold]minipeft merge --adapter runs/smollm2-lora --out merged[/]")
def merge(
    adapter: Annotated[Path, typer.Option(help="A directory with a saved adapter.")],
    directory: Annotated[Path, typer.Option("--out", help="The Hugging Face directory to write.")],
    model: Model = None,
) -> None:
    """Add an adapter's update to the weights and write the whole model, with its tokenizer, for transformers too."""
    from . import save_model
    from .quant.model import dequantize_model

    check_writable(directory, "--out", directory=True)
    if (directory / "adapter_config.json").exists():  # transformers would put the adapter on once more
        fail(f"--out: {directory} holds an adapter; another directory is accepted")
    with user_errors():
        model = model or _model_of(adapter)
    if directory.exists() and Path(model).exists() and directory.samefile(model):
        fail(f"--out: {directory} is the model itself; another directory is accepted")
    with user_errors():
        network, tokenizer = _load(model, adapter)
        with err.status("merging …") if err.is_terminal else nullcontext():
            save_model(dequantize_model(network).merge_and_unload(), directory, tokenizer)
    size = (directory / "model.safetensors").stat().st_size
    out.print(f"saved [bold]{directory}[/] ({size / 1e6:,.0f} MB); it needs no adapter:", soft_wrap=True)
    out.print(f"  [bold]minipeft chat --model {directory}[/]", soft_wrap=True)
    out.print(f'  [bold]transformers.AutoModelForCausalLM.from_pretrained("{directory}")[/]', soft_wrap=True)


@app.command(epilog="[bold]minipeft memory --params 7B --method qlora --seq 512[/]")
def memory(
    params: Annotated[str, typer.Option(help="7B, 135M …, or the path of a config.json.")] = "7B",
    method: Annotated[str, typer.Option(help="full, lora or qlora; all shows them side by side.")] = "all",
    r: Annotated[int, typer.Option(min=1, help="Rank of the adapters, on all linear layers.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 512,
    dtype_bytes: Annotated[int, typer.Option(help="Bytes of a number that is not quantized: 4 or 2.")] = 2,
    adapter_bytes: Annotated[int, typer.Option(help="Of an adapter's, its gradient's and states': 4 or 2.")] = 4,
    optimizer: Annotated[str, typer.Option(help="sgd, momentum, adam, adamw or amsgrad.")] = "adamw",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Blocks keep only their input.")] = False,
) -> None:
    """What fine-tuning a language model of any size needs in memory, part by part, by formula."""
    from rich.table import Table

    from .measure import format_bytes, memory_parts

    methods = ("full", "lora", "qlora") if method == "all" else (method,)
    for name, size in {"--dtype-bytes": dtype_bytes, "--adapter-bytes": adapter_bytes}.items():
        if size not in (2, 4):
            fail(f"{name}: got {size}; accepted are 4 and 2")
    options = {"r": r, "batch": batch, "seq": seq, "optimizer": optimizer, "checkpointing": checkpointing}
    with user_errors():
        tables = [
            memory_parts(params, m, dtype_bytes=dtype_bytes, adapter_bytes=adapter_bytes, **options) for m in methods
        ]
    table = Table(f"{params}, batch {batch}, {seq} tokens", *methods)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in [part for part in tables[0] if any(parts[part] for parts in tables)]:
        table.add_row(part, *[format_bytes(parts[part]) if parts[part] else "–" for parts in tables])
    table.add_section()
    table.add_row("total", *[format_bytes(sum(parts.values())) for parts in tables])
    out.print(table)
    kept = "inputs of blocks alone are kept (checkpointing)" if checkpointing else "all activations are kept"
    out.print(f"{optimizer}, r = {r}, adapters and what belongs to them in {8 * adapter_bytes} bits; {kept}.")


def _ask() -> str | None:
    """A line that is not empty, or None at the end of the input."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if text:
            return text


def _run_of(adapter: Path | None) -> dict[str, Any]:
    """What `minipeft train` wrote beside an adapter; nothing where it came from elsewhere."""
    from .adapt import RUN

    return read_json(adapter / RUN) if adapter is not None and (adapter / RUN).is_file() else {}


def _model_of(adapter: Path | None) -> str:
    """The model that an adapter was trained on; smollm2 where that is not written beside it."""
    model = _run_of(adapter).get("model")
    return model if isinstance(model, str) else "smollm2"


def _load(model: str | None, adapter: Path | None) -> tuple[Any, Any]:
    """Model and tokenizer. An adapter that was trained beside codes is put on the same codes."""
    from . import PeftModel, load_model, load_tokenizer
    from .quant.linear import QuantizedLinear
    from .quant.model import quantize_model
    from .recipes import METHODS

    model = model or _model_of(adapter)
    network = load_model(model)
    recipe = METHODS.get(str(_run_of(adapter).get("method")))
    if recipe and recipe.quantize and not any(isinstance(module, QuantizedLinear) for module in network.modules()):
        quantize_model(network, recipe.quantize)
    return (PeftModel.from_pretrained(network, adapter) if adapter else network), load_tokenizer(model)


def _show(first: list[str], tokenizer: Any, tokens: Iterable[int]) -> str:
    """Print pieces of text as the tokens come; returns the text of the tokens."""
    pieces = []
    for piece in first:
        out.print(piece, end="", markup=False, soft_wrap=True)
    for piece in tokenizer.stream(tokens):
        pieces.append(piece)
        out.print(piece, end="", markup=False, soft_wrap=True)
        out.file.flush()
    out.print()
    return "".join(pieces)
