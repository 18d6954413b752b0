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


def gradients_left_as_they_are(A, B, gA, gB, scaling, X="sylvester"):
    return gA, gB


def gradients_that_climb(A, B, gA, gB, scaling, X="sylvester"):
    return tuple(-g for g in RIGHT(A, B, gA, gB, scaling, X))


def gradients_whose_x_does_not_cancel(A, B, gA, gB, scaling, X="sylvester"):
    gA, gB = RIGHT(A, B, gA, gB, scaling, X)
    return (gA if isinstance(X, str) else gA + X @ A), gB


def gradients_with_x_zero(A, B, gA, gB, scaling, X="sylvester"):
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
