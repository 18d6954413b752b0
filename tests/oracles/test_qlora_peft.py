"""QLoRA beside transformers, bitsandbytes and PEFT on one small Llama: files both ways, outputs, gradients, LoftQ."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes would compile its fallback for every shape anew
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
import bitsandbytes.functional as bnb  # noqa: E402
from peft.utils import loftq_utils  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from minipeft import (  # noqa: E402
    LoftQConfig,
    LoraConfig,
    PeftModel,
    finish_qlora,
    get_peft_model,
    load_model,
    prepare_model_for_kbit_training,
    quant,
    save_model,
)
from minipeft.files import read_tensors  # noqa: E402
from minipeft.methods.qlora import loftq_init  # noqa: E402
from minipeft.models.llama import Llama  # noqa: E402
from minipeft.models.llama_config import LlamaConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not this project's to mend
IDS = np.random.default_rng(0).integers(0, 50, (2, 9))
# float32 sums of 128 products in another order, through two blocks
SAME = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A small Llama in float32, saved here; every row is a whole number of blocks (see `theirs` of the other file)."""
    config = LlamaConfig(50, 64, 128, 2, 4, num_key_value_heads=2)
    return save_model(Llama(config, rng=0), tmp_path_factory.mktemp("llama") / "full")


def theirs(directory, quant_type=None, **chosen):
    """transformers' model, quantized while it is loaded if asked."""
    options = {}
    if quant_type:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, **chosen,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, device_map="cpu", dtype=torch.float32, **options
    )


def logits(model):
    """The model's, in float32: bitsandbytes' kernel for inference in bfloat16, where the CPU has one, is off."""
    if isinstance(model, torch.nn.Module):
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        with torch.no_grad():
            return model.eval()(torch.from_numpy(IDS)).logits.numpy()
    return model.eval()(IDS).data


def bits(tensors):
    return {name: (a.shape, a.dtype.name, a.tobytes()) for name, a in tensors.items()}


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_directory_of_theirs_loads_directly_with_the_same_codes(full, tmp_path, quant_type):
    model = theirs(full, quant_type)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    stored, _ = read_tensors(tmp_path / "model.safetensors")
    state = quant.quantized_state_dict(ours)
    assert bits(state) == bits({name: stored[name] for name in state})
    layers = [(name, m) for name, m in ours.named_modules() if isinstance(m, quant.Linear4bit)]
    assert len(layers) == 14
    for name, layer in layers:
        weight = model.get_submodule(name).weight
        np.testing.assert_array_equal(layer.weight.data, bnb.dequantize_4bit(weight.data, weight.quant_state).numpy())
    np.testing.assert_allclose(logits(ours), logits(model), **SAME)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "float64", "int8"])
def test_codes_that_they_store_under_another_dtype_load_like_those_in_bytes(full, tmp_path, storage):
    model = theirs(full, "nf4", bnb_4bit_quant_storage=storage)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    packed = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert (packed.dtype, packed.shape) == (getattr(torch, storage), (64 * 128 // 2 // packed.itemsize, 1))
    theirs(full, "nf4").save_pretrained(tmp_path / "bytes")
    ours, expected = load_model(tmp_path), load_model(tmp_path / "bytes")
    assert bits(quant.quantized_state_dict(ours)) == bits(quant.quantized_state_dict(expected))
    np.testing.assert_array_equal(logits(ours), logits(expected))
    np.testing.assert_allclose(logits(ours), logits(model), **SAME)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_directory_of_ours_is_read_by_them_as_if_they_had_quantized_it(full, tmp_path, quant_type):
    ours = load_model(full, quantization=quant_type)
    save_model(ours, tmp_path)
    model, expected = theirs(tmp_path), theirs(full, quant_type)
    assert model.is_loaded_in_4bit
    expected.save_pretrained(tmp_path / "theirs")
    files = (tmp_path / part / "model.safetensors" for part in (".", "theirs"))
    assert len({str(sorted(bits(read_tensors(file)[0]).items())) for file in files}) == 1
    np.testing.assert_array_equal(logits(model), logits(expected))


def test_layers_that_were_skipped_stay_whole_with_them_too(full, tmp_path):
    ours = quant.quantize_model(load_model(full), skip=("down_proj", "layers.0.self_attn.q_proj"))
    model = theirs(save_model(ours, tmp_path))
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj") or n == "lm_head"}
    assert kinds == {n: type(ours.get_submodule(n)).__name__ for n in kinds}
    np.testing.assert_allclose(logits(ours), logits(model), **SAME)


@pytest.mark.parametrize("how", ["merge", "requantize"])
def test_a_finished_model_is_read_by_them(full, tmp_path, how):
    model = get_peft_model(load_model(full, quantization="nf4"), LoraConfig(r=4, init_lora_weights=False))
    finished, _ = finish_qlora(model, how, inputs=IDS)
    again = theirs(save_model(finished, tmp_path))
    assert bool(getattr(again, "is_loaded_in_4bit", False)) == (how == "requantize")
    np.testing.assert_allclose(logits(finished), logits(again), **SAME)


# --- adapters on the same codes ---------------------------------------------------------------------------------------


def factors(model):
    """The adapter's parameters by name, in either library."""
    named = ((n.replace(".default", ""), p) for n, p in model.named_parameters() if ".lora_" in n)
    return dict(named)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_outputs_and_gradients_of_adapters_are_pefts_on_linear4bit(full, tmp_path, quant_type):
    ours = load_model(full, quantization=quant_type)
    save_model(ours, tmp_path / "base")
    ours = get_peft_model(ours, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False))
    ours.save_pretrained(tmp_path / "adapter")
    base = peft.prepare_model_for_kbit_training(theirs(tmp_path / "base"), use_gradient_checkpointing=False)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).train()
    wrapped = [m for m in model.modules() if isinstance(m, peft.tuners.lora.bnb.Linear4bit)]
    assert len(wrapped) == 14

    loss = ours.train().loss(IDS)
    loss.backward()
    ids = torch.from_numpy(IDS)
    their_loss = model(ids, labels=ids).loss
    their_loss.backward()
    np.testing.assert_allclose(loss.item(), their_loss.item(), rtol=1e-5)
    gradients = {name: p.grad for name, p in factors(ours).items()}
    their_gradients = {name: p.grad.numpy() for name, p in factors(model).items()}
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, their_gradients[name], err_msg=name, **SAME)
    assert sorted(n for n, p in ours.named_parameters() if p.requires_grad) == sorted(
        n for n, p in model.named_parameters() if p.requires_grad
    )


def test_an_adapter_that_peft_trained_on_codes_loads_here(full, tmp_path):
    model = peft.get_peft_model(theirs(full, "nf4"), peft.LoraConfig(r=3, target_modules="all-linear"))
    for name, p in factors(model).items():
        p.data = torch.from_numpy(np.random.default_rng(len(name)).normal(0, 0.1, p.shape).astype("float32"))
    model.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(load_model(full, quantization="nf4"), tmp_path)
    np.testing.assert_allclose(logits(ours), logits(model), **SAME)


def test_preparation_leaves_the_dtypes_and_flags_that_pefts_leaves(full, tmp_path):
    half = load_model(full, dtype="float16")
    save_model(half, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="cpu", dtype=torch.float16,
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )  # fmt: skip
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    ours = prepare_model_for_kbit_training(quant.quantize_model(half))
    kinds = {n: (p.dtype.name, p.requires_grad) for n, p in ours.named_parameters()}
    expected = {n: (str(p.dtype).removeprefix("torch."), p.requires_grad) for n, p in model.named_parameters()}
    assert kinds == {n: kind for n, kind in expected.items() if kind[0] != "uint8"}


# --- LoftQ ------------------------------------------------------------------------------------------------------------


class OnTheCpu(TorchFunctionMode):
    """PEFT's LoftQ sends its tensors to "cuda", wherever it runs; here that means the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        here = lambda x: "cpu" if str(x) in ("cuda", "cuda:0") and not isinstance(x, torch.Tensor) else x  # noqa: E731
        return function(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


def peft_loftq(W, r, iterations):
    """Values of the codes, A and B, as PEFT's loftq_init gives them."""
    with OnTheCpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Q, A, B = loftq_utils.loftq_init(torch.from_numpy(W.copy()), num_bits=4, reduced_rank=r, num_iter=iterations)
    return Q.numpy(), A.numpy(), B.numpy()


@pytest.mark.parametrize("shape", [(64, 128), (192, 64), (128, 128)])
def test_the_first_step_of_loftq_is_pefts_to_the_bit_and_to_rounding(shape):
    W = np.random.default_rng(1).standard_normal(shape).astype("float32")
    Q, A, B = peft_loftq(W, 8, 1)
    q, ours_A, ours_B = loftq_init(W, 8, iterations=1)
    np.testing.assert_array_equal(quant.dequantize(q), Q)
    np.testing.assert_allclose(ours_B @ ours_A, B @ A, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(ours_A, axis=1), np.linalg.norm(A, axis=1), rtol=1e-4)


@pytest.mark.parametrize("iterations", [2, 5])
def test_further_steps_reach_pefts_error(iterations):
    """The SVDs round differently, and a few codes at a border then fall to the other side: equal errors, not bits."""
    W = np.random.default_rng(2).standard_normal((128, 256)).astype("float32")
    Q, A, B = peft_loftq(W, 16, iterations)
    q, ours_A, ours_B = loftq_init(W, 16, iterations=iterations)
    ours = quant.dequantize(q)
    assert np.mean(abs(ours - Q) > 1e-3) < 0.02
    errors = np.linalg.norm(W - ours - ours_B @ ours_A), np.linalg.norm(W - Q - B @ A)
    np.testing.assert_allclose(*errors, rtol=1e-3)


def test_a_loftq_adapter_of_ours_loads_in_peft_on_the_saved_codes(full, tmp_path):
    config = LoraConfig(r=4, init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_iter=3))
    ours = get_peft_model(load_model(full), config)
    ours.save_pretrained(tmp_path / "adapter")
    expected = logits(ours)
    save_model(ours.unload(), tmp_path / "base")
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").r == 4
    model = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "adapter")
    np.testing.assert_allclose(expected, logits(model), **SAME)
    closer, coded = (np.linalg.norm(y - logits(load_model(full))) for y in (expected, logits(theirs(full, "nf4"))))
    assert closer < coded
