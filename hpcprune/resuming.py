"""Going on where an earlier process was cut: the newest complete checkpoint of a run, taken apart again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hpcprune.checkpoint import newest_step, read_step
from hpcprune.errors import CheckpointError
from hpcprune.ledger import Ledger
from hpcprune.masks import Masks
from hpcprune.progress import Display
from hpcprune.snapshot import restore_masks, restore_model
from hpcprune.stage import Carried
from hpcprune.world import World

__all__ = ["Resumed", "resume"]


@dataclass(frozen=True)
class Resumed:
    """Where the run stood when the checkpoint was begun."""

    ledger: Ledger
    masks: Masks
    carried: Carried


def resume(checkpoints: Path, model: nn.Module, masks: Masks, world: World, display: Display) -> Resumed | None:
    """Set the model to the newest complete checkpoint; None if there is none. Collective.

    masks: of the layers that the run prunes.
    """
    path, passed_over = world.lead(lambda: newest_step(checkpoints), "looking for checkpoints")
    for reason in passed_over:
        display.say(f"passed over: {reason}")
    if path is None:
        return None
    step = world.together(lambda: read_step(path), f"reading {path}")
    ledger = Ledger.read(step.about["ledger"])
    ledger.resumed.append(ledger.run_step)
    masks = restore_masks(step, masks)
    if masks.hash != step.about["mask_hash"]:
        raise CheckpointError(f"{path}: the masks are not those of the run; remove this step to go on before it")
    masks.agree(world)
    optimizer, own = restore_model(step, model, world.rank, world.size)
    display.say(f"going on from {path} (round {ledger.round}, step {ledger.step})")
    return Resumed(ledger, masks, Carried(optimizer, own, masks))
