"""hpcprune.prune: a model of the user's, pruned in one line, in a notebook or on many ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from hpcprune.criteria import CRITERIA, SCOPES, Criterion, Scope, criteria_of
from hpcprune.errors import JobError
from hpcprune.layers import check_rows, find_layers
from hpcprune.masks import Masks
from hpcprune.ranking import Target, prune_layers
from hpcprune.shards import Layer, Span, deal
from hpcprune.statistics import Calibration, Gathered, Gradients
from hpcprune.world import World

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["prune"]


def prune(
    model: nn.Module,
    sparsity: float,
    *,
    scope: Scope | None = None,
    criterion: str = "magnitude",
    data: Dataset[Any] | Sequence[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batch_size: int = 32,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    seed: int = 0,
    comm: World | MPI.Intracomm | None = None,
) -> Masks:
    """Prune a model in place and return the masks.

    On one rank, in a notebook for instance, it prunes alone. Under mpirun every rank calls it with the same weights and
    data, scores its shard of them, and gets the same masks.

    Args:
        model: any module; the weights of its linear, convolutional and recurrent layers are prunable.
        sparsity: the part of the prunable weights to prune, at least 0 and less than 1.
        scope: whether weights are ranked over all layers ("global"), within each ("layer") or within each output of
            each ("row"). None is what the criterion is meant for: "row" for wanda, "global" for others.
        criterion: how weights are scored: magnitude (which l1 is without a training), lamp or random; with `data`,
            wanda; with `loss` too, sensitivity, snip, fisher, or movement as of one step that sees all samples.
        data: for criteria that look at any, the samples, all of them: a map-style dataset or a list, of the same
            samples on every rank.
        loss: of the model and a batch, the mean loss over the batch. Without it the model is called with a batch's
            first part, or with a dictionary's entries by name.
        batch_size: samples in a batch.
        include, exclude: shell patterns on the names of parameters or of the modules that hold them.
        embeddings: whether the weights of embeddings are prunable too.
        seed: what random scores follow from.
        comm: the ranks; all that were launched (MPI.COMM_WORLD) by default.

    Returns:
        Masks: name, as in `named_parameters` -> boolean tensor of its shape, True where a weight survives.

    Raises:
        JobError: something given is not usable.
        NumericsError: a weight, an input, the loss or a gradient is NaN.
    """
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise JobError(f"sparsity: {sparsity!r} is not in [0, 1)")
    if scope not in (None, *SCOPES):
        raise JobError(f"scope: {scope!r} is not one of: {', '.join(SCOPES)}")
    if criterion not in criteria_of("weights"):
        raise JobError(f"criterion: {criterion!r} is not one of: {', '.join(criteria_of('weights'))}")
    chosen = CRITERIA[criterion]
    samples = _count_samples(chosen, data, loss, batch_size)
    target = Target(chosen, scope or chosen.scope, sparsity, seed)
    world = World.of(comm)
    layers = find_layers(model, include, exclude, embeddings=embeddings)
    _agree((criterion, target.scope, samples, batch_size, seed), world)
    shards = deal(layers, world.size, whole_rows=target.scope == "row")
    statistic, gathered = None, None
    if samples:
        statistic = Gradients(lambda gradient: gradient) if chosen.looks_at == "training" else chosen.statistic()
        statistic.check(model, layers)
    if target.scope == "row":
        check_rows(model, layers)
    if statistic is not None:

        def run(batch: Any) -> Any:
            return loss(model, batch) if loss else _call(model, batch)

        name = (seed, criterion)
        given: Any = data
        calibration = Calibration(model, given, range(samples), batch_size, run, run, name, world)
        gathered = statistic.gather(calibration, layers, shards)
        if chosen.looks_at == "training":
            gathered = _followed(chosen, gathered, layers, model)
    masks = prune_layers(dict(model.named_parameters()), Masks.full(layers), shards, target, world, gathered).masks
    masks.apply(model)
    return masks


def _agree(given: tuple[object, ...], world: World) -> None:
    """Raise JobError, on every rank, where the ranks would not gather the same. Collective."""
    everywhere = world.allgather(given, "prune: what each rank was given")
    if len(set(everywhere)) > 1:
        told = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(everywhere[:4]))
        raise JobError(
            f"criterion, scope, the number of samples, batch_size or seed differ between ranks ({told}); give all the "
            "same: each rank takes batches of its own from the same data"
        )


def _count_samples(criterion: Criterion, data: object, loss: object, batch_size: object) -> int:
    """How many samples there are to look at; JobError where they, or what to do with them, are missing."""
    if criterion.looks_at == "weights":
        return 0
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__") or not len(data):
        given = "not given" if data is None else f"{type(data).__name__}, without samples, length or indexing"
        raise JobError(
            f"data: {given}; {criterion.name} looks at samples: give a map-style dataset (or a list) of some training "
            "samples, or choose a criterion that looks at weights alone"
        )
    if criterion.looks_at != "inputs" and not callable(loss):
        raise JobError(
            f"loss: {loss!r} is not a function; {criterion.name} needs the mean loss of a batch: give "
            "loss=lambda model, batch: ..."
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise JobError(f"batch_size: {batch_size!r} is not a whole number of at least 1")
    return len(data)


def _followed(criterion: Criterion, gradients: Gathered, layers: Sequence[Layer], model: nn.Module) -> Gathered:
    """A criterion of training without any: as of one step that saw all samples."""

    def followed(span: Span) -> Tensor:
        weights = model.get_parameter(layers[span.layer].name).detach().reshape(-1)[span.start : span.stop]
        return criterion.follow(weights.double(), gradients(span))

    return followed


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
