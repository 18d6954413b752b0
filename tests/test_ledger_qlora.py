"""The ledger's QLoRA section: judged in order, and a library that is wrong makes its claims fail."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
from findings import says_the_same_in_chinese
from scipy.special import ndtri

from minipeft import ledger, optim, quant
from minipeft.ledger import qlora_after, qlora_codes, qlora_cost, qlora_paged, qlora_static, qlora_steps, qlora_training
from minipeft.measure import estimate
from minipeft.methods import lora, qlora
from minipeft.quant import linear as coded

EXPECTED = {
    "qlora.nf4-table": "confirmed",
    "qlora.nf4-error": "confirmed within limits",
    "qlora.storage": "confirmed",
    "qlora.dynamic-dequant": "confirmed",
    "qlora.forward": "confirmed",
    "qlora.backward": "corrected",
    "qlora.static-quant": "confirmed within limits",
    "qlora.4bit-arithmetic": "measured",
    "qlora.requantize": "corrected",
    "qlora.speed": "measured",
    "qlora.batch": "measured",
    "qlora.7b": "confirmed within limits",
    "qlora.quality": "measured",
    "qlora.low-bits": "measured",
    "qlora.error-compensation": "confirmed within limits",
    "qlora.same-adapter": "confirmed",
    "qlora.merge": "corrected",
    "qlora.inference-dequant": "corrected",
    "qlora.paged": "confirmed" if sys.platform == "linux" else "confirmed within limits",
    "qlora.8bit": "confirmed",
    "qlora.double-quant": "confirmed",
}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, ledger.Verdict]:
    return {verdict.id: verdict for verdict in ledger.run(["QLoRA"])}


def test_every_claim_is_judged_in_the_documents_order(verdicts):
    assert list(verdicts) == list(EXPECTED)


@pytest.mark.parametrize("id", EXPECTED)
def test_no_claim_fails_and_each_has_figures_that_json_can_hold(verdicts, id):
    verdict = verdicts[id]
    assert verdict.verdict == EXPECTED[id], verdict.found
    assert any(character.isdigit() for character in verdict.found)
    assert verdict.figures
    json.dumps(verdict.figures, default=float, allow_nan=False)


@pytest.mark.parametrize("id", EXPECTED)
def test_the_chinese_finding_has_the_english_one_s_figures(verdicts, id):
    assert says_the_same_in_chinese(verdicts[id])


def test_full_weights_are_alive_at_every_moment_that_the_timeline_shows(verdicts):
    timeline = verdicts["qlora.dynamic-dequant"].figures["timeline"]
    assert [moment["layer"] for moment in timeline] == ["0", "1", "2", "3", "3", "2", "1"]  # the first needs no dx
    assert {moment["full_weights"] for moment in timeline} == {1}


def test_a_lloyd_max_code_is_the_best_of_all_for_its_weights(verdicts):
    figures = verdicts["qlora.nf4-error"].figures
    cases = [case for kind in ("normal", "trained") for case in figures[kind].values()]
    assert all(case["lloyd_max"] < min(case["error"].values()) for case in cases)


def test_sixteen_numbers_for_a_normal_distribution_have_the_error_that_max_1960_tabulates():
    x = 0.15 * ndtri((np.arange(200_000) + 0.5) / 200_000)  # within [-1, 1], and not cut off there
    code = qlora_codes.lloyd_max(x, np.ones(x.size))
    assert ((x - qlora_codes.nearest(x, code)) ** 2).mean() / 0.15**2 == pytest.approx(0.009497, rel=0.002)


def test_stochastic_rounding_is_right_on_average():
    W = 0.1 * np.random.default_rng(0).standard_normal((4, 64)).astype("float32")
    rng = np.random.default_rng(1)
    mean = np.mean([qlora_static.round_to_nf4(W, rng) for _ in range(2000)], axis=0)
    largest_step = 0.31 * np.abs(W).max()
    assert np.abs(mean - W).max() < 5 * largest_step / 2 / np.sqrt(2000)  # five standard errors at most
    assert np.abs(qlora_static.round_to_nf4(W) - W).max() > 10 * np.abs(mean - W).max()


def test_steps_down_are_those_of_the_largest_numbers_and_counted_as_taken_back_where_they_did_not_get_smaller():
    before = np.float32([4, -4, 4, 1, 4] + [0] * 59)
    wanted = np.float32([3.9, -3, 4.1, 0.9, 4] + [0] * 59)
    assert qlora_static._steps_down(before, wanted, qlora_static.round_to_nf4(wanted)) == (2, 1)


def test_the_bytes_that_a_second_level_saves_are_those_of_every_matrix(verdicts):
    """7B: 32 blocks of four 4096² and three 4096 × 11008 matrices; 0.373 bits of each weight."""
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    saved = verdicts["qlora.double-quant"].figures["saved_bytes_7b"]
    assert saved == weights * (32 / 64 - 8 / 64 - 32 / (64 * 256)) / 8 - 32 * 7 * 4  # and a mean for each


# --- each of these breaks the library in one place; the claim that rests on it must notice ----------------------------


def test_a_table_that_is_not_the_published_one_fails_its_claim(monkeypatch):
    monkeypatch.setattr(qlora_codes, "nf4_table", lambda derived=False: quant.nf4_table(derived) * (1 - 1e-5 * derived))
    assert qlora_codes.nf4_is_normal().verdict == "failed"


def test_scales_of_four_bytes_for_32_weights_fail_the_storage_claim(monkeypatch):
    wrong = lambda linear, blocksize=64, double_quant=True: quant.Linear4bit(  # noqa: E731
        quant.quantize_nf4(linear.weight.data, 32)
    )
    monkeypatch.setattr(qlora_codes.Linear4bit, "from_linear", wrong)
    assert qlora_codes.storage().verdict == "failed"


def test_codes_that_are_further_off_than_int4_fail_the_claim_on_nf4s_error(monkeypatch):
    right = qlora_codes.dequantize
    monkeypatch.setattr(qlora_codes, "dequantize", lambda q: right(q) * (1 - 0.2 * (q.quant_type == "nf4")))
    assert qlora_codes.nf4_error().verdict == "failed"


def test_block_maxima_that_are_not_quantized_fail_the_double_quantization_claim(monkeypatch):
    monkeypatch.setattr(qlora_codes, "double_quantize", lambda q: q)
    assert qlora_codes.double_quantization().verdict == "failed"


def test_outlying_columns_in_int8_fail_the_claim_on_eight_bits(monkeypatch):
    monkeypatch.setattr(qlora_codes, "llm_int8", lambda X, W, threshold: quant.llm_int8(X, W, 0.0))
    assert qlora_codes.eight_bits().verdict == "failed"


def test_full_weights_that_stay_fail_the_claim_on_dynamic_dequantization(monkeypatch):
    kept = []
    monkeypatch.setattr(coded, "in_buffer", lambda q: kept.append(quant.dequantize(q)) or kept[-1])
    assert qlora_steps.dynamic_dequant().verdict == "failed"


def test_a_full_weight_that_backward_keeps_fails_the_claim_on_dynamic_dequantization(monkeypatch):
    full = lambda self, op, x: (quant.dequantize(self.quantized), lambda W: coded.in_buffer(self.quantized))  # noqa: E731
    monkeypatch.setattr(coded.QuantizedWeight, "stored", full)
    assert qlora_steps.dynamic_dequant().verdict == "failed"


def test_products_with_another_weight_fail_the_forward_claim(monkeypatch):
    monkeypatch.setattr(coded, "in_buffer", lambda q: 1.01 * quant.dequantize(q))
    assert qlora_steps.forward().verdict == "failed"


def test_a_gradient_of_w_that_is_computed_would_make_the_documents_statement_right(monkeypatch):
    monkeypatch.setattr(coded.QuantizedWeight, "requires_grad", property(lambda self: True, lambda self, value: None))
    assert qlora_steps.backward().verdict == "confirmed"


def test_gradients_that_are_wrong_fail_the_backward_claim(monkeypatch):
    wrong = lambda value, parameter: 1.01 * RIGHT(value, parameter)  # noqa: E731
    monkeypatch.setattr(qlora_steps, "_central_differences", wrong)
    assert qlora_steps.backward().verdict == "failed"


RIGHT = qlora_steps._central_differences


def test_codes_that_change_would_make_the_documents_statement_right(monkeypatch):
    run = qlora_training.train("nf4")
    changed = dataclasses.replace(run, codes={name: code[:-1] + b"?" for name, code in run.codes.items()})
    monkeypatch.setattr(qlora_steps, "train", lambda quant: changed)
    assert qlora_steps.requantize().verdict == "confirmed"


def test_updates_that_are_kept_fail_the_claim_on_static_quantization(monkeypatch):
    monkeypatch.setattr(qlora_static, "train_static", qlora_static.train_static.__wrapped__)
    monkeypatch.setattr(qlora_static, "round_to_nf4", lambda W, rng=None: W)
    assert qlora_static.static_quant().verdict == "failed"


def test_products_that_do_not_dequantize_would_make_the_documents_statement_right(monkeypatch):
    kept = lambda self, op, x: (self.quantized.codes, lambda codes: quant.dequantize(self.quantized))  # noqa: E731
    monkeypatch.setattr(coded.QuantizedWeight, "stored", kept)
    assert qlora_after.inference_dequant().verdict == "confirmed"


def test_an_adapter_that_loads_changed_fails_the_claim_on_adapters(monkeypatch):
    def wrong(path):
        config, values = read_adapter(path)
        return config, {name: value + 1 for name, value in values.items()}

    read_adapter = qlora_after.read_adapter
    monkeypatch.setattr(qlora_after, "read_adapter", wrong)
    assert qlora_after.same_adapter().verdict == "failed"


def test_weights_of_another_size_than_the_formulas_fail_the_claim_on_7b(monkeypatch):
    monkeypatch.setattr(estimate, "nf4_bytes", lambda n: n // 2)
    assert qlora_cost.seven_billion().verdict == "failed"


def test_the_largest_batch_is_the_last_that_fits():
    assert [qlora_cost.largest_batch(lambda n: 10 + 3 * n, budget) for budget in (12, 13, 15, 16, 310)] == [
        0,
        1,
        1,
        2,
        100,
    ]


def test_a_paged_optimizer_with_other_updates_fails_its_claim(monkeypatch):
    monkeypatch.setattr(optim, "PagedAdamW", lambda params, lr: optim.AdamW(params, lr=lr, eps=1e-7))
    monkeypatch.setattr(qlora_paged, "_under_a_cap", lambda: None)
    assert qlora_paged.paged().verdict == "failed"


@pytest.mark.parametrize("name", ["AdamW", "PagedAdamW"])
def test_an_optimizer_that_ends_otherwise_under_the_cap_fails_the_claim_on_paging(monkeypatch, name):
    capped = {
        "state": 4e7,
        "room": 8e6,
        "AdamW": "MemoryError",
        "PagedAdamW": "finished",
        "anonymous": 1e6,
        "file": 4e7,
    }
    other = {"AdamW": "finished", "PagedAdamW": "MemoryError"}[name]
    monkeypatch.setattr(qlora_paged, "_under_a_cap", lambda: {**capped, name: other})
    monkeypatch.setattr(qlora_paged.sys, "platform", "linux")
    assert qlora_paged.paged().verdict == "failed"


def test_a_start_that_corrects_nothing_fails_the_claim_on_compensation(monkeypatch):
    def useless(*args, **kwargs):
        q, A, B = qlora.loftq_init(*args, **kwargs)
        return q, 0 * A, B

    monkeypatch.setattr(qlora_training, "loftq_init", useless)
    assert qlora_training.error_compensation().verdict == "failed"


def test_a_merge_with_the_wrong_scaling_fails_the_merge_claim(monkeypatch):
    merge_lora = lora.merge_lora
    monkeypatch.setattr(lora, "merge_lora", lambda W, A, B, s: merge_lora(W, A, B, 0.9 * s))
    assert qlora_after.merge().verdict == "failed"


def test_new_codes_that_lose_nothing_would_make_the_documents_statement_right(monkeypatch):
    lossless = lambda model, how, inputs: qlora.finish_qlora(model, "keep", inputs=inputs)  # noqa: E731
    monkeypatch.setattr(qlora_after, "finish_qlora", lossless)
    assert qlora_after.merge().verdict == "confirmed"


def test_a_report_that_hides_the_error_fails_the_merge_claim(monkeypatch):
    def hiding(model, how, inputs):
        model, report = qlora.finish_qlora(model, how, inputs=inputs)
        return model, dataclasses.replace(report, rms_error=0.0)

    monkeypatch.setattr(qlora_after, "finish_qlora", hiding)
    assert qlora_after.merge().verdict == "failed"
