"""Checkpoints: complete or absent, no pickle, refused by name; and the same bytes after a kill."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOTrainer, RewardTrainer, SFTTrainer

import soak
from losses_cases import EVERY_LOSS, first_of_each_class
from madpo import DPO, MADPO, PreferenceConfig, PreferenceTrainer
from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.losses import BetaDPO
from madpo.models.hyperparameters import Optimisation
from madpo.models.load import build_tiny, load_tokenizer
from madpo.training import checkpoints as disk
from madpo.training.digests import rows_digest
from madpo.training.states import check_groups, pack, random_states, restore_random_states, unpack
from practice_cases import read
from quick import quick
from refusals import names, refused
from small_trainers import weights
from trainer_settings import QUIET

SETTINGS = {
    **QUIET,
    "learning_rate": 1e-2,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def said(monkeypatch):
    lines = []
    for module in ("checkpoints", "resume"):
        monkeypatch.setattr(f"madpo.training.{module}.say", lines.append)
    return lines


def pairs(count=16, seed=0, **columns):
    generator = np.random.default_rng(seed)

    def draw(low, high):
        return generator.integers(5, 200, generator.integers(low, high)).tolist()

    rows = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for _ in range(count):
        for name, limits in (("prompt_ids", (2, 6)), ("chosen_ids", (1, 9)), ("rejected_ids", (1, 9))):
            rows[name].append(draw(*limits))
    reference = {name: (-10 - generator.random(count)).tolist() for name in ("ref_chosen_logps", "ref_rejected_logps")}
    return Dataset.from_dict({**rows, **reference, "reward_margin": generator.normal(size=count).tolist(), **columns})


def build(folder, out, loss=None, data=None, *, dropout=0.1, peft=True, **changes):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=PreferenceConfig(output_dir=str(out), **{**SETTINGS, **changes}),
        loss=loss or DPO(),
        train_dataset=pairs() if data is None else data,
        processing_class=load_tokenizer(folder),
        peft_config=lora if peft else None,
    )


def log(trainer):
    clock = ("_runtime", "_per_second")
    return [{k: v for k, v in row.items() if not k.endswith(clock)} for row in trainer.state.log_history]


def assert_same(a, b):
    assert weights(a).keys() == weights(b).keys()
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name
    assert log(a) == log(b)


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def write(root, step, identity=None, **contents):
    """A checkpoint with small files."""
    with disk.writing(root, step, identity or {"data": "a"}) as part:
        for name in (disk.WEIGHTS, disk.OPTIMIZER, disk.EXTRA):
            disk.save_tensors({"x": torch.full((3,), float(step))}, part / name)
        for name in (disk.TRAINING, disk.TRAINER_STATE):
            disk.save_json({"step": step, **contents}, part / name)
    return root / f"checkpoint-{step}"


# ---- The files ----


def test_a_checkpoint_is_complete_or_absent_whatever_call_fails(tmp_path, monkeypatch, said):
    """Let the n-th call of fsync, rename or replace fail, for every n: the older checkpoint is always found whole."""
    write(tmp_path, 1)
    calls = {"left": 0}

    def failing(real):
        def call(*arguments):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise OSError(28, "No space left on device", str(tmp_path))
            return real(*arguments)

        return call

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    failures = 0
    for n in range(1, 100):
        calls["left"] = n
        with contextlib.suppress(StorageError):
            write(tmp_path, 2)
            break
        failures += 1
        # The very last call makes the rename durable: by then the new one is there, and whole.
        found = disk.newest(tmp_path)
        assert found is not None
        assert found.step in (1, 2)
        assert not list(tmp_path.glob(".checkpoint-*.part"))
        shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)
    assert failures >= 8
    calls["left"] = 0
    assert disk.newest(tmp_path).step == 2
    assert not said


@pytest.mark.parametrize("name", [*disk._NEEDED, disk.MANIFEST])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path, said, name, how):
    write(tmp_path, 25)
    path = write(tmp_path, 50) / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-5] if how == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with refused(disk.DamagedCheckpoint, "checkpoint-50"):
        disk.verify(tmp_path / "checkpoint-50")
    assert disk.newest(tmp_path).step == 25
    (line,) = said
    names(line, name, "checkpoint-50", "checkpoint-25")
    assert "\n" not in line


def test_no_complete_checkpoint_is_told(tmp_path, said):
    (tmp_path / "checkpoint-9").mkdir()
    assert disk.newest(tmp_path) is None
    names(said[0], tmp_path / "checkpoint-9", disk.MANIFEST)
    assert disk.newest(tmp_path / "nothing") is None


def test_a_manifest_cannot_reach_outside_its_folder(tmp_path):
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / disk.MANIFEST).read_text())
    manifest["files"]["../secret"] = {"sha256": "0", "bytes": 1}
    (folder / disk.MANIFEST).write_text(json.dumps(manifest))
    with refused(disk.DamagedCheckpoint, "checkpoint-1"):
        disk.verify(folder)


def test_the_newest_two_are_kept_and_leftovers_swept(tmp_path):
    (tmp_path / ".checkpoint-7.part").mkdir()
    for step in (1, 2, 10, 9):
        written = write(tmp_path, step)
        disk.rotate(tmp_path, 2, [written])
    assert [p.name for p in disk.folders(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
    assert not list(tmp_path.glob(".*"))
    disk.rotate(tmp_path, 1, [tmp_path / "checkpoint-9"])
    assert [p.name for p in disk.folders(tmp_path)] == ["checkpoint-9"]


@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "sgd"])
def test_an_optimizer_survives_exactly(kind, tmp_path):
    def build_optimizer():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        groups = [{"params": layers[0].parameters(), "lr": 0.3}, {"params": layers[1].parameters()}]
        if kind == "sgd":
            return layers, torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return layers, torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), amsgrad=kind == "amsgrad")

    def step(layers, optimizer):
        optimizer.zero_grad()
        layers(torch.arange(6.0).reshape(2, 3)).square().sum().backward()
        optimizer.step()

    layers, optimizer = build_optimizer()
    step(layers, optimizer)
    tensors, values = pack(optimizer.state_dict(), "optimizer")
    disk.save_tensors(tensors, tmp_path / "o.safetensors")
    disk.save_json(values, tmp_path / "o.json")
    again, other = build_optimizer()
    again.load_state_dict(layers.state_dict())
    kept = unpack(json.loads((tmp_path / "o.json").read_text()), disk.load_file(tmp_path / "o.safetensors"))
    check_groups(kept, other.param_groups)
    other.load_state_dict(kept)
    assert [group.get("betas") for group in other.param_groups] == [g.get("betas") for g in optimizer.param_groups]
    for _ in range(3):
        step(layers, optimizer)
        step(again, other)
    for a, b in zip(layers.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with refused(DataError, ("[2, 2]", "[2]")):
        check_groups(kept, other.param_groups[:1])
    with pytest.raises(disk.DamagedCheckpoint), disk.reading(tmp_path):
        unpack(values, {})


def test_random_states_are_put_back_exactly():
    import random

    def draws():
        return random.gauss(0, 1), np.random.standard_normal(), torch.randn(3).tolist(), random.random()

    random.gauss(0, 1)  # an odd number of draws leaves a cached value behind
    np.random.standard_normal()
    states = json.loads(json.dumps(random_states()))
    first = draws()
    assert draws() != first
    restore_random_states(states)
    assert draws() == first


def test_the_digest_of_rows_is_of_their_values():
    data = pairs(7)
    digest = rows_digest(data, data.column_names)
    assert digest == rows_digest(Dataset.from_list(list(data)), data.column_names)
    assert digest == rows_digest(data.select(range(7)).select(range(7)), reversed(data.column_names))
    assert digest != rows_digest(data.select([1, 0, *range(2, 7)]), data.column_names)
    assert rows_digest(data, ("nothing",)) is None
    shifted = Dataset.from_dict({"a": [[1], [2, 3]]}), Dataset.from_dict({"a": [[1, 2], [3]]})
    assert rows_digest(shifted[0], ["a"]) != rows_digest(shifted[1], ["a"])
    texts = Dataset.from_dict({"a": ["x", None], "b": [[{"role": "user", "content": "é"}]] * 2, "c": [1.0, None]})
    assert rows_digest(texts, "abc") != rows_digest(texts, "ab")


# ---- The trainer ----


def test_checkpoints_hold_no_pickle_and_load_as_adapters(llama, tmp_path):
    trainer = build(llama, tmp_path / "run", BetaDPO(), save_total_limit=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    found = disk.folders(tmp_path / "run")
    assert [p.name for p in found] == ["checkpoint-6", "checkpoint-4"]
    for name in [*files_of(tmp_path / "run"), *files_of(tmp_path / "final")]:
        assert name.endswith((".safetensors", ".json", ".md", ".jinja")), name
    assert {disk.MANIFEST, *disk._NEEDED, "adapter_model.safetensors"} <= set(files_of(found[0]))
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    base.load_adapter(str(found[0]))
    state = {n.replace(".default", ""): p for n, p in base.named_parameters() if "lora_" in n}
    assert {tuple(p.shape) for p in state.values()} == {tuple(p.shape) for p in weights(trainer).values()}


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (DPO(), {"logging_steps": 4, "save_steps": 3}),  # totals of a window that the checkpoint cuts in two
        pytest.param(  # an uneven end of the epoch
            MADPO(tau=2, c_max=4), {"gradient_accumulation_steps": 3, "max_steps": 5}, marks=pytest.mark.slow
        ),
        # Looks at a step before it is taken, with dropout: the random states must be back before that look.
        (BetaDPO(filter=True, keep=0.75), {"gradient_accumulation_steps": 2, "max_steps": 5}),
        pytest.param(  # at the edge
            DPO(),
            {"num_train_epochs": 2, "max_steps": -1, "save_steps": 4, "lr_scheduler_type": "cosine"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["window", "accumulation", "stateful", "epoch"],
)
def test_resuming_gives_the_same_bytes_and_the_same_log(llama, tmp_path, loss, settings):
    whole = build(llama, tmp_path / "whole", loss, **settings)
    expected = whole.train()
    first = disk.folders(tmp_path / "whole")[-1]
    part = build(llama, tmp_path / "part", loss, **settings)
    found = part.train(resume_from_checkpoint=str(first))
    assert_same(whole, part)
    assert found.training_loss == expected.training_loss
    last = [p.name for p in (disk.folders(tmp_path / "whole")[0], disk.folders(tmp_path / "part")[0])]
    assert last[0] == last[1]
    for name in (disk.OPTIMIZER, disk.WEIGHTS, disk.EXTRA, "adapter_model.safetensors"):
        a, b = (tmp_path / run / last[0] / name for run in ("whole", "part"))
        assert a.read_bytes() == b.read_bytes(), name


STATEFUL = [name for name in first_of_each_class() if EVERY_LOSS[name].stateful]


@pytest.mark.parametrize("name", quick(EVERY_LOSS, "dpo", *STATEFUL))
def test_every_loss_resumes_to_the_same_bytes(llama, tmp_path, name):
    settings = {"max_steps": 4, "save_steps": 2}
    draws = np.random.default_rng(1).normal(size=(3, 16))
    columns = dict(zip(("chosen_score", "rejected_score", "reward_margin"), draws.tolist(), strict=True))
    if name == "odpo":  # which refuses a pair that the margin contradicts
        columns["reward_margin"] = np.abs(draws[2]).tolist()
    settings["data"] = pairs(**columns)
    whole = build(llama, tmp_path / "whole", EVERY_LOSS[name], **settings)
    whole.train()
    middle = next(p for p in disk.folders(tmp_path / "whole") if p.name == "checkpoint-2")
    part = build(llama, tmp_path / "part", EVERY_LOSS[name], **settings)
    part.train(resume_from_checkpoint=str(middle))
    assert_same(whole, part)


def test_full_fine_tuning_and_a_damaged_newest(llama, tmp_path, said):
    whole = build(llama, tmp_path, peft=False)
    whole.train()
    path = tmp_path / "checkpoint-6" / disk.OPTIMIZER
    path.write_bytes(path.read_bytes()[:-1])
    again = build(llama, tmp_path, peft=False)
    again.train(resume_from_checkpoint=True)
    assert_same(whole, again)
    assert any("checkpoint-6/optimizer.safetensors" in line and "checkpoint-4" in line for line in said)
    assert disk.verify(tmp_path / "checkpoint-6").step == 6, "the damaged one was written again"


def test_a_missing_optimizer_state_is_an_error(llama, tmp_path):
    trainer = build(llama, tmp_path, max_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    (folder / disk.OPTIMIZER).unlink()
    with refused(DataError, "optimizer.safetensors"):
        build(llama, tmp_path, max_steps=2).train(resume_from_checkpoint=str(folder))
    with refused(DataError, tmp_path):
        build(llama, tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    slim = build(llama, tmp_path / "slim", max_steps=2, save_only_model=True)
    slim.train()
    again = build(llama, tmp_path / "slim", max_steps=2)
    with refused(DataError, "checkpoint-2", disk.WEIGHTS):
        again.train(resume_from_checkpoint=str(tmp_path / "slim" / "checkpoint-2"))


def test_another_training_is_refused_by_the_fields_name(llama, tmp_path):
    data = pairs()
    build(llama, tmp_path, data=data, max_steps=2).train()
    folder = str(tmp_path / "checkpoint-2")
    changed = {name: data.remove_columns(name).add_column(name, [0.5] * 16) for name in data.column_names[3:]}
    other = build_tiny("llama", tmp_path / "other", seed=2)
    for field, trainer in {
        ("data",): build(llama, tmp_path, data=pairs(seed=1).remove_columns([*changed]).add_column(
            "ref_chosen_logps", data["ref_chosen_logps"]).add_column(
            "ref_rejected_logps", data["ref_rejected_logps"]).add_column("reward_margin", data["reward_margin"]),
            max_steps=2),
        ("reference",): build(llama, tmp_path, data=changed["ref_chosen_logps"], max_steps=2),
        ("margins",): build(llama, tmp_path, data=changed["reward_margin"], max_steps=2),
        ("configuration.learning_rate", "0.01", "0.02"): build(
            llama, tmp_path, data=data, max_steps=2, learning_rate=0.02
        ),
        ("configuration.max_grad_norm", "3.0"): build(llama, tmp_path, data=data, max_steps=2, max_grad_norm=3.0),
        ("loss.beta", "0.1", "0.3"): build(llama, tmp_path, DPO(beta=0.3), data, max_steps=2),
        ("adapter.default.lora_dropout", "0.1", "0.2"): build(llama, tmp_path, data=data, max_steps=2, dropout=0.2),
        ("model",): build(other, tmp_path, data=data, max_steps=2),
        ("batch", "4", "2"): build(llama, tmp_path, data=data, max_steps=2, per_device_train_batch_size=2),
    }.items():  # fmt: skip
        with refused(DataError, folder, field):
            trainer.train(resume_from_checkpoint=folder)


def test_what_bears_on_no_result_may_change(llama, tmp_path, said):
    data = pairs()
    build(llama, tmp_path, data=data).train()
    again = build(
        llama,
        tmp_path / "elsewhere",
        data=data,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        save_total_limit=1,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 6
    (line,) = (line for line in said if "per_device_train_batch_size" in line)
    names(line, ("per_device_train_batch_size", "4", "2"))


def test_formats_with_pickle_are_refused_unless_allowed(llama, tmp_path, monkeypatch):
    foreign = tmp_path / "checkpoint-2"
    trainer = build(llama, tmp_path / "a")
    foreign.mkdir()
    with refused(DataError, "manifest.json", "allow_pickle=True"):
        trainer.train(resume_from_checkpoint=str(foreign))
    sharded = build(llama, tmp_path / "b")
    sharded.is_fsdp_enabled = True
    with refused(ConfigError, "FSDP", "allow_pickle=True"):
        sharded.train()
    pushing = build(llama, tmp_path / "c")
    pushing.args.push_to_hub = True
    with refused(ConfigError, "training_args.bin", "hub_strategy='end'"):
        pushing.train()
    # The seam: transformers' own files are read where the user asked for it.
    allowed = build(llama, tmp_path / "d", allow_pickle=True, save_strategy="no", max_steps=2)
    seen = []
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda self, folder, model=None: seen.append(folder))
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda self, folder: seen.append(folder))
    allowed.state.train_batch_size = 4
    allowed.state.save_to_json(str(foreign / "trainer_state.json"))
    allowed.train(resume_from_checkpoint=str(foreign))
    assert seen == [str(foreign)] * 2


def test_the_seam_with_transformers_is_where_we_expect_it():
    for name in (
        *("train", "_save", "_save_checkpoint", "_load_from_checkpoint", "_load_optimizer_and_scheduler"),
        *("_load_scaler", "_load_rng_state", "_load_best_model", "get_batch_samples", "_run_epoch"),
        *("_finalize_training", "_get_output_dir", "store_flos", "_push_from_checkpoint"),
    ):
        for trainer in (DPOTrainer, SFTTrainer, RewardTrainer):
            assert callable(getattr(trainer, name)), name


# ---- The stages, killed ----


SHORT = {"epochs": 2}


def dying(kind, root, out, step):
    soak.die_at_step(step)
    soak.train(kind, root, out, SHORT)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """What the stages of ``soak`` read."""
    root = tmp_path_factory.mktemp("stages")
    soak.prepare(root)
    return root


@pytest.mark.parametrize(
    "kind",
    quick(soak.KINDS, "beta_dpo"),
)
def test_a_killed_stage_started_again_leaves_the_same_bytes(forked, stages, tmp_path, kind):
    """Every stage undisturbed; and killed by SIGKILL in the middle, then started again."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    undisturbed = forked(soak.train, kind, stages, whole, SHORT).end()
    assert undisturbed.status == 0, undisturbed.err
    assert forked(dying, kind, stages, again, 6).end().status == -signal.SIGKILL
    left = files_of(again / "checkpoints")
    assert f"checkpoint-4/{disk.MANIFEST}" in left, "there was something to continue from"
    assert all(name.endswith((".safetensors", ".json")) for name in left if not name.startswith("."))
    ended = forked(soak.train, kind, stages, again, SHORT).end()
    assert ended.status == 0, ended.err
    assert files_of(whole) == files_of(again)
    for name in files_of(whole):
        assert (whole / name).read_bytes() == (again / name).read_bytes(), name
    assert not (again / "checkpoints").exists()
    name = {"sft": "SFT", "sft_stopped": "SFT", "reward_model": "Reward model"}.get(kind, kind)
    names(ended.err, (name, "step 4"))
    rows = read(again / "log.jsonl")
    assert not [key for row in rows for key in row if key.endswith(("_runtime", "_per_second"))]


def test_how_often_checkpoints_are_written_is_no_part_of_an_identity():
    settings = {"learning_rate": 1e-3, "epochs": 1, "batch_size": 8}
    often, never = Optimisation(**settings, checkpoint_every=1), Optimisation(**settings, checkpoint_every=0)
    assert often.model_dump(mode="json") == never.model_dump(mode="json")
    assert never.arguments(Path("out"), 0)["save_strategy"] == "no"
