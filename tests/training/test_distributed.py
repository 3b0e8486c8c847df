"""Two processes against one: the same trajectory, columns and scores, and one sentence when something is wrong."""

import json
import re
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

import launch_cases
from madpo import DPO
from madpo.models.hyperparameters import CHECKPOINTS
from madpo.models.load import load_tokenizer
from madpo.operations import scoring
from madpo.runner.folder import UNFINISHED
from practice_cases import read, text_pairs, write
from repository import ROOT


def prepare(root, llama):
    """Pairs of text, and a reward model with a random head."""
    root.mkdir()
    write(root / "pairs.jsonl", text_pairs(29))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, dtype=torch.float32)
    model.save_pretrained(root / "reward")
    load_tokenizer(llama).save_pretrained(root / "reward")
    return root


@pytest.fixture(scope="module")
def root(llama, tmp_path_factory):
    """``one`` and ``two`` with equal data; in ``two`` a scoring that was interrupted, and pairs with a mistake."""
    root = tmp_path_factory.mktemp("both")
    prepare(root / "one", llama)
    two = prepare(root / "two", llama)
    rows = [{**row, "ref_chosen_logps": -20.0, "ref_rejected_logps": -20.0} for row in text_pairs(12)]
    rows[5]["ref_rejected_logps"] = -1e39  # more than float32 can hold
    write(two / "broken.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MADPO_CACHE", str(root / "one" / "cache"))
        patch.setattr(scoring, "PART", launch_cases.PART)
        patch.setattr(scoring._Scoring, "finish", lambda *args: pytest.fail("interrupted"))
        patch.chdir(two)
        with pytest.raises(pytest.fail.Exception):
            launch_cases.score(Path(), "continued")
    for path in (two / "continued" / UNFINISHED / CHECKPOINTS / "parts").iterdir():
        if path.name.endswith("08.safetensors"):  # kept, with values that only it can have
            save_file({side: values + 100 for side, values in load_file(path).items()}, path)
        else:
            path.unlink()
    return root


@pytest.fixture(scope="module")
def one(root, llama):
    """One process: reference columns, trajectories, scores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MADPO_CACHE", str(root / "one" / "cache"))
        patch.setattr(scoring, "PART", launch_cases.PART)
        patch.chdir(root / "one")
        found = {"columns": launch_cases.columns(llama, Path())}
        found["trajectories"] = launch_cases.trajectories(llama, Path(), 1, launch_cases.CLASSES)
        assert launch_cases.score(Path(), "scored") == launch_cases.probed(llama, Path()) == 0
    return found


class Driven(typing.NamedTuple):
    """What the driver's launches said, and how each ended: name -> [exit codes by process, files afterwards]."""

    stdout: str
    stderr: str
    ends: dict[str, list]


def launches(forked, root, llama, cache, slow):
    ended = forked(launch_cases.drive, llama, root, slow, cache=root / cache / "cache").end()
    ends = {}
    for line in ended.out.splitlines():
        if line.startswith("["):
            name, *end = json.loads(line)
            ends.setdefault(name, []).append(end)
    assert ended.status == 0, ended.err[-4000:]
    return Driven(ended.out, ended.err, ends)


@pytest.fixture(scope="module")
def driven(forked, root, llama):
    return launches(forked, root, llama, "two", False)


@pytest.fixture(scope="module")
def driven_more(forked, root, llama):
    prepare(root / "others", llama)
    return launches(forked, root, llama, "others", True)


@pytest.fixture(scope="module")
def two(root, driven):
    """What each of the two processes found."""
    return [json.loads((root / "two" / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def others(root, driven_more, llama):
    """What one process found and each of two, where ``one`` and ``two`` do not look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MADPO_CACHE", str(root / "one" / "others"))
        patch.chdir(root / "one")
        single = launch_cases.trajectories(llama, Path(), 1, launch_cases.OTHERS)
        assert launch_cases.auto(llama, Path()) == 0
    return single, *(json.loads((root / "others" / f"{rank}.json").read_text()) for rank in range(2))


@pytest.mark.parametrize("name", launch_cases.CLASSES)
def test_two_processes_follow_one_step_for_step(one, two, name):
    assert_same_course(*(found["trajectories"][name] for found in (one, *two)))


@pytest.mark.slow
@pytest.mark.parametrize("name", launch_cases.OTHERS)
def test_two_processes_follow_one_with_every_loss(others, name):
    assert_same_course(*(found[name] for found in others))


def assert_same_course(single, first, second):
    """Losses, gradient norms, logged means, running statistics and final weights; the last step has 5 of 8 pairs."""
    losses = [[row["loss"] for row in run["rows"] if "loss" in row] for run in (single, first)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-6)
    residual = np.subtract(*losses) / np.abs(losses[0])  # a factor that is missing shifts every step the same way
    assert abs(residual.mean()) < 2e-6
    for a, b in zip(single["rows"], first["rows"], strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"total_flos"}:  # which counts the repeated pairs' work
            assert b[key] == pytest.approx(a[key], rel=5e-5, abs=2e-5), key
    assert first["evaluation"] == pytest.approx(single["evaluation"], rel=5e-5, abs=2e-5)
    assert first["state"] == pytest.approx(single["state"], rel=1e-5, abs=1e-6)
    for key, values in single["weights"].items():
        np.testing.assert_allclose(first["weights"][key], values, rtol=0, atol=3e-5, err_msg=key)
    assert first["weights"] == second["weights"], "the processes hold the same weights, bit for bit"
    assert first["state"] == second["state"]


def test_reference_columns_have_the_bytes_of_one_process(root, one, two):
    assert two[0]["columns"] == two[1]["columns"] == one["columns"]
    both = (sorted((root / name / "cache" / "columns").iterdir()) for name in ("one", "two"))
    for first, second in zip(*both, strict=True):
        assert first.name == second.name, "a column made by two processes serves one, and the other way round"
        assert first.read_bytes() == second.read_bytes()
    assert len(set(one["columns"]["reward_margin"])) > 1


def test_scores_have_the_bytes_of_one_process(root, one, driven):
    for folder in ("scored", "probed"):
        for name in ("scored.jsonl", "report.json"):
            assert (root / "one" / folder / name).read_bytes() == (root / "two" / folder / name).read_bytes(), name
    left = sorted(path.name for path in (root / "two" / "scored").iterdir())
    assert left == ["record.json", "report.json", "scored.jsonl"]
    assert driven.stdout.count("pairs scored") == 4, "scored, continued, the report of what is complete, and by a probe"
    assert driven.stderr.count("scored is complete; nothing to do") == 1


@pytest.mark.slow
def test_auto_on_two_processes_is_that_of_one(root, others):
    """The decision, the strength, all three adapters and the margins of the pairs that decide."""
    first, second = (root / name / "auto" for name in ("one", "others"))
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    for key in ("label_share", "margin_temperature", "strength"):
        assert reports[1][key] == pytest.approx(reports[0][key], rel=1e-4), key
    for key in ("share", "kl", "probe"):
        np.testing.assert_allclose(*(list(flat(report[key])) for report in reports), rtol=1e-3, atol=1e-6)
    for key in ("pairs", "eval_pairs", "steps", "advice", "averaged"):
        assert reports[0][key] == reports[1][key], key
    lines = [read(folder / "dpo" / "first_look.jsonl") for folder in (first, second)]
    assert len(lines[0]) == len(lines[1]) == reports[0]["share"]["pairs"] > 4
    for a, b in zip(*lines, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    for name in ("adapter", "dpo/adapter", "mixed/adapter"):
        expected, found = (load_file(folder / name / "adapter_model.safetensors") for folder in (first, second))
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            # Where a gradient is almost 0, Adam divides its rounding by itself.
            np.testing.assert_allclose(found[key], weight, rtol=0, atol=5e-4, err_msg=f"{name} {key}")
            assert np.quantile(np.abs(found[key] - weight), 0.98) < 3e-5, f"{name} {key}"


def flat(values):
    """The numbers of nested values."""
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from flat(value)
    else:
        yield values


def test_scoring_continues_from_the_parts_that_are_there(root, one, driven):
    files = (root / "one" / "scored" / "scored.jsonl", root / "two" / "continued" / "scored.jsonl")
    for i, (a, b) in enumerate(zip(*map(read, files), strict=True)):
        more = 100 if 8 <= i < 16 else 0
        assert b["chosen_score"] == a["chosen_score"] + more
        assert b["rejected_score"] == a["rejected_score"] + more


def test_a_mistake_that_one_process_meets_ends_all_with_one_sentence(root, driven):
    ((codes, _),) = driven.ends["two"]
    assert codes
    assert set(codes.values()) <= {2, -15}, "reported, or ended by the launcher"
    scored, trained = [line for line in driven.stderr.splitlines() if line.startswith("madpo: ")]
    assert scored == (
        "madpo: the reward of pair 8 is not finite; the reward model has diverged, train it with a lower learning rate"
    )
    assert re.fullmatch(r"madpo: the loss is .* for the pairs \[5\]: .*", trained)
    assert not (root / "two" / "policy" / "record.json").exists()


@pytest.mark.slow
def test_what_a_kill_of_one_process_interrupts_ends_in_the_same_bytes(root, driven_more):
    assert [codes for codes, _ in driven_more.ends["whole"]] == [{}]
    killed = {"step": (1, ["checkpoint-2"]), "saving": (0, [".checkpoint-4.part", "checkpoint-2"])}
    for name, (rank, left) in killed.items():
        (first, found), (again, _) = driven_more.ends[name]
        assert first, "the launcher has ended the other process, or that has lost its connection"
        assert f"process {rank} dies" in driven_more.stderr
        assert [file for file in found if file != ".lock"] == left  # the system let go of the lock
        assert again == {}
        expected, present = files(root / "whole"), files(root / name)
        assert {"checkpoint-6/optimizer.safetensors", "checkpoint-6/extra_state.safetensors"} <= expected.keys()
        assert present.keys() == expected.keys()
        for file, content in expected.items():
            if "training.json" not in file and "manifest" not in file:  # which hold the seconds
                assert present[file] == content, f"{name}: {file}"


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_fsdp2_follows_one_process(root, one, driven_more):
    """The head lies in a shard of its own; its forward sees the whole weight, and the adapter is saved as a whole."""
    assert [codes for codes, _ in driven_more.ends["fsdp"]] == [{}], driven_more.stderr[-3000:]
    single, found = one["trajectories"]["beta_dpo"], json.loads((root / "fsdp" / "found.json").read_text())
    np.testing.assert_allclose(found["losses"], [row["loss"] for row in single["rows"] if "loss" in row], rtol=5e-6)
    assert found["eval_loss"] == pytest.approx(single["evaluation"]["eval_loss"], rel=5e-6)
    saved = load_file(root / "fsdp" / "saved" / "adapter_model.safetensors")
    assert saved.keys() == {name.replace(".default", "") for name in single["weights"]}
    for name, values in single["weights"].items():
        np.testing.assert_allclose(saved[name.replace(".default", "")].ravel(), values, rtol=0, atol=3e-5, err_msg=name)


@pytest.mark.slow
def test_fsdp2_trains_all_weights(root, llama, driven_more, tmp_path):
    assert [codes for codes, _ in driven_more.ends["fsdp-full"]] == [{}], driven_more.stderr[-3000:]
    settings = {**launch_cases.FULL_SETTINGS, "micro": 2 * launch_cases.FULL_SETTINGS["micro"]}
    trainer = launch_cases.trainer_of(llama, tmp_path, DPO(), **settings)
    trainer.train()
    found = json.loads((root / "fsdp-full" / "found.json").read_text())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    np.testing.assert_allclose(found["losses"], losses, rtol=5e-6)
    saved = load_file(root / "fsdp-full" / "saved" / "model.safetensors")
    np.testing.assert_array_equal(saved.pop("lm_head.weight"), saved["model.embed_tokens.weight"])  # tied
    expected = launch_cases.weights(trainer)
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(saved[name], weight, rtol=0, atol=3e-5, err_msg=name)


CONFIGURATIONS = sorted((ROOT / "examples" / "distributed").glob("*.yaml"))


def launch_words(path, *more):
    return ["--config_file", str(path), *more, "-m", "madpo.commands.cli", "train", "pairs.jsonl"]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_the_example_and_launches_what_it_says(path, monkeypatch):
    """Up to the command line and the environment of the processes, with no GPU at hand."""
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    assert config.distributed_type == DistributedType[kind]
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args(launch_words(path, "--num_processes", "2"))
    )
    assert (arguments.num_processes, arguments.num_machines, arguments.module) == (2, 1, True)
    assert arguments.training_script_args == ["train", "pairs.jsonl"]
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == (
        *(kind == name for name in ("MULTI_GPU", "FSDP", "DEEPSPEED")),
    )
    if kind == "DEEPSPEED":
        assert arguments.zero_stage == int(path.stem[-1])
        assert str(arguments.zero3_init_flag).lower() == "false", "the reference is computed before the split"
    elif kind == "FSDP":
        environment = prepare_multi_gpu_env(arguments)
        found = {key: environment[key] for key in FSDP2}
        assert found == FSDP2
        for key in FSDP2:
            monkeypatch.setenv(key, environment[key])
        plugin = FullyShardedDataParallelPlugin()  # reads the environment
        assert plugin.fsdp_version == 2
        assert plugin.cpu_ram_efficient_loading is False


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
