"""Language models: a task whose samples are rows of text, and whose metric is the perplexity of the next token."""

from __future__ import annotations

import inspect
import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from hpcprune.errors import TaskError
from hpcprune.pretrained import load_model, load_tokenizer
from hpcprune.task import Data, Task, divergence

if TYPE_CHECKING:
    from torchmetrics import Metric
    from transformers import PreTrainedTokenizerBase

__all__ = ["LanguageModel"]


class LanguageModel(Task):
    """A causal language model of Hugging Face's kind, from a folder or a .gguf file, and text files.

    Files are looked for beside the task's own. The text that it is trained, or calibrated, on is `train_text`, and that
    it is evaluated on `test_text`; each is cut into rows of `length` tokens, and what is left at the end is not used.
    """

    source: str | Path
    train_text: str | Path
    test_text: str | Path
    length: int = 1024
    primary = "perplexity"

    def model(self) -> nn.Module:
        return load_model(self._beside(self.source))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What makes tokens of text."""
        return load_tokenizer(self._beside(self.source))

    def data(self) -> Data:
        texts = (self._beside(path).read_text(encoding="utf-8") for path in (self.train_text, self.test_text))
        return Data(*(TensorDataset(self.rows(text)) for text in texts))

    def rows(self, text: str) -> Tensor:
        """A text's tokens, [rows, length], int64.

        Raises:
            TaskError: they are fewer than a row.
        """
        tokens = self.tokenizer(text, verbose=False)["input_ids"]
        rows = len(tokens) // self.length
        if not rows:
            raise TaskError(
                f"task: {type(self).__name__}: the text has {len(tokens)} tokens, fewer than a row of {self.length}; "
                "give more text, or a smaller `length`"
            )
        return torch.tensor(tokens[: rows * self.length]).view(rows, self.length)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0], use_cache=False).logits

    def loss(self, output: Any, batch: Any) -> Tensor:
        return F.cross_entropy(output[:, :-1].flatten(0, 1).float(), batch[0][:, 1:].flatten())

    def distance(self, output: Any, target: Any, temperature: float) -> Tensor:
        return divergence(output.flatten(0, 1), target.flatten(0, 1), temperature)

    def metrics(self) -> dict[str, Metric]:
        from torchmetrics import MeanMetric

        return {"perplexity": math.e ** MeanMetric()}

    def update(self, metrics: dict[str, Metric], output: Any, batch: Any) -> None:
        metrics["perplexity"].update(self.loss(output, batch), weight=len(batch[0]))

    def _beside(self, path: str | Path) -> Path:
        return Path(inspect.getfile(type(self))).parent / path
