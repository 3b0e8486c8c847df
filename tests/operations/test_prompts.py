"""A user's prompts: what is refused before models are loaded and responses are generated, and token ids."""

import json

import pytest
from transformers import AutoModelForSequenceClassification

import madpo.operations.evaluation as measuring
from madpo.core.errors import ConfigError, DataError
from madpo.data.tokens import Encoder
from madpo.models.load import load_tokenizer
from madpo.operations import EvaluateSettings, evaluate
from madpo.operations.inputs import read_prompts
from madpo.operations.pair_scorer import load_pair_encoder, load_scorer
from practice_cases import write
from refusals import refused

USERS_FIRST = (
    "{{ bos_token }}{% if messages[0].role != 'user' %}{{ raise_exception('a user speaks first') }}{% endif %}"
)


def said(content, role="user"):
    return [{"role": role, "content": content}]


def tokenizer_with(llama, template, place):
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(place)
    return tokenizer


@pytest.fixture(scope="module")
def rewarding(llama, tmp_path_factory):
    """A sequence classifier with one output, whose tokenizer has a chat template."""
    place = tmp_path_factory.mktemp("models") / "rewarding"
    AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1).save_pretrained(place)
    load_tokenizer(llama).save_pretrained(place)
    return place


@pytest.fixture
def untouched(monkeypatch):
    """Fails where a language model is loaded."""

    def loaded(*_, **__):
        pytest.fail("a model was loaded before the mistake was reported")

    monkeypatch.setattr(measuring, "load_model", loaded)


def test_of_equal_prompts_the_first_counts_and_the_row_is_known(tmp_path):
    data = write(tmp_path / "p.jsonl", [{"prompt": text} for text in ("a", "b", "a", "c")])
    found = read_prompts(data)
    assert [(p.prompt_id, p.content) for p in found] == [(0, "a"), (1, "b"), (3, "c")]
    assert found[2].place == f"{data}, line 4"
    assert read_prompts(data, 2) == found[:2]


def test_text_parts_of_a_message_are_joined(tmp_path):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "new?"}]
    data = write(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": parts}]}])
    assert read_prompts(data)[0].content == said("What is new?")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "cut \ud83d"}, ("prompt", r"\ud83d")),
        ({"prompt": said("cut \ud83d")}, ("prompt[0].content", r"\ud83d")),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, ("prompt", "null")),
        ({"prompt": []}, "prompt"),
        ({"prompt": 3}, ("prompt", "3")),
        ({"prompt": [{"role": "critic", "content": "x"}]}, ("prompt[0].role", "'critic'")),
        ({"prompt": said("x"), "tools": ["look"]}, ("tools", "1 entries")),
        ({"prompt": [{**said("x")[0], "tool_calls": [1]}]}, ("prompt[0].tool_calls", "1 entries")),
        ({"text": "x"}, ("'prompt'", "'text'")),
    ],
)
def test_a_row_that_cannot_be_asked_is_told_with_its_line(tmp_path, row, named):
    first = {"prompt": "fine"} if isinstance(row.get("prompt"), str | None) else {"prompt": said("fine")}
    with refused(DataError, "p.jsonl", "line 2", named):
        read_prompts(write(tmp_path / "p.jsonl", [first, row]))


def test_text_and_messages_do_not_mix(tmp_path):
    with refused(DataError, "line 2", "text", "messages"):
        read_prompts(write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": said("b")}]))


def test_token_ids_of_a_prompt(llama):
    tokenizer = load_tokenizer(llama)
    encoder = Encoder(tokenizer)
    assert encoder.prompt_ids("The film") == tokenizer("The film")["input_ids"]
    text = tokenizer.apply_chat_template(said("Hi"), tokenize=False, add_generation_prompt=True)
    assert encoder.prompt_ids(said("Hi")) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_refused_prompt_is_told_before_a_model_is_loaded(llama, rewarding, tmp_path, untouched):
    place = tmp_path / "strict"
    tokenizer_with(llama, USERS_FIRST, place)
    (place / "config.json").write_bytes((llama / "config.json").read_bytes())
    data = write(tmp_path / "p.jsonl", [{"prompt": said("a")}, {"prompt": said("b", "system")}])
    settings = EvaluateSettings(reward_model=str(rewarding), reference=str(place))
    with refused(DataError, "line 2", "strict", "a user speaks first"):
        evaluate(place, data, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("template", "error", "named"),
    [
        (None, ConfigError, ["chat_template"]),
        (USERS_FIRST, DataError, ["p.jsonl", "line 1", "answer 0", "a user speaks first"]),
    ],
)
def test_a_reward_model_that_cannot_read_the_prompts_is_told_before(
    llama, rewarding, tmp_path, untouched, template, error, named
):
    place = tmp_path / "mute"
    for file in rewarding.iterdir():
        if file.name not in ("chat_template.jinja", "tokenizer_config.json"):
            place.mkdir(exist_ok=True)
            (place / file.name).write_bytes(file.read_bytes())
    tokenizer_with(llama, template, place)
    data = write(tmp_path / "p.jsonl", [{"prompt": said("b", "system")}])
    with refused(error, place, *named):
        evaluate(llama, data, tmp_path / "out", EvaluateSettings(reward_model=str(place), reference=str(llama)))


def test_what_is_no_reward_model_is_told_before(llama, tmp_path, untouched):
    data = write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    with refused(ConfigError, llama, "LlamaForCausalLM"):
        evaluate(llama, data, tmp_path / "out", EvaluateSettings(reward_model=str(llama), reference=str(llama)))


def test_a_classifier_with_another_head_is_told_without_its_weights(llama, rewarding, tmp_path, monkeypatch):
    from transformers import LlamaForSequenceClassification

    built = LlamaForSequenceClassification.__init__

    def renamed(self, config):
        built(self, config)
        self.classifier = self.score
        del self.score

    monkeypatch.setattr(LlamaForSequenceClassification, "__init__", renamed)
    place = tmp_path / "headed"
    place.mkdir()
    for file in rewarding.iterdir():
        if file.suffix == ".json":
            (place / file.name).write_bytes(file.read_bytes())
    for opened in (load_pair_encoder, load_scorer):
        with refused(ConfigError, place, "LlamaForSequenceClassification"):
            opened(place)


def test_how_pairs_are_read_is_the_same_with_and_without_weights(rewarding, tmp_path):
    from madpo.data.rows import Pair

    pairs = [Pair(0, 0, said("Q"), said("A", "assistant"), said("B", "assistant"), {})]
    assert load_pair_encoder(rewarding).ids(pairs, "x", "row") == load_scorer(rewarding).encoder.ids(pairs, "x", "row")
    assert json.loads((rewarding / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


def test_a_base_of_a_reward_model_that_is_out_of_reach_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "reward_model.json").write_text(json.dumps({"base": "nobody/none"}))
    for opened in (load_pair_encoder, load_scorer):
        with refused(ConfigError, "'nobody/none'"):
            opened(tmp_path)


def test_a_base_that_was_moved_is_looked_for_and_named(llama, tmp_path):
    policy = tmp_path / "policy"
    (policy / "adapter").mkdir(parents=True)
    (policy / "config.toml").write_text(f'# madpo train "d"\nmodel = "{tmp_path / "gone"}"\n')
    adapter = policy / "adapter" / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": str(llama)}))
    assert measuring.find_policy(policy, None).base == str(llama)
    adapter.write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone too")}))
    with refused(ConfigError, "config.toml", "gone"):
        measuring.find_policy(policy, str(llama))
