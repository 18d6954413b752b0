"""The ledger: verdicts follow from evidence, and a library that is wrong makes claims fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
from findings import figures, says_the_same_in_chinese

from minipeft import ledger
from minipeft.ledger import Evidence, language, lora, runs
from minipeft.methods import lora as formulas

LORA = [
    "lora.low-rank",
    "lora.frozen",
    "lora.identity-at-init",
    "lora.one-zero",
    "lora.two-nonzero",
    "lora.latency",
    "lora.merge",
    "lora.row-column-rank",
    "lora.svd-low-dim",
    "lora.overparameterized",
    "lora.memory-parts",
    "lora.forward-flops",
    "lora.backward-flops",
    "lora.not-train-efficient",
    "lora.early-movement",
    "lora.smaller-faster",
    "lora.hybrid",
]
MEASURED = {"lora.latency", "lora.overparameterized", "lora.early-movement", "lora.smaller-faster", "lora.hybrid"}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, ledger.Verdict]:
    return {verdict.id: verdict for verdict in ledger.run(["LoRA"])}


def test_every_claim_of_the_lora_section_is_judged_in_the_document_s_order(verdicts):
    assert list(verdicts) == LORA


@pytest.mark.parametrize("id", LORA)
def test_no_check_fails_and_amounts_are_measured(verdicts, id):
    verdict = verdicts[id]
    assert verdict.verdict != "failed", verdict.found
    assert (verdict.verdict == "measured") == (id in MEASURED)


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
