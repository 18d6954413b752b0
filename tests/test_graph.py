"""The computation graph: what it contains, the picture, the text, and where it stops."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from minipeft import LoraConfig, Tensor, backend, get_peft_model, nn, ops
from minipeft.graph import COLORS, MAX_NODES, Graph

SVG = "{http://www.w3.org/2000/svg}"


def leaf(*shape: int, value: float = 1.0) -> Tensor:
    return Tensor(np.full(shape, value), requires_grad=True, dtype="float32")


def mlp_loss() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(5, 8, rng=0), nn.ReLU(), nn.Linear(8, 3, rng=1))
    return model, ops.cross_entropy(model(np.ones((4, 5), "float32")), np.zeros(4, "int64"))


def titles(graph: Graph) -> list[str]:
    return [node.lines[0] for node in graph.nodes]


def edges(graph: Graph) -> set[tuple[str, str]]:
    return {(graph.nodes[p].lines[0], node.lines[0]) for node in graph.nodes for p in node.parents}


def picture(graph: Graph) -> ElementTree.Element:
    return ElementTree.fromstring(graph._repr_svg_())


def boxes(root: ElementTree.Element) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of every node's box; the background and the legend lack x or rounded corners."""
    rects = [r for r in root.iter(f"{SVG}rect") if r.get("x") and r.get("rx")]
    sides = [[float(r.get(key)) for key in ("x", "y", "width", "height")] for r in rects]
    return [(x, y, x + width, y + height) for x, y, width, height in sides]


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text for text in root.iter(f"{SVG}text")]


def lattice(n: int) -> Tensor:
    """A wide graph with edges that skip rows and cross."""
    layer = [leaf(2) for _ in range(n)]
    first = list(layer)
    for k in range(n - 1):
        layer = [a * b + first[(i + k) % n] for i, (a, b) in enumerate(itertools.pairwise(layer))]
    return layer[0]


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_nodes_come_after_their_parents_and_the_result_last():
    _, loss = mlp_loss()
    graph = loss.graph()
    assert all(p < i for i, node in enumerate(graph.nodes) for p in node.parents)
    assert (graph.nodes[-1].kind, graph.nodes[-1].lines[0]) == ("result", "cross_entropy")
    assert [node.kind for node in graph.nodes[:4]] == ["parameter"] * 4


def test_a_module_gives_its_parameters_their_names():
    model, loss = mlp_loss()
    assert edges(loss.graph(model)) == {
        ("0.weight", "linear"),
        ("0.bias", "linear"),
        ("linear", "relu"),
        ("relu", "linear"),
        ("2.weight", "linear"),
        ("2.bias", "linear"),
        ("linear", "cross_entropy"),
    }


def test_frozen_weights_and_input_data_are_not_in_it():
    model = get_peft_model(nn.Sequential(nn.Linear(5, 8, rng=0)), LoraConfig(r=2))
    graph = Graph(model(np.ones((4, 5), "float32")).sum(), model)
    assert [t.rpartition("0.")[2] for t in titles(graph)] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
        "lora_linear",
        "sum",
    ]


def test_a_tensor_used_twice_is_one_node_with_two_edges():
    x = leaf()
    graph = (x * x).graph({"x": x})
    assert titles(graph) == ["x", "mul"]
    assert graph.nodes[1].parents == (0, 0)


def test_a_dictionary_names_leaves_and_results_of_operations():
    x = leaf()
    y = x * 2.0
    z = y + 1.0
    assert titles(z.graph({"x": x, "y": y, "z": z})) == ["x", "mul → y", "add → z"]


def test_values_are_shown_of_up_to_four_elements():
    four = Tensor([[1.5, -2.0], [0.25, 1e6]], requires_grad=True)
    five = leaf(5)
    graph = (four.sum() + five.sum()).graph({"four": four, "five": five})
    shown = {node.lines[0]: node.lines[1:] for node in graph.nodes}
    assert shown["four"] == ["(2, 2) float32", "[[1.5,-2], [0.25,1e+06]]"]
    assert shown["five"] == ["(5,) float32"]
    assert shown["sum"] == ["scalar float32", "5"]


def test_a_graph_stays_as_it_was_when_values_change_and_backward_runs():
    x = leaf(value=3.0)
    y = x * 2.0
    graph = y.graph()
    before = graph.dot
    y.backward()
    x.data[...] = 7
    assert graph.dot == before
    assert "3" in graph.nodes[0].lines


def test_a_leaf_and_a_constant_are_graphs_of_one_node():
    assert [node.kind for node in leaf(3).graph().nodes] == ["parameter"]
    assert [node.kind for node in Tensor([1.0]).graph().nodes] == ["constant"]
    assert len(boxes(picture(leaf(3).graph()))) == 1


def test_device_tensors_are_drawn_too(xp):
    x = Tensor(backend.move(np.ones(2, "float32"), xp), requires_grad=True)
    assert (x * 2.0).graph().nodes[-1].lines == ["mul", "(2,) float32", "[2,2]"]


def test_the_summary_counts_operations_and_leaves():
    _, loss = mlp_loss()
    assert re.fullmatch(
        r"Graph\(4 operations, 4 leaves; result: cross_entropy, scalar float32, [\d.]+\)", repr(loss.graph())
    )


# --- where it stops ---------------------------------------------------------------------------------------------------


def test_a_freed_graph_is_an_error_that_says_when_to_ask():
    _, loss = mlp_loss()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward has freed the graph of this 'cross_entropy'; ask for it before"):
        loss.graph()


def test_a_part_that_is_freed_is_named():
    x = leaf()
    y = x * 2.0
    z = y + 1.0
    y.backward()
    with pytest.raises(RuntimeError, match="'mul'"):
        z.graph()


@pytest.mark.parametrize("names", [3, ["x"], {"x": 1.0}, "x"])
def test_names_are_a_mapping_to_tensors_or_a_module(names):
    with pytest.raises(TypeError, match="names: got"):
        leaf().graph(names)


def test_a_graph_of_any_depth_is_text_but_only_a_small_one_is_a_picture(tmp_path):
    x = y = leaf()
    for _ in range(20_000):  # far beyond Python's recursion limit
        y = y * 1.0
    graph = y.graph()
    assert graph.dot.count("->") == 20_000
    assert graph._repr_svg_() is None
    assert f"more than {MAX_NODES} nodes are not drawn" in repr(graph)
    with pytest.raises(ValueError, match=f"up to {MAX_NODES} nodes, this graph has 20001"):
        graph.save(tmp_path / "deep.svg")
    assert list(tmp_path.iterdir()) == []
    for _ in range(10):
        x = x + leaf()
    assert x.graph()._repr_svg_() is not None


# --- the picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: mlp_loss()[1], lambda: lattice(7), lambda: leaf(2) @ leaf(2)])
def test_boxes_do_not_overlap_and_lie_inside_the_picture(make):
    root = picture(make().graph())
    width, height = map(float, root.get("viewBox").split()[2:])
    places = boxes(root)
    assert all(0 < left < right < width and 0 < top < bottom < height for left, top, right, bottom in places)
    for a, b in itertools.combinations(places, 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_every_edge_is_a_curve_with_a_head_that_touches_the_top_of_a_box():
    graph = lattice(5).graph()
    paths = [path.get("d") for path in picture(graph).iter(f"{SVG}path")]
    heads = [tuple(map(float, re.match(r"M(\S+) ([\d.]+)l", d).groups())) for d in paths if "l" in d]
    assert len(heads) == len(paths) / 2 == sum(len(node.parents) for node in graph.nodes)
    places = boxes(picture(graph))
    for x, y in heads:
        assert any(left < x < right and abs(y - top) < 0.1 for left, top, right, _ in places)
    assert len(set(heads)) == len(heads)  # two edges into one box arrive side by side


def test_edges_leave_downwards_from_parents_to_children():
    for d in (path.get("d") for path in picture(lattice(6).graph()).iter(f"{SVG}path")):
        if "C" in d:
            heights = [float(piece.split()[-1]) for piece in re.split("[CV]", d[1:])]
            assert heights == sorted(heights)


def test_two_chains_side_by_side_do_not_cross():
    a, b = leaf(2), leaf(2)
    root = picture((a.exp().exp().exp() + b.exp().exp().exp()).graph({"a": a, "b": b}))
    chains = sorted((round(left + right) / 2, top) for left, top, right, _ in boxes(root))
    columns = {x for x, _ in chains}
    assert len(columns) == 3  # each chain is a straight column, the sum between them


def test_kinds_differ_in_colour_in_form_and_in_the_legend():
    _, loss = mlp_loss()
    root = picture(loss.graph())
    rects = [r for r in root.iter(f"{SVG}rect") if r.get("x") and r.get("rx")]
    form = {r.get("fill"): (r.get("rx"), r.get("stroke-width")) for r in rects}
    assert form.keys() == {COLORS["parameter"], COLORS["operation"], COLORS["result"]}
    assert len(set(form.values())) == 3
    assert texts(root)[:3] == ["parameter", "operation", "result"]


def test_the_background_is_light_and_covers_the_picture():
    background = next(picture(leaf().graph()).iter(f"{SVG}rect"))
    assert (background.get("fill"), background.get("width"), background.get("height")) == ("#FFFFFF", "100%", "100%")


def test_the_picture_has_a_title_for_those_who_hear_it():
    _, loss = mlp_loss()
    root = picture(loss.graph())
    assert root.get("role") == "img"
    assert root.get("aria-label") == root.find(f"{SVG}title").text == f"Computation graph: {loss.graph()!r}"


def test_text_is_escaped():
    x = leaf()
    name = '<b> & "权重"'
    assert name in texts(picture(x.graph({name: x})))


def test_chinese_names_get_a_wider_box():
    x = leaf()
    (latin,), (chinese,) = (boxes(picture(x.graph({name: x}))) for name in ("w" * 12, "权" * 12))
    assert chinese[2] - chinese[0] > 1.5 * (latin[2] - latin[0])


def test_long_names_go_on_in_the_next_line():
    x, name = leaf(), "base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    root = picture(x.graph({name: x}))
    (left, _, right, _), *_ = boxes(root)
    assert right - left < 320
    assert "".join(texts(root)[1:-2]) == name
    assert all(text.endswith(".") for text in texts(root)[1:-3])


# --- text and files ---------------------------------------------------------------------------------------------------


def test_dot_names_operations_shapes_and_parameters():
    model, loss = mlp_loss()
    dot = loss.graph(model).dot
    assert dot.startswith("digraph {")
    assert f'[label="0.weight\\n(8, 5) float32", shape=ellipse, fillcolor="{COLORS["parameter"]}"]' in dot
    assert r'label="relu\n(4, 8) float32", shape=box' in dot
    assert dot.count("->") == 7


def test_dot_escapes_quotes_and_backslashes():
    x = leaf(2, 3)
    assert r'label="a\"b\\c\n(2, 3) float32"' in x.graph({'a"b\\c': x}).dot


def test_files_hold_the_picture_or_the_text_and_nothing_else_is_left(tmp_path):
    graph = mlp_loss()[1].graph()
    graph.save(tmp_path / "graph.svg")
    graph.save(str(tmp_path / "graph.dot"))
    assert (tmp_path / "graph.svg").read_text(encoding="utf-8") == graph._repr_svg_()
    assert (tmp_path / "graph.dot").read_text(encoding="utf-8") == graph.dot
    assert len(list(tmp_path.iterdir())) == 2


def test_other_suffixes_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"names that end in .svg or .dot are accepted"):
        leaf().graph().save(tmp_path / "graph.png")
    assert list(tmp_path.iterdir()) == []
