"""The ledger on Adapter, P-Tuning and full-then-LoRA: judged, and numbers that are wrong make claims fail."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from minipeft import LoraConfig, get_peft_model, ledger
from minipeft.ledger import others
from minipeft.ledger import runs as shared

VERDICTS = {"lora.not-train-efficient": "confirmed", "lora.hybrid": "measured"}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, ledger.Verdict]:
    return {verdict.id: verdict for verdict in ledger.run(list(VERDICTS))}


def test_both_claims_are_judged_and_their_figures_are_json(verdicts):
    assert {id: verdict.verdict for id, verdict in verdicts.items()} == VERDICTS
    for verdict in verdicts.values():
        json.dumps(verdict.figures, allow_nan=False)


# --- lora.not-train-efficient -----------------------------------------------------------------------------------------


def test_products_lie_between_two_thirds_and_all_of_full_training_s(verdicts):
    figures = verdicts["lora.not-train-efficient"].figures
    for method in others.EFFICIENT:
        assert 0.65 < figures[method]["flops"] < 0.8
        assert figures[method]["time"] > 0.3
    assert 1.8 < figures["full"]["crossed"] < 2  # dX and dW; the head's weight and the embeddings have no dW


def test_adapters_at_the_end_alone_whose_backward_does_not_cross_the_model_fail_the_claim(monkeypatch):
    def at_the_end(model, method, choice):
        if method == "full":
            return shared.prepared(model, method, choice)
        return get_peft_model(model, LoraConfig(r=8, target_modules=["model.layers.3.mlp.down_proj"]))

    monkeypatch.setattr(others, "prepared", at_the_end)
    evidence = others.not_train_efficient()
    assert evidence.verdict == "failed"
    assert evidence.figures["lora"]["crossed"] < 0.2


def test_a_method_that_trains_many_parameters_fails_the_claim(monkeypatch):
    monkeypatch.setattr(others, "prepared", lambda model, method, choice: shared.prepared(model, "full", choice))
    assert others.not_train_efficient().verdict == "failed"


# --- lora.hybrid ------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_two_phases_by_their_share_of_the_steps(verdicts):
    figures = verdicts["lora.hybrid"].figures
    assert list(figures) == ["0%", "10%", "20%", "30%", "100%"]
    for fraction in (0.1, 0.2, 0.3):
        for cost in ("flops", "mean_bytes"):
            expected = (1 - fraction) * figures["0%"][cost] + fraction * figures["100%"][cost]
            assert figures[f"{fraction:.0%}"][cost] == pytest.approx(expected, rel=1e-12)
        assert figures[f"{fraction:.0%}"]["peak_bytes"] == figures["100%"]["peak_bytes"] == 1
    assert figures["0%"]["flops"] < 1
    assert figures["0%"]["peak_bytes"] < 0.5


def test_the_ends_are_the_runs_of_lora_and_of_full_training(monkeypatch):
    """The same weights, to the bit, as the methods of those names at the one rate."""
    for fraction, method in ((0.0, "lora"), (1.0, "full")):
        at_rate = replace(shared.METHODS[method], lr=others.LR)
        monkeypatch.setattr(shared, "METHODS", {**shared.METHODS, method: at_rate})
        alone = shared.adapt.__wrapped__(method, "mlp", steps=others.STEPS)
        assert others.hybrid(fraction, 0).loss == alone.history.loss


def test_spreads_are_over_seeds_and_a_run_that_ends_elsewhere_widens_them(monkeypatch):
    usual = others.hybrid_training().figures["20%"]
    right = others.hybrid

    def hybrid(fraction, seed):
        run = right(fraction, seed)
        worse = [loss + 1 for loss in run.loss] if (fraction, seed) == (0.2, 1) else run.loss
        return others.HybridRun(**{**vars(run), "loss": worse})

    monkeypatch.setattr(others, "hybrid", hybrid)
    found = others.hybrid_training().figures["20%"]
    assert found["loss_spread"] > 2 * usual["loss_spread"]
    assert found["loss"] == pytest.approx(usual["loss"] + 1 / 4)
