"""What is opened is decided by the names that the libraries open, and a folder does not decide what is fetched."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from peft import PeftType, get_peft_model
from safetensors.torch import load_file

from madpo.commands.cli import main
from madpo.core.errors import ConfigError
from madpo.models.load import LoRA, load_model
from madpo.models.untrusted import ADAPTER_WEIGHTS, MODEL_WEIGHTS, check_model
from madpo.operations import load_scorer
from madpo.operations.evaluation import find_policy
from madpo.operations.pair_scorer import load_pair_encoder
from practice_cases import text_pairs, write
from quick import quick
from refusals import names, refused

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """No pickle is read in this module, not even with ``weights_only``."""
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail(f"torch.load was called with {a[:1]}"))


@pytest.fixture
def folder(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture
def adapter(llama, tmp_path):
    model = load_model(llama, dtype=torch.float32)
    get_peft_model(model, LoRA(rank=2).peft_config("CAUSAL_LM", model)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def pickled(safetensors, name):
    """The tensors of a file as a pickle next to it."""
    torch.save(load_file(safetensors), safetensors.with_name(name))


NEARLY = ["model.safetensors.bak", "model-00001-of-00002.safetensors", "model.safetensors.tmp", "models.safetensors"]


@pytest.mark.parametrize("name", [*NEARLY, "adapter_model.safetensors"])
def test_a_file_that_nobody_opens_excuses_no_pickle(folder, name):
    pickled(folder / "model.safetensors", "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / name)
    with refused(ConfigError, "pytorch_model.bin"):
        load_model(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors", "adapter_model.pt", "../m.bin", 3, ["a"]])
def test_a_configuration_names_no_pickle(folder, name):
    """transformers reads the file that ``transformers_weights`` names, though model.safetensors is next to it."""
    pickled(folder / "model.safetensors", "adapter_model.bin")
    edit(folder / "config.json", transformers_weights=name)
    with pytest.raises(ConfigError):
        load_model(folder)
    if name != "other.safetensors":
        with refused(ConfigError, "config.json", "transformers_weights"):
            check_model(folder)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("shard", ["model-1.bin", "model-1.safetensors.bin", "../m.safetensors", 3])
def test_an_index_names_no_pickle_and_nothing_outside(folder, shard, explicit):
    index = folder / ("other.safetensors.index.json" if explicit else MODEL_WEIGHTS[1])
    weights = load_file(folder / "model.safetensors")
    if isinstance(shard, str):
        torch.save(weights, folder / shard)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}))
    if explicit:
        edit(folder / "config.json", transformers_weights=index.name)
    else:
        (folder / "model.safetensors").unlink()
    with refused(ConfigError, index.name, repr(shard)):
        load_model(folder)


def test_the_index_of_a_model_of_the_hub_is_held_to_the_same(folder, monkeypatch):
    (folder / MODEL_WEIGHTS[1]).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "m.bin"}}))

    def cached(name, path, **settings):
        return str(folder / path) if (folder / path).is_file() else None

    monkeypatch.setattr("transformers.utils.cached_file", cached)
    monkeypatch.setattr("transformers.utils.hub.cached_file", cached)
    monkeypatch.setattr("transformers.configuration_utils.cached_file", cached)
    with refused(ConfigError, "some/model", "'m.bin'"):
        check_model("some/model")


@pytest.mark.parametrize("name", ["adapter_model.safetensors.bak", "adapter_model-1.safetensors", "model.safetensors"])
def test_an_adapter_has_the_one_name_that_peft_opens(llama, adapter, tmp_path, name, capsys):
    pickled(adapter / ADAPTER_WEIGHTS, "adapter_model.bin")
    (adapter / ADAPTER_WEIGHTS).rename(adapter / name)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(llama))
    reward = tmp_path / "reward"
    shutil.copytree(adapter, reward / "adapter")
    (reward / "reward_model.json").write_text(json.dumps({"base": str(llama)}))
    for load in (lambda: load_model(llama, adapter=adapter), lambda: load_scorer(reward)):
        with refused(ConfigError, "adapter_model.bin", "pickle"):
            load()
    data = str(write(tmp_path / "pairs.jsonl", text_pairs(8)))
    assert main(["score", data, "--reward_model", str(reward), "--output_dir", str(tmp_path / "out")]) == 2
    names(capsys.readouterr().err, reward / "adapter", "adapter_model.bin", "pickle")
    (adapter / "adapter_model.bin").unlink()
    with refused(ConfigError, "adapter_model.safetensors"):
        load_model(llama, adapter=adapter)


def test_a_link_to_nowhere_is_no_adapter(llama, adapter):
    """PEFT takes it for absent, and looks for the pickle."""
    pickled(adapter / ADAPTER_WEIGHTS, "adapter_model.bin")
    (adapter / ADAPTER_WEIGHTS).unlink()
    (adapter / ADAPTER_WEIGHTS).symlink_to(adapter / "nowhere")
    with refused(ConfigError, "adapter_model.bin", "pickle"):
        load_model(llama, adapter=adapter)


# Fields by which one or another kind of adapter names files, models and tokenizers.
NAMES = {
    "adapters": {"a": "evil/adapter"},
    "shadow_model": "evil/model",
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": "x",
    "tokenizer_name_or_path": "evil/model",
    "prompt_tuning_init_state_dict_path": "evil.bin",
    "corda_config": {"cache_file": "evil.bin", "covariance_file": "evil.bin"},
    "num_virtual_tokens": 2,
}


@pytest.mark.parametrize("kind", quick([kind.value for kind in PeftType], "LORA", "PROMPT_TUNING", "XLORA", "CPT"))
def test_no_kind_of_adapter_opens_more_than_its_own_folder(folder, adapter, monkeypatch, kind):
    """Of every kind that this PEFT has: the weights do not fit most of them, and none reaches out for others."""
    from transformers.utils import hub as transformers_hub

    files = transformers_hub.cached_files

    def cached(path_or_repo_id, *a, **k):
        if str(path_or_repo_id).startswith("evil"):
            pytest.fail(f"{kind} opens {path_or_repo_id}")
        return files(path_or_repo_id, *a, **k)

    def fetched(*a, **k):
        pytest.fail(f"{kind} fetches {a}")

    monkeypatch.setattr(transformers_hub, "cached_files", cached)
    for place in ("peft.config", "peft.utils.save_and_load", "transformers.utils.hub"):
        monkeypatch.setattr(f"{place}.hf_hub_download", fetched)
    edit(folder / "config.json", use_cache=False)  # which one kind asks for
    settings = {"peft_type": kind, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "inference_mode": False}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | NAMES))
    with refused(ConfigError, adapter):  # its tensors are LoRA's, of another rank
        load_model(folder, adapter=adapter, dtype=torch.float32)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub where every request is a failure, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: pytest.fail(f"{a[0]} was looked up"))


def test_a_base_that_only_a_folder_names_is_not_fetched(llama, adapter, hub, tmp_path):
    edit(adapter / "adapter_config.json", base_model_name_or_path="evil-org/model")
    for policy in (adapter, adapter.parent):
        with refused(ConfigError, "'evil-org/model'", "hf download evil-org/model"):
            find_policy(policy, None)
        with refused(ConfigError, "'evil-org/model'"):
            find_policy(policy, str(llama))  # the reference is another one
        assert find_policy(policy, "evil-org/model").base == "evil-org/model"
    (tmp_path / "config.toml").write_text('model = "evil-org/other"\n')
    with refused(ConfigError, "'evil-org/other'"):
        find_policy(tmp_path, None)
    full = tmp_path / "full"
    shutil.copytree(llama, full / "model")
    (full / "config.toml").write_text('model = "evil-org/other"\n')
    with refused(ConfigError, "'evil-org/other'"):
        find_policy(full, None)
    assert find_policy(full, str(llama)).reference == str(llama)
    reward = tmp_path / "reward"
    shutil.copytree(adapter, reward / "adapter")
    (reward / "reward_model.json").write_text(json.dumps({"base": "evil-org/model"}))
    for load in (load_scorer, load_pair_encoder):
        with refused(ConfigError, "'evil-org/model'"):
            load(reward)


def test_a_base_that_was_fetched_before_is_used(llama, adapter, hub, tmp_path):
    commit = "a" * 40
    kept = tmp_path / "hub" / "models--some-org--model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    shutil.copytree(llama, kept / "snapshots" / commit)
    edit(adapter / "adapter_config.json", base_model_name_or_path="some-org/model")
    assert find_policy(adapter, None).base == "some-org/model"


def test_the_names_are_those_of_the_libraries():
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    assert MODEL_WEIGHTS == (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    assert ADAPTER_WEIGHTS == SAFETENSORS_WEIGHTS_NAME
