"""Comparisons of the CUDA kernels with the oracle, for the emulated kernels and for those on a GPU.

Operators are compared, not layers: every output of every operator, with the oracle in float64 on the same rounded
inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from helpers import normal, random_edges

from acgkd_fast import EdgeSample, _library

# Of the largest entry of a tensor; bfloat16 rounds what it stores to 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
LAYERS = ("gcn", "gcn without self loops", "gin")


@dataclass(frozen=True)
class Case:
    """One input of message passing: sizes of the graphs, features per node, and how the edges are stored."""

    sizes: tuple[int, ...]
    width: int
    density: float = 0.3
    symmetric: bool = True
    capacity_slack: int = 0
    hubs: int = 0  # nodes of the first graph that are joined to all others
    misaligned: bool = False
    seed: int = 1

    def edges(self, dtype: torch.dtype) -> EdgeSample:
        if self.hubs:
            edges = self._with_hubs()
        else:
            edges, _ = random_edges(
                list(self.sizes), symmetric=self.symmetric, seed=self.seed, density=self.density, dtype=torch.float64
            )
        edges.value = edges.value.detach().to(dtype)
        return edges

    def _with_hubs(self) -> EdgeSample:
        """A ring in the first graph, whose first nodes are joined to every other."""
        n = self.sizes[0]
        node = torch.arange(n)
        low, high = [node], [(node + 1) % n]
        for hub in range(self.hubs):
            others = torch.arange(hub + 2, n)
            low.append(torch.full_like(others, hub))
            high.append(others)
        low, high = torch.cat(low), torch.cat(high)
        weight = normal(len(low), self.seed).abs() + 0.2
        ptr = torch.tensor([0, *torch.tensor(self.sizes).cumsum(0).tolist()])
        if self.symmetric:
            both = torch.stack([torch.cat([low, high]), torch.cat([high, low])])
            return EdgeSample.from_edge_index(both, ptr, torch.cat([weight, weight]), symmetric=True)
        return EdgeSample.from_edge_index(torch.stack([low, high]), ptr, weight)


def padded(tensor: torch.Tensor, slack: int, fill: float) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, slack), value=fill)


def placed(tensor: torch.Tensor, misaligned: bool) -> torch.Tensor:
    """The same rows at an address that is no multiple of 16."""
    if not misaligned:
        return tensor
    room = tensor.new_full((tensor.numel() + 1,), float("nan"))
    room[1:] = tensor.reshape(-1)
    return room[1:].view(tensor.shape)


def mirror(edges: EdgeSample) -> torch.Tensor:
    """Position of the opposite entry of each entry of a symmetric matrix without repeated entries."""
    row, col, nodes = edges.row(), edges.col[: edges.num_edges].long(), edges.num_nodes
    key = row * nodes + col
    return torch.searchsorted(key, col * nodes + row)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    actual = actual.cpu().double()
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    if actual.numel() == 0:
        return
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    # Inputs are of the order of 1; a result far below that is what remains of terms that cancel.
    assert error <= TOLERANCE[dtype] * max(size, 1.0), (what, error, size)


class Inputs:
    """The operands of one case, on a device and, as the oracle sees them, on the CPU in float64."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.edges = case.edges(dtype)
        nodes = sum(case.sizes)
        self.x = normal((nodes, case.width), case.seed + 1, dtype)
        self.grad_out = normal((nodes, case.width), case.seed + 2, dtype)

    def features(self, tensor: torch.Tensor) -> torch.Tensor:
        return placed(tensor.to(self.device), self.case.misaligned)

    def value(self) -> torch.Tensor:
        return padded(self.edges.value, self.case.capacity_slack, float("nan")).to(self.device)

    def matrix(self) -> tuple[Any, ...]:
        # What nobody may follow: a column far outside.
        col = padded(self.edges.col, self.case.capacity_slack, 2**31 - 1)
        parts = (self.edges.rowptr, col, *self.edges.transposed())
        return tuple(None if part is None else part.to(self.device) for part in parts)

    def oracle_matrix(self) -> tuple[Any, ...]:
        col = padded(self.edges.col, self.case.capacity_slack, 0)
        return (self.edges.rowptr, col, *self.edges.transposed())

    def oracle_value(self) -> torch.Tensor:
        return padded(self.edges.value, self.case.capacity_slack, 0).double()


def run(ops: Any, layer: str, inputs: Inputs, eps: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Every output of the layer's two operators."""
    x, grad_out = inputs.features(inputs.x), inputs.features(inputs.grad_out)
    value, matrix = inputs.value(), inputs.matrix()
    if layer == "gin":
        assert eps is not None
        eps = eps.to(inputs.device)
        out = ops.gin_propagate(x, value, eps, None, None, *matrix, 0)
        grad_x, grad_value, grad_eps = ops.gin_propagate_backward(grad_out, x, value, eps, *matrix)
        return {"out": out, "grad_x": grad_x, "grad_value": grad_value, "grad_eps": grad_eps}
    loops = layer == "gcn"
    out, scale = ops.gcn_propagate(x, value, None, None, *matrix, loops, 0)
    back = ops.gcn_propagate_backward(grad_out, x, inputs.features(out), value, scale, *matrix, loops)
    return {"out": out, "scale": scale, **dict(zip(("grad_x", "grad_value", "grad_degree"), back, strict=True))}


def compare(ops: Any, layer: str, inputs: Inputs, eps_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Run a layer and compare every output with the oracle; returns the outputs."""
    eps = torch.tensor([0.25], dtype=eps_dtype)
    found = run(ops, layer, inputs, eps)
    x, grad_out = inputs.x.double(), inputs.grad_out.double()
    value, matrix = inputs.oracle_value(), inputs.oracle_matrix()
    if layer == "gin":
        expected = {"out": _library.reference("gin_propagate")(x, value, eps.double(), None, None, *matrix, 0)}
        back = _library.reference("gin_propagate_backward")(grad_out, x, value, eps.double(), *matrix)
        expected.update(zip(("grad_x", "grad_value", "grad_eps"), back, strict=True))
    else:
        loops = layer == "gcn"
        out, scale = _library.reference("gcn_propagate")(x, value, None, None, *matrix, loops, 0)
        # The backward pass is judged on what the forward pass stored.
        saved = found["out"].cpu().double(), value, found["scale"].cpu().double()
        back = _library.reference("gcn_propagate_backward")(grad_out, x, *saved, *matrix, loops)
        expected = {"out": out, "scale": scale}
        expected.update(zip(("grad_x", "grad_value", "grad_degree"), back, strict=True))

    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    storage = {"scale": wide, "grad_degree": wide, "grad_eps": eps_dtype}
    count = inputs.edges.num_edges
    for name, reference in expected.items():
        actual, dtype = found[name], storage.get(name, inputs.dtype)
        assert actual.dtype == dtype, name
        if name == "grad_value":
            assert not actual[count:].any(), "padding"
            actual, reference = actual[:count].cpu().double(), reference[:count]
            if inputs.case.symmetric:
                opposite = mirror(inputs.edges)
                actual, reference = actual + actual[opposite], reference + reference[opposite]
        # eps has a dtype of its own, but its gradient is no better than the inputs.
        coarser = max(dtype, inputs.dtype, key=TOLERANCE.__getitem__)
        assert_close(actual, reference, coarser, f"{layer} {name}")
    return found


def run_attention(ops: Any, heads: int, inputs: Inputs, loops: bool) -> dict[str, torch.Tensor]:
    """Every output of the two operators of attention; the case's width is that of a head."""
    sent, source, target, grad_out = attention_operands(heads, inputs)
    value, matrix = inputs.value(), inputs.matrix()
    operands = inputs.features(sent), source.to(inputs.device), target.to(inputs.device), value
    out, highest, total = ops.gat_propagate(*operands, *matrix, 0.2, loops)
    back = ops.gat_propagate_backward(
        inputs.features(grad_out), *operands, inputs.features(out), highest, total, *matrix, 0.2, loops
    )
    return {"out": out, "highest": highest, "total": total, **dict(zip(_ATTENTION_GRADIENTS, back, strict=True))}


_ATTENTION_GRADIENTS = ("grad_sent", "grad_source", "grad_target", "grad_value")


def attention_operands(heads: int, inputs: Inputs) -> list[torch.Tensor]:
    nodes, seed = sum(inputs.case.sizes), inputs.case.seed
    widths = (heads * inputs.case.width, heads, heads, heads * inputs.case.width)
    return [normal((nodes, width), seed + 3 + k, inputs.dtype) for k, width in enumerate(widths)]


def compare_attention(ops: Any, heads: int, inputs: Inputs, loops: bool = True) -> dict[str, torch.Tensor]:
    """Run attention and compare every output with the oracle; returns the outputs."""
    found = run_attention(ops, heads, inputs, loops)
    *operands, grad_out = (tensor.double() for tensor in attention_operands(heads, inputs))
    value, matrix = inputs.oracle_value(), inputs.oracle_matrix()
    sums = _library.reference("gat_propagate")(*operands, value, *matrix, 0.2, loops)
    expected = dict(zip(("out", "highest", "total"), sums, strict=True))
    # The backward pass is judged on what the forward pass stored.
    saved = [found[name].cpu().double() for name in expected]
    back = _library.reference("gat_propagate_backward")(grad_out, *operands, value, *saved, *matrix, 0.2, loops)
    expected.update(zip(_ATTENTION_GRADIENTS, back, strict=True))
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    for name, reference in expected.items():
        dtype = wide if name in ("highest", "total") else inputs.dtype
        assert found[name].dtype == dtype, name
        assert_close(found[name], reference, dtype, f"attention {name}")
    assert not found["grad_value"][inputs.edges.num_edges :].any(), "padding"
    return found


READOUT_MODES = {"sum": 0, "mean": 1, "max": 2}


def compare_readout(
    ops: Any, sizes: list[int], width: int, mode: str, dtype: torch.dtype, device: str = "cpu", misaligned: bool = False
) -> list[torch.Tensor]:
    ptr = torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()])
    nodes, code = sum(sizes), READOUT_MODES[mode]
    # Few distinct values, so that a maximum is reached more than once.
    x = (normal((nodes, width), 5) * 2).round().to(dtype)
    grad_out = normal((len(sizes), width), 6, dtype)
    out, argmax = ops.readout(placed(x.to(device), misaligned), ptr.to(device), code)
    expected, expected_argmax = _library.reference("readout")(x.double(), ptr, code)
    assert out.dtype == dtype and argmax.dtype == torch.int32
    assert_close(out, expected, dtype, f"readout {mode}")
    assert torch.equal(argmax.cpu(), expected_argmax), mode
    grad_x = ops.readout_backward(placed(grad_out.to(device), misaligned), argmax, ptr.to(device), code, nodes)
    expected_grad = _library.reference("readout_backward")(grad_out.double(), expected_argmax, ptr, code, nodes)
    assert grad_x.dtype == dtype
    assert_close(grad_x, expected_grad, dtype, f"readout {mode} backward")
    return [out, argmax, grad_x]


def compare_normalize(
    ops: Any, rows: int, width: int, dtype: torch.dtype, device: str = "cpu", misaligned: bool = False
) -> list[torch.Tensor]:
    """Column moments and the frozen BatchNorm, each alone and both in one pass."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return placed(tensor.to(device), misaligned and tensor.dim() == 2)

    def agree(actual: torch.Tensor, reference: torch.Tensor, expected_dtype: torch.dtype, what: str) -> None:
        assert actual.dtype == expected_dtype, what
        assert_close(actual, reference, expected_dtype, what)

    # An offset of 30 would cost a naive second moment three digits.
    offset = (normal((rows, width), 1) + 30.0).to(dtype)
    mean, variance = ops.column_moments(move(offset))
    for actual, reference in zip((mean, variance), _library.reference("column_moments")(offset.double()), strict=True):
        agree(actual, reference, wide, "moments")
    grads = [normal(width, seed, wide) for seed in (2, 3)]
    grad_x = ops.column_moments_backward(*map(move, grads), move(offset), mean)
    backward = _library.reference("column_moments_backward")
    agree(grad_x, backward(*(g.double() for g in grads), offset.double(), mean.cpu().double()), dtype, "backward")
    found = [mean, variance, grad_x]

    # Centred, so that the rectifier cuts half of the values.
    x, grad_out, residual = (normal((rows, width), seed, dtype) for seed in (4, 10, 9))
    constants = [normal(width, 5, dtype), normal(width, 6, dtype).abs() + 0.1, normal(width, 7, dtype)]
    constants.append(normal(width, 8, dtype))
    oracle = [c.double() for c in constants]
    forward, backward = _library.reference("frozen_norm_relu"), _library.reference("frozen_norm_relu_backward")
    # Where rounding carries a value across zero the rectifier decides otherwise; leave those out.
    passed = forward(x.double(), None, *oracle, 1e-5, False)[0]
    clear = (passed == 0) | (passed > 1e-4)
    for moments in (False, True):
        for added in (None, residual):
            outputs = ops.frozen_norm_relu(
                move(x), None if added is None else move(added), *map(move, constants), 1e-5, moments
            )
            references = forward(x.double(), None if added is None else added.double(), *oracle, 1e-5, moments)
            for actual, reference, expected_dtype in zip(outputs, references, (dtype, wide, wide), strict=True):
                agree(actual, reference, expected_dtype, "frozen norm")
            found += outputs
        upstream = [grad_out, *(grads if moments else (None, None))]
        batch_mean = outputs[1]
        grad = ops.frozen_norm_relu_backward(
            *(None if g is None else move(g) for g in upstream), move(x), batch_mean, *map(move, constants), 1e-5
        )
        reference = backward(
            *(None if g is None else g.double() for g in upstream), x.double(), batch_mean.cpu().double(), *oracle, 1e-5
        )
        agree(grad.cpu() * clear, reference * clear, dtype, "frozen norm backward")
        found.append(grad)
    return found
