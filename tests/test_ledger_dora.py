"""The ledger's DoRA section: judged in order, and a formula that is wrong makes its claim fail."""

from __future__ import annotations

import json

from findings import says_the_same_in_chinese

from minipeft import ledger
from minipeft.ledger import dora as section
from minipeft.methods import dora as formulas

EXPECTED = {
    "dora.decompose": "confirmed",
    "dora.scalar": "corrected",
    "dora.update": "confirmed",
    "dora.trainable": "confirmed",
    "dora.gradient": "confirmed",
    "dora.decoupled": "measured",
    "dora.better": "measured",
    "dora.merge": "confirmed within limits",
}


def test_every_claim_is_judged_in_the_documents_order():
    verdicts = {verdict.id: verdict for verdict in ledger.run(["DoRA"])}
    assert {id: v.verdict for id, v in verdicts.items()} == EXPECTED, [v.found for v in verdicts.values()]
    assert list(verdicts) == list(EXPECTED)
    for verdict in verdicts.values():
        json.dumps(verdict.figures, default=float, allow_nan=False)
        assert says_the_same_in_chinese(verdict)


def test_a_weight_that_is_not_normalized_fails_the_update_claim(monkeypatch):
    monkeypatch.setattr(section, "dora_norm", lambda *a, **k: 1.01 * formulas.dora_norm(*a, **k))
    assert section.update().verdict == "failed"


def test_gradients_without_the_projection_fail_the_gradient_claim(monkeypatch):
    monkeypatch.setattr(section, "dora_gradients", lambda V, m, G: formulas.dora_gradients(V, m, G, "constant"))
    assert section.gradient().verdict == "failed"


def test_a_magnitude_one_percent_too_long_fails_the_decomposition_claim(monkeypatch):
    monkeypatch.setattr(section, "dora_magnitude", lambda W, kind="column": 1.01 * formulas.dora_magnitude(W, kind))
    assert section.decompose().verdict == "failed"
