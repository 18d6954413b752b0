"""The ledger: verdicts follow from evidence, and a library that is wrong makes claims fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
from findings import figures, says_the_same_in_chinese

from minipeft import backend, ledger, rank
from minipeft.ledger import Evidence, language, lora, runs
from minipeft.methods import lora as formulas

LORA = {
    "lora.low-rank": "confirmed",
    "lora.frozen": "confirmed",
    "lora.identity-at-init": "confirmed",
    "lora.one-zero": "confirmed within limits",
    "lora.two-nonzero": "confirmed within limits",
    "lora.latency": "measured",
    "lora.merge": "confirmed within limits",
    "lora.row-column-rank": "confirmed",
    "lora.svd-low-dim": "confirmed",
    "lora.overparameterized": "measured",
    "lora.memory-parts": "confirmed",
    "lora.forward-flops": "confirmed",
    "lora.backward-flops": "confirmed",
    "lora.not-train-efficient": "confirmed",
    "lora.early-movement": "measured",
    "lora.smaller-faster": "measured",
    "lora.hybrid": "measured",
}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, ledger.Verdict]:
    return {verdict.id: verdict for verdict in ledger.run(["LoRA"])}


def test_every_claim_of_the_lora_section_is_judged_in_the_document_s_order(verdicts):
    assert list(verdicts) == list(LORA)


@pytest.mark.parametrize("id", LORA)
def test_verdicts_are_those_that_arithmetic_and_the_papers_lead_one_to_expect(verdicts, id):
    assert verdicts[id].verdict == LORA[id], verdicts[id].found


@pytest.mark.parametrize("id", LORA)
def test_every_verdict_shows_figures_that_json_can_hold(verdicts, id):
    assert verdicts[id].figures
    assert any(character.isdigit() for character in verdicts[id].found)
    json.dumps(verdicts[id].figures, default=float, allow_nan=False)


@pytest.mark.parametrize("id", LORA)
def test_the_chinese_finding_has_the_english_one_s_figures(verdicts, id):
    assert says_the_same_in_chinese(verdicts[id])


def test_figures_are_told_apart_by_sign_unit_and_count():
    assert figures("r=8, 8 layers: -0.10 (12.5%), 1,024 in float32") == figures("1,024：8 -0.10，r = 8；12.5%；float32")
    for other in ("r=8: -0.10 (12.5%)", "r=8, 8: 0.10 (12.5%)", "r=8, 8: -0.10 (12.5)", "r=8, 8: -0.1 (12.5%)"):
        assert figures(other) != figures("r=8, 8: -0.10 (12.5%)")


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        (Evidence("", "", holds=None), "measured"),
        (Evidence("", "", holds=True), "confirmed"),
        (Evidence("", "", holds=False, within=True), "confirmed within limits"),
        (Evidence("", "", holds=False, instead=True), "corrected"),
        (Evidence("", "", holds=False), "failed"),
    ],
)
def test_a_verdict_follows_from_what_held(evidence, verdict):
    assert evidence.verdict == verdict


def test_a_check_that_raises_has_failed_and_says_why():
    def check() -> Evidence:
        raise ZeroDivisionError("nothing to divide by")

    verdict = ledger.Claim("x.y", "X", "", check, full=False).judge()
    assert verdict.verdict == "failed"
    assert "ZeroDivisionError: nothing to divide by" in verdict.found
    assert verdict.found_zh == "检验中断：ZeroDivisionError: nothing to divide by"


def test_a_claim_of_two_checks_says_what_both_found_in_both_languages(monkeypatch):
    monkeypatch.setattr(ledger, "_claims", dict(ledger._claims))
    monkeypatch.setattr(ledger, "_on_the_model", dict(ledger._on_the_model))
    check = lambda n: lambda: Evidence(f"Small: {n}.", f"小：{n}。", holds=True)  # noqa: E731
    ledger._claims["lora.merge"] = ledger.Claim("lora.merge", "LoRA", "same", check(1), full=False)
    ledger._on_the_model["lora.merge"] = ledger.Claim("lora.merge", "LoRA", "same", check(2), full=True)
    [claim] = ledger.claims(["lora.merge"], full=True)
    verdict = claim.judge()
    assert (verdict.found, verdict.found_zh) == ("Small: 1. Small: 2.", "小：1。小：2。")


def test_what_the_language_model_learned_of_itself_is_said_in_both_languages(monkeypatch):
    run = {"answered": 0.65, "loss": 0.42, "parameters": 2_419_200, "losses": [0.42]}
    monkeypatch.setattr(language, "_identities", lambda: {kind: [run, run | {"loss": 0.4}] for kind in language.RANKS})
    assert says_the_same_in_chinese(language.all_linear())


def test_an_unknown_section_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"got 'Lara'.*LoRA"):
        list(ledger.run(["Lara"]))


def test_single_claims_can_be_chosen():
    assert [claim.id for claim in ledger.claims(["lora.merge"])] == ["lora.merge"]


# Each of these breaks the library in one place; the claim that rests on it must notice.


def test_a_start_that_is_not_the_identity_fails_the_identity_claim(monkeypatch):
    monkeypatch.setattr(formulas, "init_lora", lambda *a, **k: [f + 0.01 for f in lora.init_lora(*a, **k)])
    assert lora.identity_at_init().verdict == "failed"


def test_a_merge_with_the_wrong_scaling_fails_the_merge_claim(monkeypatch):
    monkeypatch.setattr(lora, "merge_lora", lambda W, A, B, s: formulas.merge_lora(W, A, B, 0.9 * s))
    assert lora.merge().verdict == "failed"


def test_an_update_of_full_rank_fails_the_low_rank_claim(monkeypatch):
    full = lambda A, B, s: np.random.default_rng(0).standard_normal((len(B), A.shape[1]))  # noqa: E731
    monkeypatch.setattr(lora, "lora_delta", full)
    assert lora.low_rank().verdict == "failed"


def test_a_frozen_weight_that_changes_fails_the_frozen_claim(monkeypatch):
    run = runs.adapt("lora")
    changed = {name: array + (name == "head.bias") for name, array in run.before.items()}
    monkeypatch.setattr(lora, "adapt", lambda method: runs.Run(**{**vars(run), "before": changed}))
    assert lora.frozen().verdict == "failed"


def test_a_run_that_trains_nothing_does_not_confirm_that_weights_are_frozen(monkeypatch):
    untrained = formulas.LoraLinear.delta
    monkeypatch.setattr(formulas.LoraLinear, "delta", lambda self, adapter: 0 * untrained(self, adapter))
    assert lora.frozen().verdict == "failed"


def test_a_model_without_adapters_does_not_confirm_the_identity_at_the_start(monkeypatch):
    monkeypatch.setattr(lora, "get_peft_model", lambda model, *a, **k: model)
    assert lora.identity_at_init().verdict == "failed"


def test_a_start_that_gives_up_too_little_of_w_fails_the_two_nonzero_claim(monkeypatch):
    right = formulas.unmerge_lora
    monkeypatch.setattr(formulas, "unmerge_lora", lambda W, A, B, s: right(W, A, B, 0.999 * s))
    assert lora.two_nonzero().verdict == "failed"


def test_a_model_that_merges_a_part_of_its_update_fails_the_merge_claim(monkeypatch):
    def merge(self, adapters):
        for name in adapters:
            self.weight.data = self.weight.data + 0.9 * self.delta(name)
            self.merged.append(name)

    monkeypatch.setattr(formulas.LoraLinear, "merge", merge)
    assert lora.merge().verdict == "failed"


def test_ranks_that_are_always_the_same_fail_both_claims_about_rank(monkeypatch):
    monkeypatch.setattr(rank, "matrix_rank", lambda *a, **k: 1)
    monkeypatch.setattr(rank, "row_rank_exact", lambda M: 1)
    monkeypatch.setattr(rank, "column_rank_exact", lambda M: 1)
    assert lora.row_column_rank().verdict == "failed"
    assert lora.low_rank().verdict == "failed"


def test_an_approximation_by_the_smallest_directions_fails_the_low_dimension_claim(monkeypatch):
    monkeypatch.setattr(rank, "best_rank_r", _last_directions)
    assert lora.svd_low_dim().verdict == "failed"


def _last_directions(W, r):
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return U[:, -r:] * S[-r:] @ Vt[-r:]


@pytest.mark.parametrize("check", [lora.memory_parts, lora.backward_flops])
def test_weights_that_train_beside_the_adapters_fail_what_is_said_of_lora_s_costs(monkeypatch, check):
    attach = lora.get_peft_model
    monkeypatch.setattr(lora, "get_peft_model", lambda *a, **k: attach(*a, **k).requires_grad_(True))
    assert check().verdict == "failed"


def test_products_that_are_counted_twice_fail_the_forward_claim(monkeypatch):
    counted = backend.matmul

    def twice(a, b, out=None):
        if backend.flop_counter is not None:
            backend.flop_counter.uncredited += 2 * a.size * b.shape[-1]
        return counted(a, b, out)

    monkeypatch.setattr(backend, "matmul", twice)
    assert lora.forward_flops().verdict == "failed"
