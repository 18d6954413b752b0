"""Flops, bytes and seconds: counted against hand-made sums, formulas against what lives, clocks against a fake one."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import time
import tracemalloc

import numpy as np
import pytest

from minipeft import (
    AdaLoraConfig,
    LoraConfig,
    LoraProConfig,
    Tensor,
    backend,
    fit,
    get_peft_model,
    measure,
    nn,
    no_grad,
    ops,
    optim,
)
from minipeft.measure import (
    LlamaShape,
    MemoryReport,
    compare_latency,
    count_flops,
    estimate_memory,
    format_bytes,
    latency,
    llama_shape,
    memory_report,
    peak_memory,
)
from minipeft.measure.activations import block_activations
from minipeft.measure.memory import distinct_bytes
from minipeft.measure.shapes import _proportions
from minipeft.quant.model import quantize_model
from minipeft.tensor import Held

PARTS = ("weights", "gradients", "optimizer", "activations", "trainable_weights")


@pytest.fixture(autouse=True)
def no_graphs_from_before() -> None:
    """Activations are those of all live graphs: cycles that other tests left are collected first."""
    if Held.live:
        gc.collect()


def parts(report: MemoryReport) -> dict[str, int | None]:
    return {part: getattr(report, part) for part in PARTS}


# --- a chain ----------------------------------------------------------------------------------------------------------


def chain(dtype: str = "float32") -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(20, 30, dtype=dtype, rng=0),
        nn.ReLU(),
        nn.Linear(30, 30, dtype=dtype, rng=1),
        nn.ReLU(),
        nn.Linear(30, 7, dtype=dtype, rng=2),
    )


def chain_loss(model: nn.Module, rows: int = 12, dtype: str = "float32") -> Tensor:
    rng = np.random.default_rng(0)
    return ops.cross_entropy(model(Tensor(rng.standard_normal((rows, 20)), dtype=dtype)), rng.integers(0, 7, rows))


def between_forward_and_backward(model: nn.Module, loss_of, optimizer_class=optim.AdamW) -> MemoryReport:
    """What a step in the middle of training holds: gradients and states of the step before, activations of this one."""
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss_of(model).backward()
    optimizer.step()
    loss = loss_of(model)
    report = memory_report(model, optimizer)
    loss.backward()
    return report


# --- a Llama of plain operations --------------------------------------------------------------------------------------

SHAPE = LlamaShape(16, 24, 3, 4, 2, 50)
BATCH, SEQ = 2, 5


class Block(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        self.heads, self.kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        for i, (name, (out, in_)) in enumerate(shape.matrices.items()):
            setattr(self, name, nn.Linear(in_, out, bias=False, rng=i))
        self.norm, self.second_norm = nn.RMSNorm(shape.hidden_size), nn.RMSNorm(shape.hidden_size)

    def forward(self, x: Tensor, cos: np.ndarray, sin: np.ndarray) -> Tensor:
        batch, seq, _ = x.shape

        def heads(y: Tensor, n: int) -> Tensor:
            return y.reshape(batch, seq, n, -1).swapaxes(1, 2)

        h = self.norm(x)
        q = ops.rope(heads(self.q_proj(h), self.heads), cos, sin)
        k = ops.rope(heads(self.k_proj(h), self.kv_heads), cos, sin)
        y = ops.scaled_dot_product_attention(q, k, heads(self.v_proj(h), self.kv_heads), is_causal=True)
        x = x + self.o_proj(y.swapaxes(1, 2).reshape(batch, seq, -1))
        h = self.second_norm(x)
        return x + self.down_proj(ops.swiglu(self.gate_proj(h), self.up_proj(h)))


class Llama(nn.Module):
    output_head = "lm_head"

    def __init__(self, shape: LlamaShape) -> None:
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size, rng=0)
        self.layers = [Block(shape) for _ in range(shape.num_hidden_layers)]
        self.norm = nn.RMSNorm(shape.hidden_size)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False, rng=0)
        if shape.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.head_size = shape.matrices["q_proj"][0] // shape.num_attention_heads

    def forward(self, ids: np.ndarray) -> Tensor:
        x, tables = self.embed_tokens(ids), ops.rope_table(ids.shape[1], self.head_size)
        for layer in self.layers:
            x = layer(x, *tables)
        x = self.norm(x).reshape(ids.size, -1)
        return ops.linear_cross_entropy(x, self.lm_head.weight, np.roll(ids, -1).reshape(-1))


def llama_loss(model: nn.Module) -> Tensor:
    return model(np.random.default_rng(0).integers(0, SHAPE.vocab_size, (BATCH, SEQ)))


# --- the formula is the measurement -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "optimizer_class", "options"),
    [
        ("sgd", optim.SGD, {}),
        ("momentum", optim.SGD, {"momentum": 0.9}),
        ("adam", optim.Adam, {}),
        ("adamw", optim.AdamW, {}),
        ("amsgrad", optim.Adam, {"amsgrad": True}),
    ],
)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_formula_gives_every_byte_of_a_chain_with_every_optimizer(name, optimizer_class, options, method):
    model, estimate = chain(), estimate_memory(chain(), method, r=4, batch=12, optimizer=name)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=4))
        assert estimate_memory(model, "lora", batch=12, optimizer=name) == estimate  # with the adapters attached
    measured = between_forward_and_backward(
        model, chain_loss, lambda params, lr: optimizer_class(params, lr, **options)
    )
    assert parts(measured) == parts(estimate)
    assert measured.gradients > 0


def test_the_formula_counts_eight_bytes_for_float64():
    measured = between_forward_and_backward(chain("float64"), lambda model: chain_loss(model, dtype="float64"))
    assert measured == estimate_memory(chain(), "full", batch=12, dtype_bytes=8)


@pytest.mark.parametrize("targets", [["0"], ["2"], ["4"], ["0", "4"]])
def test_a_chain_keeps_only_what_its_adapted_layers_and_what_follows_need(targets):
    model = get_peft_model(chain(), LoraConfig(r=3, target_modules=targets))
    measured = between_forward_and_backward(model, chain_loss)
    assert measured == estimate_memory(chain(), "lora", r=3, batch=12, targets=targets)


@pytest.mark.parametrize("shape", [SHAPE, dataclasses.replace(SHAPE, tie_word_embeddings=True, head_dim=6)])
def test_the_formula_gives_every_byte_of_full_training_of_a_llama(shape):
    measured = between_forward_and_backward(Llama(shape), llama_loss)
    assert parts(measured) == parts(estimate_memory(shape, "full", batch=BATCH, seq=SEQ))


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["o_proj", "up_proj"], *[[name] for name in SHAPE.matrices]]
)
def test_the_formula_gives_every_byte_of_lora_on_a_llama(targets):
    model = get_peft_model(Llama(SHAPE), LoraConfig(r=4, target_modules=targets))
    measured = between_forward_and_backward(model, llama_loss)
    assert parts(measured) == parts(estimate_memory(SHAPE, "lora", r=4, batch=BATCH, seq=SEQ, targets=targets))


def test_activations_of_other_modules_are_not_known_by_formula():
    report = estimate_memory(Llama(SHAPE), "lora", r=4)
    assert report.activations is None
    assert "not known" in str(report)
    assert report.total == report.weights + report.gradients + report.optimizer


# --- the formula where nothing can be measured ------------------------------------------------------------------------

PUBLISHED = {  # numbers of parameters of the released checkpoints
    "135M": 134_515_008,
    "360M": 361_821_120,
    "1.1B": 1_100_048_384,
    "1.7B": 1_711_376_384,
    "7B": 6_738_415_616,
    "8b": 8_030_261_248,
    "13B": 13_015_864_320,
    "33B": 32_528_943_616,
    "65B": 65_285_660_672,
    "70B": 68_976_648_192,
}


def test_named_sizes_have_the_published_numbers_of_parameters():
    assert {name: llama_shape(name).parameters for name in PUBLISHED} == PUBLISHED


def test_the_shape_has_as_many_weights_as_the_model_of_that_shape():
    assert SHAPE.parameters == sum(p.size for p in Llama(SHAPE).parameters())


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_table_of_parts_is_the_estimate_and_one_weight(method):
    report = estimate_memory("7B", method, dtype_bytes=2, adapter_bytes=4, checkpointing=True)
    parts = measure.memory_parts("7B", method, checkpointing=True)
    assert sum(parts.values()) - parts["one weight dequantized"] == report.total
    assert parts["one weight dequantized"] == (2 * 4096 * 11008 if method == "qlora" else 0)
    assert parts["adapters"] == (0 if method == "full" else report.trainable_weights)
    assert report.optimizer == 2 * report.gradients == 2 * report.trainable_weights


def test_adapters_of_7b_have_the_number_of_weights_that_peft_prints():
    report = estimate_memory("7B", "lora", r=16)
    assert report.trainable_weights == 39_976_960 * 4
    assert report.weights == (6_738_415_616 + 39_976_960) * 4


def test_full_training_in_float32_takes_sixteen_bytes_a_weight_beside_activations():
    report = estimate_memory(7_000_000_000, "full")
    assert report.total - report.activations == 16 * 6_738_415_616


def test_a_quantized_weight_takes_4_127_bits():
    assert 8 * measure.nf4_bytes(4096 * 4096) / 4096**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=2e-6)
    assert measure.nf4_bytes(65) == 33 + 2 + 4 + 4


def test_qlora_quantizes_the_blocks_and_keeps_embedding_norms_and_head():
    lora, qlora = estimate_memory(SHAPE, "lora", r=4), estimate_memory(SHAPE, "qlora", r=4)
    blocks = [out * in_ for out, in_ in SHAPE.matrices.values()] * SHAPE.num_hidden_layers
    assert lora.weights - qlora.weights == sum(4 * n - measure.nf4_bytes(n) for n in blocks)
    assert parts(dataclasses.replace(qlora, weights=lora.weights)) == parts(lora)
    assert estimate_memory(Llama(SHAPE), "qlora", r=4).weights == qlora.weights


def test_checkpointing_keeps_an_input_for_each_block_and_one_block():
    shape = llama_shape("7B")
    kept, again = (estimate_memory(shape, "full", checkpointing=c).activations for c in (False, True))
    block = 4 * sum(block_activations(shape, set(shape.matrices), 0, 1, 512, True).values())
    assert kept - again == 31 * block - 32 * 4 * 512 * 4096


def test_activations_grow_in_proportion_to_the_batch():
    one, two = (estimate_memory("135M", "lora", batch=batch).activations for batch in (1, 2))
    tables = 512 * 64 * 4  # the rotary tables do not grow with the batch
    assert two - tables == 2 * (one - tables)


def test_the_scaling_rule_is_llamas_own_proportions():
    for size in ("7B", "13B"):
        assert llama_shape(llama_shape(size).parameters) == llama_shape(size)
    for n in (50_000_000, 500_000_000, 3_000_000_000, 30_000_000_000):
        assert llama_shape(n).parameters == pytest.approx(n, rel=0.15)  # a step of 128 in d is 24 % of 500M
    for n in (8_454_528, 20_000_000, 10**12):
        nearest = min((_proportions(heads) for heads in range(1, 200)), key=lambda shape: abs(shape.parameters - n))
        assert llama_shape(n) == llama_shape(np.int64(n)) == nearest


CONFIG = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}


def test_a_config_is_read_from_a_dictionary_a_file_and_a_directory(tmp_path):
    config = CONFIG | {"num_key_value_heads": 2, "vocab_size": 50, "model_type": "llama", "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert llama_shape(config) == llama_shape(tmp_path) == llama_shape(str(tmp_path / "config.json")) == SHAPE
    del config["num_key_value_heads"]
    assert llama_shape(config).num_key_value_heads == 4  # Hugging Face's default: as many as query heads


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config_or_size": "seven"}, ValueError, "config_or_size: got 'seven'"),
        ({"config_or_size": "missing/config.json"}, FileNotFoundError, "no such file"),
        (
            {"config_or_size": {"hidden_size": 4}},
            ValueError,
            "no intermediate_size, num_hidden_layers, num_attention_heads",
        ),
        ({"config_or_size": CONFIG | {"hidden_size": 0}}, ValueError, "config_or_size: hidden_size: got 0; an int"),
        ({"config_or_size": CONFIG | {"num_attention_heads": "4"}}, ValueError, "num_attention_heads: got '4'"),
        ({"config_or_size": "9999999999999B"}, ValueError, "got 9999999999999000000000 parameters; 8454528 to"),
        ({"config_or_size": quantize_model(chain())}, ValueError, "config_or_size: the Module holds weights as codes"),
        ({"config_or_size": 10}, ValueError, "config_or_size: got 10 parameters"),
        ({"config_or_size": 1.5}, TypeError, "config_or_size: got float"),
        ({"config_or_size": True}, TypeError, "config_or_size: got bool"),
        ({"method": "dora"}, ValueError, "method: got 'dora'"),
        ({"optimizer": "lion"}, ValueError, "optimizer: got 'lion'"),
        ({"batch": 0}, ValueError, "batch: got 0"),
        ({"r": 2.0}, ValueError, "r: got 2.0"),
        ({"targets": "q_proj"}, ValueError, "targets: got 'q_proj'"),
        ({"targets": ["qproj"]}, ValueError, "targets: there is no 'qproj'"),
        ({"config_or_size": chain(), "checkpointing": True}, ValueError, "checkpointing"),
        (
            {"config_or_size": get_peft_model(chain(), LoraConfig(r=2)), "method": "full"},
            ValueError,
            "method: got 'full'",
        ),
    ],
)
def test_estimate_names_the_argument_that_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        estimate_memory(**{"config_or_size": "7B", **arguments})


# --- reading arrays ---------------------------------------------------------------------------------------------------


def test_activations_are_there_from_forward_to_backward_only():
    model = chain()
    assert memory_report(model).activations == 0
    loss = chain_loss(model)
    assert memory_report(model).activations > 0
    loss.backward()
    assert memory_report(model).activations == 0
    assert memory_report(model).gradients == memory_report(model).weights


def test_a_dropped_loss_frees_its_activations():
    model = chain()
    chain_loss(model)
    assert memory_report(model).activations == 0


def test_a_batch_that_is_a_slice_of_the_data_counts_as_the_slice():
    data, model = np.zeros((1000, 20), "float32"), nn.Linear(20, 3, rng=0)
    y = model(Tensor(data[10:18]))
    assert memory_report(model).activations == 8 * 20 * 4
    z = (Tensor(data, requires_grad=True) ** 2).sum()  # now the whole of it is needed, and the exponent
    assert memory_report(model).activations == data.nbytes + 4
    del y, z


def test_tied_weights_and_views_of_one_memory_count_once():
    model, memory = nn.Module(), np.zeros(100)
    model.a, model.b, model.c = nn.Parameter(memory[:60]), nn.Parameter(memory[40:]), nn.Parameter(memory[:10])
    model.c.requires_grad = False
    model.again = model.a
    report = memory_report(model)
    assert (report.weights, report.trainable_weights) == (800, 800)


def test_everything_that_a_module_holds_counts_as_weights():
    @dataclasses.dataclass
    class Quantized:
        codes: np.ndarray
        absmax: np.ndarray
        blocksize: int = 64

    model = nn.Module()
    model.quantized, model.tables = Quantized(np.zeros(32, "uint8"), np.zeros(1, "float32")), {"cos": [np.zeros(3)]}
    report = memory_report(model)
    assert (report.weights, report.trainable_weights, report.gradients) == (32 + 4 + 24, 0, 0)


def test_distinct_bytes_of_gaps_overlaps_and_nothing():
    memory = np.zeros(100, "uint8")
    assert distinct_bytes([]) == distinct_bytes([memory[:0]]) == 0
    assert distinct_bytes([memory[10:20], memory[15:30], memory[50:60], memory[52:54], memory[:5][::-1]]) == 35


def test_a_report_is_the_same_on_every_array_library(xp):
    model = chain().to(xp)
    targets = np.zeros(12, "int64")

    def loss_of(model: nn.Module) -> Tensor:
        x = Tensor(backend.move(np.ones((12, 20), "float32"), xp))
        return ops.cross_entropy(model(x), Tensor(backend.move(targets, xp)))

    assert between_forward_and_backward(model, loss_of) == estimate_memory(chain(), "full", batch=12)


def test_what_a_method_carries_between_steps_counts_as_optimizer_state():
    """LoRA-Pro's full variant keeps two moments of W's size a layer, and leaves the optimizer nothing to keep."""
    batches = [(np.ones((4, 20), "float32"), np.arange(4))]
    found = {}
    for variant in ("plain", "full"):
        model = get_peft_model(chain(), LoraProConfig(r=2, variant=variant))
        optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad])
        before = memory_report(model, optimizer)
        fit(model, batches, steps=2, optimizer=optimizer, progress=False)
        found[variant] = memory_report(model, optimizer)
        assert before.optimizer == 0
        assert found[variant].weights == before.weights
    assert found["plain"].optimizer == 2 * found["plain"].trainable_weights
    assert found["full"].optimizer == 2 * 4 * (30 * 20 + 30 * 30 + 7 * 30)
    assert memory_report(model).optimizer == found["full"].optimizer  # the method is part of the model


def test_adaloras_scores_count_until_the_ranks_are_settled():
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=5)
    model = get_peft_model(chain(), config)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad])
    sizes = []
    watch = lambda progress: sizes.append(memory_report(model, optimizer).optimizer - optimizer.nbytes)  # noqa: E731
    batches = [(np.ones((4, 20), "float32"), np.arange(4))]
    fit(model, batches, steps=5, optimizer=optimizer, callbacks=[watch], progress=False)
    assert sizes[0] > memory_report(model).trainable_weights  # two averages of every factor
    assert sizes[-1] < 100  # the masks that are left


def test_the_report_prints_as_a_table_with_units():
    report = MemoryReport(3 * 2**30, 2**20, 0, 100, 1536)
    assert report.total == 3 * 2**30 + 2**20 + 100
    assert report.as_dict() == {**parts(report), "total": report.total}
    rows = str(report).splitlines()
    assert rows[0].split() == ["weights", "3.00", "GiB", "(trainable:", "1.50", "KiB)"]
    assert [row.split()[0] for row in rows] == ["weights", "gradients", "optimizer", "activations", "total"]
    assert repr(report) == str(report)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (5 * 2**40, "5.00 TiB"),
        (2**70, "1048576.00 PiB"),
    ],
)
def test_bytes_are_written_with_binary_units(size, text):
    assert format_bytes(size) == text


def test_memory_report_says_what_it_needs():
    with pytest.raises(TypeError, match="model: expected a Module, got dict"):
        memory_report({})
    with pytest.raises(TypeError, match="optimizer: expected an Optimizer, got str"):
        memory_report(chain(), "adamw")


# --- the peak ---------------------------------------------------------------------------------------------------------

MIB = 2**20
SLACK = 64 * 1024  # Python's own objects


def test_the_peak_is_the_most_at_one_time_above_the_start():
    before = np.ones(4 * MIB, "uint8")
    with peak_memory() as peak:
        for _ in range(3):
            np.ones(2 * MIB, "uint8")
        kept = np.ones(MIB, "uint8")
    assert 2 * MIB <= peak.bytes < 2 * MIB + SLACK
    assert kept.size + before.size == 5 * MIB
    assert not tracemalloc.is_tracing()


def test_nested_peaks_each_count_their_own_block():
    with peak_memory() as outer:
        np.ones(4 * MIB, "uint8")
        kept = np.ones(MIB, "uint8")
        with peak_memory() as inner:
            np.ones(2 * MIB, "uint8")
        after = inner.bytes
        np.ones(3 * MIB, "uint8")
    assert 2 * MIB <= inner.bytes == after < 2 * MIB + SLACK
    assert 4 * MIB <= outer.bytes < 4 * MIB + SLACK
    assert kept.size == MIB


def test_the_peak_leaves_tracing_as_it_was_and_survives_an_exception():
    tracemalloc.start()
    try:
        with pytest.raises(KeyError), peak_memory() as peak:
            raise KeyError(np.ones(MIB, "uint8").sum())
        assert tracemalloc.is_tracing()
        assert peak.bytes >= MIB
    finally:
        tracemalloc.stop()


def test_the_peak_of_a_step_is_lower_with_lora_than_in_full_training():
    def peak_of(model: nn.Module) -> int:
        with peak_memory() as peak:
            (model(Tensor(np.ones((4, 400), "float32"))) ** 2).sum().backward()
        return peak.bytes

    full = nn.Sequential(*[nn.Linear(400, 400, rng=i) for i in range(3)])
    assert peak_of(full) > 3 * 400 * 400 * 4 > 4 * peak_of(get_peft_model(full, LoraConfig(r=2)))


# --- flops ------------------------------------------------------------------------------------------------------------

ROWS, IN, OUT = 6, 5, 4
PRODUCT = 2 * ROWS * IN * OUT


def test_a_linear_layer_costs_one_product_forward_and_two_backward():
    x, layer = Tensor(np.ones((ROWS, IN)), requires_grad=True, dtype="float32"), nn.Linear(IN, OUT, rng=0)
    with count_flops() as flops:
        layer(x).sum().backward()
    assert (flops.forward, flops.backward, flops.total) == (PRODUCT, 2 * PRODUCT, 3 * PRODUCT)
    assert flops.counts == {"forward": {"linear": PRODUCT}, "backward": {"linear": 2 * PRODUCT}}


def test_products_that_nobody_needs_are_not_counted_because_they_do_not_run():
    x, layer = Tensor(np.ones((ROWS, IN)), requires_grad=True, dtype="float32"), nn.Linear(IN, OUT, rng=0)
    with count_flops() as flops:
        layer(x.detach()).sum().backward()  # no dx
    assert flops.backward == PRODUCT
    layer.requires_grad_(False)
    with count_flops() as flops:
        layer(x).sum().backward()  # no dW
    assert flops.backward == PRODUCT


def test_attention_counts_its_two_products_and_their_four_gradients():
    q, k, v = (Tensor(np.ones((2, 3, 5, 4)), requires_grad=True, dtype="float32") for _ in range(3))
    with count_flops() as flops:
        ops.scaled_dot_product_attention(q, k, v).sum().backward()
    product = 2 * (2 * 3) * 5 * 5 * 4
    assert flops.counts == {"forward": {"attention": 2 * product}, "backward": {"attention": 4 * product}}


@pytest.mark.parametrize(("trains_x", "trains_w"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_fused_loss_counts_gradients_that_its_forward_pass_forms_as_backward(trains_x, trains_w):
    x = Tensor(np.ones((ROWS, IN)), requires_grad=trains_x, dtype="float32")
    w = Tensor(np.ones((OUT, IN)), requires_grad=trains_w, dtype="float32")
    targets, product = [0, 1, -100, 2, 3, 0], 2 * (ROWS - 1) * IN * OUT  # a row that is ignored costs nothing
    with count_flops() as flops:
        loss = ops.linear_cross_entropy(x, w, targets, chunk=2)
        if trains_x or trains_w:
            loss.backward()
    assert (flops.forward, flops.backward) == (product, (trains_x + trains_w) * product)
    with count_flops() as flops, no_grad():
        ops.linear_cross_entropy(x, w, targets, chunk=2)
    assert (flops.forward, flops.backward) == (product, 0)


def test_nested_counters_both_count():
    layer, x = nn.Linear(IN, OUT, rng=0), Tensor(np.ones((ROWS, IN)), dtype="float32")
    with count_flops() as outer:
        layer(x)
        with count_flops() as inner:
            layer(x).sum().backward()
        layer(x)
    assert (inner.forward, inner.backward) == (PRODUCT, PRODUCT)
    assert (outer.forward, outer.backward) == (3 * PRODUCT, PRODUCT)


def test_a_counter_ends_with_its_block_even_after_an_exception():
    layer, x = nn.Linear(IN, OUT, rng=0), Tensor(np.ones((ROWS, IN)), dtype="float32")
    with count_flops() as outer, pytest.raises(KeyError), count_flops() as inner:
        raise KeyError(layer(x).shape)
    layer(x)
    assert inner.total == outer.total == PRODUCT
    assert backend.flop_counter is None


# --- seconds ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only `clock[0] += seconds` moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def taking(clock: list[float], *seconds: float):
    """A function that takes these seconds, one after the other, again and again."""
    durations = itertools.cycle(seconds)

    def fn() -> None:
        clock[0] += next(durations)

    return fn


def test_latency_is_the_median_the_minimum_and_the_interquartile_range(clock):
    found = latency(taking(clock, 1, 2, 3, 4, 100), repeat=5, warmup=0)
    assert (found.median, found.minimum, found.spread, found.repeat) == pytest.approx((3, 1, 2, 5))


def test_warm_up_calls_do_not_count(clock):
    assert latency(taking(clock, 50, 50, 1, 1), repeat=2, warmup=2).median == pytest.approx(1)


def test_comparison_gives_ratios_to_the_first(clock):
    found = compare_latency({"base": taking(clock, 2), "twice": taking(clock, 4)}, repeat=3, warmup=1)
    assert found["twice"].median == pytest.approx(4)
    assert found.ratios == pytest.approx({"base": 1, "twice": 2})
    assert [line.split()[:3] for line in str(found).splitlines()] == [["base", "1.000", "×"], ["twice", "2.000", "×"]]


def test_functions_take_turns_and_change_who_begins():
    calls: list[str] = []
    compare_latency({name: (lambda name=name: calls.append(name)) for name in "abc"}, repeat=3, warmup=1)
    assert "".join(calls) in ("abccbaabccba", "cbaabccbaabc")


@pytest.mark.parametrize("seconds", [1.25, 0.31, 2.5e-5, 4e-8])
def test_seconds_are_written_with_a_unit(clock, seconds):
    text = str(latency(taking(clock, seconds), repeat=1, warmup=0)).split()
    scale = {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[text[1]]
    assert float(text[0]) * scale == pytest.approx(seconds, rel=1e-2)  # three digits are printed
    assert 1 <= float(text[0]) < 1000


def test_latency_says_what_it_needs():
    with pytest.raises(ValueError, match="fns: got none"):
        compare_latency({})
    with pytest.raises(TypeError, match=r"fns\['a'\]: expected a function"):
        compare_latency({"a": 3})
    with pytest.raises(ValueError, match="repeat: got 0; an int of at least 1"):
        latency(list, repeat=0)
    with pytest.raises(ValueError, match=r"repeat: got 2\.5"):
        latency(list, repeat=2.5)
