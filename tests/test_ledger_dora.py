"""The ledger's DoRA section: judged in order, and a formula that is wrong makes its claim fail."""

from __future__ import annotations

import functools
import json

import pytest
from findings import says_the_same_in_chinese

from minipeft import backend, ledger, ops
from minipeft.ledger import dora as section
from minipeft.methods import dora as formulas
from minipeft.methods.lora import LoraLinear

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
    monkeypatch.setattr(section, "dora_gradients", lambda V, m, G, norm: formulas.dora_gradients(V, m, G, "constant"))
    assert section.gradient().verdict == "failed"


def test_a_magnitude_one_percent_too_long_fails_the_decomposition_claim(monkeypatch):
    monkeypatch.setattr(section, "dora_magnitude", lambda W, kind="column": 1.01 * formulas.dora_magnitude(W, kind))
    assert section.decompose().verdict == "failed"


@pytest.fixture
def afresh(monkeypatch):
    """Runs of the section that no test before has left behind, and none that this one leaves."""
    monkeypatch.setattr(section, "_train", functools.cache(section._train.__wrapped__))


def test_a_layer_that_does_not_normalize_fails_the_update_claim(monkeypatch, afresh):
    monkeypatch.setattr(formulas.DoraLinear, "forward", LoraLinear.forward)
    assert section.update().verdict == "failed"


def test_one_magnitude_where_each_column_should_have_its_own_does_not_correct_the_document(monkeypatch, afresh):
    right = formulas.dora_magnitude
    for module in (formulas, section):
        monkeypatch.setattr(module, "dora_magnitude", lambda W, kind="column": right(W, "scalar"))
    assert section.scalar().verdict == "failed"


@pytest.mark.parametrize("swapped", ["graph", "constant"])
def test_both_forms_of_the_gradient_must_be_their_own(monkeypatch, swapped):
    right = section.dora_linear
    monkeypatch.setattr(section, "dora_linear", lambda *a: right(*a[:7], swapped))
    assert section.gradient().verdict == "failed"


def test_a_model_without_magnitudes_does_not_confirm_that_weights_are_decomposed(monkeypatch):
    attach = section.get_peft_model
    monkeypatch.setattr(section, "get_peft_model", lambda model, config: attach(model, section.LoraConfig()))
    assert section.decompose().verdict == "failed"


def test_a_merged_layer_that_still_computes_its_adapter_fails_the_merge_claim(monkeypatch):
    right = formulas.DoraLinear.forward

    def forward(self, x):
        backend.matmul(ops.tensor(x).data, self.lora_A["default"].weight.data.T)
        return right(self, x)

    monkeypatch.setattr(formulas.DoraLinear, "forward", forward)
    assert section.merge().verdict == "failed"
