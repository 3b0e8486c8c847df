"""Experiments: what their files may say, their graph, and the smoke experiment end to end."""

import json
import re
import shutil
import signal
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import get_scheduler

import soak
from forked import command_line
from madpo import margin_weight
from madpo.commands.cli import main
from madpo.core.config import find_experiment, load_config, packaged_experiments
from madpo.core.errors import ConfigError
from madpo.core.metrics import Estimate
from madpo.models.hyperparameters import Optimisation, Schedule
from madpo.operations.settings import AdapterOptimisation
from madpo.runner.record import Record
from madpo.study.experiment import Experiment
from practice_cases import read
from refusals import names, refused


def load(name, *overrides):
    return load_config(find_experiment(name), Experiment, overrides)


@pytest.mark.parametrize("name", packaged_experiments())
def test_every_packaged_experiment_parses_and_builds_a_graph_without_cycles(name):
    seen = set()
    steps = load(name).steps()
    for step in steps:
        assert {id(upstream) for upstream in step.upstream.values()} <= seen, f"{step.name} comes before its inputs"
        seen.add(id(step))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert {"sft", "responses" if load(name).pairs else "pairs"} <= set(names)


def test_the_quickstarts_graph():
    steps = {step.name: step for step in load("quickstart").steps()}
    assert list(steps) == [
        "oracle",
        "sft",
        "responses",
        "pairs/low/seed0",
        "evaluation/sft/seed0",
        "reference/low/seed0",
        "policy/low/dpo/seed0",
        "evaluation/low/dpo/seed0",
        "reward_model/low/seed0",
        "margins/low/seed0",
        "policy/low/madpo/seed0",
        "evaluation/low/madpo/seed0",
    ]
    assert set(steps["policy/low/dpo/seed0"].inputs) == {"pairs", "reference", "logps"}, "DPO waits for no margins"
    assert set(steps["policy/low/madpo/seed0"].inputs) == {"pairs", "reference", "logps", "margins"}


def test_extra_groups_are_in_the_graph_where_they_are_named():
    quickstart = load("quickstart")
    plain = [step.name for step in quickstart.steps()]
    steps = {step.name: step for step in quickstart.with_groups(["auto"]).steps()}
    assert [name for name in steps if name not in plain] == ["policy/low/auto/seed0", "evaluation/low/auto/seed0"]
    assert steps["policy/low/auto/seed0"].groups == ("auto",)
    assert set(steps["policy/low/auto/seed0"].inputs) == {"pairs", "reference", "logps", "margins"}
    assert [step.name for step in quickstart.with_groups(["evaluation/*"]).steps()] == plain


def test_what_does_not_bear_on_a_result_stays_outside_identities():
    plain = {step.name: step.identity for step in load("smoke").steps()}
    faster = {step.name: step.identity for step in load("smoke", "responses.batch_size=3").steps()}
    assert plain == faster
    other = {step.name: step.identity for step in load("smoke", "policy.optimisation.learning_rate=0.5").steps()}
    changed = {name for name in plain if plain[name] != other[name]}
    assert {name.split("/")[0] for name in changed} == {"policy", "evaluation"}
    assert "evaluation/sft/seed0" not in changed


def test_a_smaller_vocabulary_is_the_base_of_all_that_is_trained_from_the_named_model():
    plain = {step.name: step for step in load("smoke").steps()}
    small = {step.name: step for step in load("smoke", "vocabulary.size=300").steps()}
    assert small.keys() - plain.keys() == {"base"}
    readers = {name for name, step in small.items() if "base" in step.inputs}
    assert readers == {name for name in small if name.split("/")[0] in ("sft", "reward_model")}
    assert {name for name in plain if small[name].identity == plain[name].identity} == {"oracle"}
    assert {s.name: s.identity for s in load("laptop", "vocabulary=false").steps()}.keys() == {
        s.name for s in load("laptop").steps()
    } - {"base"}
    other = {step.name: step for step in load("smoke", "vocabulary.size=301").steps()}
    assert other["sft"].identity != small["sft"].identity
    measured = {n: load("smoke", "vocabulary.size=300", f"vocabulary.eval_texts={n}").steps() for n in (128, 9)}
    assert [step.identity for step in measured[128]] == [step.identity for step in small.values()]
    assert next(step for step in measured[9] if step.name == "base").config.eval_texts == 9


def test_memory_bears_on_no_identity():
    """The change that a training out of memory is advised to make leaves every finished step where it is."""
    found = [load("smoke", f"policy.optimisation.micro_batch_size={micro}").steps() for micro in (2, 8)]
    first, second, plain = ({step.name: step.identity for step in steps} for steps in (*found, load("smoke").steps()))
    assert first == second == plain
    stages = [{step.name: step.config for step in steps}["reference/low/seed0"] for steps in found]
    assert [(stage.batch_size, stage.micro_batch_size) for stage in stages] == [(8, 2), (8, 8)]


def test_only_what_a_measurement_needs_is_trained():
    """A study of DPO only trains no reward model, and a row of one tier none of the others'."""
    plain = {"name": "DPO", "loss": {"kind": "dpo"}}
    steps = load_config(find_experiment("smoke"), Experiment, {"method": [plain], "selection": []}).steps()
    kinds = {step.name.split("/")[0] for step in steps}
    assert kinds == {"oracle", "sft", "responses", "pairs", "reference", "policy", "evaluation"}
    margin = {"name": "MADPO", "loss": {"kind": "madpo"}, "seeds": [0, 1, 2], "tiers": ["low"]}
    given = {"method": [plain, margin], "selection": [], "pairs.tiers": ["low", "high"]}
    steps = load_config(find_experiment("smoke"), Experiment, given).steps()
    names = [step.name for step in steps]
    assert [name for name in names if name.startswith("reward_model")] == [
        f"reward_model/low/seed{k}" for k in range(3)
    ]
    assert "pairs/high/seed0" in names
    assert "pairs/high/seed1" not in names
    seen = set()
    for step in steps:
        assert {upstream.name for upstream in step.inputs.values()} <= seen
        seen.add(step.name)


def test_a_row_with_a_learning_rate_of_its_own_differs_in_that_only():
    steps = {step.name: step for step in load("laptop").steps()}
    half, whole = (steps[f"policy/low/dpo{name}/seed0"] for name in ("-lr=5e-05-beta=0.1", ""))
    assert (half.config.optimisation.learning_rate, whole.config.optimisation.learning_rate) == (5e-5, 1e-4)
    rate = {"optimisation": whole.config.optimisation, "method": whole.config.method}
    assert half.config.model_copy(update=rate) == whole.config


# The laptop study runs for hours. These may change only with a sentence in the log saying why; a field that joins a
# configuration must be made by `madpo.core.config.added`.
LAPTOP = {
    "oracle": "e827b90f04ef08b3",
    "base": "4e69974a9baf3c51",
    "sft": "bc7d28f9bc2854c8",
    "responses": "f6077fa53826d092",
    "evaluation/sft/seed1": "2a2677331bb9a744",
    "pairs/low/seed1": "0198455c01115ddb",
    "reward_model/low/seed1": "5b35361c4d0189d2",
    "margins/low/seed1": "a7bee0a9ef9545b2",
    "reference/low/seed1": "24d499b25fde2879",
    "policy/low/dpo/seed1": "09a2f2e8aaa302ab",
    "evaluation/low/dpo/seed1": "d95e87c42665b2ce",
    "policy/low/ipo/seed1": "87c4c5d507d60633",
    "evaluation/low/ipo/seed1": "289260dbdb810ebe",
    "policy/low/beta-dpo-m=0.6-p=0.8/seed1": "340acfa63565288b",
    "evaluation/low/beta-dpo-m=0.6-p=0.8/seed1": "e458f71ead4e68ec",
    "policy/low/madpo-tau=7-c=4/seed1": "d1a0ac3e10d0bf8f",
    "evaluation/low/madpo-tau=7-c=4/seed1": "56273ac132ba33f9",
}


def test_the_long_runs_identities_stand(monkeypatch):
    monkeypatch.setattr("madpo.runner.step.libraries", lambda: {"torch": "0"})
    steps = {step.name: step for step in load("laptop").steps()}
    assert {name: steps[name].identity[:16] for name in LAPTOP} == LAPTOP


@pytest.mark.parametrize("change", ["seeds=[1]", "seeds=[1, 2, 5]", "pairs.tiers=['high','low']"])
def test_more_or_fewer_seeds_and_tiers_leave_finished_steps_where_they_are(change, tmp_path):
    before = {step.name: step.folder(tmp_path) for step in load("laptop").steps()}
    after = {step.name: step.folder(tmp_path) for step in load("laptop", change).steps()}
    shared = before.keys() & after.keys()
    assert {"evaluation/low/dpo/seed1", "evaluation/sft/seed1", "margins/high/seed1"} <= shared
    assert {before[name] for name in shared} == {after[name] for name in shared}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("pairs.train=40", [("train", "40"), ("prompts", "40")]),
        ("evaluation.prompts=17", [("evaluation.prompts", "17", "16 pairs")]),
        ("method.1.name=DPO", ["'dpo'"]),
        ("method.1.loss.c_max=0.5", [("c_max", "0.5")]),
        ("method.1.loss.kind=mdpo", ["'mdpo'", "'madpo'"]),
        ("policy.optimisation.learning_rat=1", ["'policy.optimisation.learning_rat'", "'learning_rate'"]),
        ("policy.optimisation.learning_rate=-1", [("learning_rate", "-1")]),
        ("policy.optimisation.micro_batch_size=3", [("batch_size 8", "micro_batch_size 3")]),
        ("policy.optimisation.schedule=cosin", ["'cosin'", "'cosine'"]),
        ("policy.optimisation.betas=[0.9, 1.0]", [("policy.optimisation.betas.1", "1.0", "1")]),
        ("method.9.online.generations=3", ["'RLOO'", ("batch_size 8", "generations 3")]),
        ("responses.temperature=0", ["'high'", ("temperature", "0")]),
        ("pairs.tiers=['hihg']", ["'hihg'", "'high'"]),
        ("seeds=[1, 1]", ["seeds"]),
        ("vocabulary.size=0", [("vocabulary.size", "0")]),
        ("reward_model.folds=1000000000000", [("folds", "1000000000000")]),  # so many steps fill any memory
    ],
)
def test_mistakes_are_one_sentence_with_the_key(override, named):
    with refused(ConfigError, "smoke.toml", *named) as caught:
        load("smoke", override)
    assert "\n" not in str(caught.value)


def test_every_schedule_needs_no_more_than_steps():
    """Other schedules of transformers ask for options of their own, hours after the start."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    for name in get_args(Schedule):
        assert get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4).get_last_lr()


def test_a_batch_is_whole_micro_batches_everywhere():
    for kind in (Optimisation, AdapterOptimisation):
        with refused(ConfigError, ("batch_size 8", "micro_batch_size 3")):
            kind(learning_rate=1, epochs=1, batch_size=8, micro_batch_size=3)
        assert kind(learning_rate=1, epochs=1, batch_size=8, micro_batch_size=16).per_pass == 8


def test_greedy_responses_make_only_pairs_of_the_low_tier():
    low = ("responses.temperature=0", "pairs.tiers=['low']")
    with refused(ConfigError, "'RLOO'"):
        load("smoke", *low)
    rows = [{"name": "DPO", "loss": {"kind": "dpo"}}]
    given = {"responses.temperature": 0, "pairs.tiers": ["low"], "method": rows, "selection": []}
    assert load_config(find_experiment("smoke"), Experiment, given).steps()


def test_a_smaller_vocabulary_is_for_the_packaged_corpus():
    with refused(ConfigError, "madpo trim-vocab"):
        load_config(find_experiment("smoke"), Experiment, {"vocabulary.size": 300, "corpus": {"kind": "imdb-hub"}})


TIERS = ["--set", "pairs.tiers=['high','low']"]
SMALL = ["--set", "pairs.tiers=['low']", "pairs.prompts=20", "pairs.train=16", "evaluation.prompts=4"]
CORE = ["--only", "core/*/low/*"]


@pytest.fixture(scope="module")
def small(command, tmp_path_factory):
    """The core of one tier with few pairs, run to the end by the command line: a chain of every kind of step."""
    folder = tmp_path_factory.mktemp("small")
    ended = command("run", "smoke", "--output_dir", folder / "run", *SMALL, *CORE, cache=folder / "cache").end()
    assert ended.status == 0, ended.err
    return folder


def records(root):
    found = [json.loads(path.read_text()) for path in sorted(root.rglob("record.json"))]
    return {record["name"]: record for record in found}


def folder_of(root, name):
    (path,) = root.glob(f"{name}-*")
    return path


@pytest.mark.slow
def test_smoke_end_to_end(command, tmp_path):
    root = tmp_path / "run"
    ended = command("run", "smoke", "--output_dir", root, *TIERS, cache=tmp_path / "cache").end()
    assert ended.status == 0, ended.err
    assert "report.html" in ended.out
    done = records(root)
    assert set(done) == {step.name for step in load("smoke", "pairs.tiers=['high','low']").steps()}

    for tier in ("high", "low"):
        pairs = pd.read_parquet(folder_of(root, f"pairs/{tier}/seed0") / "pairs.parquet").set_index("pair_id")
        assert pairs["split"].value_counts().to_dict() == {"train": 24, "heldout": 16}
        if tier == "low":
            assert set(pairs["chosen_source"]) | set(pairs["rejected_source"]) == {"sft", "review"}
        margins = pd.read_parquet(folder_of(root, f"margins/{tier}/seed0") / "margins.parquet").set_index("pair_id")
        assert set(margins.index) == set(pairs.index)
        train = margins.loc[pairs.index[pairs["split"] == "train"], "reward_margin"]
        # The mean weight of the log is the mean of the weight over the epoch's batches.
        log = read(folder_of(root, f"policy/{tier}/madpo/seed0") / "log.jsonl")
        logged = np.mean([row["weight/mean"] for row in log if "weight/mean" in row])
        expected = margin_weight(torch.tensor(train.to_numpy()), tau=7, c_max=4).mean()
        assert logged == pytest.approx(float(expected), abs=1e-5)
        # The reference columns and the first step come from the same weights: the first margin is about 0.
        assert abs(log[0]["rewards/margins"]) < 0.02

    sft = done["evaluation/sft/seed0"]["metrics"]
    assert sft["kl"]["mean"] == 0
    for name in ("evaluation/high/dpo/seed0", "evaluation/low/madpo/seed0"):
        metrics = done[name]["metrics"]
        samples = read(folder_of(root, name) / "samples.jsonl")
        rewards = [row["oracle_reward"] for row in samples]
        reward = metrics["oracle_reward"]
        assert reward["mean"] == pytest.approx(np.mean(rewards))
        assert reward["low"] <= reward["mean"] <= reward["high"]
        assert metrics["kl"]["mean"] > 0
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "MADPO" in page
    assert not re.search(r"""(src|href)=["']https?:""", page)


def test_a_second_run_does_nothing_and_says_so(command, small):
    before = {path: path.stat().st_mtime_ns for path in (small / "run").rglob("record.json")}
    ended = command("run", "smoke", "--output_dir", small / "run", *SMALL, *CORE, cache=small / "cache").end()
    assert ended.status == 0
    assert before == {path: path.stat().st_mtime_ns for path in (small / "run").rglob("record.json")}


def assert_same(ours, theirs):
    """The records of one run are among those of another, and a policy has the same bytes."""
    found, expected = records(ours), records(theirs)
    assert {"policy/low/madpo/seed0", "evaluation/low/madpo/seed0", "responses"} <= found.keys()
    for name, record in found.items():
        assert {**record, "provenance": None} == {**expected[name], "provenance": None}, name
    adapter = "adapter/adapter_model.safetensors"
    a, b = (folder_of(root, "policy/low/madpo/seed0") / adapter for root in (ours, theirs))
    assert a.read_bytes() == b.read_bytes()


def dying(*words):
    soak.die_at_step(1, "policy/low/madpo")
    command_line(*words)


@pytest.mark.slow
def test_killed_and_started_again_ends_in_the_same_bytes(forked, command, small, tmp_path):
    """SIGKILL in the middle of a training; finished stages are kept, and the results equal the undisturbed run's."""
    root = tmp_path / "run"
    shutil.copytree(small / "run", root)
    for step in ("reference", "margins", "policy", "evaluation"):  # what the killed process begins with, and the rest
        for folder in [*root.glob(f"{step}/low/seed0-*"), *root.glob(f"{step}/low/madpo/seed0-*")]:
            shutil.rmtree(folder)
    words = ["run", "smoke", "--output_dir", str(root), *SMALL, "--only", "evaluation/low/madpo/*"]
    assert forked(dying, *words, cache=small / "cache").end().status == -signal.SIGKILL
    kept = set(records(root))
    assert {"sft", "oracle", "responses", "reference/low/seed0", "margins/low/seed0"} <= kept
    assert "policy/low/madpo/seed0" not in kept
    again = command(*words, cache=small / "cache").end()
    assert again.status == 0, again.err
    names(again.err, "2 to")
    assert_same(root, small / "run")


def test_a_mistake_exits_with_status_2_and_leaves_nothing(tmp_path, capsys):
    assert main(["run", "smoke", "--output_dir", str(tmp_path / "run"), "--set", "pairs.trian=3"]) == 2
    said = capsys.readouterr()
    assert said.err.strip().count("\n") == 0
    names(said.err, "'pairs.trian'", "'train'")
    assert not said.out
    assert not (tmp_path / "run").exists()


LOSS = '''
"""A loss in somebody's own file."""

from typing import Literal

import torch.nn.functional as F

from madpo.losses import LossConfig, LossOutput


class Hinge(LossConfig):
    """SLiC's hinge on the log-ratio margin: max(0, 1 - beta h)."""

    kind: Literal["hinge"] = "hinge"
    beta: float = 0.1

    def __call__(self, inputs, state=None):
        return LossOutput(F.relu(1 - self.beta * inputs.log_ratio_margin), {})
'''
ROW = """
[[method]]
name = "Hinge"
group = "rivals"
loss = { kind = "custom", target = "my_losses.py:Hinge" }
sweep = { beta = [0.1, 0.2] }
tiers = ["low"]
"""


@pytest.mark.slow
def test_a_loss_of_ones_own_is_a_row(command, small, tmp_path):
    """Nothing of ours changes: a file, and five lines in a TOML."""
    (tmp_path / "my_losses.py").write_text(LOSS)
    (tmp_path / "mine.toml").write_text(find_experiment("smoke").read_text() + ROW)
    shutil.copytree(small / "run", tmp_path / "run")
    words = ("run", "mine.toml", "--output_dir", "run", *SMALL, "--only", "*/hinge*")
    ended = command(*words, cache=small / "cache", folder=tmp_path).end()
    assert ended.status == 0, ended.err
    # The loss declares no needs, so neither margins nor their reward model are upstream of it.
    names(ended.err, "5 of 9 steps", "4 to")
    found = records(tmp_path / "run")
    config = found["policy/low/hinge-beta=0.2/seed0"]["config"]["loss"]
    assert config["parameters"] == {"beta": 0.2}
    assert len(config["source_digest"]) == 64
    log = (folder_of(tmp_path / "run", "policy/low/hinge-beta=0.1/seed0") / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["loss"] == pytest.approx(1, abs=0.01), "max(0, 1 - 0.1 * 0) before the first step"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Hinge" in page
    assert "MADPO" in page, "the report speaks of the whole folder"


PLACES = {
    "processes": ["--processes", "2"],
    "ray": ["--executor", "ray", "--processes", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_records_are_the_same_wherever_steps_run(command, small, tmp_path, place):
    """One tier's core; `make soak` compares the whole graph."""
    if place == "ray":
        pytest.importorskip("ray", reason='ray is not installed; pip install "madpo[ray]"')
    root = tmp_path / "run"
    words = ["run", "smoke", "--output_dir", root, *SMALL, *CORE, *PLACES[place]]
    ended = command(*words, cache=small / "cache").end()
    assert ended.status == 0, ended.err
    assert_same(root, small / "run")


def test_several_values_of_a_setting_share_a_folder(tmp_path, capsys):
    """What the setting does not touch keeps its folder; every value's own results stay next to the others."""
    key = "policy.optimisation.learning_rate"
    graphs = [load("smoke", f"{key}={value}").steps() for value in (0.5, 0.25)]
    folders = [{str(step.folder(tmp_path)): step for step in steps} for steps in graphs]
    shared = {step.name.split("/")[0] for place, step in folders[0].items() if place in folders[1]}
    own = {step.name.split("/")[0] for place, step in folders[0].items() if place not in folders[1]}
    assert {"oracle", "sft", "responses", "pairs", "reward_model", "margins", "reference"} <= shared
    assert own == {"policy", "evaluation"}
    for steps, reward in zip(graphs, (2.0, 1.0), strict=True):
        for step in steps:
            name = step.name.split("/")
            if name[0] in ("policy", "evaluation") and name[1] in ("sft", "high") and name[-1] == "seed0":
                record = Record(
                    name=step.name, identity=step.identity, operation=step.operation,
                    config=step.settings, inputs={role: up.identity for role, up in step.inputs.items()},
                    metrics={"oracle_reward": Estimate(reward, reward - 0.5, reward + 0.5, 9), "kl": 4.5},
                    libraries={}, threads=1, provenance={},
                )  # fmt: skip
                step.folder(tmp_path).mkdir(parents=True, exist_ok=True)
                (step.folder(tmp_path) / "record.json").write_text(record.model_dump_json())
    assert main(["status", str(tmp_path), "--values", key]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " evaluation/high/dpo/" in line]
    assert [line.split()[0] for line in lines] == ["0.25", "0.5"]
    names(lines[0], ("1.00", "95 %", "0.50", "1.50"), "kl 4.50")
    assert main(["status", str(tmp_path), "--values", "policy.nothing"]) == 2
    names(capsys.readouterr().err, "policy.nothing")


def test_a_pilots_prompts_are_used_nowhere_else():
    """Reviews that are skipped are neither prompts nor the oracle's, and a study without them keeps its identities."""
    plain, skipping = (
        load("laptop", *given)
        for given in ((), ("pairs.skip=560", "pairs.prompts=400", "pairs.train=300", "evaluation.prompts=40"))
    )
    steps = [{step.name: step for step in experiment.steps()} for experiment in (plain, skipping)]
    assert "skip" not in steps[0]["responses"].settings
    assert steps[1]["responses"].settings["skip"] == 560
    assert steps[1]["oracle"].settings["prompts"] == 960
