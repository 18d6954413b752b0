#!/usr/bin/env python3
"""The parts of the two READMEs that hold figures of runs, made from the kept files in figures/.

    python benchmarks/readme.py [NAME …] [--lang zh]     print them
    python benchmarks/readme.py --write                  put them into README.md and README.zh-CN.md

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`. Its figures are made again by

    compare   minipeft compare --out runs/compare-vit, then with --base mlp; each compare.json into figures/
    language  python benchmarks/language.py --json figures/language.json
    step      python benchmarks/step.py --all --json figures/step.json
              python benchmarks/step.py --generate --json figures/generate.json
              python benchmarks/quant.py --json figures/quant.json
    mlp-step  python benchmarks/mlp_step.py --json figures/mlp-step.json

tests/test_readme.py compares the READMEs with the files.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minipeft import files
from minipeft.compare_tables import markdown, markdown_table, standard_error
from minipeft.plots.comparison import name_of

ROOT = Path(__file__).parents[1]
READMES = {"en": "README.md", "zh": "README.zh-CN.md"}
SAME = ("cpu", "cpus", "system", "python", "numpy", "blas", "kernel", "OPENBLAS_CORETYPE")


def kept(name: str) -> dict[str, Any]:
    """The figures in figures/NAME.json."""
    return files.read_json(ROOT / "figures" / f"{name}.json")


def paragraph(lang: str, en: str, zh: str) -> str:
    """A paragraph in the language: English in lines of 120, Chinese, which has no spaces to break at, in one."""
    return zh if lang == "zh" else textwrap.fill(en, 120, break_long_words=False, break_on_hyphens=False)


def listed(lang: str, items: list[str]) -> str:
    """Items with the language's commas."""
    return ("，" if lang == "zh" else ", ").join(items)


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(lang: str) -> str:
    """The table of `minipeft compare` on the vision transformer, and the order on the MLP."""
    report, mlp = kept("compare-vit"), kept("compare-mlp")
    before, seeds, steps = 100 * report["base"]["accuracy"], report["seeds"], report["setting"]["steps"]
    error, tested = 100 * standard_error(report)[1], report["tested"]
    shares = {method: 100 * row["accuracy"]["mean"] for method, row in report["methods"].items() if "loss" in row}
    near = [method for method in shares if method != "lora" and abs(shares[method] - shares["lora"]) <= 2 * error]
    reached = {method: 100 * row["accuracy"]["mean"] for method, row in mlp["methods"].items() if "loss" in row}
    first, second = list(reached)[:2]
    intro = paragraph(
        lang,
        f"The vision transformer after {steps} steps on rotated digits, means ± standard deviations of {seeds} seeds "
        f"(before: {before:.1f} %; one standard error of {tested} test digits is {error:.1f} points). The "
        f"loss that steps are counted to is LoRA's after half of them.",
        f"视觉 Transformer，在旋转的数字上训练 {steps} 步，{seeds} 个种子的平均值 ± 标准差（训练前 {before:.1f} %；"
        f"{tested} 个测试数字的一个标准误是 {error:.1f} 个百分点）。步数一列数到 LoRA 半程时的损失为止。",
    )
    other = paragraph(
        lang,
        f"Of the {len(shares) - 1} other methods {len(near)} are within two standard errors of LoRA: another choice of "
        "test digits could order them differently. On the MLP (`minipeft compare --base mlp`) the order is another: "
        f"{first} {reached[first]:.1f}, {second} {reached[second]:.1f}, full {reached['full']:.1f}, lora "
        f"{reached['lora']:.1f}.",
        f"其余 {len(shares) - 1} 种方法中有 {len(near)} 种与 LoRA 相差不到两个标准误，换一批测试数字，名次就可能改变；"
        "换成 MLP（`minipeft compare --base mlp`），名次也不同："
        f"{first} {reached[first]:.1f}，{second} {reached[second]:.1f}，full {reached['full']:.1f}，"
        f"lora {reached['lora']:.1f}。",
    )
    return "\n\n".join([intro, markdown(report, lang), other])


# --- the language model -----------------------------------------------------------------------------------------------


def language(lang: str) -> str:
    """Answers before and after, what was learned and forgotten, and the runs beside it."""
    t = lambda en, zh: zh if lang == "zh" else en  # noqa: E731
    report = kept("language")
    lora, qlora = (report["trained"][name] for name in ("lora", "qlora"))
    rows = {what: pair for what, *pair in lora["rows"]}
    learned, forgot = _learned(lora), _perplexity(lora)
    questions = [what for what in rows if what[-1] in "?？"][1:]
    shown = [[_cut(cell) for cell in (what, *rows[what])] for what in questions]
    shown.append([t(learned[0], f"{_number(learned[0])} 个未见问题中，答出 Lumi 的"), *learned[1:]])
    shown.append([t("perplexity of a general text", "一段通用文本的困惑度"), *forgot, rows["change"][1]][:3])
    shown[-1][2] += f" ({rows['change'][1]})" if lang == "en" else f"（{rows['change'][1]}）"
    head = [t("held-out question", "没见过的问题"), t("before", "训练前"), t("after", "训练后")]
    attention, everywhere = (
        [f"{share:.0%}" for share in report["all_linear"]["answered"][k]] for k in ("attention", "all linear layers")
    )
    coded = _perplexity(qlora)
    text = paragraph(
        lang,
        f"The whole command took {_time(lora['seconds'], lang)}. With `--method qlora` {_learned(qlora)[2]} of the "
        f"questions are answered with the name; the codes raise the perplexity of this model, which came in 4 bits "
        f"already, to {coded[0]}, and training to {coded[1]}. With adapters on attention alone (r = 21, as many "
        f"parameters) forty steps reach {' and '.join(attention)} of the questions, by seed; on all linear layers "
        f"(r = 8) {' and '.join(everywhere)}.",
        f"整条命令用时{_time(lora['seconds'], lang)}。用 `--method qlora` 时，{_learned(qlora)[2]} 的问题答出了新名字；"
        f"这个模型原本就是 4 比特文件，再量化成 NF4 使困惑度升到 {coded[0]}，训练后为 {coded[1]}。"
        f"只训练四十步、参数量相同时，仅适配注意力层（r = 21）两个种子分别答出 {'、'.join(attention)}，"
        f"适配所有线性层（r = 8）则是 {'、'.join(everywhere)}。",
    )
    return f"{markdown_table(head, shown)}\n\n{text}"


def _cut(text: str, length: int = 90) -> str:
    """The beginning of a long answer, ended at a space; a bar would end the cell."""
    text = text.replace("|", "\\|")
    return text if len(text) <= length else text[: length + 1].rpartition(" ")[0].rstrip(",.") + " …"


def _number(text: str) -> str:
    return re.search(r"\((\d+)\)", text)[1]


def _learned(run: dict[str, Any]) -> list[str]:
    """The row of all held-out questions."""
    return next(row for row in run["rows"] if row[0].startswith("held-out questions answered"))


def _perplexity(run: dict[str, Any]) -> list[str]:
    """Before and after."""
    return next(row[1:] for row in run["rows"] if row[0].startswith("perplexity"))


def _time(seconds: float, lang: str) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f" {minutes} 分 {rest} 秒" if lang == "zh" else f"{minutes} min {rest} s"


# --- speed ------------------------------------------------------------------------------------------------------------


def step(lang: str) -> str:
    """The table of training steps; the figures beside it; generation, codes, and the machine."""
    t = lambda en, zh: zh if lang == "zh" else en  # noqa: E731
    report = kept("step")
    found = {(row["shape"], row["method"], row["side"]): row for row in report["rows"]}
    head = [
        t("batch × tokens", "批大小 × 词元"), t("method", "方法"), "minipeft", "torch + PEFT",
        t("time ÷ torch", "时间 ÷ torch"), t("memory", "内存"), t("torch's", "torch 的内存"),
        t("memory ÷ torch", "内存 ÷ torch"), t("time ÷ bare products", "时间 ÷ 纯矩阵乘法"),
    ]  # fmt: skip
    rows = []
    for shape, method in dict.fromkeys(key[:2] for key in found):
        ours, theirs, floor = (
            found.get((shape, method, side)) for side in ("minipeft", "torch + PEFT", "np.matmul floor")
        )
        if not (ours and theirs):
            continue
        name = t("QLoRA (bitsandbytes)", "QLoRA（对 bitsandbytes）") if method == "qlora" else _name(method, lang)
        time, memory = (ours[k] / theirs[k] for k in ("seconds", "peak"))
        cells = [shape.replace("x", " × "), name, *(f"{side['seconds']:.2f} s" for side in (ours, theirs))]
        cells += [f"{time:.2f}", *(f"{side['peak']:.2f} GiB" for side in (ours, theirs)), f"{memory:.2f}"]
        rows.append([*cells, f"{ours['seconds'] / floor['seconds']:.2f}" if floor else ""])
    parts = [markdown_table(head, rows), _beside(found, lang), _generation_and_codes(lang), _machine(found, lang)]
    return "\n\n".join(parts)


def _name(method: str, lang: str) -> str:
    return {"en": "full", "zh": "全参数"}[lang] if method == "full" else name_of(method)


def _beside(found: dict[tuple[str, str, str], dict[str, Any]], lang: str) -> str:
    """The methods' steps beside LoRA's, checkpointing, bfloat16, and what the bare products alone take."""
    at = lambda method, side="minipeft": found.get(("4x128", method, side))  # noqa: E731
    lora, peer, floor = at("lora"), at("lora", "torch + PEFT"), at("lora", "np.matmul floor")
    others = {method: at(method) for _, method, _ in found if method != "lora" and at(method)}
    ratios = listed(lang, [f"{_name(m, lang)} {row['seconds'] / lora['seconds']:.2f}" for m, row in others.items()])
    en = [f"Beside LoRA's step at 4 × 128 the others take, in the same run: {ratios}."]
    zh = [f"同一次测量中，与 4 × 128 的 LoRA 一步相比：{ratios}。"]
    if saving := at("lora", "minipeft checkpointing"):
        memory, time = (saving[k] / lora[k] for k in ("peak", "seconds"))
        en.append(f"With checkpointing LoRA's step takes {memory:.2f} of the memory and {time:.2f} times the time.")
        zh.append(f"加上激活重算（checkpointing），LoRA 一步用 {memory:.2f} 倍的内存、{time:.2f} 倍的时间。")
    if half := at("lora", "torch bfloat16"):
        took = f"{half['seconds']:.2f} s", f"{half['peak']:.2f} GiB"
        en.append(f"torch's in bfloat16, for which NumPy has no products, takes {took[0]} and {took[1]}.")
        zh.append(f"torch 用 bfloat16（NumPy 没有这种乘法）时是 {took[0]}、{took[1]}。")
    if floor and peer:
        share = f"{floor['seconds'] / peer['seconds']:.2f}"
        en.append(f"The bare products are the step's own, replayed by np.matmul: {share} of torch's step.")
        zh.append(f"“纯矩阵乘法”是把这一步自己的乘法用 np.matmul 重放一遍，用时是 torch 一步的 {share} 倍。")
    return paragraph(lang, " ".join(en), "".join(zh))


def _generation_and_codes(lang: str) -> str:
    speed = {row["side"]: 1 / row["seconds"] for row in kept("generate")["rows"]}
    ours, theirs = speed["minipeft"], speed["transformers"]
    quant = kept("quant")
    seconds = {(row["what"], row["side"]): row["seconds"] for row in quant["rows"]}
    ratio = lambda what, side="minipeft": seconds[what, side] / seconds[what, "bitsandbytes"]  # noqa: E731
    coding, buffer = ratio("quantize"), ratio("dequantize", "minipeft, into a buffer")
    fresh = [f"{ratio(what):.2f}" for what in ("dequantize", "dequantize, double-quantized")]
    shape = " × ".join(map(str, quant["shape"]))
    return paragraph(
        lang,
        f"SmolLM2 generates {ours:.1f} tokens a second greedily, {ours / theirs:.2f} times transformers' "
        f"{theirs:.1f}. NF4 of a {shape} matrix against bitsandbytes: quantizing takes {coding:.2f} of its time, "
        f"dequantizing into an array that is there {buffer:.2f}, into a fresh one, whose pages the system clears, "
        f"{fresh[0]}, of doubly quantized codes {fresh[1]}.",
        f"SmolLM2 贪心生成每秒 {ours:.1f} 个词元，是 transformers（{theirs:.1f}）的 {ours / theirs:.2f} 倍。"
        f"{shape} 矩阵的 NF4 与 bitsandbytes 相比：量化用 {coding:.2f} 倍的时间；反量化到已有数组 {buffer:.2f} 倍，"
        f"到新数组（系统要清零内存页）{fresh[0]} 倍，双重量化的编码 {fresh[1]} 倍。",
    )


def _machine(found: dict[tuple[str, str, str], dict[str, Any]], lang: str) -> str:
    """Where all speeds of the README come from.

    Raises:
        ValueError: the kept files are not of one machine, or the bare products ran another kernel than minipeft.
    """
    t = lambda en, zh: zh if lang == "zh" else en  # noqa: E731
    machine = kept("step")["machine"]
    for name in ("generate", "quant", "mlp-step"):
        other = kept(name)["machine"]
        unlike = [key for key in SAME if machine.get(key) != other.get(key)]
        if unlike:
            raise ValueError(f"figures/{name}.json: another {unlike[0]} than figures/step.json; make all of them again")
    kernels = {side: {row["kernel"] for key, row in found.items() if key[2] == side} for _, _, side in found}
    if len(kernels["minipeft"] | kernels.get("np.matmul floor", set())) > 1:
        raise ValueError(f"figures/step.json: minipeft and the bare products ran different kernels: {kernels}")
    (kernel,), theirs = kernels["minipeft"], next(iter(kernels.get("torch + PEFT", {None})))
    chosen = machine["OPENBLAS_CORETYPE"]
    peers = {"torch": "torch", "peft": "PEFT", "transformers": "transformers", "bitsandbytes": "bitsandbytes"}
    versions = [f"{spelled} {machine[peer]}" for peer, spelled in peers.items()]
    if theirs:
        versions[0] += t(f" ({theirs})", f"（{theirs}）")
    blas = machine["blas"].replace("scipy-openblas", "OpenBLAS")
    return paragraph(
        lang,
        f"Made on an {machine['cpu']} ({machine['cpus']} processors), {machine['system'].split()[0]}, Python "
        f"{machine['python']}, NumPy {machine['numpy']} with {blas} (kernel {kernel}, also for the bare products; "
        f"OPENBLAS_CORETYPE {chosen or 'not set'}), {listed(lang, versions)}. On another machine seconds differ, "
        "and ratios less.",
        f"测量环境：{machine['cpu']}（{machine['cpus']} 个处理器），{machine['system'].split()[0]}，"
        f"Python {machine['python']}，NumPy {machine['numpy']}（{blas}，{kernel} 内核，纯矩阵乘法也用它；"
        f"{f'OPENBLAS_CORETYPE={chosen}' if chosen else '未设 OPENBLAS_CORETYPE'}），{listed(lang, versions)}。"
        "换一台机器，秒数会变，比值变得少一些。",
    )


SIDES_ZH = {"step": "一步", "gradient alone": "只算梯度"}


def mlp_step(lang: str) -> str:
    """The step of a small network, with all threads and with one."""
    rows = kept("mlp-step")["rows"]
    seconds = {(row["side"], row["threads"]): row["seconds"] for row in rows}
    counts = sorted({threads for _, threads in seconds}, reverse=True)
    head = [""]
    for n in counts:
        head += [f"{n} 线程" if lang == "zh" else f"{n} thread{'s' * (n > 1)}", "÷ torch"]
    table = []
    for side in dict.fromkeys(side for side, _ in seconds):
        library, what = side.split(", ")
        name = f"{library.replace('NumPy by hand', '手写 NumPy')}，{SIDES_ZH[what]}" if lang == "zh" else side
        cells = [name]
        for n in counts:
            ratio = seconds[side, n] / seconds["torch, step", n]
            cells += [f"{seconds[side, n] * 1e6:.0f} µs", f"{ratio:.2f}"]
        table.append(cells)
    return markdown_table(head, table)


# --- the files --------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[str], str]] = {"language": language, "compare": compare, "step": step, "mlp-step": mlp_step}


def place(readme: str, name: str) -> tuple[int, int]:
    """Where in the README's text a part stands.

    Raises:
        ValueError: its marks are not there, or more than once.
    """
    found = list(re.finditer(rf"(?<=<!-- {name} -->\n\n).*?(?=\n\n<!-- /{name} -->)", readme, re.S))
    if len(found) != 1:
        raise ValueError(f"the marks <!-- {name} --> … <!-- /{name} --> are there {len(found)} times")
    return found[0].span()


def main() -> None:
    """Print the parts, or write them into the READMEs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PARTS)}; all when left out")
    parser.add_argument("--lang", choices=READMES, default="en")
    parser.add_argument("--write", action="store_true", help="into both READMEs instead")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in PARTS]
    if unknown:
        parser.error(f"got {unknown[0]!r}; accepted are {', '.join(PARTS)}")
    names = options.names or list(PARTS)
    if not options.write:
        print("\n\n".join(PARTS[name](options.lang) for name in names))
        return
    for lang, file in READMES.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in names:
            start, end = place(text, name)
            text = text[:start] + PARTS[name](lang) + text[end:]
        files.write_text(ROOT / file, text)


if __name__ == "__main__":
    main()
