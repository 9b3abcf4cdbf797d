"""Language models: from folders and GGUF files, pruned as a job, and back into a folder that transformers opens."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hpcprune.errors import JobError, TaskError, WeightsError
from hpcprune.evaluate import figures_of
from hpcprune.export import export
from hpcprune.language import LanguageModel
from hpcprune.pretrained import load_model, load_tokenizer
from tests.commands import Command
from tests.conftest import ROOT
from tests.test_readme import blocks

NET = "SmolLM2-135M"
WORDS = [f"w{number}" for number in range(96)]
PAGE = (ROOT / "docs/task.md").read_text().partition("## A language model")[2]
TASK, JOB = (blocks(PAGE, language)[0] for language in ("python", "yaml"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a small Llama, as transformers itself writes it, beside a task, a job and texts."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    _llama().save_pretrained(folder / NET)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / NET)
    random = np.random.default_rng(0)
    for name, count in (("calibration.txt", 16 * 6 + 3), ("evaluation.txt", 16 * 5)):
        (folder / name).write_text(" ".join(random.choice(WORDS, count)))
    (folder / "task.py").write_text(TASK.replace("length = 2048", "length = 16"))
    (folder / "job.yaml").write_text(JOB)
    yield folder


def _llama(vocabulary: int = 96) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )


def test_a_job_prunes_the_rows_of_a_folders_model_and_transformers_opens_the_export(
    saved: Path, tmp_path: Path, hpcprune: Command
) -> None:
    out, folder = tmp_path / "run", tmp_path / "hf"
    for words in (("run", saved / "job.yaml", "--out", out), ("export", out / "model.h5", "--to", "hf", folder)):
        done = hpcprune(*words)
        assert done.code == 0, done.err

    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (saved / NET, folder))
    for name, module in after.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":  # which is tied to the embedding
            assert (module.weight == 0).sum(1).tolist() == [module.in_features // 2] * module.out_features
            survives = module.weight != 0
            assert torch.equal(module.weight[survives], before.get_submodule(name).weight[survives])
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    text = (saved / "evaluation.txt").read_text()
    rows = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"]).view(5, 16)
    with torch.no_grad():
        perplexities = [math.exp(model(rows, labels=rows).loss) for model in (before, after)]
    report = json.loads((out / "report.json").read_text())
    assert report["primary"] == "perplexity" and not report["higher_is_better"]
    assert [each["metrics"]["perplexity"] for each in report["evaluations"]] == pytest.approx(
        [perplexities[0], perplexities[1], perplexities[1]], rel=1e-5
    )
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        (tmp_path / "run/report.json").stat().st_mode & 0o777
    }
    with pytest.raises(JobError, match="already there"):
        export(out / "model.h5", "hf", folder)


def _write_gguf(
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    without: str = "",
    beside: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """A Llama with its heads turned as llama.cpp wants them, which is of no matter here: the reader turns them back."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a small one")
    writer.add_vocab_size(96)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    random = np.random.default_rng(1)
    shapes = {"token_embd": (96, 32), "output_norm": (32,)}
    for block in range(2):
        shapes |= {f"blk.{block}.attn_q": (32, 32), f"blk.{block}.attn_k": (16, 32), f"blk.{block}.attn_v": (16, 32)}
        shapes |= {
            f"blk.{block}.attn_output": (32, 32),
            f"blk.{block}.attn_norm": (32,),
            f"blk.{block}.ffn_norm": (32,),
        }
        shapes |= {
            f"blk.{block}.ffn_gate": (64, 32),
            f"blk.{block}.ffn_up": (64, 32),
            f"blk.{block}.ffn_down": (32, 64),
        }
    for name, shape in (shapes | beside).items():
        if name == without:
            continue
        values = random.standard_normal(shape).astype(np.float32)
        own = kind if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


HEAD = MappingProxyType({"output": (96, 32)})  # of its own, not tied to the embedding


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0])
@pytest.mark.parametrize("beside", [MappingProxyType({}), HEAD])
def test_a_gguf_file_gives_the_model_that_transformers_own_reader_gives(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, beside: Mapping[str, tuple[int, ...]]
) -> None:
    _write_gguf(tmp_path / "net.gguf", kind, beside=beside)
    ours = load_model(tmp_path / "net.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="net.gguf")
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (not beside)
    weights, wanted = ours.state_dict(), theirs.state_dict()
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in weights)
    rows = torch.arange(96).view(4, 24)
    with torch.no_grad():
        assert torch.equal(ours(rows).logits, theirs(rows).logits)


def test_a_file_that_lacks_weights_or_has_others_is_refused(saved: Path, tmp_path: Path) -> None:
    _write_gguf(tmp_path / "net.gguf", without="blk.1.ffn_up")
    with pytest.raises(WeightsError, match=r"has no model.layers.1.mlp.up_proj.weight for a LlamaForCausalLM; give"):
        load_model(tmp_path / "net.gguf")
    _write_gguf(tmp_path / "net.gguf", beside={"blk.0.ffn_gate_inp": (4, 32)})
    with pytest.raises(WeightsError, match=r"blk.0.ffn_gate_inp.weight has no place in a LlamaForCausalLM"):
        load_model(tmp_path / "net.gguf")
    config = LlamaConfig.from_pretrained(saved / NET, tie_word_embeddings=False)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "net")
    with pytest.raises(WeightsError, match=r"has no lm_head.weight for a LlamaForCausalLM; .*causal language"):
        load_model(tmp_path / "net")


def test_files_that_are_cut_short_are_named(saved: Path, tmp_path: Path) -> None:
    _write_gguf(tmp_path / "net.gguf", gguf.GGMLQuantizationType.F32)
    shutil.copytree(saved / NET, tmp_path / "net")
    for file, opened in ((tmp_path / "net.gguf",) * 2, (tmp_path / "net/model.safetensors", tmp_path / "net")):
        content = file.read_bytes()
        for share in (0.001, 0.02, 0.5, 0.999):
            file.write_bytes(content[: int(len(content) * share)])
            with pytest.raises(WeightsError, match=rf"{file}: not a whole .* file.*: cut short or damaged; copy or"):
                load_model(opened)
    (tmp_path / "net.gguf").write_text("words and no model")
    with pytest.raises(WeightsError, match=r"net.gguf: no GGUF file, as it does not begin with GGUF"):
        load_model(tmp_path / "net.gguf")


def test_what_is_no_model_is_refused_with_what_to_do(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"neither a folder nor a .gguf file; .*nothing is downloaded"):
        load_model(Path("HuggingFaceTB/SmolLM2-135M"))
    with pytest.raises(WeightsError, match=r"a folder without config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(WeightsError, match=r"transformers cannot open it: .*nonesuch"):
        load_model(tmp_path)
    shutil.copy(saved / NET / "config.json", tmp_path)
    with pytest.raises(WeightsError, match=r"transformers cannot open it"):  # no weights
        load_model(tmp_path)
    with pytest.raises(WeightsError, match=r"transformers cannot open it"):
        load_tokenizer(tmp_path)


def test_a_text_shorter_than_a_row_is_refused_before_any_work(saved: Path, tmp_path: Path, hpcprune: Command) -> None:
    job = shutil.copytree(saved, tmp_path / "job") / "job.yaml"
    (job.parent / "calibration.txt").write_text("w1 w2 w3")
    done = hpcprune("run", job, "--out", tmp_path / "run")
    done.assert_refused("Words: train_text has 3 tokens, fewer than a row of 16; give more text, or a smaller `length`")
    assert not (tmp_path / "run").exists()


def test_what_a_task_does_not_say_or_the_model_does_not_know_is_refused(saved: Path) -> None:
    def told(**attributes: object) -> str:
        given = {"source": saved / NET, "train_text": saved / "calibration.txt", "test_text": "none.txt"} | attributes
        words = type("Words", (LanguageModel,), {"__module__": __name__} | given)()
        with pytest.raises(TaskError) as refused:
            words.model()
            words.data()
        return str(refused.value)

    assert "Words.length: 65 tokens are not in [2, 64], the places that the model knows" in told(length=65)
    assert "Words.length: 1 tokens are not in [2, 64]" in told(length=1)
    assert 'Words does not say where its source is; add `source = "..."`' in told(source=None)
    assert 'does not say where its test_text is; add `test_text = "..."`' in told(length=16, test_text=None)
    assert "none.txt: No such file or directory; give a text file" in told(length=16)
    weights = saved / NET / "model.safetensors"
    assert f"{weights}: no text in UTF-8; give a text file" in told(length=16, test_text=weights)


def test_a_perplexity_that_is_not_a_number_is_told_as_that() -> None:
    task = LanguageModel.__new__(LanguageModel)
    metrics, rows = task.metrics(), [torch.arange(8).view(2, 4)]
    task.update(metrics, torch.zeros(2, 4, 8), rows)
    assert figures_of(metrics)["perplexity"] == pytest.approx(8)
    task.update(metrics, torch.full((2, 4, 8), math.nan), rows)
    assert math.isnan(figures_of(metrics)["perplexity"])
