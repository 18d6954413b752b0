"""The ledger's LoRA-Pro section: judged in order, and a formula that is wrong makes its claim fail."""

from __future__ import annotations

import pytest
from findings import says_the_same_in_chinese

from minipeft import ledger
from minipeft.ledger import lora_pro as section
from minipeft.methods import lora_pro as formulas

PROVEN = [
    "lorapro.equivalence",
    "lorapro.optimal",
    "lorapro.x-free",
    "lorapro.sylvester",
    "lorapro.descent",
]
MEASURED = ["lorapro.gap", "lorapro.cost"]


def test_every_claim_is_judged_in_the_document_s_order():
    found = list(ledger.run(["LoRA-Pro"]))
    verdicts = {verdict.id: verdict.verdict for verdict in found}
    assert all(says_the_same_in_chinese(verdict) for verdict in found)
    assert list(verdicts) == PROVEN + MEASURED
    assert {verdicts[id] for id in PROVEN} == {"confirmed"}
    assert {verdicts[id] for id in MEASURED} == {"measured"}


def equivalent_gradient_of_half(A, B, gA, gB, scaling):
    return scaling * (B @ gA)


def gradients_left_as_they_are(A, B, gA, gB, scaling, X="sylvester", rtol=None):
    return gA, gB


def gradients_that_climb(A, B, gA, gB, scaling, X="sylvester", rtol=None):
    return tuple(-g for g in RIGHT(A, B, gA, gB, scaling, X))


def gradients_whose_x_does_not_cancel(A, B, gA, gB, scaling, X="sylvester", rtol=None):
    gA, gB = RIGHT(A, B, gA, gB, scaling, X)
    return (gA if isinstance(X, str) else gA + X @ A), gB


def gradients_with_x_zero(A, B, gA, gB, scaling, X="sylvester", rtol=None):
    return RIGHT(A, B, gA, gB, scaling, "zero" if isinstance(X, str) else X)


RIGHT = formulas.lora_pro_gradients


@pytest.mark.parametrize(
    ("function", "wrong", "check"),
    [
        ("equivalent_gradient", equivalent_gradient_of_half, section.equivalence),
        ("lora_pro_gradients", gradients_left_as_they_are, section.optimal),
        ("lora_pro_gradients", gradients_whose_x_does_not_cancel, section.x_free),
        ("lora_pro_gradients", gradients_with_x_zero, section.sylvester),
        ("lora_pro_gradients", gradients_that_climb, section.descent),
    ],
)
def test_a_wrong_formula_makes_its_claim_fail(monkeypatch, function, wrong, check):
    monkeypatch.setattr(formulas, function, wrong)
    assert check().verdict == "failed"


def test_a_method_that_leaves_lora_s_gradients_as_they_are_fails_the_claim_that_they_are_the_best(monkeypatch):
    monkeypatch.setattr(formulas.LoraPro, "before_step", lambda self, model, step: None)
    assert section.optimal().verdict == "failed"


def test_each_gap_is_of_the_rate_that_makes_the_lowest_loss(monkeypatch):
    best = {"full training": 1, "LoRA": 0, "LoRA-Pro plain": 2, "LoRA-Pro full": 1}
    loss = lambda name, lr, seed: 1.0 + seed + abs(section.RATES.index(lr) - best[name])  # noqa: E731
    monkeypatch.setattr(section, "_final_loss", loss)
    figures = section.gap().figures
    assert figures["rates"] == {name: section.RATES[i] for name, i in best.items()}
    assert figures["losses"] == {name: [1.0, 2.0, 3.0] for name in best}
