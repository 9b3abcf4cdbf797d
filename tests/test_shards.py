"""Shards: everything is dealt once, in order, evenly."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from hpcprune.shards import Layer, Span, deal, imbalance

shapes = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 60)).map(tuple), min_size=1, max_size=12)


def layers_of(shapes: list[tuple[int, ...]]) -> list[Layer]:
    return [Layer(f"layer{number}", tuple(shape), "float32") for number, shape in enumerate(shapes)]


@given(shapes, st.integers(1, 40))
def test_every_weight_is_dealt_once_in_global_order(shapes: list[tuple[int, ...]], ranks: int) -> None:
    layers = layers_of(shapes)
    shards = deal(layers, ranks)
    assert len(shards) == ranks
    position = [(span.layer, span.start, span.stop) for shard in shards for span in shard]
    expected_layer, expected_start = 0, 0
    for layer, start, stop in position:
        assert (layer, start) == (expected_layer, expected_start)
        assert start < stop <= layers[layer].weights
        expected_layer, expected_start = (layer + 1, 0) if stop == layers[layer].weights else (layer, stop)
    assert (expected_layer, expected_start) == (len(layers), 0)


@given(shapes, st.integers(1, 40))
@example([(41, 1)], 2)
@example([(1, 1_000_000), (41, 1)], 2)
@example([(21, 7)] * 3, 3)
def test_the_imbalance_is_small_when_there_are_20_rows_a_rank(shapes: list[tuple[int, ...]], ranks: int) -> None:
    layers = layers_of(shapes)
    if sum(layer.shape[0] for layer in layers) > 20 * ranks:
        assert imbalance(deal(layers, ranks)) <= 1.05


def test_more_ranks_than_weights_leave_some_ranks_nothing() -> None:
    shards = deal(layers_of([(2, 1), (1, 1)]), 5)
    assert sum(span.weights for shard in shards for span in shard) == 3
    assert [] in shards


def test_a_cut_falls_between_rows_where_one_is_near() -> None:
    (first, second) = deal(layers_of([(1000, 24)]), 2)
    assert first == [Span(0, 0, 12000)]
    assert second == [Span(0, 12000, 24000)]
    for shard in deal(layers_of([(1000, 8)]), 3):
        assert all(span.start % 8 == 0 and span.stop % 8 == 0 for span in shard)


def test_a_cut_falls_on_a_layers_edge_where_one_is_near() -> None:
    assert deal(layers_of([(1000, 10), (1005, 10)]), 2) == [[Span(0, 0, 10000)], [Span(1, 0, 10050)]]
