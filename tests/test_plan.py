"""The plan: shards that are even, told in words, and bytes that are those of what the run then makes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import hpcprune
from hpcprune.cli import cli
from hpcprune.job import Job
from hpcprune.job_file import load_job
from hpcprune.layers import find_layers
from hpcprune.optimizer import make_optimizer
from hpcprune.packing import Masked
from hpcprune.plan import Plan, make_plan, print_plan
from hpcprune.prepare import Prepared, prepare
from hpcprune.shards import Layer, deal, imbalance
from hpcprune.survivors import Survivors
from hpcprune.world import World
from tests.conftest import TINY


def resolved(*overrides: str) -> Job:
    return load_job(TINY, overrides)


def planned(model: nn.Module, job: Job, ranks: int = 1) -> Plan:
    """The plan of a model; of the rest of what is prepared it needs nothing."""
    layers = find_layers(model)
    tiny = prepare(resolved(), World.alone())
    prepared = Prepared(tiny.task, model, tiny.data, layers, deal(layers, 1), None, tiny.retrain, 1)
    return make_plan(job, prepared, ranks)


def printed(plan: Plan, width: int = 200) -> str:
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=width))
    return text.getvalue()


# Shards


@st.composite
def architectures(draw: st.DrawFn) -> list[Layer]:
    """Layers as models have them: kernels, matrices, a few wide and many small, over five orders of magnitude."""
    sizes = st.floats(0, 3.7).map(lambda exponent: round(10**exponent))
    kernels = st.sampled_from([(), (1, 1), (3, 3), (7, 7), (3,)])
    shapes = draw(st.lists(st.tuples(sizes, sizes, kernels), min_size=1, max_size=60))
    return [Layer(str(n), (rows, columns, *kernel), "float32") for n, (rows, columns, kernel) in enumerate(shapes)]


@settings(max_examples=300)
@given(architectures(), st.floats(0, 1))
def test_with_more_than_20_rows_a_rank_the_largest_shard_is_at_most_5_percent_over_the_mean(
    layers: list[Layer], part: float
) -> None:
    most = (sum(layer.shape[0] for layer in layers) - 1) // 20
    if most >= 1:
        assert 1 <= imbalance(deal(layers, 1 + round(part * (min(most, 256) - 1)))) <= 1.05


def weights_of(words: str, layers: dict[str, Layer]) -> list[tuple[str, int]]:
    """The weights of a shard, read back from what a plan calls them: name, rows, or single weights."""
    found = []
    for part in words.split(", "):
        name, _, place = part.partition(" ")
        unit, _, numbers = place.partition(" ")
        first, _, last = numbers.partition("-")
        size = layers[name].row if unit == "rows" else 1
        stop = (int(last or first) + 1) * size if unit else layers[name].weights
        found += [(name, weight) for weight in range(int(first or 0) * size, stop)]
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_the_command_line_tells_every_weight_once_in_order(ranks: int) -> None:
    done = CliRunner().invoke(cli, ["plan", str(TINY), "--ranks", str(ranks)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    layers = {layer.name: layer for layer in prepare(resolved(), World.alone()).layers}
    rows = re.findall(r"│ +(\d+) │ +([\d,]+) │ +([\d.]+)% │ (.*?) +│", done.output)
    told = [weights_of(words, layers) for *_, words in rows]
    assert sum(told, []) == [(layer.name, n) for layer in layers.values() for n in range(layer.weights)]  # noqa: RUF017
    weights = [int(number.replace(",", "")) for _, number, *_ in rows]
    assert weights == [len(each) for each in told]
    assert [int(rank) for rank, *_ in rows] == list(range(ranks))
    assert sum(weights) == 20 * 48 + 48 * 48 + 48 * 4
    assert [float(share) for _, _, share, _ in rows] == [round(100 * each / sum(weights), 1) for each in weights]
    largest = re.search(r"imbalance: +([\d.]+)", done.output)
    assert largest and float(largest[1]) == round(max(weights) * ranks / sum(weights), 3) <= 1.05


def test_overrides_change_the_plan_and_a_mistake_is_one_line(tmp_path: Path) -> None:
    plans = [CliRunner().invoke(cli, ["plan", str(TINY), f"prune.sparsity={each}"]).output for each in (0.5, 0.9)]
    sent = [re.findall(r"gradients, each step: +([\d.]+) kB .*; dense ([\d.]+) kB", text)[0] for text in plans]
    assert sent[0][1] == sent[1][1] and float(sent[1][0]) < float(sent[0][0]) < float(sent[0][1])
    refused = CliRunner().invoke(cli, ["plan", str(TINY), "--ranks", "0"])
    assert refused.exit_code == 2 and "--ranks" in refused.output
    missing = CliRunner().invoke(cli, ["plan", str(tmp_path / "job.yaml")])
    assert missing.exit_code == 2 and missing.output.count("\n") == 1 and "hpcprune: error: " in missing.output


def test_parts_of_rows_and_ranks_without_any_are_told() -> None:
    text = printed(planned(nn.Sequential(nn.Linear(1000, 2), nn.Linear(2, 1, bias=False)), resolved(), 3))
    assert "0.weight weights 0-" in text and "1.weight" in text
    text = printed(planned(nn.Linear(1, 2), resolved(), 5))
    assert text.count("nothing: there are more ranks than parts") == 3
    assert "weight row 0" in text or "weight rows 0" in text


def test_names_are_told_as_they_are() -> None:
    model = nn.ModuleDict({"[red]": nn.Linear(2, 2), ":smile:": nn.Linear(2, 2)})
    assert "[red].weight, :smile:.weight" in printed(planned(model, resolved()))


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    model = nn.ModuleDict({f"a_layer_with_a_long_name_{n}": nn.Linear(30, 30) for n in range(9)})
    text = printed(planned(model, resolved(), 2), width=60)
    assert all(len(line) <= 100 for line in text.splitlines())
    squeezed = re.sub(r"[\s│]", "", text)
    assert all(f"a_layer_with_a_long_name_{n}.weight" in squeezed for n in range(9))


# Bytes


def mixed() -> nn.Module:
    """Prunable weights of 2 bytes, a norm of 4."""
    return nn.ModuleList(
        [nn.Linear(64, 64, dtype=torch.bfloat16), nn.LayerNorm(64), nn.Linear(64, 9, dtype=torch.bfloat16)]
    )


def half_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 9))
    model[0].requires_grad_(False)
    return model


def storages(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the memory that tensors lie in; what several share counts once."""
    held = [tensor.untyped_storage() for tensor in tensors if tensor is not None and tensor.numel() > 1]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


@pytest.mark.parametrize("model", [lambda: prepare(resolved(), World.alone()).model, mixed, half_frozen])
@pytest.mark.parametrize(
    "optimizer", ["{lr: 0.1}", "{lr: 0.1, momentum: 0}", "{name: adam, lr: 0.1}", "{name: adamw, lr: 0.1}"]
)
@pytest.mark.parametrize("packing", ["auto", "never"])
def test_bytes_are_those_that_the_run_sends_and_holds(
    model: Callable[[], nn.Module], optimizer: str, packing: str
) -> None:
    made = model()
    job = resolved("prune.scope=layer", f"retrain.optimizer={optimizer}", f"retrain.packing={packing}")
    plan = planned(made, job)
    weights = sum(tensor.nbytes for tensor in (*made.parameters(), *made.buffers()))
    masks = hpcprune.prune(made, 0.9, scope="layer", comm=World.alone())
    survivors = Survivors(made, masks, packing=packing != "never")
    stepped = make_optimizer(survivors, job.retrain.optimizer)
    stepped.step()
    state = [value for each in stepped.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    rounded = 4 * len(masks)  # bytes, since the layers' counts are rounded one by one
    assert plan.weight_bytes == weights
    assert plan.step_bytes_dense == survivors.dense_bytes
    assert plan.step_bytes == pytest.approx(survivors.packed_bytes, abs=rounded)
    assert plan.mask_bytes == sum(masks.bits(name).nbytes for name in masks)
    held = storages([*made.parameters(), *made.buffers(), *survivors.packed.values(), *survivors.gradients(), *state])
    flags = sum(segment.parameter.numel() for segment in survivors if isinstance(segment.packing, Masked))
    counters = sum(buffer.nbytes for buffer in made.buffers() if buffer.numel() == 1)
    expected = held + survivors.dense_bytes + plan.mask_bytes + flags + counters
    assert plan.memory_bytes == pytest.approx(expected, abs=8 * rounded)


def test_gradients_that_travel_in_16_bits_take_2_bytes() -> None:
    for model in (nn.Linear(64, 64), mixed(), nn.Linear(64, 64, dtype=torch.float64)):
        whole, half = (planned(model, resolved(f"retrain.wire={wire}")).step_bytes for wire in ("float32", "bfloat16"))
        packed = Survivors(model, hpcprune.prune(model, 0.9, comm=World.alone()))
        assert whole == packed.packed_bytes and half == 2 * len(packed)


@pytest.mark.parametrize(("size", "told"), [(432, "0.43 kB"), (99_999, "100.00 kB"), (25_000_000, "25.00 MB")])
def test_sizes_are_told_in_a_unit_that_shows_them(size: int, told: str) -> None:
    assert f" {told} to every rank" in printed(Plan([Layer("a", (1,), "float32")], [[]], 1, size, 0, 0, 0, 0))
