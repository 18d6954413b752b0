"""The ledger's AdaLoRA section: judged in order, and a formula that is wrong makes its claim fail."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from findings import says_the_same_in_chinese

from minipeft import ledger
from minipeft.ledger import adalora as section
from minipeft.methods import adalora as formulas

EXPECTED = {
    "adalora.svd-form": "confirmed",
    "adalora.orthogonal": "corrected",
    "adalora.importance": "corrected",
    "adalora.prune": "confirmed",
    "adalora.reallocate": "confirmed",
    "adalora.overhead": "measured",
    "adalora.params": "measured",
    "adalora.regularize": "measured",
    "adalora.uniform": "measured",
    "adalora.sensitive": "measured",
}


@pytest.fixture(scope="module")
def verdicts():
    return list(ledger.run(["AdaLoRA"]))


def test_every_claim_is_judged_in_the_document_s_order(verdicts):
    assert {v.id: v.verdict for v in verdicts} == EXPECTED
    assert [v.id for v in verdicts] == list(EXPECTED)


def test_the_figures_can_be_written_as_json(verdicts):
    for verdict in verdicts:
        assert json.loads(json.dumps(verdict.figures))


def test_the_chinese_findings_have_the_english_ones_figures(verdicts):
    assert all(says_the_same_in_chinese(verdict) for verdict in verdicts)


def test_the_record_of_ranks_is_there_to_be_drawn(verdicts):
    figures = next(v.figures for v in verdicts if v.id == "adalora.reallocate")
    for record in figures["record"].values():
        assert record[0] == [0, dict.fromkeys(figures["planted"], 12)]
        assert sum(record[-1][1].values()) == sum(figures["planted"].values())
        assert [step for step, _ in record] == sorted(step for step, _ in record)


@pytest.fixture
def afresh(monkeypatch):
    """Runs of the section that no test before has left behind, and none that this one leaves."""
    for name in ("train", "planted", "_scored"):
        monkeypatch.setattr(section, name, functools.cache(getattr(section, name).__wrapped__))


def delta_without_lambda(P, lam, Q):
    return P @ Q


def not_orthonormal(P):
    return P / np.linalg.norm(P, axis=0)


def linear_budget(step, *, total_step, tinit, tfinal, init_budget, target_budget):
    left = min(max(1 - (step - tinit) / (total_step - tfinal - tinit), 0), 1)
    return int((init_budget - target_budget) * left + target_budget)


def combined_upside_down(*averages):
    return -RIGHT["_combined"](*averages)


def penalty_of_nothing(Ps, Qs, weight):
    return RIGHT["_penalty"](Ps, Qs, 1e-9)


def sensitivity_of_magnitude(P, lam, Q, gP, glam, gQ, state=None):
    return formulas.importance_magnitude(P, lam, Q), state


RIGHT = {name: getattr(formulas, name) for name in ("_combined", "_penalty")}


@pytest.mark.parametrize(
    ("name", "wrong", "check"),
    [
        ("adalora_delta", delta_without_lambda, "svd_form"),
        ("orthonormalize", not_orthonormal, "svd_form"),
        ("orthonormalize", not_orthonormal, "orthogonal"),
        ("_penalty", penalty_of_nothing, "orthogonal"),
        ("rank_budget", linear_budget, "prune"),
        ("_combined", combined_upside_down, "reallocate"),
    ],
)
def test_a_wrong_formula_makes_its_claim_fail(monkeypatch, afresh, name, wrong, check):
    monkeypatch.setattr(formulas, name, wrong)
    assert getattr(section, check)().verdict == "failed"


def test_the_two_scores_must_differ_for_a_correction(monkeypatch, afresh):
    monkeypatch.setattr(formulas, "importance_sensitivity", sensitivity_of_magnitude)
    assert section.importance().verdict == "confirmed"


def test_an_interval_that_is_not_kept_is_seen(monkeypatch, afresh):
    def every_step(self, model, step):
        interval, self.config.deltaT = self.config.deltaT, 1
        right(self, model, step)
        self.config.deltaT = interval

    right = formulas.AdaLora.after_step
    monkeypatch.setattr(formulas.AdaLora, "after_step", every_step)
    assert section.prune().verdict == "failed"


def test_scores_at_random_fail_the_claim_that_rank_goes_where_it_matters(monkeypatch, afresh):
    rng = np.random.default_rng(0)
    at_random = lambda self, name, layer: rng.random(layer.lora_E["default"].size)  # noqa: E731
    monkeypatch.setattr(formulas.AdaLora, "_scores", at_random)
    assert section.reallocate().verdict == "failed"


def test_a_layer_that_leaves_lambda_out_fails_the_form_s_claim(monkeypatch):
    def projection(self):
        P, _, Q = self.parameters_of("default")
        return self.base_layer.weight, self.base_layer.bias, Q, P, self.factor("default")

    section.train(4, 6, orthogonality="gram-schmidt")  # trained as it should be
    monkeypatch.setattr(formulas.AdaLoraLinear, "projection", projection)
    assert section.svd_form().verdict == "failed"


def test_a_pruning_of_other_directions_than_the_lowest_is_seen(monkeypatch, afresh):
    def first(self, done, layers):
        """Prune whatever comes last, whatever its score."""
        own = self._scores
        self._scores = lambda name, layer: np.arange(len(layer.lora_E["default"].data), 0.0, -1) + (name == "fc1")
        prune(self, done, layers)
        self._scores = own

    prune = formulas.AdaLora._prune
    monkeypatch.setattr(formulas.AdaLora, "_prune", first)
    assert section.prune().verdict == "failed"
