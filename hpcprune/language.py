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
        model = load_model(self._file("source"))
        places = getattr(model.config, "max_position_embeddings", None) or math.inf
        if not 2 <= self.length <= places:
            raise TaskError(
                f"task: {type(self).__name__}.length: {self.length} tokens are not in [2, {places}], the places that "
                "the model knows"
            )
        known: Any = model.get_input_embeddings().num_embeddings
        if self.tokenizer.vocab_size > known:
            raise TaskError(
                f"task: {type(self).__name__}.source: its tokenizer has {self.tokenizer.vocab_size} tokens, and the "
                f"model knows {known}; give those that belong together"
            )
        return model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What makes tokens of text."""
        return load_tokenizer(self._file("source"))

    def data(self) -> Data:
        return Data(*(TensorDataset(self.rows(self._text(name), name)) for name in ("train_text", "test_text")))

    def rows(self, text: str, name: str = "the text") -> Tensor:
        """A text's tokens, [rows, length], int64. name: what an error calls it.

        Raises:
            TaskError: they are fewer than a row.
        """
        tokens = self.tokenizer(text, verbose=False)["input_ids"]
        rows = len(tokens) // self.length
        if not rows:
            raise TaskError(
                f"task: {type(self).__name__}: {name} has {len(tokens)} tokens, fewer than a row of {self.length}; "
                "give more text, or a smaller `length`"
            )
        return torch.tensor(tokens[: rows * self.length]).view(rows, self.length)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0], use_cache=False).logits

    def loss(self, output: Any, batch: Any) -> Tensor:
        return F.cross_entropy(output[:, :-1].flatten(0, 1).float(), batch[0][:, 1:].flatten())

    def distance(self, output: Any, target: Any, temperature: float) -> Tensor:
        return divergence(output.flatten(0, 1).float(), target.flatten(0, 1).float(), temperature)

    def metrics(self) -> dict[str, Metric]:
        from torchmetrics import MeanMetric

        return {"perplexity": math.e ** MeanMetric(nan_strategy=math.nan)}

    def update(self, metrics: dict[str, Metric], output: Any, batch: Any) -> None:
        metrics["perplexity"].update(self.loss(output, batch), weight=len(batch[0]))

    def _text(self, name: str) -> str:
        path = self._file(name)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "no text in UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise TaskError(f"task: {type(self).__name__}.{name}: {path}: {reason}; give a text file") from None

    def _file(self, name: str) -> Path:
        """Where an attribute says, seen from the task's own file."""
        path: str | Path | None = getattr(self, name, None)
        if path is None:
            raise TaskError(f'task: {type(self).__name__} does not say where its {name} is; add `{name} = "..."`')
        return Path(inspect.getfile(type(self))).parent / path
