"""A weight that a file lacks is refused by name, wherever a model or an adapter is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from madpo import DPO, PreferenceConfig, PreferenceTrainer
from madpo.commands.cli import main
from madpo.core.errors import ConfigError
from madpo.models.load import LoRA, load_classifier, load_model
from madpo.operations import load_scorer
from madpo.rewards.classifier import Classifier
from madpo.rewards.oracles import ClassifierOracle
from madpo.rewards.reward_model import RewardModel
from practice_cases import text_pairs, write
from refusals import names, refused

pytestmark = pytest.mark.usefixtures("own_cache")

NORM = "model.layers.1.input_layernorm.weight"
SMALL = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24, "max_position_embeddings": 32, "num_key_value_heads": 1}
EXPERTS = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "gemma2": {"head_dim": 8},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "mamba": {"state_size": 4, "time_step_rank": 2},
}


def rewrite(folder, change):
    """Save a folder's weights again, as ``change`` makes them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def renamed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def folder(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_loads_whole_and_without_any_one_tensor_is_refused(family, tied, tmp_path):
    """transformers' report of missing keys knows tied weights, and weights that it joins on the way."""
    fields = {**SMALL, **FAMILIES[family], "tie_word_embeddings": tied, "pad_token_id": 0}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32)
    made.save_pretrained(tmp_path)
    found = load_model(tmp_path, dtype=torch.float32).state_dict()
    assert found.keys() == made.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in made.state_dict().items())
    tensors = load_file(tmp_path / "model.safetensors")
    for name in list(tensors)[:: max(1, len(tensors) // 8)]:
        save_file(without(name)(tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
        with refused(ConfigError, tmp_path) as error:
            load_model(tmp_path)
        assert "\n" not in str(error.value)
        if family not in ("mixtral", "qwen3_moe", "gpt_neox"):  # whose weights have other names in the model
            assert name in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without(NORM), [("1", "LlamaForCausalLM"), NORM]),
        (renamed("base_model."), [("base_model.model.embed_tokens.weight", "model.embed_tokens.weight")]),
        (renamed("module."), [("module.model.embed_tokens.weight", "model.embed_tokens.weight")]),
        (
            lambda t: {n.replace("q_proj.weight", "q_proj.base_layer.weight"): v for n, v in t.items()},
            ["model.layers.0.self_attn.q_proj.weight", "merge_and_unload"],
        ),
        (lambda t: t | {NORM: torch.ones(7)}, [(NORM, "(7,)"), ("config.json", "(32,)")]),
    ],
)
def test_the_sentence_names_the_weight_and_what_is_there_instead(folder, change, named):
    rewrite(folder, change)
    with refused(ConfigError, folder, *named):
        load_model(folder)


def test_a_shard_that_lacks_a_weight_is_refused(llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load_model(tmp_path)
    gone = next(iter(load_file(shards[0])))
    save_file(without(gone)(load_file(shards[0])), shards[0], metadata={"format": "pt"})
    with refused(ConfigError, gone):
        load_model(tmp_path)


def test_a_tensor_with_two_values_in_two_shards_is_refused_by_both_names(llama, tmp_path):
    """Every file of the index is read whole, so the last value would win, whichever file the index names."""
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path, max_shard_size="40KB")
    first, *_, last = sorted(tmp_path.glob("model-*.safetensors"))
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: value.clone()}, last, metadata={"format": "pt"})
    assert torch.equal(load_model(tmp_path, dtype=value.dtype).state_dict()[name], value)  # one value, twice
    save_file(load_file(last) | {name: value + 1}, last, metadata={"format": "pt"})
    with refused(ConfigError, tmp_path, name, (first.name, last.name)):
        load_model(tmp_path)
    save_file(load_file(last) | {name: value[:1].clone()}, last, metadata={"format": "pt"})
    with refused(ConfigError, tmp_path, name):
        load_model(tmp_path)


UNUSED = {
    "layers": lambda folder: edit(folder / "config.json", num_hidden_layers=1),
    "biases": lambda folder: rewrite(folder, lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
    "scales": lambda folder: rewrite(
        folder, lambda t: t | {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}
    ),
}


@pytest.mark.parametrize("what", UNUSED)
def test_tensors_of_the_models_own_modules_that_it_does_not_use_are_said(folder, capsys, what):
    """A configuration of fewer layers, without biases or without quantisation makes another model of the weights."""
    UNUSED[what](folder)
    load_model(folder)
    said = capsys.readouterr().err
    names(said, folder, ("LlamaForCausalLM", "model.layers."))
    load_model(folder)
    assert not capsys.readouterr().err


PROJECTION = "model.layers.0.mlp.up_proj.weight"


def eighth(tensors):
    """The weight in 8 bits with its scale, as ModelOpt and DeepSeek store it."""
    scale = tensors[PROJECTION].abs().max().reshape(1) / 448
    packed = {PROJECTION: (tensors[PROJECTION] / scale).to(torch.float8_e4m3fn), f"{PROJECTION}_scale": scale}
    return tensors | packed


def whole(tensors):
    return tensors | {PROJECTION: (tensors[PROJECTION] * 100).to(torch.int8)}


def bitsandbytes(tensors):
    return whole(tensors) | {PROJECTION.replace("weight", "SCB"): torch.ones(64)}


@pytest.mark.parametrize("packed", [eighth, whole, bitsandbytes])
@pytest.mark.parametrize("method", [None, "modelopt"])
def test_quantised_weights_are_never_read_as_plain_ones(folder, packed, method):
    """transformers skips a method that it does not know, and reads these numbers without their scale."""
    rewrite(folder, packed)
    if method is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    for load in (load_model, lambda place: load_classifier(place, num_labels=1, new_head=True)):
        with refused(ConfigError, folder, method or ".up_proj."):
            load(folder)


def test_a_quantised_copy_next_to_the_model_is_not_its_weights(folder):
    copied = whole(load_file(folder / "model.safetensors"))
    save_file(copied, folder / "model_int8.safetensors", metadata={"format": "pt"})
    assert load_model(folder)


def test_plain_weights_in_eight_bits_are_read(folder):
    """Without a scale they are what they say."""
    rewrite(folder, lambda t: t | {PROJECTION: t[PROJECTION].to(torch.float8_e4m3fn)})
    found = load_model(folder, dtype=torch.float32).state_dict()[PROJECTION]
    stored = load_file(folder / "model.safetensors")[PROJECTION]
    assert torch.equal(found, stored.float())


def test_tensors_of_other_parts_are_left_out_without_a_word(folder, capsys):
    rewrite(folder, lambda t: t | {"vision_tower.layers.0.q_proj.weight": torch.ones(3), "score.weight": torch.ones(3)})
    load_model(folder)
    assert not capsys.readouterr().err


@pytest.fixture
def data(tmp_path):
    return str(write(tmp_path / "pairs.jsonl", text_pairs(16)))


@pytest.fixture(scope="module")
def policy_adapter(llama, tmp_path_factory):
    """An adapter without any training: loading it is what is tried."""
    out = tmp_path_factory.mktemp("policy") / "adapter"
    model = load_model(llama, dtype=torch.float32)
    get_peft_model(model, LoRA(rank=2).peft_config("CAUSAL_LM", model)).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def reward_folder(llama, tmp_path_factory):
    """The folder of a reward model, as ``madpo reward`` leaves it."""
    out = tmp_path_factory.mktemp("reward")
    base = load_classifier(llama, num_labels=1, new_head=True, dtype=torch.float32)
    get_peft_model(base, LoRA(rank=2).peft_config("SEQ_CLS", base)).save_pretrained(out / "adapter")
    (out / "reward_model.json").write_text(json.dumps({"base": str(llama)}))
    return out


COMMANDS = {
    "train": ["train", "{data}", "--model_name_or_path", "{model}", "--loss", "dpo"],
    "train in full": ["train", "{data}", "--model_name_or_path", "{model}", "--loss", "dpo", "--full"],
    "reward": ["reward", "{data}", "--model_name_or_path", "{model}"],
    "tune": ["tune", "{data}", "--model_name_or_path", "{model}", "--loss", "dpo", "--folds", "2"],
    "score by folds": ["score", "{data}", "--model_name_or_path", "{model}", "--folds", "2"],
    "score": ["score", "{data}", "--reward_model", "{reward}"],
    "evaluate": ["evaluate", "{policy}", "--prompts", "{data}", "--reward", "{reward}", "--max_new_tokens", "2"],
    "trim-vocab": ["trim-vocab", "{model}", "--corpus", "{data}", "--size", "390"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_goes_on_with_a_weight_at_random(command, data, folder, policy_adapter, reward_folder, capsys):
    """Each loads the broken folder: as its base model, or as the base of its policy or its reward model."""
    out = folder.parent / "out"
    rewrite(folder, without(NORM))
    policy = shutil.copytree(policy_adapter, folder.parent / "policy")
    edit(policy / "adapter_config.json", base_model_name_or_path=str(folder))
    reward = shutil.copytree(reward_folder, folder.parent / "reward")
    edit(reward / "reward_model.json", base=str(folder))
    places = {"data": data, "model": folder, "reward": reward, "policy": policy}
    words = [word.format(**places) for word in COMMANDS[command]]
    assert main([*words, "--output_dir", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in said)
    assert said[-1].startswith(f"madpo: {folder}: ")
    assert NORM in said[-1]
    assert not out.exists()


def trainer(model, out, **settings):
    rows = {"prompt_ids": [[1, 5]] * 2, "chosen_ids": [[6, 2]] * 2, "rejected_ids": [[7, 2]] * 2}
    args = PreferenceConfig(output_dir=str(out), report_to="none", **settings)
    return PreferenceTrainer(model, args=args, loss=DPO(), train_dataset=Dataset.from_dict(rows))


def test_a_trainer_that_is_given_a_name_refuses_it_too(folder, tmp_path):
    kept = {"dtype": "bfloat16"}
    made = trainer(str(folder), tmp_path / "a", model_init_kwargs=kept)
    assert made.model.dtype == torch.bfloat16
    assert made.args.model_init_kwargs == kept
    rewrite(folder, without(NORM))
    with refused(ConfigError, NORM):
        trainer(str(folder), tmp_path / "b")


def classifier(llama, out, labels=1):
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=labels, dtype=torch.float32)
    made.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(llama) / name, out)
    return out


def test_a_head_is_new_only_where_a_command_makes_it(llama, tmp_path):
    """Scores of a classifier without its head would be random: of a reward model, and of the judge of a study."""
    whole = classifier(llama, tmp_path / "classifier")
    assert load_scorer(whole)
    two = classifier(llama, tmp_path / "two", labels=2)
    oracle = ClassifierOracle(name=str(two), positive_label="LABEL_1")
    assert Classifier(oracle)
    for place, load in ((whole, lambda: load_scorer(whole)), (two, lambda: Classifier(oracle))):
        rewrite(place, without("score.weight"))
        with refused(ConfigError, "score.weight"):
            load()
    assert load_classifier(llama, num_labels=1, new_head=True)
    assert load_classifier(two, num_labels=1, new_head=True)
    assert load_classifier(classifier(llama, tmp_path / "five", labels=5), num_labels=1, new_head=True)
    rewrite(whole, without(NORM))
    with refused(ConfigError, NORM):
        load_classifier(whole, num_labels=1, new_head=True)


def adapter_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


PART = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without(PART), [("1 weights", PART)]),
        (renamed("x."), [("28 weights", "base_model.")]),
        (
            lambda t: t | {PART.replace("layers.1", "layers.5"): t[PART].clone()},
            [("1 weights", PART.replace("layers.1", "layers.5"))],
        ),
        (lambda t: t | {PART: torch.ones(32, 3)}, [(PART, "(32, 3)"), ("adapter_config.json", "(32, 2)")]),
    ],
)
def test_an_adapter_that_is_not_whole_or_not_of_this_model_is_refused(llama, policy_adapter, tmp_path, change, named):
    folder = shutil.copytree(policy_adapter, tmp_path / "adapter")
    assert load_model(llama, adapter=folder)
    adapter_tensors(folder, change)
    with refused(ConfigError, folder, *named):
        load_model(llama, adapter=folder)


def test_a_reward_model_without_its_head_is_refused(reward_folder, tmp_path):
    folder = shutil.copytree(reward_folder, tmp_path / "reward")
    assert RewardModel.load(folder)
    adapter_tensors(folder / "adapter", without("base_model.model.score.weight"))
    with refused(ConfigError, folder, ("1 weights", "base_model.model.score.weight")):
        RewardModel.load(folder)
    # Nor where its configuration does not ask for a head: then the base model is asked, and has none.
    edit(folder / "adapter" / "adapter_config.json", modules_to_save=None, task_type=None)
    with refused(ConfigError, "score.weight"):
        RewardModel.load(folder)


def test_tokens_that_an_adapter_trains_are_missed_as_well(llama, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4], task_type="CAUSAL_LM")
    get_peft_model(load_model(llama, dtype=torch.float32), config).save_pretrained(tmp_path)
    assert load_model(llama, adapter=tmp_path)
    adapter_tensors(tmp_path, lambda t: {n: v for n, v in t.items() if "trainable_tokens" not in n})
    with refused(ConfigError, tmp_path, ("1 weights", "trainable_tokens_delta")):
        load_model(llama, adapter=tmp_path)


def test_an_adapter_loads_to_the_numbers_of_peft(llama, policy_adapter):
    from peft import PeftModel

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16), policy_adapter)
    ours = load_model(llama, adapter=policy_adapter, dtype=torch.bfloat16)
    assert type(ours) is type(plain)
    mine, theirs = ours.state_dict(), plain.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours.training
