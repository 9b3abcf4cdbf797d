"""How to train, as a job file says it: length, batches, optimizer, learning rate; for retraining, the exchange too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, ValidationInfo

from hpcprune.errors import show
from hpcprune.section import PARSED, Count, Fraction, NotNegative, Positive, Section, keep_own, own_keys, refuse

__all__ = ["BUCKET_MB", "Distill", "LrSchedule", "Optimizer", "Retraining", "TopK", "Training"]

BUCKET_MB = 2.0  # measured by bench/exchange.py
# Which keys of a section belong to which `name`; a key of another name would be silently without effect.
_OPTIMIZER_KEYS = {"sgd": ("momentum", "nesterov"), "adam": ("betas",), "adamw": ("betas",)}
_LR_SCHEDULE_KEYS = {
    "constant": (),
    "linear": ("final",),
    "cosine": ("final",),
    "step": ("at", "factor"),
    "rewind": ("start",),
}


class Optimizer(Section):
    """How the weights are stepped; the names and meanings are torch.optim's."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """The optimizer."""
    lr: Positive = Field(default=None, validate_default=True)
    """The learning rate; where it is not given, 0.01 for sgd and 0.001 for adam and adamw."""
    momentum: Fraction = 0.9
    """sgd: the share of the last step that goes on."""
    nesterov: bool = False
    """sgd: Nesterov's momentum instead of the classical; needs momentum above 0."""
    weight_decay: NotNegative = 0.0
    """The pull of all weights to zero; pruned weights stay zero with or without it."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """adam and adamw: the decay of the running means of the gradient and of its square."""

    @pydantic.field_validator("lr", mode="before")
    @classmethod
    def _lr_of_name(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return 0.01 if info.data.get("name") == "sgd" else 0.001
        return value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Optimizer:
        own_keys(self, _OPTIMIZER_KEYS)
        if self.nesterov and not self.momentum:
            raise refuse("nesterov needs momentum above 0; give momentum, or remove nesterov")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _of_name(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return keep_own(handler(self), _OPTIMIZER_KEYS)


class LrSchedule(Section):
    """The learning rate over the steps of one training; every round starts it anew, but for `prune.every_steps`."""

    name: Literal["constant", "linear", "cosine", "step"] = "constant"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[int, Field(ge=0), PARSED] = 0
    """Steps over which the learning rate rises linearly to `lr` first."""
    final: Annotated[float, Field(ge=0, le=1), PARSED] = 0.0
    """linear and cosine: the share of `lr` that the end of the training approaches."""
    at: tuple[Fraction, ...] = Field(default=(0.5, 0.75), min_length=1)
    """step: where the learning rate falls, as shares of the steps after the warm-up, rising."""
    factor: Annotated[float, Field(gt=0, le=1), PARSED] = 0.1
    """step: what the learning rate is multiplied by at each of them."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> LrSchedule:
        own_keys(self, _LR_SCHEDULE_KEYS)
        if list(self.at) != sorted(set(self.at)):
            raise refuse(f"at: {show(self.at)} does not rise; write the shares from the smallest to the largest")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _of_name(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return keep_own(handler(self), _LR_SCHEDULE_KEYS)


class Training(Section):
    """How long and how to train."""

    epochs: NotNegative | None = None
    """Passes over the training data (a round, in `retrain`); a fraction is a part of a pass, 0 is no training."""
    steps: Annotated[int, Field(ge=0), PARSED] | None = None
    """Optimizer steps (a round, in `retrain`); give either `epochs` or `steps`."""
    batch_size: Count = 64
    """Samples a step."""
    batch_per: Literal["global", "rank"] = "global"
    """Whether `batch_size` is that of all ranks together or of each rank."""
    optimizer: Optimizer = Optimizer()
    """How the weights are stepped."""
    lr_schedule: LrSchedule = LrSchedule()
    """The learning rate over the steps."""
    accumulate: Count = 1
    """Parts in which each rank computes its share of a batch, one after the other, to save memory; nothing is sent
    between them."""
    clip_norm: Positive | None = None
    """What the norm of the whole gradient is cut down to; null for no clipping."""
    l1: NotNegative = 0.0
    """The pull of each prunable weight to zero, the same for small and large ones (L1); those that arrive there stay
    there until a gradient takes them away."""
    autocast: bool = False
    """Whether to compute in bfloat16 where torch's autocast does; weights and gradients keep their dtype."""

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.epochs is None and self.steps is None:
            raise refuse("how long? give epochs or steps (0 is no training)")
        if self.epochs is not None and self.steps is not None:
            raise refuse("epochs and steps are both given; keep one (null takes the other back)")
        return self


class RetrainSchedule(LrSchedule):
    """As above; or that of the dense training again: Renda et al. 2020, arXiv:2003.02389."""

    name: Literal["constant", "linear", "cosine", "step", "rewind"] = "constant"  # type: ignore[assignment]
    """How the learning rate falls after the warm-up; `rewind` is that of the dense training, its `lr` too, from a step
    on."""
    start: Annotated[int, Field(ge=0), PARSED] = 0
    """rewind: the step of the dense training whose learning rate is the first."""

    @pydantic.model_validator(mode="after")
    def _one_warmup(self) -> RetrainSchedule:
        if self.name == "rewind" and self.warmup:
            raise refuse("warmup and rewind are both given; the dense training has its own warm-up: remove warmup")
        return self


class TopK(Section):
    """Only the largest of the survivors' gradients travel, the rest is kept for later steps; for slow networks.

    Deep Gradient Compression: Lin et al. 2018, arXiv:1712.01887.
    """

    share: Annotated[float, Field(gt=0, lt=1), PARSED] = 0.01
    """The share of each bucket's elements that travels in a step."""
    warmup: Annotated[int, Field(ge=0), PARSED] = 0
    """Steps over which the share falls exponentially from 1 to `share`."""


class Distill(Section):
    """The dense network teaches the pruned one: Hinton et al. 2015, arXiv:1503.02531."""

    share: Annotated[float, Field(gt=0, le=1), PARSED] = 0.5
    """The share of the loss that is the distance to the dense network's outputs; the rest is the task's own."""
    temperature: Positive = 2.0
    """What a classifier's scores are divided by, so that the less likely classes count for more."""


class Retraining(Training):
    """How to train after each round, and how the ranks exchange the survivors' gradients."""

    lr_schedule: RetrainSchedule = RetrainSchedule()
    """The learning rate over the steps."""
    exchange: Literal["auto", "torch", "mpi", "horovod"] = "auto"
    """What carries the gradients: torch.distributed (nccl where CUDA is, else gloo), mpi4py or Horovod; the dense
    training uses it too."""
    bucket_mb: Positive = BUCKET_MB
    """Megabytes of packed gradients, at least, that are sent as one (a parameter is not cut): less starts earlier, more
    costs less each."""
    wire: Literal["float32", "bfloat16", "float16"] = "float32"
    """The 16-bit dtype in which wider gradients travel; with float32 each travels in its own dtype, and nothing is
    approximated."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Whether the survivors' gradients are packed, or all gradients travel; auto tries both in a few steps at the start
    of a round where more than an eighth of the weights survive, and packs below."""
    sparse: Literal["auto", "never"] = "never"
    """Whether pruned Linear layers compute with their survivors alone, forward and backward; auto does
    where it was faster in steps tried at the start of a round, and then two runs may differ in their last bits."""
    distill: Distill | None = None
    """Where given, the pruned network learns from the dense one's outputs too."""
    top_k: TopK | None = None
    """Where given, only the largest of the survivors' gradients travel; needs sgd without nesterov."""

    @pydantic.model_validator(mode="after")
    def _packed_for_top_k(self) -> Retraining:
        if self.top_k is not None and self.packing == "never":
            raise refuse("top_k chooses among packed survivors; write packing: auto, or remove top_k")
        return self

    @pydantic.model_validator(mode="after")
    def _sgd_for_top_k(self) -> Retraining:
        if self.top_k is not None and (self.optimizer.name != "sgd" or self.optimizer.nesterov):
            name = f"{self.optimizer.name}{' with nesterov' if self.optimizer.nesterov else ''}"
            raise refuse(
                f"top_k corrects the momentum of plain sgd, not of {name}; write optimizer.name: sgd, or remove it"
            )
        return self
