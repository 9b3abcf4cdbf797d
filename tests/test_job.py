"""The job file: what is understood, what is refused and in which words, and that docs/job-file.md says the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hpcprune.errors import JobError
from hpcprune.job import Job, differences
from hpcprune.job_file import Key, keys, load_job

DOC = (Path(__file__).resolve().parent.parent / "docs" / "job-file.md").read_text(encoding="utf-8")

SMALL = """\
task: task.py
train: {epochs: 3}
prune:
  sparsity: 0.9
retrain: {epochs: 1}
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a job file `digits/job.yaml` in the current directory, and give its path relative to it."""
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()

    def file(text: str) -> Path:
        path = Path("digits/job.yaml")
        path.write_text(text, encoding="utf-8")
        return path

    return file


def refusal(path: Path, *overrides: str, out: str | None = None) -> str:
    with pytest.raises(JobError) as error:
        load_job(path, overrides, out)
    assert error.value.exit_code == 2
    return str(error.value)


# What is understood


def test_a_small_job_has_the_documented_defaults(write: Write) -> None:
    job = load_job(write(SMALL))
    assert (job.task, job.seed, job.out, job.weights) == ("task.py", 0, "runs/digits", "train")
    assert job.train is not None and (job.train.epochs, job.train.steps) == (3, None)
    assert (job.retrain.batch_size, job.retrain.batch_per) == (64, "global")
    optimizer = job.retrain.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.01, 0.9, False)
    assert (job.retrain.lr_schedule.name, job.retrain.lr_schedule.warmup) == ("constant", 0)
    assert (job.prune.criterion, job.prune.scope, job.prune.rounds) == ("magnitude", "global", 1)
    assert (job.prune.schedule, job.prune.include, job.prune.exclude) == ("one-shot", ("*",), ())
    assert (job.evaluate.batch_size, job.checkpoint.every_steps, job.checkpoint.keep) == (256, None, 2)
    assert (job.world.timeout, job.world.stop_signal) == (300, "SIGUSR1")


def test_defaults_that_depend_on_other_keys(write: Write) -> None:
    path = write(SMALL)
    assert load_job(path, ["prune.rounds=2"]).prune.schedule == "cubic"
    assert load_job(path, ["prune.rounds=2", "prune.schedule=linear"]).prune.schedule == "linear"
    assert load_job(path, ["retrain.optimizer.name=adam"]).retrain.optimizer.lr == 0.001
    assert load_job(path, ["retrain.optimizer.name=adamw"]).retrain.optimizer.lr == 0.001
    assert load_job(path, ["retrain.optimizer={name: adam, lr: 0.5}"]).retrain.optimizer.lr == 0.5


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", ".001", '"1e-3"', "1.0e-3"])
def test_a_number_may_be_written_in_any_way(write: Write, text: str) -> None:
    assert load_job(write(SMALL + f"world: {{timeout: {text}}}")).world.timeout == 0.001


def test_whole_numbers_may_have_an_exponent(write: Write) -> None:
    assert load_job(write(SMALL), ["retrain.epochs=null", "retrain.steps=2e3"]).retrain.steps == 2000


def test_an_empty_section_means_its_defaults(write: Write) -> None:
    job = load_job(write(SMALL + "evaluate:\n  # batch_size: 3\nworld:\n"))
    assert job.evaluate.batch_size == 256 and job.world.timeout == 300


def test_overrides_win_over_the_file_and_out_wins_over_both(write: Write) -> None:
    path = write(SMALL + "out: there\n")
    job = load_job(
        path, ["prune.sparsity=0.98", "checkpoint.keep=5", "out=elsewhere", "prune.sparsity=0.99"], "here: #1"
    )
    assert (job.prune.sparsity, job.checkpoint.keep, job.out) == (0.99, 5, "here: #1")
    assert load_job(path, ["out=elsewhere"]).out == "elsewhere"
    assert load_job(path).out == "there"


def test_an_override_may_set_a_whole_section_or_a_list(write: Write) -> None:
    job = load_job(write(SMALL), ["retrain={steps: 5}", 'prune.include=["conv*", fc]', "prune.exclude=[a=b]"])
    assert (job.retrain.steps, job.retrain.epochs) == (5, None)
    assert (job.prune.include, job.prune.exclude) == (("conv*", "fc"), ("a=b",))


def test_paths_are_relative_to_the_job_file(write: Write) -> None:
    path = write(SMALL)
    job = load_job(path, ["task=task.py:Digits", "weights=w/net.pt"])
    assert job.task_file == Path("digits/task.py") and job.weights_file == Path("digits/w/net.pt")
    assert load_job(path, ["task=package.module:Digits"]).task_file is None
    assert load_job(path).weights_file is None
    assert load_job(path, ["weights=/abs/net.pt"]).weights_file == Path("/abs/net.pt")


def test_the_job_in_the_current_directory_is_named_after_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(SMALL).parent)
    assert load_job(Path("job.yaml")).out == "runs/digits"


def test_nothing_of_a_job_can_be_changed(write: Write) -> None:
    job = load_job(write(SMALL))
    with pytest.raises(ValueError, match="frozen"):
        job.prune.sparsity = 0.5  # type: ignore[misc]


# Writing it, and telling jobs apart

EDGES = ["prune.what=[weights, edges]", "prune.graph={edges: 0.2}"]

VARIED = [
    "prune.rounds=3",
    "retrain.optimizer={name: adam, lr: 1e-3, betas: [0.8, 0.99]}",
    "retrain.lr_schedule={name: step, at: [0.3, 0.6], factor: 0.5}",
    "train.optimizer={nesterov: true}",
    "train.lr_schedule={name: cosine, final: 0.1, warmup: 3}",
    'prune.exclude=["*ü*", "yes", "1"]',
]


def test_a_layers_name_may_be_a_number(write: Write) -> None:
    job = load_job(write(SMALL), ["prune.scope=layer", "prune.layers={6: 0.25, head: 0.5}"])
    assert job.prune.layers == {"6": 0.25, "head": 0.5}


def test_scope_and_calibrate_follow_from_the_criterion(write: Write) -> None:
    path = write(SMALL)
    plain, wanda, given = (
        load_job(path, overrides).prune
        for overrides in ([], ["prune.criterion=wanda"], ["prune.criterion=wanda", "prune.scope=global"])
    )
    assert (plain.scope, plain.calibrate) == ("global", None)
    assert wanda.calibrate is not None
    assert (wanda.scope, wanda.calibrate.samples, wanda.calibrate.batch_size) == ("row", 512, 32)
    assert given.scope == "global"


def test_the_resolved_job_reads_back_equal(write: Write) -> None:
    job = load_job(write(SMALL), VARIED)
    again = load_job(write(job.to_yaml()))
    assert again == job and again.digest() == job.digest() and again.to_yaml() == job.to_yaml()
    assert differences(job, again) == []


def test_the_resolved_job_can_be_run_from_another_folder(write: Write) -> None:
    job = load_job(write(SMALL), ["weights=net.pt", "task=task.py:Digits"])
    Path("digits/task.py").write_text("model = 1")
    target = Path("runs/digits/job.yaml")
    target.parent.mkdir(parents=True)
    target.write_text(job.to_yaml(beside=target.parent))
    again = load_job(target)
    assert again.task_file is not None and again.task_file.resolve() == Path("digits/task.py").resolve()
    assert again.task.endswith(":Digits") and again.out == "runs/digits"
    assert again.weights_file is not None and again.weights_file.resolve() == Path("digits/net.pt").resolve()
    assert again.digest() == job.digest() and differences(job, again) == []


def test_the_digest_is_of_what_determines_the_result(write: Write) -> None:
    path = write(SMALL)
    digest = load_job(path).digest()
    for same in ["out=x", "checkpoint.keep=9", "checkpoint.every_steps=3", "world.timeout=1", "evaluate.batch_size=1"]:
        assert load_job(path, [same]).digest() == digest, same
    for other in ["seed=1", "prune.sparsity=0.91", "retrain.epochs=2", "train.optimizer.lr=0.1", "task=other.py"]:
        assert load_job(path, [other]).digest() != digest, other
        assert len(differences(load_job(path), load_job(path, [other]))) == 1
    assert re.fullmatch("[0-9a-f]{64}", digest)


def test_how_gradients_are_carried_determines_the_result_only_where_some_are_chosen_among(write: Write) -> None:
    path = write(SMALL)
    for key in ("retrain.exchange=mpi", "retrain.packing=always", "retrain.bucket_mb=5"):
        assert load_job(path, [key]).digest() == load_job(path).digest(), key
    top_k = "retrain.top_k={share: 0.01}"
    assert load_job(path, [top_k, "retrain.exchange=mpi"]).digest() == load_job(path, [top_k]).digest()
    assert differences(load_job(path, [top_k]), load_job(path, [top_k, "retrain.bucket_mb=5"])) == [
        "retrain.bucket_mb (2.0 there, 5.0 here)"
    ]


def test_the_digest_is_of_the_contents_of_the_task_file_wherever_it_lies(write: Write, tmp_path: Path) -> None:
    path = write(SMALL)
    Path("digits/task.py").write_text("a = 1")
    digest = load_job(path).digest()
    Path("digits").rename("moved")
    assert load_job(Path("moved/job.yaml"), ["out=runs/digits"]).digest() == digest
    Path("moved/task.py").write_text("a = 2")
    changed = load_job(Path("moved/job.yaml"))
    assert changed.digest() != digest


def test_how_the_dense_network_would_be_trained_is_nothing_to_a_job_that_loads_it(write: Write) -> None:
    path = write(SMALL)
    a, b = load_job(path, ["weights=w.pt"]), load_job(path, ["weights=w.pt", "train.epochs=9"])
    assert a.digest() == b.digest() and differences(a, b) == []
    assert a.digest() != load_job(path).digest()


def test_differences_name_both_values(write: Write) -> None:
    path = write(SMALL)
    here = load_job(path, ["prune.sparsity=0.5", "retrain.optimizer.name=adam", "out=x"])
    assert differences(load_job(path), here) == [
        "prune.sparsity (0.9 there, 0.5 here)",
        'retrain.optimizer.name ("sgd" there, "adam" here)',
        "retrain.optimizer.lr (0.01 there, 0.001 here)",
        "retrain.optimizer.momentum (0.9 there, null here)",
        "retrain.optimizer.nesterov (false there, null here)",
        "retrain.optimizer.betas (null there, [0.9, 0.999] here)",
    ]


# What is refused: wrong values and keys

VALUES = [
    ("prune.sparsity", "1.2", "1.2 is not in [0, 1)"),
    ("prune.sparsity", "1", "1 is not in [0, 1)"),
    ("prune.sparsity", "1.0", "1.0 is not in [0, 1)"),
    ("prune.sparsity", "-0.1", "-0.1 is not in [0, 1)"),
    ("prune.sparsity", "ninety", '"ninety" is not a number in [0, 1)'),
    ("prune.sparsity", "true", "true is not a number in [0, 1)"),
    ("prune.sparsity", "null", "null is not a number in [0, 1)"),
    ("prune.sparsity", ".nan", "NaN is not a number in [0, 1)"),
    ("prune.sparsity", "'1e999'", '"1e999" is not a number in [0, 1)'),
    ("prune.sparsity", "[0.5]", "[0.5] is not a number in [0, 1)"),
    (
        "prune.criterion",
        "magnitud",
        '"magnitud" is not one of magnitude, l1, lamp, random, sensitivity, snip, fisher, movement, wanda; '
        "did you mean magnitude?",
    ),
    ("prune.criterion", "5", "5 is not one of magnitude, l1, lamp, random, sensitivity, snip, fisher, movement, wanda"),
    (
        "prune.graph.criterion",
        "l1",
        '"l1" is not one of magnitude, random, sensitivity, snip, fisher, attention',
    ),
    ("prune.scope", "globl", '"globl" is not one of global, layer, row; did you mean global?'),
    ("prune.layers", "{1.5: 0.5}", '{"1.5": 0.5} is not a mapping of texts, each to a number in [0, 1)'),
    ("prune.layers", "{head: 1}", '{"head": 1} is not a mapping of texts, each to a number in [0, 1)'),
    ("prune.schedule", "weekly", '"weekly" is not one of one-shot, linear, cubic, layer-by-layer'),
    ("prune.rounds", "0", "0 is not a whole number of at least 1"),
    ("prune.rounds", "1.5", "1.5 is not a whole number of at least 1"),
    ("prune.rounds", "true", "true is not a whole number of at least 1"),
    (
        "prune.include",
        "conv*",
        '"conv*" is not a list of 1 or more items, each a text that is not empty; write ["conv*"]',
    ),
    ("prune.include", "[]", "[] is not a list of 1 or more items, each a text that is not empty"),
    ("prune.include", "[a, 5, 6]", '["a", 5, 6] is not a list of 1 or more items, each a text that is not empty'),
    ("prune.exclude", "['']", '[""] is not a list of 0 or more items, each a text that is not empty'),
    ("task", "''", '"" is not a text that is not empty'),
    ("out", "2024-01-01", '"2024-01-01" is not a text that is not empty; put it in quotes'),
    ("weights", "3", "3 is not a text that is not empty; put it in quotes"),
    ("seed", "-1", "-1 is not a whole number in [0, 4294967296)"),
    ("seed", "4294967296", "4294967296 is not a whole number in [0, 4294967296)"),
    (
        "train",
        "3",
        "3 is not a section (keys: epochs, steps, batch_size, batch_per, optimizer, lr_schedule, accumulate, "
        "clip_norm, l1, autocast)",
    ),
    ("retrain.epochs", "-1", "-1 is not a number of at least 0, or null"),
    ("retrain.batch_size", "0", "0 is not a whole number of at least 1"),
    ("retrain.batch_per", "node", '"node" is not one of global, rank'),
    ("retrain.optimizer.name", "adamx", '"adamx" is not one of sgd, adam, adamw; did you mean adam?'),
    ("retrain.optimizer.lr", "0", "0 is not a number above 0"),
    ("retrain.optimizer.momentum", "1", "1 is not in [0, 1)"),
    ("retrain.optimizer.nesterov", "maybe", '"maybe" is not true or false'),
    ("retrain.optimizer.weight_decay", "-1", "-1 is not a number of at least 0"),
    ("retrain.optimizer.betas", "[0.9]", "[0.9] is not a list of 2 items, each a number in [0, 1)"),
    ("retrain.optimizer.betas", "[0.9, 1]", "[0.9, 1] is not a list of 2 items, each a number in [0, 1)"),
    ("retrain.lr_schedule.name", "exp", '"exp" is not one of constant, linear, cosine, step'),
    ("retrain.lr_schedule.warmup", "-1", "-1 is not a whole number of at least 0"),
    ("retrain.lr_schedule.final", "1.5", "1.5 is not in [0, 1]"),
    ("retrain.lr_schedule.factor", "0", "0 is not in (0, 1]"),
    ("evaluate.batch_size", "0", "0 is not a whole number of at least 1"),
    ("checkpoint.keep", "0", "0 is not a whole number of at least 1"),
    ("checkpoint.every_steps", "0", "0 is not a whole number of at least 1, or null"),
    ("checkpoint.every_minutes", "0", "0 is not a number above 0, or null"),
    ("world.timeout", "0", "0 is not a number above 0"),
    ("world.timeout", ".inf", "Infinity is not a number above 0"),
    (
        "world.stop_signal",
        "SIGUSR3",
        '"SIGUSR3" is not one of SIGUSR1, SIGUSR2, SIGHUP, SIGALRM, SIGXCPU; did you mean',
    ),
]


@pytest.mark.parametrize(("key", "text", "words"), VALUES)
def test_a_wrong_value_says_what_is_allowed(write: Write, key: str, text: str, words: str) -> None:
    path = write(SMALL)
    message = refusal(path, f"{key}={text}")
    assert message.startswith(f"override {key}={text}: {words}") and "\n" not in message
    values = yaml.safe_load(SMALL)
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = yaml.safe_load(text)
    message = refusal(write(yaml.safe_dump(values)))
    assert message.startswith(f"digits/job.yaml: {key}: {words}") and "\n" not in message


def test_every_problem_has_a_line(write: Write) -> None:
    message = refusal(write("prune: {sparsity: 2, scop: x}\nretrain: {epochs: 1}\nworld: {timeout: no}\nx: &x [*x]\n"))
    assert [line.split(": ")[1:3] for line in message.splitlines()] == [
        ["task", "missing; give a text that is not empty"],
        ["prune.sparsity", "2 is not in [0, 1)"],
        ["prune.scop", "no such key; did you mean prune.scope? (keys of prune"],
        ["world.timeout", "false is not a number above 0"],
        ["x", "no such key (keys of the job"],
    ]


@pytest.mark.parametrize(
    ("key", "nearest", "listed"),
    [
        (
            "prune.sparsityy",
            "prune.sparsity",
            "keys of prune: criterion, sparsity, scope, distribution, layers, rounds, schedule, include, exc",
        ),
        (
            "prun",
            "prune",
            "keys of the job: task, seed, out, weights, train, prune, retrain, evaluate, checkpoint, world",
        ),
        ("sparsity", "prune.sparsity", "keys of the job: task, seed, out"),
        ("stop_signal", "world.stop_signal", "keys of the job: task"),
        ("train.optimizer.learning_rate", None, "keys of train.optimizer: name, lr, momentum"),
        ("train.optimiser", "train.optimizer", "keys of train: epochs, steps"),
        ("prune.optimizer", "train.optimizer", "keys of prune: criterion"),
        ("prune.1", None, "keys of prune: criterion"),
    ],
)
def test_an_unknown_key_names_the_nearest(write: Write, key: str, nearest: str | None, listed: str) -> None:
    path = write(SMALL)
    question = f"; did you mean {nearest}?" if nearest else ""
    words = f"{key}=1: no such key{question} ({listed}"
    assert refusal(path, f"{key}=1").startswith(f"override {words}")
    values = yaml.safe_load(SMALL)
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[int(last) if last.isdigit() else last] = 1
    message = refusal(write(yaml.safe_dump(values)))
    assert f"digits/job.yaml: {key}: no such key{question} ({listed}" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prune.sparsity", "override prune.sparsity: write it as key=value"),
        ("=3", "override =3: write it as key=value"),
        ("foo.bar=1", "override foo.bar=1: no such key (keys of the job: task"),
        ("seed.x=1", "override seed.x=1: no such key; seed is no section, it is a whole number"),
        ("prune.include=[*]", "override prune.include=[*]:1: not valid YAML: "),
        ("prune.sparsity=[", "override prune.sparsity=[:1: not valid YAML: "),
        ("seed=" + "1" * 5000, "override seed=11111"),
        ("prune={sparsity: 2}", "override prune={sparsity: 2}: prune.sparsity: 2 is not in [0, 1)"),
        ("prune={}", "override prune={}: prune.sparsity: missing; give a number in [0, 1): The share"),
        ("retrain=", "override retrain=: how long? give epochs or steps (0 is no training)"),
    ],
)
def test_a_wrong_override_is_named(write: Write, override: str, words: str) -> None:
    message = refusal(write(SMALL), override)
    assert message.startswith(words) and "\n" not in message and len(message) < 500


def test_an_override_cannot_reach_into_what_is_no_section(write: Write) -> None:
    message = refusal(write(SMALL.replace("{epochs: 3}", "3")), "train.epochs=1")
    assert message == "override train.epochs=1: train is 3 in the file, not a section; correct the file"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train=null"], "train: missing, and weights is train; say how to train, or name a file in weights"),
        (["retrain.steps=3"], "retrain: epochs and steps are both given; keep one (null takes the other back)"),
        (["retrain.epochs=null"], "retrain: how long? give epochs or steps (0 is no training)"),
        (["prune.distribution=erk"], "distribution: with scope: global the threshold gives each layer its sparsity"),
        (["prune.layers={head: 0.5}"], "layers: with scope: global the threshold gives each layer its sparsity"),
        (["weights=net.pt", "prune.rewind=5"], "prune.rewind: weights is net.pt, so no step is trained to go back to"),
        (
            ["weights=net.pt", "retrain.lr_schedule.name=rewind"],
            "retrain.lr_schedule.name: weights is net.pt, so there",
        ),
        (["retrain.lr_schedule={name: rewind, warmup: 5}"], "warmup and rewind are both given"),
        (["prune.until=accuracy > 0.9"], 'until: "accuracy > 0.9" is no goal; write a metric, >= or <=, and a number'),
        (["prune.until=loss <= 1", "prune.sparsity=0"], "until searches for a sparsity of all layers"),
        (
            ["prune.until=loss <= 1", "prune.scope=layer", "prune.schedule=layer-by-layer", "prune.rounds=2"],
            "and has none to search with schedule: layer-by-layer",
        ),
        (["prune.until=loss <= 1", "prune.criterion=movement"], "movement is not kept of the networks that until goes"),
        (["prune.every_steps=5"], "every_steps: rounds: 1 prunes once, before the first step; give more rounds"),
        (
            ["prune.every_steps=5", "prune.rounds=2", "prune.rewind=0"],
            "every_steps goes on with one retraining, and rewind begins anew; remove one of them",
        ),
        (["prune.schedule=layer-by-layer"], "schedule: layer-by-layer ranks no layers together; write scope: layer"),
        (["prune.scope=layer", "prune.schedule=layer-by-layer"], "rounds: 1 would prune all layers at once"),
        (
            ["prune.criterion=l1", "retrain.l1=0.1"],
            "prune.criterion: l1 prunes what was trained with an L1 term before",
        ),
        (["prune.criterion=snip", "prune.calibrate.batch_size=1"], "prune.criterion: snip looks at the network as in"),
        (["prune.criterion=l1"], "prune.criterion: l1 prunes what was trained with an L1 term before; give"),
        (["prune.criterion=movement", "train.epochs=0"], "prune.criterion: movement follows weights while they are"),
        (["prune.criterion=movement", "prune.calibrate.samples=5"], "movement looks at training alone"),
        (["prune.criterion=movement", "retrain.top_k.share=0.1"], "prune.criterion: movement needs the whole gradient"),
        (["prune.calibrate.samples=5"], "magnitude looks at weights alone, not at samples; remove calibrate"),
        (
            ["prune.what=[weights, edges]"],
            "what: edges are to go, and nothing says how many; write graph: {edges: 0.2}",
        ),
        ([*EDGES, "prune.what=[weights, edges, nodes]"], "what: nodes are to go, and nothing says how many; write"),
        (["prune.graph={edges: 0.2}"], "graph.edges: 0.2 are to go, and what does not name them; add edges to what"),
        (["prune.graph={}"], "graph: what names neither edges nor nodes; add one of them to what, or remove graph"),
        (["prune.what=[edges]", "prune.graph={edges: 0.2}"], "sparsity: 0.9 of the weights are to go, and what leaves"),
        ([*EDGES, "prune.calibrate.samples=5"], "magnitude looks at weights alone, not at samples; remove calibrate"),
        (["prune.rounds=2", "prune.schedule=one-shot"], "one-shot is 1 round, not 2; write schedule: cubic"),
        (["retrain.optimizer={name: adam, momentum: 0.9}"], "momentum belongs to sgd, not to adam; remove it"),
        (["retrain.optimizer={name: adamw, nesterov: true}"], "nesterov belongs to sgd, not to adamw"),
        (["retrain.optimizer.betas=[0.9, 0.9]"], "betas belongs to adam and adamw, not to sgd"),
        (["retrain.optimizer={momentum: 0, nesterov: true}"], "nesterov needs momentum above 0"),
        (["retrain.lr_schedule.final=0.1"], "final belongs to linear and cosine, not to constant"),
        (["retrain.lr_schedule={name: cosine, at: [0.5]}"], "at belongs to step, not to cosine"),
        (["retrain.lr_schedule={name: linear, factor: 0.5}"], "factor belongs to step, not to linear"),
        (["retrain.lr_schedule={name: step, at: [0.7, 0.2]}"], "at: [0.7, 0.2] does not rise"),
        (["retrain.lr_schedule={name: step, at: [0.5, 0.5]}"], "at: [0.5, 0.5] does not rise"),
        (["retrain.top_k={}", "retrain.optimizer.name=adam"], "top_k corrects the momentum of plain sgd, not of adam"),
        (["retrain.top_k={}", "retrain.optimizer.nesterov=true"], "not of sgd with nesterov"),
        (["retrain.top_k={}", "retrain.packing=never"], "top_k chooses among packed survivors"),
    ],
)
def test_keys_that_do_not_go_together(write: Write, overrides: list[str], words: str) -> None:
    message = refusal(write(SMALL), *overrides)
    assert words in message and "\n" not in message


def test_keys_of_their_optimizer_and_schedule_are_kept(write: Write) -> None:
    job = load_job(write(SMALL), VARIED)
    assert job.train is not None
    assert job.retrain.optimizer.betas == (0.8, 0.99) and job.train.optimizer.nesterov
    assert job.retrain.lr_schedule.at == (0.3, 0.6) and job.train.lr_schedule.final == 0.1
    written = yaml.safe_load(job.to_yaml())
    assert set(written["retrain"]["optimizer"]) == {"name", "lr", "weight_decay", "betas"}
    assert set(written["train"]["lr_schedule"]) == {"name", "warmup", "final"}


# What is refused: files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ": the file is empty"),
        ("# only a comment\n", ": the file is empty"),
        ("- task: task.py\n", ': the file is [{"task": "task.py"}], not a mapping'),
        ("task.py\n", ': the file is "task.py", not a mapping'),
        ("task: [a\nprune: b\n", ":2: not valid YAML: "),
        ("task: a\n\n\tprune: b\n", ":3: not valid YAML: "),
        ("task: *a\n", ":1: not valid YAML: found undefined alias 'a'"),
        ("task: a\nprune: {include: [*]}\n", ":2: not valid YAML: "),
        ("task: !!python/object/apply:os.system [ls]\n", ":1: not valid YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML: but found another document"),
        ("out: 2024-13-45\n", ": not valid YAML: month must be in 1..12; put a text in quotes"),
        ("? [a]\n: 1\n", ":1: not valid YAML: found unhashable key"),
        ("task: a\x07b\n", ": not valid YAML: unacceptable character"),
        ("task: " + "[" * 5000, ": not valid YAML: "),
        (
            "task: a\nprune: 1\ntask: b\n",
            ':3: not valid YAML: the key "task" is given twice, first on line 1; keep one',
        ),
        ("prune: {sparsity: 0.9, sparsity: 0.8}\n", ':1: not valid YAML: the key "sparsity" is given twice'),
    ],
)
def test_a_file_that_is_no_job_file(write: Write, text: str, words: str) -> None:
    message = refusal(write(text))
    assert message.startswith(f"digits/job.yaml{words}") and "\n" not in message and len(message) < 500


def test_the_same_key_in_two_sections_is_no_duplicate(write: Write) -> None:
    load_job(write(SMALL + "evaluate: {batch_size: 3}\ncheckpoint: {keep: 1}\n"), ["retrain.batch_size=3"])


def test_anchors_and_merges_work(write: Write) -> None:
    text = SMALL.replace("train: {epochs: 3}", "train: &t {epochs: 3, batch_size: 8}", 1)
    job = load_job(write(text.replace("retrain: {epochs: 1}", "retrain: {<<: *t, epochs: 1}")))
    assert (job.retrain.epochs, job.retrain.batch_size) == (1, 8)


def test_no_such_file_names_those_that_are_there(write: Write) -> None:
    write(SMALL)
    here = os.getcwd()  # noqa: PTH109  (what the message must show, by other means)
    assert refusal(Path("digits/jop.yaml")) == (
        f"no such job file: digits/jop.yaml (in {here}); job files there: digits/job.yaml"
    )
    assert refusal(Path("no/job.yaml")) == f"no such job file: no/job.yaml (in {here}); give the path of a job file"


def test_a_folder_a_binary_and_a_path_through_a_file(write: Write) -> None:
    path = write(SMALL)
    assert refusal(Path("digits")) == "digits: a folder, not a job file; give the file, as in digits/job.yaml"
    Path("net.pt").write_bytes(b"PK\x03\x04\xff\xfe")
    assert refusal(Path("net.pt")) == "net.pt: not a text in UTF-8 (byte 4); give a job file in YAML"
    assert "cannot be read: Not a directory" in refusal(path / "x")


def test_reading_a_job_imports_no_torch(write: Write) -> None:
    code = "import sys; from pathlib import Path; from hpcprune.job_file import load_job"
    code += f"; load_job(Path('{write(SMALL)}'))"
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True, env=environment)


# docs/job-file.md


def rows() -> dict[str, list[str]]:
    """The documented keys by their full names: their allowed values, default, meaning and example."""
    found: dict[str, list[str]] = {}
    sections: list[str] = []
    for line in DOC.splitlines():
        if line.startswith("## The job"):
            sections = [""]
        elif line.startswith("#"):
            sections = [f"{name}." for name in line.lstrip("# ").split(" and ")]
        elif row := re.fullmatch(r"\| `(\w+)` \| (.*) \|", line):
            for section in sections:
                assert section + row[1] not in found
                found[section + row[1]] = row[2].split(" | ")
    return found


def default_in_words(key: Key) -> str:
    if key.required:
        return "required"
    if key.default is None and "null" not in key.allowed:
        return "depends: "  # on other keys; held to what they resolve to by a test above
    return f"`{key.default}`" if isinstance(key.default, str) else f"`{json.dumps(key.default)}`"


def test_edges_alone_need_no_sparsity_and_their_criterion_may_look_at_samples(write: Write) -> None:
    text = SMALL.replace("sparsity: 0.9", "what: [edges]\n  graph: {edges: 0.2, criterion: attention}")
    prune = load_job(write(text)).prune
    assert prune.sparsity == 0 and prune.calibrate is not None and {*prune.criteria} == {"edges"}
    with pytest.raises(JobError, match=r"prune.sparsity: missing; give a number in \[0, 1\)"):
        load_job(write(text), ["prune.what=[weights, edges]"])
    with pytest.raises(JobError, match=r'"attention" is not one of magnitude, .*, wanda$'):
        load_job(write(SMALL), ["prune.criterion=attention"])


def test_the_page_has_every_key_and_no_other() -> None:
    assert list(rows()) and set(rows()) == {key.name for key in keys().values() if not key.section}


@pytest.mark.parametrize("key", [key for key in keys().values() if not key.section], ids=lambda key: key.name)
def test_the_page_says_what_the_schema_says(write: Write, key: Key) -> None:
    allowed, default, meaning, example = rows()[key.name]
    assert allowed == key.allowed
    assert default.startswith(default_in_words(key))
    assert meaning == key.meaning
    beside = {"steps": ["epochs=null"], "final": ["lr_schedule.name=cosine"], "betas": ["optimizer.name=adam"]}
    beside |= {"at": ["lr_schedule.name=step"], "factor": ["lr_schedule.name=step"], "schedule": ["rounds=2"]}
    beside |= {"distribution": ["scope=layer"], "layers": ["scope=row"], "samples": ["criterion=wanda"]}
    beside |= {"start": ["lr_schedule.name=rewind"], "what": ["graph.edges=0.2"]}
    beside |= {"edges": ["what=[edges, weights]"], "nodes": ["what=[nodes, weights]"]}
    *sections, last = key.name.split(".")
    beside |= {"every_steps": ["rounds=2"]} if sections == ["prune"] else {}
    beside |= {"batch_size": ["criterion=fisher"]} if "calibrate" in sections else {}
    beside |= {"criterion": ["what=[edges, weights]", "graph.edges=0.2"]} if "graph" in sections else {}
    needed = [f"{sections[0]}.{other}" for other in beside.get(last, [])]
    value = yaml.safe_load(example.strip("`"))
    job = load_job(write(SMALL), [*needed, f"{key.name}={example.strip('`')}"])
    got = job.model_dump(mode="json")
    for part in key.name.split("."):
        got = got[part]
    assert got == (float(value) if isinstance(value, str) and isinstance(got, float) else value)


def test_the_pages_jobs_are_jobs(write: Write) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert isinstance(load_job(write(block)), Job)


def test_the_pages_commands_have_valid_overrides(write: Write) -> None:
    commands = re.findall(r"^    hpcprune run \S+ ([^#\n]*)", DOC, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        load_job(write(SMALL), [word for word in command.split() if "=" in word])
