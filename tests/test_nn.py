"""Modules: names, the tree, values in and out, moving, switches, the layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import standin

from minipeft import Tensor, backend, nn, ops
from minipeft.tensor import is_held


class Block(nn.Module):
    """Parameters and modules in every place that a module may have them."""

    def __init__(self, rng=0):
        self.fc = nn.Linear(4, 4, rng=rng)
        self.layers = [nn.Linear(4, 3, rng=1), [nn.ReLU(), nn.LayerNorm(3)]]
        self.heads = {"a": nn.Linear(3, 2, bias=False, rng=2), "b": {"deep": nn.Parameter(np.ones(2, np.float32))}}
        self.pair = (nn.Dropout(0.5, rng=3), nn.Parameter(np.zeros(2, np.float32)))
        self.scale = nn.Parameter(np.ones(2, np.float32))
        self.table = np.arange(3.0)
        self.name = "block"

    def forward(self, x):
        x = self.layers[0](ops.relu(self.fc(x)))
        for layer in self.layers[1]:
            x = layer(x)
        return self.pair[0](self.heads["a"](x)) * self.heads["b"]["deep"] * self.scale + self.pair[1]


NAMES = [
    "fc.weight", "fc.bias", "layers.0.weight", "layers.0.bias", "layers.1.1.weight", "layers.1.1.bias",
    "heads.a.weight", "heads.b.deep", "pair.1", "scale",
]  # fmt: skip
MODULES = ["", "fc", "layers.0", "layers.1.0", "layers.1.1", "heads.a", "pair.0"]


class Tied(nn.Module):
    """One matrix for the words at both ends, and one layer that is used twice."""

    def __init__(self):
        self.embed = nn.Embedding(5, 3, rng=0)
        self.body = self.again = nn.Linear(3, 3, rng=1)
        self.head = nn.Linear(3, 5, bias=False, rng=2)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.again(self.body(self.embed(ids))))


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_parameters_have_the_names_of_the_path_to_them():
    assert sorted(name for name, _ in Block().named_parameters()) == sorted(NAMES)


def test_modules_have_the_names_of_the_path_to_them():
    assert [name for name, _ in Block().named_modules()] == MODULES
    assert [name for name, _ in Block().named_modules("model")] == ["model", *[f"model.{n}" for n in MODULES[1:]]]


def test_tied_parameters_and_shared_modules_come_once():
    model = Tied()
    assert [name for name, _ in model.named_parameters()] == ["embed.weight", "body.weight", "body.bias"]
    assert [name for name, _ in model.named_modules()] == ["", "embed", "body", "head"]


def test_a_tied_parameter_gets_the_gradient_of_both_uses():
    model = Tied()
    ids = np.array([0, 2])
    model(ids).sum().backward()
    both = model.embed.weight.grad
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.embed.weight.data.copy())
    untied(ids).sum().backward()
    np.testing.assert_allclose(both, untied.embed.weight.grad + untied.head.weight.grad, rtol=1e-5)  # float32 sums


def test_tied_parameters_stay_tied_when_moved_and_converted():
    model = Tied().to(standin).to("cpu").to("float64")
    assert model.head.weight is model.embed.weight
    assert model.body is model.again
    assert model.head.weight.dtype == "float64"


def test_a_module_that_contains_itself_is_walked_once():
    model = Block()
    model.parent = model
    assert [name for name, _ in model.named_modules()] == MODULES


@pytest.mark.parametrize("name", MODULES)
def test_submodules_are_found_by_name(name):
    model = Block()
    assert model.get_submodule(name) is dict(model.named_modules())[name]


def test_a_shared_module_is_found_by_either_name():
    model = Tied()
    assert model.get_submodule("again") is model.get_submodule("body")


@pytest.mark.parametrize("name", MODULES[1:-1])
def test_submodules_are_replaced_by_name(name):
    model, new = Block(), nn.ReLU()
    model.set_submodule(name, new)
    assert model.get_submodule(name) is new
    assert [n for n, _ in model.named_modules()] == MODULES


def test_keys_of_dictionaries_need_not_be_text():
    model = nn.Module()
    model.experts = {0: nn.ReLU(), 1: nn.ReLU()}
    model.set_submodule("experts.1", nn.Linear(2, 2, rng=0))
    assert isinstance(model.experts[1], nn.Linear)
    assert isinstance(model.get_submodule("experts.1"), nn.Linear)


@pytest.mark.parametrize(
    "name", ["layers.2", "layers.-1", "layer.0", "fc.weight", "fc.x", "heads.c", "name", "fc.", "layers"]
)
@pytest.mark.parametrize("method", ["get_submodule", "set_submodule"])
def test_a_name_that_is_not_there_is_answered_with_the_closest(method, name):
    model = Block()
    with pytest.raises(ValueError, match=rf"{method}: no module '{name}'; closest are '"):
        getattr(model, method)(name, *[nn.ReLU()] * (method == "set_submodule"))
    assert [n for n, _ in model.named_modules()] == MODULES


def test_the_closest_names_are_close():
    with pytest.raises(ValueError, match=r"closest are 'layers.1.1', 'layers.1.0', 'layers.0'|closest are 'layers"):
        Block().get_submodule("layer.1.1")
    with pytest.raises(ValueError, match="there are none"):
        nn.ReLU().get_submodule("x")


def test_the_whole_cannot_be_replaced_by_a_part():
    with pytest.raises(ValueError, match="set_submodule: got the empty name"):
        Block().set_submodule("", nn.ReLU())


def test_a_module_without_forward_says_so():
    with pytest.raises(NotImplementedError, match=r"Module has no forward\(\)"):
        nn.Module()(1)


def test_the_printed_form_shows_the_tree():
    assert repr(nn.Sequential(nn.Linear(2, 3, rng=0), nn.Sequential(nn.ReLU()))) == (
        "Sequential(\n"
        "  (0): Linear(in_features=2, out_features=3, bias=True)\n"
        "  (1): Sequential(\n"
        "    (0): ReLU()\n"
        "  )\n"
        ")"
    )


# --- values -----------------------------------------------------------------------------------------------------------


def test_state_is_the_arrays_themselves_by_name():
    model = Block()
    state = model.state_dict()
    assert sorted(state) == sorted(NAMES)
    assert state["fc.weight"] is model.fc.weight.data


def test_loaded_values_are_copies(xp):
    source, model = Block(rng=5), Block().to(xp)
    state = source.state_dict()
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        assert backend.get_namespace(parameter.data) is xp
        np.testing.assert_array_equal(backend.to_numpy(parameter.data), state[name])
    state["fc.weight"][:] = 7
    assert (backend.to_numpy(model.fc.weight.data) != 7).all()


def test_loaded_values_take_the_dtype_of_the_parameter():
    model = Block().to("float64")
    model.load_state_dict(Block(rng=5).state_dict())
    assert {p.dtype.name for p in model.parameters()} == {"float64"}


def test_loading_leaves_the_objects_and_a_graph_that_uses_them_alone():
    model = nn.Linear(2, 2, rng=0)
    weight, x = model.weight, Tensor([[1.0, 2.0]], requires_grad=True)
    loss = model(x).sum()
    expected = weight.data.sum(axis=0)
    model.load_state_dict({"weight": np.zeros((2, 2)), "bias": np.zeros(2)})
    loss.backward()
    assert model.weight is weight
    np.testing.assert_array_equal(x.grad[0], expected)
    assert not weight.data.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("scale"), "state_dict: missing scale; unexpected nothing"),
        (lambda s: s.update(extra=np.ones(1)), "state_dict: missing nothing; unexpected extra"),
        (lambda s: s.clear(), r"missing fc.bias, .* and 5 more; unexpected nothing"),
        (lambda s: s.update(scale=np.ones(3)), r"state_dict: scale has shape \(3,\), the model's is \(2,\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    model, state = Block(), Block(rng=5).state_dict()
    before = model.fc.weight.data.copy()
    change(state)
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)
    np.testing.assert_array_equal(model.fc.weight.data, before)


def test_part_of_a_state_is_loaded_when_asked():
    model = Block()
    model.load_state_dict({"scale": np.array([2.0, 3.0]), "other": np.ones(1)}, strict=False)
    assert model.scale.data.tolist() == [2, 3]


def test_a_deep_copy_has_values_of_its_own_and_the_same_ties():
    model = Tied()
    twin = copy.deepcopy(model)
    twin.embed.weight.data += 1
    assert twin.head.weight is twin.embed.weight
    np.testing.assert_allclose(twin.embed.weight.data, model.embed.weight.data + 1)


# --- moving and converting --------------------------------------------------------------------------------------------


def test_a_moved_model_computes_the_same(xp):
    model, x = Block().eval().to("float64"), np.random.default_rng(0).standard_normal((5, 4))
    here = model(Tensor(x))
    here.sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    moved = Block().eval().to("float64").to(xp)
    there = moved(Tensor(xp.asarray(x)))
    there.sum().backward()
    assert backend.get_namespace(there.data) is xp
    np.testing.assert_allclose(there.numpy(), here.numpy(), rtol=1e-13)  # a GPU sums in another order
    for name, p in moved.named_parameters():
        np.testing.assert_allclose(backend.to_numpy(p.grad), expected[name], rtol=1e-12, atol=1e-14)


def test_moving_takes_along_arrays_and_tensors_that_are_no_parameters():
    model = Block()
    model.constant, model.tables = Tensor(np.ones(2)), (np.ones(2), [np.arange(3)])
    model.to(standin, "float32")
    found = [model.table, model.constant.data, model.tables[0], model.tables[1][0]]
    assert all(backend.get_namespace(a) is standin for a in found)
    assert [a.dtype.name for a in found] == ["float32", "float32", "float32", "int64"]
    assert model.name == "block"


@pytest.mark.parametrize("dtype", ["float64", np.float64, np.dtype("float64")])
def test_a_dtype_may_be_the_only_argument(dtype):
    assert {p.dtype.name for p in Block().to(dtype).parameters()} == {"float64"}


def test_moving_forgets_gradients():
    model = nn.Linear(2, 2, rng=0)
    model(Tensor([[1.0, 2.0]])).sum().backward()
    assert model.to("float64").weight.grad is None


def test_moving_to_where_it_is_copies_nothing():
    model = nn.Linear(2, 2, rng=0)
    array = model.weight.data
    assert model.to("cpu", "float32").weight.data is array


def test_models_are_converted_to_floats_only():
    with pytest.raises(TypeError, match="dtype: got int64; floats are accepted"):
        Block().to(dtype="int64")


def test_an_unknown_device_is_refused_before_anything_moves():
    model = Block()
    with pytest.raises(ValueError, match='device: got \'tpu\'; accepted are "cpu", "cuda" or an array library'):
        model.to("tpu")
    assert type(model.fc.weight.data) is np.ndarray


# --- switches ---------------------------------------------------------------------------------------------------------


def test_training_and_inference_are_switched_for_the_whole_tree():
    model = Block().eval()
    assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.train().modules())


def test_dropout_drops_in_training_only():
    model, x = nn.Dropout(0.5, rng=0), Tensor(np.ones(100, np.float32))
    assert (model(x).data == 0).any()
    assert model.eval()(x) is x


def test_frozen_models_build_no_graph():
    model = Block().requires_grad_(False)
    y = model(Tensor(np.ones((2, 4), np.float32)))
    assert not y.requires_grad
    assert not is_held(model.fc.weight.data)
    assert all(p.requires_grad for p in model.requires_grad_().parameters())


def test_zero_grad_forgets_all_gradients():
    model = Block()
    model(Tensor(np.ones((2, 4), np.float32))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# --- layers -----------------------------------------------------------------------------------------------------------


def test_linear_starts_uniform_within_one_over_the_root_of_its_inputs():
    weight = nn.Linear(400, 300, rng=0).weight.data
    assert weight.dtype == "float32"
    assert abs(weight).max() <= 0.05
    assert abs(weight.std() - 0.05 / 3**0.5) < 3e-4  # four standard errors of 120,000 draws
    assert abs(weight.mean()) < 4e-4


def test_one_seed_gives_the_same_start_in_either_precision():
    single, double = nn.Linear(4, 3, rng=7), nn.Linear(4, 3, rng=7, dtype="float64")
    np.testing.assert_array_equal(single.weight.data, double.weight.data.astype("float32"))
    assert double.bias.dtype == "float64"


def test_embedding_starts_normal():
    weight = nn.Embedding(500, 100, rng=0).weight.data
    assert abs(weight.std() - 1) < 0.015  # four standard errors of 50,000 draws
    assert weight.dtype == "float32"


def test_layers_apply_their_operations(xp):
    x = Tensor(xp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4))))
    linear, norm, rms = (
        layer.to("float64").to(xp) for layer in (nn.Linear(4, 5, rng=0), nn.LayerNorm(4, 1e-3), nn.RMSNorm(4, 1e-3))
    )
    pairs = [
        (linear(x), ops.linear(x, linear.weight, linear.bias)),
        (norm(x), ops.layer_norm(x, norm.weight, norm.bias, 1e-3)),
        (rms(x), ops.rms_norm(x, rms.weight, 1e-3)),
        (nn.ReLU()(x), ops.relu(x)),
        (nn.Sequential(linear, nn.ReLU())(x), ops.relu(linear(x))),
    ]
    for found, expected in pairs:
        np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_embedding_looks_up_rows(xp):
    layer = nn.Embedding(5, 3, rng=0).to(xp)
    ids = np.array([[4, 0], [1, 4]])
    np.testing.assert_array_equal(layer(xp.asarray(ids)).numpy(), backend.to_numpy(layer.weight.data)[ids])


def test_sequential_is_a_list_of_layers():
    first, last = nn.Linear(2, 3, rng=0), nn.ReLU()
    model = nn.Sequential(first, last)
    assert (len(model), model[0], model[-1], list(model)) == (2, first, last, [first, last])
    assert [n for n, _ in model.named_parameters()] == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.Linear(0, 3), "in_features: got 0; an int of at least 1 is accepted"),
        (lambda: nn.Linear(3, 2.0), "out_features: got 2.0; an int of at least 1 is accepted"),
        (lambda: nn.Embedding(-1, 3), "num_embeddings: got -1; an int of at least 1 is accepted"),
        (lambda: nn.Dropout(1.0), r"p: got 1.0; a probability in \[0, 1\) is accepted"),
    ],
)
def test_layers_refuse_sizes_that_make_no_sense(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("layers", [(nn.Linear(2, 2), ops.relu), ([nn.Linear(2, 2), nn.ReLU()],)])
def test_sequential_refuses_what_is_no_module(layers):
    """Not kept as a plain attribute, which forward would leave out without a word."""
    with pytest.raises(TypeError, match=r"layers: number . is a (function|builtin\w*|list); modules are accepted"):
        nn.Sequential(*layers)
