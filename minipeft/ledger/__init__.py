"""The ledger: every checkable statement of the document, judged by numbers that are computed now.

A claim is one function, in the module of its section. It returns `Evidence`: what was found, and which statements
held. The verdict follows from that by one rule (`Evidence.verdict`); no verdict and no figure is written in the code.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# The contents, in the document's order: each section's modules, and the ids of its claims.
MODULES = {
    "LoRA": ("lora", "others", "language"),
    "QLoRA": (
        "qlora_codes",
        "qlora_steps",
        "qlora_static",
        "qlora_training",
        "qlora_after",
        "qlora_cost",
        "qlora_paged",
    ),
    "AdaLoRA": ("adalora",),
    "LoRA-GA": ("lora_ga",),
    "DoRA": ("dora",),
    "LoRA-Pro": ("lora_pro",),
}
SECTIONS = tuple(MODULES)
ORDER = """
    lora.low-rank lora.frozen lora.identity-at-init lora.one-zero lora.two-nonzero lora.latency lora.merge
    lora.row-column-rank lora.svd-low-dim lora.overparameterized lora.memory-parts lora.forward-flops
    lora.backward-flops lora.not-train-efficient lora.all-linear lora.early-movement lora.smaller-faster
    lora.hybrid
    qlora.nf4-table qlora.nf4-error qlora.storage qlora.dynamic-dequant qlora.forward qlora.backward
    qlora.static-quant qlora.4bit-arithmetic qlora.requantize qlora.speed qlora.batch qlora.7b qlora.quality
    qlora.low-bits qlora.error-compensation qlora.same-adapter qlora.merge qlora.inference-dequant qlora.paged
    qlora.8bit qlora.double-quant
    adalora.svd-form adalora.orthogonal adalora.importance adalora.prune adalora.reallocate adalora.overhead
    adalora.params adalora.regularize adalora.uniform adalora.sensitive
    loraga.name loraga.accumulation loraga.accumulation-memory loraga.accumulate-adapters loraga.alignment
    loraga.start loraga.convergence
    dora.decompose dora.scalar dora.update dora.trainable dora.gradient dora.decoupled dora.better dora.merge
    lorapro.equivalence lorapro.optimal lorapro.x-free lorapro.sylvester lorapro.descent lorapro.gap lorapro.cost
""".split()  # noqa: SIM905 - one line a section reads better


@dataclass(frozen=True)
class Evidence:
    """What a check found.

    Attributes:
        found: one or two sentences, with the figures.
        found_zh: the same in Chinese, with the same figures.
        holds: the document's statement held wherever it was tried. None: it is about an amount, which was measured.
        within: where it did not hold everywhere: it held inside the limits that `found` names.
        instead: where it is wrong: the right statement, in `found`, held.
        figures: the numbers, for JSON and for plots.
    """

    found: str
    found_zh: str
    holds: bool | None = None
    within: bool = False
    instead: bool = False
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """confirmed · confirmed within limits · corrected · measured · failed (nothing that was claimed held)."""
        if self.holds is None:
            return "measured"
        if self.holds:
            return "confirmed"
        return "confirmed within limits" if self.within else "corrected" if self.instead else "failed"


@dataclass(frozen=True)
class Verdict:
    """One row of the ledger: the claim, what was found, and how the document's statement stands."""

    id: str
    section: str
    statement: str
    found: str
    found_zh: str
    verdict: str
    seconds: float
    figures: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A statement of the document and the function that checks it."""

    id: str
    section: str
    statement: str
    check: Callable[[], Evidence]
    full: bool

    def judge(self) -> Verdict:
        """Run the check. One that raises has failed, with the error as what was found."""
        start = time.perf_counter()
        try:
            evidence = self.check()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            evidence = Evidence(f"the check stopped: {said}", f"检验中断：{said}", holds=False)
        seconds, claimed = time.perf_counter() - start, (self.id, self.section, self.statement)
        return Verdict(*claimed, evidence.found, evidence.found_zh, evidence.verdict, seconds, evidence.figures)


def chinese_marks(listed: str) -> str:
    """A list of names and figures, which need no translation, with Chinese marks between them."""
    for mark, chinese in ((", ", "，"), ("; ", "；"), (": ", "："), (" (", "（"), (")", "）")):
        listed = listed.replace(mark, chinese)
    return listed


_claims: dict[str, Claim] = {}
_on_the_model: dict[str, Claim] = {}


def claim(id: str, statement: str, full: bool = False) -> Callable[[Callable[[], Evidence]], Callable[[], Evidence]]:
    """Put a check into the ledger.

    With `full` it needs the real language model and runs only in `minipeft verify --full`; where the id has another
    check as well, the two are one row then.
    """

    def register(check: Callable[[], Evidence]) -> Callable[[], Evidence]:
        module = check.__module__.rpartition(".")[2]
        section = next(section for section, modules in MODULES.items() if module in modules)
        (_on_the_model if full else _claims)[id] = Claim(id, section, statement, check, full)
        return check

    return register


def _repeated(quick: Claim, on_the_model: Claim) -> Claim:
    """One claim of both checks: what was claimed must hold in both."""

    @functools.wraps(quick.check)
    def check() -> Evidence:
        a, b = quick.check(), on_the_model.check()
        held = [{"holds": e.holds, "within": e.holds or e.within, "instead": e.holds or e.instead} for e in (a, b)]
        both = {name: held[0][name] and held[1][name] for name in held[0]}
        if a.holds is None or b.holds is None:
            both["holds"] = None
        figures = {**a.figures, "SmolLM2": b.figures}
        return Evidence(f"{a.found} {b.found}", a.found_zh + b.found_zh, figures=figures, **both)

    return replace(quick, check=check)


def claims(sections: Sequence[str] = (), full: bool = False) -> list[Claim]:
    """The claims of these sections (all when none is named), in the document's order.

    Args:
        sections: names of sections ("LoRA", in any case) or ids of single claims ("lora.merge").

    Raises:
        ValueError: a name that is neither.
    """
    for module in itertools.chain(*MODULES.values()):
        importlib.import_module(f".{module}", __name__)
    names = {section.lower() for section in SECTIONS} | _claims.keys() | _on_the_model.keys()
    for wanted in sections:
        if wanted.lower() not in names:
            raise ValueError(
                f"section: got {wanted!r}; accepted are {', '.join(SECTIONS)} and ids such as 'lora.merge'"
            )
    found = dict(_claims)
    for id, c in _on_the_model.items() if full else ():
        found[id] = _repeated(found[id], c) if id in found else c
    chosen = {wanted.lower() for wanted in sections}
    return [
        c
        for c in sorted(found.values(), key=lambda c: ORDER.index(c.id))
        if not chosen or c.section.lower() in chosen or c.id in chosen
    ]


def run(sections: Sequence[str] = (), full: bool = False) -> Iterator[Verdict]:
    """Judge the claims of these sections, one after the other."""
    for c in claims(sections, full):
        yield c.judge()
