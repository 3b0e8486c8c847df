"""Fuzzers for our own readers: configurations, runs, checkpoints, folders of commands, data, packaged models."""

import hashlib
import json
import tomllib

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzz_cases import as_toml, damaged, fresh, fuzzed, mutated, survives, values
from madpo.core.config import find_experiment, load_config
from madpo.data import check, load_preferences
from madpo.data.margins import read_margins
from madpo.models import packaged as packages
from madpo.models.packaged import PACKAGED, PackagedModel, packaged
from madpo.models.untrusted import check_adapter, check_model
from madpo.operations import EvaluateSettings, RewardSettings, ScoreSettings, TrainSettings
from madpo.operations.evaluation import find_policy
from madpo.operations.inputs import read_prompts
from madpo.report import rebuild_report
from madpo.rewards.oracles import load_oracle
from madpo.runner.folder import prepare
from madpo.runner.record import Record, load_record, run_status
from madpo.runner.run import ordered
from madpo.study.experiment import Experiment
from madpo.training import checkpoints as disk
from madpo.training.digests import check_identity
from madpo.training.states import check_groups, pack, unpack
from practice_cases import everything, write

EXPERIMENT = tomllib.loads(find_experiment("smoke").read_text(encoding="utf-8"))
COMMANDS = {
    RewardSettings: {"model": "m", "optimisation": {"batch_size": 8}, "lora": {"rank": 4}, "seed": 3},
    ScoreSettings: {"reward_model": "r", "format": "parquet", "batch_size": 4},
    TrainSettings: {"model": "m", "loss": {"kind": "madpo", "tau": 3.0}, "args": {"learning_rate": 1e-3, "seed": 1}},
    EvaluateSettings: {"reward_model": "r", "max_prompts": 3, "temperature": 0.7},
}


@fuzzed(share=2)
@given(tree=mutated(EXPERIMENT))
def test_any_experiment(tree, tmp_path):
    (tmp_path / "e.toml").write_bytes(as_toml(tree))

    def read():
        return [step.identity for step in ordered(load_config(tmp_path / "e.toml", Experiment).steps())]

    survives("experiment", read, tmp_path)


@fuzzed(share=2)
@given(content=st.binary(max_size=200) | damaged(find_experiment("smoke").read_bytes()))
def test_any_bytes_as_an_experiment(content, tmp_path):
    (tmp_path / "e.toml").write_bytes(content)
    survives("experiment", lambda: load_config(tmp_path / "e.toml", Experiment), tmp_path)


@fuzzed(share=2)
@given(data=st.data())
def test_any_settings_of_a_command(data, tmp_path):
    model = data.draw(st.sampled_from(sorted(COMMANDS, key=lambda kind: kind.__name__)))
    (tmp_path / "c.toml").write_bytes(as_toml(data.draw(mutated(COMMANDS[model]))))
    words = ["loss.tau=1", "args.seed=x", "a.b.c=1", "lora=3", "model.x=1", "loss.kind=custom"]
    typed = data.draw(st.lists(st.text(max_size=20) | st.sampled_from(words), max_size=2))
    survives("settings of a command", lambda: load_config(tmp_path / "c.toml", model, typed), tmp_path)


def run_folder(root):
    """A finished run, as the pipeline leaves it."""
    steps = {}
    for name, config in (
        ("policy/high/madpo/seed0", {"method": "MADPO", "loss": {"kind": "madpo", "tau": 7.0, "c_max": 4.0}}),
        ("evaluation/high/madpo/seed0", {"method": "MADPO"}),
        ("evaluation/sft", {}),
        ("margins/high", {}),
    ):
        identity = hashlib.sha256(name.encode()).hexdigest()
        folder = root / f"{name}-{identity[:8]}"
        folder.mkdir(parents=True)
        record = Record(
            name=name,
            identity=identity,
            operation="f/1",
            config=config,
            inputs={},
            metrics={"oracle_reward": {"mean": 1.0, "low": 0.5, "high": 1.5, "n": 3}, "distinct_2": 0.5, "steps": 3},
            libraries={"torch": "2"},
            threads=1,
            provenance={"seconds": 3.5, "host": "h", "started": "t", "madpo": "0", "argv": ["madpo"]},
        )
        (folder / "record.json").write_text(record.model_dump_json())
        row = {"prompt": "p", "response": "r", "kl": 1.0, "tokens": 4, "ended": True}
        rows = [row | {"prompt_id": i, "oracle_reward": 0.5 * i} for i in range(3)]
        write(folder / "samples.jsonl", rows)
        (folder / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 0.7, "rewards/margins": 0.1}) + "\n")
        if name.startswith("margins"):
            table = pd.DataFrame({"pair_id": [1, 2, 3], "reward_margin": [0.5, -1.0, 2.0]})
            table.to_parquet(folder / "margins.parquet")
        steps[name] = {"folder": folder.relative_to(root).as_posix(), "identity": identity}
    about = {"title": "t", "experiment": {"title": "t"}}
    (root / "run.json").write_text(json.dumps({"about": about, "steps": steps}))


@fuzzed(share=0.5)
@given(data=st.data())
def test_any_file_of_a_run(data, tmp_path):
    root = fresh(tmp_path, "run")
    run_folder(root)
    victim = data.draw(st.sampled_from(sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())))
    path = root / victim
    whole = path.read_bytes()
    if path.suffix == ".jsonl" and data.draw(st.booleans()):
        changed = data.draw(mutated([json.loads(line) for line in whole.splitlines()]))
        content = "\n".join(json.dumps(line) for line in (changed if isinstance(changed, list) else [changed])).encode()
    elif path.suffix == ".json" and data.draw(st.booleans()):
        content = json.dumps(data.draw(mutated(json.loads(whole)))).encode()
    else:
        content = data.draw(damaged(whole) | st.binary(max_size=60))
    path.write_bytes(content)
    outside = {n: c for n, c in everything(tmp_path).items() if not n.startswith(str(root))}
    survives("run.json", lambda: run_status(root), tmp_path)
    survives("record.json", lambda: load_record(path.parent), tmp_path)
    survives("report of a run", lambda: rebuild_report(root, figures=False), tmp_path, writes=True)
    assert {n: c for n, c in everything(tmp_path).items() if not n.startswith(str(root))} == outside
    assert not list(root.rglob("*.tmp"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    with disk.writing(root, 7, {"data": "a", "batch": 4}) as part:
        for name in (disk.WEIGHTS, disk.OPTIMIZER, disk.EXTRA):
            disk.save_tensors({"0.exp_avg": torch.ones(3)}, part / name)
        for name in (disk.TRAINING, disk.TRAINER_STATE):
            disk.save_json({"step": 7, "processes": [{}]}, part / name)
    return root / "checkpoint-7"


@fuzzed(share=3)
@given(data=st.data())
def test_any_checkpoint(data, checkpoint, tmp_path):
    root = fresh(tmp_path, "run")
    folder = root / "checkpoint-7"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((folder / disk.MANIFEST).read_bytes())
    if data.draw(st.booleans()):
        text = json.dumps(data.draw(mutated(manifest))).encode()
        (folder / disk.MANIFEST).write_bytes(text if data.draw(st.booleans()) else data.draw(damaged(text)))
    else:  # another content, and a manifest that fits
        name = data.draw(st.sampled_from(sorted(disk._NEEDED)))
        content = data.draw(st.binary(max_size=50) | damaged((folder / name).read_bytes()))
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (folder / disk.MANIFEST).write_text(json.dumps(manifest))
    found = survives("checkpoint", lambda: disk.verify(folder), tmp_path)
    survives("checkpoint", lambda: disk.newest(root), tmp_path)
    if isinstance(found, disk.Checkpoint):
        for name in (disk.WEIGHTS, disk.OPTIMIZER, disk.EXTRA):
            survives("checkpoint", lambda name=name: found.tensors(name), tmp_path)
        for name in (disk.TRAINING, disk.TRAINER_STATE):
            survives("checkpoint", lambda name=name: found.json(name), tmp_path)
        survives("checkpoint", lambda: check_identity(found, {"data": "a"}), tmp_path)


OPTIMIZER = {
    "state": {0: {"step": 3, "exp_avg": torch.ones(2), "nested": {"qmap": torch.zeros(3)}}},
    "param_groups": [{"params": [0], "lr": 0.1, "betas": (0.9, 0.99)}],
}


@fuzzed(share=2)
@given(data=st.data())
def test_any_optimizer_state(data, tmp_path):
    live = [{"params": [torch.ones(2)], "lr": 0.1, "betas": (0.9, 0.99)}]
    tensors, whole = pack(OPTIMIZER, "optimizer")
    kept = data.draw(st.one_of(mutated(whole), values))

    def read():
        with disk.reading(tmp_path):
            check_groups(unpack(kept, tensors), live)

    survives("checkpoint", read, tmp_path)


FOLDER = {
    "config.toml": {"model": "m"},
    "adapter/adapter_config.json": {"base_model_name_or_path": "m", "peft_type": "LORA"},
    "config.json": {"model_type": "llama", "attn_implementation": "sdpa", "text_config": {"a": [1]}},
    "model.safetensors.index.json": {"weight_map": {"a": "m-1.safetensors"}},
}


@fuzzed(share=2)
@given(data=st.data())
def test_any_folder_of_a_model_or_policy(data, tmp_path):
    folder = fresh(tmp_path, "folder")
    for name, tree in FOLDER.items():
        (folder / name).parent.mkdir(exist_ok=True)
        changed = data.draw(st.one_of(st.just(tree), mutated(tree)))
        raw = as_toml(changed) if name.endswith(".toml") else json.dumps(changed).encode()
        (folder / name).write_bytes(raw if data.draw(st.booleans()) else data.draw(damaged(raw)))
    survives("model folder", lambda: check_model(folder), tmp_path)
    survives("adapter folder", lambda: check_adapter(folder / "adapter"), tmp_path)
    survives("policy folder", lambda: find_policy(folder, None), tmp_path)


def as_bytes(tree):
    return mutated(tree).map(lambda value: json.dumps(value).encode())


@fuzzed(share=2)
@given(content=st.binary(max_size=80) | as_bytes({"data": "d", "pairs": 3, "folds": None}))
def test_any_notes_of_an_interrupted_command(content, tmp_path):
    for name in ("begun.json", "record.json"):
        folder = fresh(tmp_path, "folder")
        (folder / "unfinished" / "checkpoints").mkdir(parents=True)
        (folder / "unfinished" / "checkpoints" / "part").write_text("")
        (folder / "unfinished" / "begun.json").write_bytes(b"{}")
        (folder / "unfinished" / name).write_bytes(content)
        survives("interrupted command", lambda folder=folder: prepare(folder, {"config": {"pairs": 3}}), tmp_path)


@fuzzed(share=2)
@given(content=st.binary(max_size=80) | as_bytes({"kind": "ngram", "scores": "completion"}))
def test_any_oracle(content, tmp_path):
    folder = fresh(tmp_path, "folder")
    (folder / "oracle.json").write_bytes(content)
    (folder / "vocabulary.json").write_bytes(content[::-1])
    (folder / "oracle.safetensors").write_bytes(content)
    survives("oracle", lambda: load_oracle(folder), tmp_path)


ROW = {"prompt": "p", "chosen": "c", "rejected": "r", "reward_margin": 0.5, "weight": 1.0, "pair_id": 3}


@fuzzed(share=3)
@given(data=st.data())
def test_any_rows_in_every_format_and_reader(data, tmp_path):
    folder = fresh(tmp_path, "data")
    rows = data.draw(mutated([ROW, ROW | {"prompt": "q"}]))
    text = "\n".join(json.dumps(row) for row in (rows if isinstance(rows, list) else [rows])).encode()
    (folder / "d.jsonl").write_bytes(text if data.draw(st.booleans()) else data.draw(damaged(text)))
    (folder / "d.csv").write_bytes(data.draw(damaged(b"prompt,chosen,rejected,reward_margin\np,c,r,1\n")))
    pq.write_table(pa.table({name: [value, value] for name, value in ROW.items()}), folder / "d.parquet")
    (folder / "d.parquet").write_bytes(data.draw(damaged((folder / "d.parquet").read_bytes())))
    for name in ("d.jsonl", "d.csv", "d.parquet"):
        for read in (load_preferences, check, read_margins, read_prompts):
            survives(f"data {name[1:]}", lambda read=read, name=name: read(folder / name), tmp_path)


@fuzzed(share=2)
@given(data=st.data())
def test_no_byte_of_a_changed_packaged_file_is_parsed(data, tmp_path):
    header = b"GGUF" + bytes([3, 0, 0, 0]) + (1).to_bytes(8, "little") + (2).to_bytes(8, "little") + b"general.name"
    content = data.draw(damaged(header) | st.binary(max_size=80))
    part = fresh(tmp_path, "part") / "model.gguf"
    part.write_bytes(content)
    parsed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MADPO_CACHE", str(fresh(tmp_path, "cache")))
        digest = hashlib.sha256(header).hexdigest()
        patch.setitem(PACKAGED, "fuzzed", PackagedModel((("p", "f"),), digest, "pip", "none", "hub/model", "none"))
        patch.setattr(packages, "_locate", lambda *a: part)
        patch.setattr(packages, "_dequantise", lambda gguf, out: (parsed.append(gguf.read_bytes()), out.mkdir()))
        survives("GGUF", lambda: packaged("fuzzed"), tmp_path, writes=True)
    assert parsed in ([], [header])
    assert not list((tmp_path / "cache").rglob("*.gguf"))
