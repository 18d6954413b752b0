"""The numbers that claims found, for figures: each claim is checked once in a process, by whoever asks first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import ledger

_found: dict[str, dict[str, Any]] = {}


def remember(verdicts: Iterable[ledger.Verdict]) -> None:
    """Take these verdicts' figures: the ledger has just run, and its claims need no second check."""
    _found.update((verdict.id, verdict.figures) for verdict in verdicts if verdict.verdict != "failed")


def figures(id: str) -> dict[str, Any]:
    """The figures of the claim `id`.

    Raises:
        ValueError: no such claim.
        RuntimeError: its check failed, so there is nothing to draw.
    """
    if id not in _found:
        [claim] = ledger.claims([id]) or ledger.claims([id], full=True)  # no language model where none is needed
        verdict = claim.judge()
        if verdict.verdict == "failed":
            raise RuntimeError(f"{id}: {verdict.found}")
        remember([verdict])
    return _found[id]
