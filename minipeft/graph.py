"""The computation graph as a picture: SVG drawn here, without any external program, or DOT text for Graphviz.

The layout is the layered one of Sugiyama, Tagawa and Toda (1981) in small: a node's row is the longest path from the
leaves to it, an edge that skips rows passes through a point in each, sweeps order every row by the mean position of its
neighbours (barycenters) so that few edges cross, and the same means, pushed apart until no boxes overlap, are the x.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

import numpy as np

from . import backend, files
from .tensor import Node, Tensor, _freed

MAX_NODES = 200  # nobody reads a picture of more
COLORS = {"parameter": "#E69F00", "operation": "#56B4E9", "result": "#009E73", "constant": "#CCCCCC"}  # Okabe and Ito
STYLE = "max-width:100%;height:auto;font-family:DejaVu Sans Mono,Menlo,Consolas,monospace"
CHAR, TITLE, LINE, STEP = 0.61, 18, 14, 20  # a letter's width in ems; two font sizes and the line distance in pixels
PAD, GAP_X, GAP_Y, MARGIN = 10, 30, 48, 18  # pixels


class Box(NamedTuple):
    """One tensor: what its box says, "parameter", "operation", "result" or "constant", and its parents' numbers."""

    lines: list[str]
    kind: str
    parents: tuple[int, ...]


class Graph:
    """What made a tensor: the operations, and the leaves that need a gradient, as they were when this was called.

    Frozen parents are not part of the graph: an operation remembers only the inputs that backward sends a gradient to,
    so frozen weights and input data are missing from the picture. It is why they cost no gradient.

    Args:
        tensor: the result.
        names: what to call tensors: `{"W": W}`, or a module, whose parameters' names are used.

    Attributes:
        nodes: all of them, parents before children.

    Raises:
        RuntimeError: backward has freed the graph.
        TypeError: `names` is neither a mapping from names to tensors nor a module.
    """

    def __init__(self, tensor: Tensor, names: Mapping[str, Tensor] | Any = None) -> None:
        called, root = _names_by_id(names), tensor if tensor._node is None else tensor._node
        number = {origin: i for i, origin in enumerate(_ancestors(root))}
        self.nodes: list[Box] = []
        for origin in number:
            kind = "operation" if isinstance(origin, Node) else "parameter" if origin.requires_grad else "constant"
            kind = "result" if origin is root and isinstance(origin, Node) else kind
            parents = tuple(number[p] for p in _parents(origin))
            self.nodes.append(Box(_lines(origin, called.get(id(origin)), kind), kind, parents))

    def __repr__(self) -> str:
        leaves = sum(node.kind in ("parameter", "constant") for node in self.nodes)
        large = f"; more than {MAX_NODES} nodes are not drawn, .dot has them" if len(self.nodes) > MAX_NODES else ""
        result = ", ".join(self.nodes[-1].lines)
        return f"Graph({len(self.nodes) - leaves} operations, {leaves} leaves; result: {result}{large})"

    @property
    def dot(self) -> str:
        """The graph in Graphviz's DOT language, however large it is."""
        rows = ["digraph {", '  node [style=filled, fontname="DejaVu Sans Mono"]']
        for i, node in enumerate(self.nodes):
            label = r"\n".join(line.replace("\\", r"\\").replace('"', r"\"") for line in node.lines)
            shape = "ellipse" if node.kind == "parameter" else "box"
            rows.append(f'  n{i} [label="{label}", shape={shape}, fillcolor="{COLORS[node.kind]}"]')
        rows += [f"  n{p} -> n{i}" for i, node in enumerate(self.nodes) for p in node.parents]
        return "\n".join([*rows, "}\n"])

    def _repr_svg_(self) -> str | None:
        """What a notebook shows: the picture, or nothing (and so the summary) of more than `MAX_NODES` nodes."""
        return _svg(self.nodes, escape(f"Computation graph: {self!r}")) if len(self.nodes) <= MAX_NODES else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture (`.svg`) or the text (`.dot`), whole or not at all.

        Raises:
            ValueError: another suffix, or a picture of more than `MAX_NODES` nodes.
        """
        suffix = os.path.splitext(path)[1]
        if suffix not in (".svg", ".dot"):
            raise ValueError(f"path: got {os.fspath(path)!r}; names that end in .svg or .dot are accepted")
        text = self.dot if suffix == ".dot" else self._repr_svg_()
        if text is None:
            raise ValueError(
                f"path: .svg shows up to {MAX_NODES} nodes, this graph has {len(self.nodes)}; .dot has no limit"
            )
        files.write_text(path, text)


# --- reading the graph ------------------------------------------------------------------------------------------------


Origin = Node | Tensor  # a recorded operation, or a leaf


def _parents(origin: Origin) -> list[Origin]:
    """The parents that get a gradient; an operation with a joint backward also has places of those that do not."""
    return [p for p in origin.parents if p is not None] if isinstance(origin, Node) else []


def _ancestors(root: Origin) -> list[Origin]:
    """Everything below `root` in the order it was made, leaves first; with a list, not by recursion: no depth limit."""
    seen, stack = {root: None}, [root]
    while stack:
        origin = stack.pop()
        if isinstance(origin, Node) and origin.backward is _freed:
            raise RuntimeError(
                f"graph(): backward has freed the graph of this {origin.op!r}; ask for it before backward"
            )
        new = [parent for parent in _parents(origin) if parent not in seen]
        seen |= dict.fromkeys(new)
        stack += new
    return sorted(seen, key=lambda origin: origin.order if isinstance(origin, Node) else 0)


def _names_by_id(names: Any) -> dict[int, str]:
    if names is None:
        return {}
    if hasattr(names, "named_parameters"):
        names = dict(names.named_parameters())
    if not isinstance(names, Mapping) or not all(isinstance(t, Tensor) for t in names.values()):
        raise TypeError(f"names: got {type(names).__name__}; a mapping from names to tensors, or a module, is accepted")
    return {id(t if t._node is None else t._node): str(name) for name, t in names.items()}


def _lines(origin: Origin, name: str | None, kind: str) -> list[str]:
    """What a box says: operation and name, shape and dtype, and the values of up to four elements."""
    op, value = (origin.op, origin.value) if isinstance(origin, Node) else ("", origin.data)
    title = f"{op} → {name}" if op and name else op or name or kind
    lines = [title, f"{origin.shape or 'scalar'} {origin.dtype}"]
    if value is not None and value.size <= 4:
        values = np.array2string(backend.to_numpy(value), separator=",", formatter={"float_kind": "{:.5g}".format})
        lines.append(" ".join(values.split()))
    return lines


# --- the layout -------------------------------------------------------------------------------------------------------


def _levels(nodes: list[Box]) -> list[int]:
    """The row of each node: the longest path to it; a leaf goes down to just above its first use."""
    level: list[int] = []
    first_use: dict[int, int] = {}
    for node in nodes:
        level.append(max((level[p] + 1 for p in node.parents), default=0))
        first_use |= {p: min(first_use.get(p, level[-1]), level[-1]) for p in node.parents}
    return [level[i] if node.parents else first_use.get(i, 1) - 1 for i, node in enumerate(nodes)]


def _items(nodes: list[Box]) -> tuple[list[list[int]], list[list[int]]]:
    """(rows, edges as paths) of items: an item is a node or, numbered after the nodes, a point of an edge in a row."""
    level = _levels(nodes)
    rows: list[list[int]] = [[] for _ in range(max(level) + 1)]
    paths, number = [], itertools.count(len(nodes))
    for i, node in enumerate(nodes):
        rows[level[i]].append(i)
        for p in node.parents:
            points = {row: next(number) for row in range(level[p] + 1, level[i])}
            for row, point in points.items():
                rows[row].append(point)
            paths.append([p, *points.values(), i])
    return rows, paths


def _place(rows: list[list[int]], paths: list[list[int]], widths: list[float], leaves: set[int]) -> list[float]:
    """The x of every item; sorts the rows. Leaves give way to all others, which would be pushed aside row by row."""
    above: list[list[int]] = [[] for _ in widths]
    below: list[list[int]] = [[] for _ in widths]
    for a, b in itertools.chain.from_iterable(map(itertools.pairwise, paths)):
        above[b].append(a)
        below[a].append(b)
    both = [[u for u in a + b if u not in leaves] or a + b for a, b in zip(above, below, strict=True)]
    x = [0.0] * len(widths)
    for sweep in range(80):  # upwards from the result first; at the beginning the order is free, then only x moves
        near = both if sweep >= 12 else above if sweep % 2 else below
        for row in rows if sweep % 2 else rows[::-1]:
            wish = {v: sum(x[u] for u in near[v]) / len(near[v]) if near[v] else x[v] for v in row}
            if sweep < 12:
                row.sort(key=wish.__getitem__)
            places = _apart([(wish[v], widths[v], 0.02 if v in leaves else 1) for v in row])
            for v, place in zip(row, places, strict=True):
                x[v] = place
    left = min(a - w / 2 for a, w in zip(x, widths, strict=True))
    return [a - left + MARGIN for a in x]


def _apart(row: list[tuple[float, float, float]]) -> Iterator[float]:
    """The places nearest to the wishes, in weighted squares, that keep order and gaps; from (wish, width, weight).

    Without the gaps' sum before each item this is monotone regression: neighbours in the wrong order share their mean.
    """
    offsets = list(itertools.accumulate([(a[1] + b[1]) / 2 + GAP_X for a, b in itertools.pairwise(row)], initial=0.0))
    shared: list[tuple[float, float, int]] = []  # (mean, weight, number of items)
    for (wish, _, weight), offset in zip(row, offsets, strict=True):
        mean, n = wish - offset, 1
        while shared and shared[-1][0] > mean:
            other, other_weight, other_n = shared.pop()
            mean = (mean * weight + other * other_weight) / (weight + other_weight)
            weight, n = weight + other_weight, n + other_n
        shared.append((mean, weight, n))
    return map(sum, zip(offsets, [mean for mean, _, n in shared for _ in range(n)], strict=True))


# --- the picture ------------------------------------------------------------------------------------------------------


def _width(text: str, size: float) -> float:
    """Pixels of a text in a fixed-width font; Chinese characters are two letters wide."""
    return CHAR * size * sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _text(x: float, y: float, text: str, size: float, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" {more}>{escape(text)}</text>'


def _sized_lines(node: Node) -> list[tuple[str, int]]:
    """What a box says, with sizes; a long name goes on in the next line after a dot."""
    title = [""]
    for part in re.split(r"(?<=\.)", node.lines[0]):
        if title[-1] and len(title[-1] + part) > 24:
            title.append("")
        title[-1] += part
    return [(line, TITLE) for line in title] + [(line, LINE) for line in node.lines[1:]]


def _svg(nodes: list[Box], title: str) -> str:
    said = [_sized_lines(node) for node in nodes]
    heights = [2 * PAD + TITLE + STEP * (len(lines) - 1) for lines in said]
    rows, paths = _items(nodes)
    widths = [2 * PAD + max(_width(*line) for line in lines) for lines in said]
    widths += [0.0] * (sum(map(len, rows)) - len(nodes))  # the points
    x = _place(rows, paths, widths, {i for i, node in enumerate(nodes) if not node.parents})
    start, end, y = {}, {}, MARGIN + 2.5 * LINE
    for row in rows:  # the boxes of a row end on one line, so that an edge leaves one without touching the next
        tallest = max(heights[v] for v in row if v < len(nodes))
        start |= dict.fromkeys(row, y)
        end |= dict.fromkeys(row, y + tallest)
        y += tallest + GAP_Y
    shapes = list(_legend({node.kind for node in nodes}))
    for path, landing in zip(paths, _landings(paths, x, widths), strict=True):
        spans = [(start[v], end[v]) for v in path[:-1]] + [(start[path[-1]], end[path[-1]] - heights[path[-1]])]
        shapes.append(_edge([x[v] for v in path[:-1]] + [landing], spans))
    shapes += [_box(n.kind, said[i], x[i], end[i] - heights[i], widths[i], heights[i]) for i, n in enumerate(nodes)]
    width, height = max(340, *map(lambda a, w: a + w / 2, x, widths)) + MARGIN, y - GAP_Y + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" style="{STYLE}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{title}"><title>{title}</title>'
        f'<rect width="100%" height="100%" rx="8" fill="#FFFFFF"/>{"".join(shapes)}</svg>\n'
    )


def _landings(paths: list[list[int]], x: list[float], widths: list[float]) -> list[float]:
    """Where each edge arrives: side by side on top of its box, in the order the edges come from."""
    arriving: dict[int, list[int]] = {}
    for k in sorted(range(len(paths)), key=lambda k: x[paths[k][-2]]):
        arriving.setdefault(paths[k][-1], []).append(k)
    ends = [0.0] * len(paths)
    for v, edges in arriving.items():
        for i, k in enumerate(edges):
            ends[k] = x[v] + (i - (len(edges) - 1) / 2) * min(26, widths[v] / (len(edges) + 1))
    return ends


def _edge(xs: list[float], spans: list[tuple[float, float]]) -> str:
    """A curve that is vertical inside rows, with an arrow head; for each row the edge's x, where it begins and ends."""
    d = f"M{xs[0]:.1f} {spans[0][1]:.1f}"
    for (a, b), ((_, leaves), (enters, ends)) in zip(itertools.pairwise(xs), itertools.pairwise(spans), strict=True):
        middle = (leaves + enters) / 2
        d += f"C{a:.1f} {middle:.1f} {b:.1f} {middle - 8:.1f} {b:.1f} {enters - 8:.1f}V{ends - 8:.1f}"
    head = f"M{b:.1f} {ends:.1f}l-5.5 -10h11z"
    return f'<path d="{d}" fill="none" stroke="#444444" stroke-width="2"/><path d="{head}" fill="#444444"/>'


def _box(kind: str, lines: list[tuple[str, int]], x: float, y: float, width: float, height: float) -> str:
    """Round for parameters, with a heavy frame for the result: the colour is not the only difference."""
    corner, frame = 20 if kind == "parameter" else 4, 3.5 if kind == "result" else 1.2
    texts = ""
    for i, (line, size) in enumerate(lines):
        weight = ' font-weight="bold"' if size == TITLE else ""
        texts += _text(x, y + PAD + 15 + STEP * i, line, size, f'text-anchor="middle"{weight}')
    return (
        f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{corner}" '
        f'fill="{COLORS[kind]}" stroke="#222222" stroke-width="{frame}"/>{texts}'
    )


def _legend(kinds: set[str]) -> Iterator[str]:
    x = float(MARGIN)
    for kind in (kind for kind in COLORS if kind in kinds):
        yield f'<rect x="{x:.1f}" y="{MARGIN - 4}" width="14" height="14" fill="{COLORS[kind]}" stroke="#222222"/>'
        yield _text(x + 20, MARGIN + 8, kind, LINE)
        x += 40 + _width(kind, LINE)
