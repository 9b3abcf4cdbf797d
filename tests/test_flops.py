"""FLOPs against counts made by hand, and against torch's own counter where it knows every operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch_geometric.nn import GATConv, GCNConv

from hpcprune.flops import count_flops
from hpcprune.graph import Graph


class Network(nn.Module):
    """The submodules of `parts`, called by `run(self, *inputs)`."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def test_linear_and_convolution_as_counted_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
    counted = count_flops(model, torch.rand(2, 3, 6, 6), {"0.weight": 54 / 216, "3.weight": 1 / 2880})
    # Every weight of the convolution is used at each of 6 * 6 places, twice (multiply, add), for 2 images.
    assert counted.by_layer["0.weight"] == (2 * 2 * 36 * 216, 2 * 2 * 36 * 54)
    assert counted.by_layer["3.weight"] == (2 * 2 * 2880, 2 * 2 * 1)
    assert counted.dense == 2 * 2 * (36 * 216 + 2880)
    assert counted.survivors == 2 * 2 * (36 * 54 + 1)


@pytest.mark.parametrize(
    ("model", "shape", "flops"),
    [
        (nn.Conv1d(4, 6, 3, groups=2, bias=False), (5, 4, 10), 2 * 5 * 8 * (6 * 2 * 3)),
        (nn.Conv2d(4, 4, 3, groups=4, stride=2), (2, 4, 9, 9), 2 * 2 * 16 * (4 * 3 * 3)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 2 * 25 * (4 * 6 * 9)),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 2 * 8 * (3 * 2 * 8)),
        (nn.Linear(8, 3), (8,), 2 * 24),
        (nn.Linear(8, 3), (2, 5, 8), 2 * 10 * 24),
    ],
)
def test_each_weight_is_used_once_a_place(model: nn.Module, shape: tuple[int, ...], flops: int) -> None:
    inputs = torch.rand(shape)
    counted = count_flops(model, inputs, {})
    assert counted.by_layer == {"weight": (flops, flops)}
    with FlopCounterMode(display=False) as theirs, torch.no_grad():
        model(inputs)
    assert counted.dense == theirs.get_total_flops()


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers_use_each_matrix_once_a_step(kind: Any, gates: int, packed: bool) -> None:
    """The LSTM is one fused operation on the CPU, of which torch's counter sees nothing."""
    model = kind(3, 4, num_layers=2, bidirectional=True)
    inputs: Any = torch.rand(6, 5, 3)
    steps = 6 * 5
    if packed:
        inputs = nn.utils.rnn.pack_padded_sequence(inputs, [6, 4, 4, 2, 1])
        steps = 6 + 4 + 4 + 2 + 1
    # A PackedSequence is a tuple: it is wrapped so that it stays one argument.
    counted = count_flops(model, (inputs,), {"weight_hh_l1_reverse": 0.25})
    expected = {}
    for layer, width in ((0, 3), (1, 8)):
        for way in ("", "_reverse"):
            expected[f"weight_ih_l{layer}{way}"] = 2 * steps * gates * 4 * width
            expected[f"weight_hh_l{layer}{way}"] = 2 * steps * gates * 4 * 4
    assert {name: dense for name, (dense, _) in counted.by_layer.items()} == expected
    assert counted.dense == sum(expected.values())
    assert counted.dense - counted.survivors == expected["weight_hh_l1_reverse"] * 3 // 4


def test_the_fused_recurrent_layer_of_cudnn() -> None:
    """Called on meta tensors, which need no GPU; the weights come in one list, biases among them."""

    def run(self: Any, x: Tensor) -> Any:
        weights = [self.ih, self.hh, self.b, self.b]
        hidden = torch.zeros(1, 5, 4, device="meta")
        sizes = (0, weights, 4, None, hidden, hidden, 2, 4, 0, 1, False, 0.0, False, False, [], None)
        return torch.ops.aten._cudnn_rnn(x, *sizes[1:])

    def meta(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, device="meta"))

    model = Network(run, ih=meta(16, 3), hh=meta(16, 4), b=meta(16))
    counted = count_flops(model, torch.empty(6, 5, 3, device="meta"), {"hh": 0.5})
    assert counted.by_layer == {"ih": (2 * 30 * 48, 2 * 30 * 48), "hh": (2 * 30 * 64, 2 * 30 * 32)}


def test_attention_is_counted_through_the_fast_path_too() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    counted = count_flops(model, torch.rand(2, 5, 8), {"self_attn.in_proj_weight": 0.5})
    tokens = 2 * 5
    assert counted.by_layer == {
        "self_attn.in_proj_weight": (2 * tokens * 24 * 8, tokens * 24 * 8),
        "self_attn.out_proj.weight": (2 * tokens * 64,) * 2,
        "linear1.weight": (2 * tokens * 128,) * 2,
        "linear2.weight": (2 * tokens * 128,) * 2,
    }
    scores = 2 * (2 * 2 * 2 * 5 * 5 * 4)  # both products, 2 sequences, 2 heads of 4
    assert counted.dense == scores + sum(dense for dense, _ in counted.by_layer.values())
    assert torch.backends.mha.get_fastpath_enabled()


def test_cross_attention_cuts_its_weight_in_parts() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    query, memory = torch.rand(2, 3, 8), torch.rand(2, 7, 8)
    counted = count_flops(model, (query, memory, memory), {})
    assert counted.by_layer["in_proj_weight"][0] == 2 * 2 * (3 * 64 + 7 * 128)


def test_a_module_used_twice_and_a_weight_of_two_names() -> None:
    shared = nn.Linear(6, 6)
    model = Network(lambda self, x: self.b(self.a(x)), a=shared, b=shared)
    assert count_flops(model, torch.rand(4, 6), {}).by_layer == {"a.weight": (2 * 2 * 4 * 36,) * 2}
    # It goes by the name that the densities have.
    assert count_flops(model, torch.rand(4, 6), {"b.weight": 0.5}).by_layer == {
        "b.weight": (2 * 2 * 4 * 36, 4 * 36 * 2)
    }


USES: dict[str, Callable[..., Any]] = {
    "functional": lambda self, x: F.linear(x, self.layer.weight),
    "matmul": lambda self, x: x @ self.layer.weight.t(),
    "einsum": lambda self, x: torch.einsum("bi,oi->bo", x, self.layer.weight),
    "einsum, weight first": lambda self, x: torch.einsum("oi,bi->bo", self.layer.weight, x),
    "copied": lambda self, x: x @ self.layer.weight.t().contiguous().clone(),
    "cast": lambda self, x: x.bfloat16() @ self.layer.weight.bfloat16().t(),
    "masked": lambda self, x: F.linear(x, self.layer.weight * torch.ones(6, 6)),
    "scaled by a parameter": lambda self, x: F.linear(x, self.layer.weight * self.layer.bias[:, None]),
    "data": lambda self, x: F.linear(x, self.layer.weight.data),
    "one vector at a time": lambda self, x: torch.stack([self.layer.weight @ row for row in x]),
    "one vector at a time, added to": lambda self, x: torch.stack(
        [torch.addmv(row, self.layer.weight, row) for row in x]
    ),
    "one number at a time": lambda self, x: torch.stack([torch.dot(w, row) for row in x for w in self.layer.weight]),
    "sum over batches": lambda self, x: torch.addbmm(x[:1], x[:, :, None].mT, self.layer.weight.t().expand(4, 6, 6)),
    "broadcast": lambda self, x: torch.matmul(x[:, None, :], self.layer.weight.t().expand(4, 6, 6)),
    "1 x 1 convolution": lambda self, x: F.conv1d(x[:, :, None], self.layer.weight[:, :, None]),
}


@pytest.mark.parametrize("use", USES)
def test_the_weight_is_followed_and_not_the_module(use: str) -> None:
    model = Network(USES[use], layer=nn.Linear(6, 6))
    counted = count_flops(model, torch.rand(4, 6), {"layer.weight": 0.25})
    assert counted.by_layer == {"layer.weight": (2 * 4 * 36, 2 * 4 * 9)}


def test_autocast_and_inference_mode_inside_the_model() -> None:
    def run(self: Any, x: Tensor) -> Any:
        with torch.inference_mode():
            first = self.layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return first, self.layer(x)

    model = Network(run, layer=nn.Linear(6, 6))
    assert count_flops(model, torch.rand(4, 6), {}).by_layer == {"layer.weight": (2 * 2 * 4 * 36,) * 2}


def test_reparametrised_weights_go_by_the_parameter_that_is_as_large() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    counted = count_flops(model, torch.rand(4, 6), {})
    assert counted.by_layer == {"parametrizations.weight.original1": (2 * 4 * 36,) * 2}


def test_weights_joined_into_one_product_share_it_by_size() -> None:
    model = Network(
        lambda self, x: F.linear(x, torch.cat([self.q.weight, self.k.weight])), q=nn.Linear(6, 4), k=nn.Linear(6, 2)
    )
    counted = count_flops(model, torch.rand(3, 6), {"q.weight": 0.5})
    assert counted.by_layer == {"q.weight": (2 * 3 * 24, 3 * 24), "k.weight": (2 * 3 * 12,) * 2}


def test_weights_that_lie_in_one_storage_are_told_apart() -> None:
    flat = torch.rand(54)
    model = Network(
        lambda self, x: F.linear(F.linear(x, self.a.data), self.b.data),
        a=nn.Parameter(flat[:36].view(6, 6)),
        b=nn.Parameter(flat[36:].view(3, 6)),
    )
    assert count_flops(model, torch.rand(4, 6), {"a": 1.0, "b": 0.0}).by_layer == {"a": (288, 288), "b": (144, 0)}


def test_activations_are_no_weights() -> None:
    """A product of two activations stays with no layer, though a weight was added to one of them before."""
    model = Network(lambda self, x: (x + self.layer.weight) @ x, layer=nn.Linear(6, 6))
    counted = count_flops(model, torch.rand(6, 6), {"layer.weight": 0.0})
    assert (counted.dense, counted.survivors, counted.by_layer) == (432, 432, {})


def test_a_branch_is_counted_as_it_is_taken() -> None:
    def run(self: Any, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: self.layer(self.layer(x)), (x,))

    model = Network(run, layer=nn.Linear(6, 6))
    assert count_flops(model, torch.ones(4, 6), {}).dense == 2 * 4 * 36
    assert count_flops(model, -torch.ones(4, 6), {}).dense == 2 * 2 * 4 * 36


def test_of_two_parameters_as_large_the_prunable_one_is_the_weight() -> None:
    model = Network(
        lambda self, x: F.linear(x, self.scale * self.layer.weight),
        layer=nn.Linear(6, 6),
        scale=nn.Parameter(torch.rand(6, 6)),
    )
    assert count_flops(model, torch.rand(4, 6), {"layer.weight": 0.5}).by_layer == {"layer.weight": (288, 144)}


def test_a_learned_query_leaves_the_product_to_the_prunable_weight() -> None:
    model = Network(
        lambda self, x: self.layer(self.query) + x, layer=nn.Linear(6, 6), query=nn.Parameter(torch.rand(9, 6))
    )
    assert count_flops(model, torch.rand(9, 6), {"layer.weight": 0.0}).by_layer == {"layer.weight": (2 * 9 * 36, 0)}


def test_bilinear() -> None:
    model = nn.Bilinear(3, 4, 5)
    assert count_flops(model, (torch.rand(2, 3), torch.rand(2, 4)), {}).dense == 3 * 2 * 60


def test_survivors_are_whole_weights() -> None:
    """Quotients, and those rounded to float32 on the way: the number of survivors is found again exactly."""
    model = nn.Linear(100, 70, bias=False)
    for survivors in range(0, 7001, 137):
        for dtype in (torch.float32, torch.float64):
            density = float(torch.tensor(survivors / 7000, dtype=dtype))
            assert count_flops(model, torch.rand(3, 100), {"weight": density}).survivors == 2 * 3 * survivors


def test_a_list_or_a_mapping_is_one_argument() -> None:
    """As a collated batch is; only a tuple is several."""
    model = Network(lambda self, batch: self.layer(batch["x"][0]), layer=nn.Linear(6, 6))
    assert count_flops(model, {"x": [torch.rand(4, 6)]}, {}).dense == 2 * 4 * 36


def test_messages_are_counted_where_they_are_added_and_booked_to_their_graph() -> None:
    ends = torch.tensor([[0, 1, 2, 2], [1, 2, 3, 4]])
    graph = Graph(torch.cat([ends, ends.flip(0)], 1), 5)
    x = torch.rand(5, 6)
    convolution = Network(lambda self, x: self.layer(x, *self.graph()), graph=graph, layer=GCNConv(6, 3))
    # In both directions and from each node to itself: a number added to the degree, and 3 to the node's.
    assert count_flops(convolution, x, {}).by_layer == {
        "graph.weight": (2 * (8 + 5) * (1 + 3),) * 2,
        "layer.lin.weight": (2 * 5 * 18,) * 2,
    }
    with torch.no_grad():
        graph.weight[0] = 0
    left = count_flops(convolution, x, {"layer.lin.weight": 0.5})
    assert left.by_layer["graph.weight"] == (2 * (6 + 5) * (1 + 3),) * 2
    assert left.survivors == 2 * (6 + 5) * 4 + 2 * 5 * 9
    attention = Network(lambda self, x: self.layer(x, self.graph()[0]), graph=graph, layer=GATConv(6, 3, heads=2))
    found = count_flops(attention, x, {}).by_layer
    # For each head a number to the sum that coefficients are divided by, and 3 to the node's.
    assert found["graph.weight"] == (2 * (6 + 5) * 2 * (1 + 3),) * 2
    assert found["layer.lin.weight"] == (2 * 5 * 36,) * 2


@pytest.mark.parametrize("product", [torch.sparse.mm, torch.matmul])
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_products_with_sparse_matrices_take_what_is_in_them(product: Callable[..., Tensor], layout: Any) -> None:
    sparse = torch.tensor([[0.0, 2, 0, 1], [0, 0, 0, 3], [0, 0, 0, 0]]).to_sparse(layout=layout)
    model = Network(lambda self, x: self.layer(product(sparse, x)), layer=nn.Linear(5, 2))
    assert count_flops(model, torch.rand(4, 5), {}).dense == 2 * 3 * 5 + 2 * 3 * 10


class Moody(nn.Module):
    """Has everything that a careless count would change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.BatchNorm1d(6)
        self.layer = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1, 6))
        self.switched = 0

    def train(self, mode: bool = True) -> Moody:
        self.switched += 1
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        if torch.rand(()) > 2 or bool((x < 0).any()):
            raise RuntimeError("negative")
        out: Tensor = self.layer(self.frozen(self.norm(x)))
        return out


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = Moody()
    model.frozen.eval()
    switched = model.switched
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    generator = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="negative"):
            count_flops(model, -torch.ones(4, 6), {})
    else:
        assert count_flops(model, torch.ones(4, 6), {}).dense == 2 * 4 * 36
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert model.switched == switched
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("densities", "message"),
    [({"wieght": 0.5}, "'wieght' is not a parameter"), ({"weight": 1.5}, "weight: 1.5 is not in")],
)
def test_densities_that_do_not_fit(densities: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_flops(nn.Linear(2, 2), torch.rand(1, 2), densities)
