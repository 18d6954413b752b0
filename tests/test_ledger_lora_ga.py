"""The ledger's LoRA-GA section: judged in order, and a library that is wrong makes its claim fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
from findings import says_the_same_in_chinese

from minipeft import ledger, train
from minipeft.ledger import lora_ga as section
from minipeft.methods import lora, lora_ga
from minipeft.tensor import Tensor

EXPECTED = {
    "loraga.name": "corrected",
    "loraga.accumulation": "confirmed",
    "loraga.accumulation-memory": "corrected",
    "loraga.accumulate-adapters": "confirmed",
    "loraga.alignment": "confirmed",
    "loraga.start": "confirmed",
    "loraga.convergence": "measured",
}


@pytest.fixture(scope="module")
def verdicts():
    return {verdict.id: verdict for verdict in ledger.run(["LoRA-GA"])}


def test_every_claim_is_judged_in_the_documents_order(verdicts):
    assert {id: v.verdict for id, v in verdicts.items()} == EXPECTED, [v.found for v in verdicts.values()]
    assert list(verdicts) == list(EXPECTED)


@pytest.mark.parametrize("id", EXPECTED)
def test_figures_are_shown_and_json_can_hold_them(verdicts, id):
    assert any(character.isdigit() for character in verdicts[id].found)
    json.dumps(verdicts[id].figures, allow_nan=False)


@pytest.mark.parametrize("id", EXPECTED)
def test_the_chinese_finding_has_the_english_one_s_figures(verdicts, id):
    assert says_the_same_in_chinese(verdicts[id])


def test_convergence_compares_what_was_trained(verdicts):
    """Steps are read off the losses that are shown; three seeds a row."""
    for row in verdicts["loraga.convergence"].figures.values():
        assert len(row["steps"]) == len(row["accuracy"]) == len(row["losses"]) == 3
        for steps, losses in zip(row["steps"], row["losses"], strict=True):
            assert len(losses) == section.STEPS
            below = [n for n in range(5, len(losses) + 1) if np.mean(losses[n - 5 : n]) < section.TARGET]
            assert steps == (below[0] if below else section.STEPS + 1)


# --- each of these breaks one thing; the claim that rests on it must notice -------------------------------------------

RIGHT = lora_ga.lora_ga_init


def factors_changed_over(G, r, **options):
    """A from the left vectors' order: rows r + 1 … 2r, as the paper's B has."""
    return RIGHT(G, r, **options | {"direction": "A2rBr"})


def factors_at_random(G, r, **options):
    return lora.init_lora(*G.shape, r, "both", 0, G.dtype)


def factors_with_singular_values(G, r, **options):
    """The paper's, as if it had PEFT's B."""
    return RIGHT(G, r, **options | {"scale": "unit"})


@pytest.mark.parametrize("wrong", [factors_changed_over, factors_at_random])
def test_factors_that_are_not_the_papers_fail_the_name_claim(monkeypatch, wrong):
    monkeypatch.setattr(lora_ga, "lora_ga_init", wrong)
    assert section.name().verdict == "failed"


@pytest.mark.parametrize("wrong", [factors_at_random, factors_with_singular_values])
def test_factors_that_are_not_the_best_fail_the_alignment_claim(monkeypatch, wrong):
    monkeypatch.setattr(lora_ga, "lora_ga_init", wrong)
    assert section.alignment().verdict == "failed"


def test_an_alignment_of_one_factor_only_fails_the_alignment_claim(monkeypatch):
    right = lora_ga.gradient_alignment
    monkeypatch.setattr(lora_ga, "gradient_alignment", lambda G, A, B, s: right(G, A, 0 * B, s))
    assert section.alignment().verdict == "failed"


def test_gradients_that_are_summed_fail_the_accumulation_claim(monkeypatch):
    def summed(model, loss_fn, method, stream, n, step):
        for _ in range(n):
            loss_fn(model, next(stream)).backward()
        return 1.0, n

    monkeypatch.setattr(train, "_accumulate", summed)
    assert section.accumulation().verdict == "failed"


def test_graphs_that_stay_confirm_what_the_document_says_of_memory(monkeypatch):
    kept, right = [], section._loss

    def keeping(model, batch):
        kept.append(right(model, batch))
        return kept[-1] * 1.0

    monkeypatch.setattr(section, "_loss", keeping)
    monkeypatch.setattr(Tensor, "backward", lambda self, grad=None: None)  # it would free them
    assert section.accumulation_memory().verdict == "confirmed"


def test_accumulators_of_another_size_fail_the_adapters_claim(monkeypatch):
    monkeypatch.setattr(section, "_accumulator_bytes", lambda d, k, r: 4 * d * k)
    assert section.accumulate_adapters().verdict == "failed"


@pytest.mark.parametrize(("factor", "said"), [(1, "does not spare"), (0, "It spares")])
def test_whether_the_adapters_spare_activations_is_said_as_it_was_measured(monkeypatch, factor, said):
    right = section._parts

    def parts(kind, width, depth):
        found = right(kind, width, depth)
        return found | {"activations": found["activations"] * (factor if kind == "LoRA" else 1)}

    monkeypatch.setattr(section, "_parts", parts)
    assert said in section.accumulate_adapters().found


def test_a_base_that_keeps_its_weights_fails_the_adapters_claim(monkeypatch):
    monkeypatch.setattr(section, "quantize_model", lambda model, code: model)
    assert section.accumulate_adapters().verdict == "failed"


@pytest.mark.parametrize("factor", [0.0, 0.99])
def test_a_weight_that_does_not_give_up_sba_fails_the_start_claim(monkeypatch, factor):
    right = lora.unmerge_lora
    monkeypatch.setattr(lora, "unmerge_lora", lambda W, A, B, s: right(W, A, B, factor * s))
    assert section.start().verdict == "failed"
