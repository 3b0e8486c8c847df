"""Models, adapters, checkpoints and run folders of others: nothing in them runs code, and nothing leads out of them."""

import ast
import inspect
import json
import os
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedConfig

import madpo
from guarded_cases import build
from madpo import PreferenceConfig, PreferenceTrainer
from madpo.commands.cli import main
from madpo.core.config import load_config
from madpo.core.errors import ConfigError, DataError
from madpo.data import load_preferences
from madpo.models.load import LoRA, load_classifier, load_model, load_tokenizer, resolve_model
from madpo.models.untrusted import check_config, check_model
from madpo.models.weights import pretrained
from madpo.operations import TrainSettings, load_scorer
from madpo.rewards.reward_model import RewardModel
from madpo.runner.record import load_record, run_status
from madpo.training import checkpoints as disk
from practice_cases import text_pairs, write
from refusals import refused

pytestmark = pytest.mark.usefixtures("own_cache")


class Opens:
    """Unpickled, it writes a file, in the place of any code."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.system, (f"echo ran > {self.marker}",))


@pytest.fixture
def marker(tmp_path):
    """A file that only code of the attacker would write."""
    path = tmp_path / "it_ran"
    yield path
    assert not path.exists(), "code of a folder was run"


@pytest.fixture
def folder(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl"])
def test_a_model_of_pickles_is_refused_and_not_read(folder, marker, tmp_path, capsys, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Opens(marker)))
    for load in (
        load_model,
        load_classifier,
        load_scorer,
        lambda place: resolve_model(str(place)),
        lambda place: PreferenceTrainer(str(place), args=PreferenceConfig(output_dir=str(tmp_path / "out"))),
    ):
        with refused(ConfigError, name, "pickle"):
            load(folder)
    data = write(tmp_path / "pairs.jsonl", text_pairs(8))
    command = ["train", str(data), "--model_name_or_path", str(folder), "--loss", "dpo", "--output_dir"]
    assert main([*command, str(tmp_path / "P")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("madpo: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "P").exists()


def test_a_pickle_next_to_safetensors_is_never_read(folder, marker):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Opens(marker)))
    assert load_model(folder).config.model_type == "llama"


@pytest.fixture
def adapter(llama, tmp_path):
    base = load_model(llama, dtype=torch.float32)
    model = get_peft_model(base, LoRA(rank=2).peft_config("CAUSAL_LM", base))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapters_of_pickles_are_refused(llama, adapter, tmp_path, marker):
    assert load_model(llama, adapter=adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Opens(marker)))
    for load in (load_model, load_classifier):
        with refused(ConfigError, "adapter_model.bin", "pickle"):
            load(llama, adapter=adapter)
    (tmp_path / "R").mkdir()
    shutil.move(adapter, tmp_path / "R" / "adapter")
    (tmp_path / "R" / "reward_model.json").write_text(json.dumps({"base": str(llama)}))
    with refused(ConfigError, "adapter_model.bin", "pickle"):
        RewardModel.load(tmp_path / "R")


@pytest.mark.parametrize("known", [True, False])
def test_auto_map_is_never_followed(folder, marker, known):
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n")
    classes = dict.fromkeys(("AutoModelForCausalLM", "AutoModelForSequenceClassification"), "modeling_evil.M")
    classes["AutoConfig"] = "configuration_evil.C"
    edit(folder / "config.json", auto_map=classes, **({} if known else {"model_type": "evil"}))
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", None]})
    if known:  # the library's own class is there
        load_model(folder)
        load_classifier(folder, num_labels=1, new_head=True)
        load_tokenizer(folder)
        return
    with refused(ConfigError, folder, "Python"):
        load_model(folder)
    data = write(folder.parent / "pairs.jsonl", text_pairs(8))
    command = ["train", str(data), "--model_name_or_path", str(folder), "--loss", "dpo"]
    command += ["--output_dir", str(folder.parent / "P")]
    assert main(command) == 2
    assert main([*command, "--args.trust_remote_code", "true"]) == 2


KERNELS = [
    {"_attn_implementation_internal": "evil/kernel"},  # CVE-2026-4372
    {"_attn_implementation": "evil/kernel:attention"},
    {"attn_implementation": "evil/kernel"},
    {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}},
    {"attn_implementation": "flash_attention_2"},  # fetched where it is not installed
    {"text_config": {"_attn_implementation_internal": "evil/kernel"}},
    {"deep": [{"er": {"experts_implementation": "evil/kernel"}}]},
]


@pytest.mark.parametrize("fields", KERNELS, ids=lambda fields: next(iter(fields)))
def test_fields_that_fetch_kernels_are_refused(folder, fields, monkeypatch):
    edit(folder / "config.json", **fields)
    for load in (load_model, load_classifier, lambda place: resolve_model(str(place))):
        with refused(ConfigError, folder, "code", "hub"):
            load(folder)
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", classmethod(lambda cls, name, **k: (config, {})))
    monkeypatch.setattr("transformers.utils.cached_file", lambda *a, **k: None)
    for load in (load_model, load_classifier):
        with refused(ConfigError, "evil-org/model", "code", "hub"):
            load("evil-org/model")


def test_implementations_inside_the_library_pass(folder):
    edit(folder / "config.json", attn_implementation="eager", experts_implementation=None)
    assert load_model(folder).config._attn_implementation == "eager"
    check_config({"attn_implementation": {"": "sdpa", "vision": None}, "y": [[1, {"z": "a/b"}]]}, "x")


ADAPTER_FIELDS = [
    ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, ("megatron_config", "megatron_core")),
    ({"tokenizer_kwargs": {"trust_remote_code": True}}, ("trust_remote_code", "True")),
]


@pytest.mark.parametrize(("fields", "named"), ADAPTER_FIELDS)
def test_fields_of_an_adapter_that_import_code_are_refused(llama, folder, adapter, fields, named):
    edit(adapter / "adapter_config.json", **fields)
    with refused(ConfigError, adapter / "adapter_config.json", named):
        load_model(llama, adapter=adapter)
    shutil.copy(adapter / "adapter_config.json", folder)
    with refused(ConfigError, folder, "adapter"):
        load_model(folder)


def test_paths_stay_inside(folder, llama):
    with refused(ConfigError, f"'../../../{llama}'"):
        resolve_model(f"tiny-../../../{llama}")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(ConfigError, "secret.safetensors", "outside"):
        check_model(folder)


@pytest.fixture
def saved(tmp_path):
    """A data set with pictures, one of them in a list, that a row names by paths: to save them is to embed them."""
    one, two = ({"bytes": None, "path": place} for place in ("/nowhere/a.png", "http://127.0.0.1:9/b.png"))
    data = datasets.Dataset.from_list([{**row, "picture": one, "more": [two]} for row in text_pairs(3)])
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    columns = {"picture": stored, "more": datasets.List(stored)}
    data.cast(datasets.Features({**data.features, **columns})).save_to_disk(tmp_path / "saved")
    media = {"picture": datasets.Image(), "more": datasets.List(datasets.Image())}
    edit(tmp_path / "saved" / "dataset_info.json", features=datasets.Features({**data.features, **media}).to_dict())
    return tmp_path / "saved"


def test_no_row_of_a_saved_data_set_makes_a_library_open_a_file(saved, monkeypatch):
    expected = [(row["prompt"], row["chosen"]) for row in text_pairs(3)]
    assert [(row["prompt"], row["chosen"]) for row in load_preferences(saved)] == expected
    streamed = datasets.load_from_disk(str(saved)).to_iterable_dataset()
    with pytest.raises((OSError, ImportError)):
        next(iter(streamed))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: streamed)
    assert [(row["prompt"], row["chosen"]) for row in load_preferences("some/data")] == expected


@pytest.mark.parametrize("how", ["above", "absolute", "link", "null"])
def test_a_saved_data_set_names_no_file_outside_its_folder(saved, tmp_path, how):
    (file,) = saved.glob("*.arrow")
    shutil.move(file, tmp_path / "secret.arrow")
    name = {"above": "../secret.arrow", "absolute": f"{tmp_path}/secret.arrow", "link": file.name, "null": "a\0b"}[how]
    if how == "link":
        file.symlink_to(tmp_path / "secret.arrow")
    edit(saved / "state.json", _data_files=[{"filename": name}])
    with refused(DataError, saved, "state.json", "outside"):
        load_preferences(saved)


@pytest.mark.parametrize("offset", [-5, 2**30, 2**31 - 1])
def test_an_offset_that_leads_out_of_a_saved_data_set_is_one_sentence(tmp_path, offset):
    """Unchecked it is an error of the interpreter, or the end of the process."""
    datasets.Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": side} for side in "rs"]).save_to_disk(
        tmp_path
    )
    (file,) = tmp_path.glob("*.arrow")
    good, bad = (np.array([0, middle, 2], dtype="<i4").tobytes() for middle in (1, offset))
    assert good in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(good, bad))
    with refused(DataError, tmp_path):
        load_preferences(tmp_path)


@pytest.mark.parametrize("files", [None, [], 3, [3], [{}], [{"filename": None}]])
def test_a_saved_data_set_without_files_is_one_sentence(saved, files):
    edit(saved / "state.json", _data_files=files)
    with refused(DataError, saved, "state.json"):
        load_preferences(saved)


LOSS = "from madpo.losses import DPO\nclass Mine(DPO):\n    kind: str = 'mine'\n"


def test_a_custom_loss_lies_next_to_its_toml_or_where_the_user_is(tmp_path, monkeypatch, marker):
    for place in ("away", "here"):
        (tmp_path / place).mkdir()
    (tmp_path / "away" / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "link.py").symlink_to(tmp_path / "away" / "evil.py")
    toml = tmp_path / "here" / "mine.toml"
    for target in ("../away/evil.py:Mine", f"{tmp_path}/away/evil.py:Mine", "link.py:Mine"):
        toml.write_text(f'model = "m"\nloss = {{ kind = "custom", target = "{target}" }}\n')
        with refused(ConfigError, ("target", f"'{target}'"), "--set loss.target"):
            load_config(toml, TrainSettings)
    (tmp_path / "here" / "good.py").write_text(LOSS)
    toml.write_text('model = "m"\nloss = { kind = "custom", target = "good.py:Mine" }\n')
    assert load_config(toml, TrainSettings).loss.kind == "custom"
    (tmp_path / "away" / "good.py").write_text(LOSS)  # what the user types is the user's
    toml.write_text('model = "m"\n')
    typed = ["loss.kind=custom", f"loss.target={tmp_path}/away/good.py:Mine"]
    assert load_config(toml, TrainSettings, typed).loss.kind == "custom"


RECORD = {"name": "policy/high", "identity": "a" * 64, "operation": "f/1", "threads": 1}
RECORD |= {name: {} for name in ("config", "inputs", "metrics", "libraries", "provenance")}


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a/../../b", "a//b", ".", "a/./b", "a b", "", "a\n"])
def test_a_record_names_nothing_outside_its_run(tmp_path, name):
    (tmp_path / "record.json").write_text(json.dumps(RECORD))
    assert load_record(tmp_path).name == "policy/high"
    (tmp_path / "record.json").write_text(json.dumps(RECORD | {"name": name}))
    assert load_record(tmp_path) is None
    listing = {"about": {}, "steps": {"a": {"folder": name, "identity": "a" * 64}}}
    (tmp_path / "run.json").write_text(json.dumps(listing))
    with refused(ConfigError, "run.json"):
        run_status(tmp_path)
    assert main(["report", str(tmp_path)]) == main(["status", str(tmp_path)]) == 2


@pytest.fixture(scope="module")
def finished(llama, module_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    build(llama, out, max_steps=2, save_steps=2).train()
    return out / "checkpoint-2"


@pytest.fixture
def trained(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run" / finished.name)


def resealed(folder, name, content):
    """The checkpoint with another file in it, and a manifest that fits."""
    manifest = json.loads((folder / disk.MANIFEST).read_text())
    (folder / name).write_bytes(content)
    (folder / disk.MANIFEST).unlink()
    disk._seal(folder, manifest["step"], manifest["identity"])


def resume(llama, trained):
    return build(llama, trained.parent, max_steps=2, save_steps=2).train(resume_from_checkpoint=str(trained))


def test_a_pickle_or_a_link_in_a_checkpoint_is_refused(llama, trained, tmp_path, marker):
    resealed(trained, "optimizer.pt", pickle.dumps(Opens(marker)))
    with refused(DataError, "optimizer.pt", "pickle"):
        resume(llama, trained)
    (trained / "optimizer.pt").unlink()
    resealed(trained, disk.EXTRA, (trained / disk.EXTRA).read_bytes())
    shutil.move(trained / disk.WEIGHTS, tmp_path / "elsewhere")
    (trained / disk.WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with refused(DataError, trained / disk.WEIGHTS):
        resume(llama, trained)


HOSTILE = [b"", b"\x00", b"[]", b"{}", b"null", b'{"optimizer": 3}', b"[" * 100_000, b'{"global_step": 10}']


@pytest.mark.parametrize("name", sorted(disk._NEEDED))
def test_contents_that_madpo_does_not_write_end_in_a_sentence(llama, trained, name):
    whole, contents = (trained / name).read_bytes(), list(HOSTILE)
    if name == disk.TRAINING:
        kept = json.loads(whole)
        for gone in ("processes", "extra", "optimizer"):
            contents.append(json.dumps({k: v for k, v in kept.items() if k != gone}).encode())
        contents += [json.dumps(kept | {key: "x"}).encode() for key in ("optimizer", "scheduler", "processes")]
    trainer = build(llama, trained.parent, max_steps=2, save_steps=2)
    for content in contents:
        resealed(trained, name, content)
        with pytest.raises(DataError) as error:
            trainer.train(resume_from_checkpoint=str(trained))
        assert "\n" not in str(error.value)
        assert str(trained) in str(error.value)


def test_the_best_checkpoint_lies_in_the_trainings_own_folder(llama, trained, tmp_path, marker):
    """The path is in trainer_state.json; following it would unpickle what lies there."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "adapter_model.bin").write_bytes(pickle.dumps(Opens(marker)))
    state = json.loads((trained / disk.TRAINER_STATE).read_text())
    resealed(trained, disk.TRAINER_STATE, json.dumps(state | {"best_model_checkpoint": str(evil)}).encode())
    trainer = build(llama, trained.parent, max_steps=2, save_steps=2)
    trainer.args.load_best_model_at_end = True
    with refused(DataError, evil, trained.parent):
        trainer.train(resume_from_checkpoint=str(trained))


SOURCE = Path(madpo.__file__).parent
WEIGHTS = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")


def test_every_loader_of_the_hub_is_told_to_run_no_code_and_to_read_no_pickle():
    """No remote code, weights from safetensors or a verified GGUF; the rest behind one check each."""
    elsewhere = {
        ("adapted", "load_adapter", "weights.py:with_adapter"),  # after check_adapter
        ("datasets.Dataset", "load_from_disk", "sources.py:_saved"),  # after refuse_files_outside
        ("datasets", "load_dataset", "sources.py:_hub"),  # this version runs no script of a data set
        ("", "load_dataset", "corpus.py:read"),
    }
    # Where a user of the trainer may ask for more, by model_init_kwargs.
    asked_for = {("weights.py", "pretrained"), ("weights.py", "from_pretrained"), ("preference.py", "_processor")}
    calls, others = 0, set()
    for path in sorted(SOURCE.rglob("*.py")):
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
                owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
                name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
                if name not in LOADERS:
                    continue
                if owner in {"PeftConfig", "GenerationConfig"}:  # JSON, no weights and no code
                    continue
                if name != "from_pretrained":
                    others.add((owner, name, f"{path.name}:{function.name}"))
                    continue
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                place = f"{path.name}:{call.lineno}"
                if (path.name, function.name) in asked_for:
                    continue
                assert given.get("trust_remote_code") == "False", place
                if owner in WEIGHTS:
                    verified = path.name == "packaged.py" and "gguf_file" in given
                    assert verified or given.get("use_safetensors") == "True", place
                calls += 1
    assert calls >= 5
    safe = {name: p.default for name, p in inspect.signature(pretrained).parameters.items()}
    assert (safe["use_safetensors"], safe["trust_remote_code"]) == (True, False)
    assert others == elsewhere


LOADERS = ("from_pretrained", "load_adapter", "load_dataset", "load_from_disk", "pipeline")
