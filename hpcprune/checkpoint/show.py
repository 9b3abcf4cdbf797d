"""`hpcprune show`: what a checkpoint file or a step holds, as tables for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpcprune.checkpoint.format import BLOCK, sparsity
from hpcprune.checkpoint.pieces import Outline, Piece, open_tensor
from hpcprune.checkpoint.read import CheckpointFile, open_checkpoint
from hpcprune.checkpoint.steps import INDEX
from hpcprune.checkpoint.totals import by_kind

__all__ = ["show"]

FILE_WIDTH = 160  # characters of a line where the output is not a terminal
LONGEST_VALUE = 200  # characters of a value that are shown, unless it is a table of its own


def show(path: str | Path, console: Console | None = None) -> None:
    """Print what a file, or a step's folder by its index, says of itself; values are not read.

    Raises:
        CheckpointError: it is damaged, or not a checkpoint.
    """
    path = Path(path)
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = FILE_WIDTH
    if path.is_dir():
        if not (path / INDEX).exists() and (path / "model.h5").exists():
            path = path / "model.h5"
        elif (path / INDEX).exists():
            path = path / INDEX
    with open_checkpoint(path, "") as file:
        block = file.block
        console.print(
            _plain(f"{path}: {block.kind}, checkpoint format {block.format}, {block.bytes + BLOCK:,} bytes"),
            style="bold",
        )
        console.print(_plain(f"sha256 {block.sha256}"))
        _show_about(console, file)
        _show_layers(console, file)
        _show_tensors(console, file)


def _plain(text: object) -> Text:
    """Text from the file: control characters would otherwise reach the terminal."""
    return Text("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text)))


def _show_about(console: Console, file: CheckpointFile) -> None:
    tables, texts = {}, {}
    grid = Table.grid(padding=(0, 2))
    for key, value in sorted(file.about.items()):
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            tables[key] = value
            continue
        if isinstance(value, str) and "\n" in value.strip():
            texts[key] = value.strip().split("\n")
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        if len(text) > LONGEST_VALUE:
            text = text[:LONGEST_VALUE] + f"... ({len(text):,} characters)"
        grid.add_row(_plain(key), _plain(text))
    if grid.row_count:
        console.print()
        console.print(grid)
    for key, lines in texts.items():
        console.print()
        for line in (f"{key}:", *(f"  {line}" for line in lines)):
            console.print(_plain(line), soft_wrap=True)
    for key, rows in tables.items():
        _show_rows(console, key, rows)


def _show_rows(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """A list of records, such as the history of metrics, as a table of its plain values and those one level below."""
    rows = [_flat(row) for row in rows]
    columns = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
    )
    table = Table(title=_plain(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(_plain(column), justify="right")
    for row in rows:
        table.add_row(*(_plain(_cell(row.get(column))) for column in columns))
    console.print()
    console.print(table)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _show_layers(console: Console, file: CheckpointFile) -> None:
    layers: list[tuple[str, Piece | Outline]] = (
        list(file.outlines().items())
        if file.block.kind == "index"
        else [(f"{piece.name} from {piece.start:,}" if piece.start else piece.name, piece) for piece in file.pieces()]
    )
    if not layers:
        return
    extra = sorted({key for _, layer in layers for key in layer.attributes})
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("layer", no_wrap=True)
    for column in ("shape", "dtype"):
        table.add_column(column)
    for column in ("weights", "survivors", "sparsity"):
        table.add_column(column, justify="right")
    for column in extra:
        table.add_column(_plain(column))
    for name, layer in layers:
        table.add_row(
            _plain(name),
            " x ".join(map(str, layer.shape)) or "scalar",
            layer.dtype,
            *_counts(layer.weights, layer.survivors),
            *(_plain(_cell(layer.attributes.get(column))) for column in extra),
        )
    weights, _ = by_kind(layer for _, layer in layers)
    if weights.layers > 1:
        table.add_section()
        table.add_row("all layers of weights", "", "", *_counts(weights.weights, weights.survivors))
    console.print()
    console.print(table)


def _counts(weights: int, survivors: int) -> tuple[str, str, str]:
    return f"{weights:,}", f"{survivors:,}", f"{sparsity(survivors, weights):.2%}"


def _show_tensors(console: Console, file: CheckpointFile) -> None:
    nodes = [*file.tensor_nodes(), *((f"own/{name}", node) for name, node in file.members("own"))]
    if not nodes:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("tensor", "shape", "dtype"):
        table.add_column(column, overflow="fold")
    for key, node in nodes:
        dtype, shape, _ = open_tensor(node)
        table.add_row(_plain(key), " x ".join(map(str, shape)) or "scalar", dtype)
    console.print()
    console.print(table)
