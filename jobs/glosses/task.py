"""WordNet's glosses: 82,115 definitions of nouns of 26 kinds (Debian's wordnet-base), and a bidirectional GRU."""

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hpcprune

FILE = Path("/usr/share/wordnet/data.noun")
WORDS, LENGTH, WIDTH = 10_000, 20, 64  # what is not among the most frequent words is 1, what is padded is 0
FIRST_KIND = 3  # of nouns, in WordNet's numbering (lexnames.5WN)


class Reader(nn.Module):
    """Words to vectors, read in both directions, the largest of each number over the words, scores of kinds."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.rnn = nn.GRU(WIDTH, 128, batch_first=True, bidirectional=True)
        self.scores = nn.Sequential(nn.Dropout(0.3), nn.Linear(256, classes))

    def forward(self, words: Tensor) -> Tensor:
        found, _ = self.rnn(self.words(words))
        return self.scores(found.masked_fill((words == 0).unsqueeze(-1), -1).amax(1))


class Glosses(hpcprune.Classifier):
    classes = 26

    def model(self) -> nn.Module:
        return Reader(self.classes)

    def data(self) -> hpcprune.Data:
        if not FILE.is_file():
            raise FileNotFoundError(f"{FILE}; as root: apt install wordnet-base")
        lines = [line for line in FILE.read_text().splitlines() if not line.startswith("  ")]  # those are the licence
        labels = torch.tensor([int(line.split()[1]) - FIRST_KIND for line in lines])
        # Definitions without the examples in quotes that follow some of them.
        texts = [re.findall(r"[a-z]+", line.partition("| ")[2].partition('"')[0].lower())[:LENGTH] for line in lines]
        test = torch.arange(len(texts)) % 10 == 9
        counts = Counter(word for text, held in zip(texts, test, strict=True) if not held for word in text)
        numbers = {word: number for number, (word, _) in enumerate(counts.most_common(WORDS - 2), start=2)}
        words = torch.zeros(len(texts), LENGTH, dtype=torch.long)
        for row, text in zip(words, texts, strict=True):
            row[: len(text)] = torch.tensor([numbers.get(word, 1) for word in text])
        return hpcprune.Data(*(TensorDataset(words[part], labels[part]) for part in (~test, test)))
