"""Smaller copies of models: exact where all tokens are kept, whole or absent, and fit for every later stage."""

import hashlib
import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from madpo.commands.cli import main
from madpo.core.errors import ConfigError, DataError, StorageError
from madpo.data.corpus import PackagedIMDB, load_corpus
from madpo.data.texts import read_texts
from madpo.models.engine.head import Head
from madpo.models.engine.logprobs import hidden_states
from madpo.models.load import load_model
from madpo.operations import TrimSettings, trim_vocab
from madpo.operations.trimming import trim as trimming
from madpo.operations.trimming.kept_mass import score_texts, token_mass
from madpo.rewards.reward_model import RewardModel
from madpo.study.experiment import run_experiment
from practice_cases import text_pairs, write
from refusals import names, refused
from vocabulary_cases import LINES, RESERVED, SPECIAL, write_model

CORPUS = [{"text": f"{a} {b}"} for a in LINES[:3] for b in LINES[:3]]
HALF = TrimSettings(held_out_share=0.3, batch_size=4)
# family of the model, kind of the tokenizer, rows that belong to no token (-1: the last token has no row)
SHAPES = [
    ("gemma3", "gemma", 0),
    ("llama", "llama2", 0),
    ("llama", "llama3", 19),
    ("gpt2", "gpt2", 7),
    ("gemma3", "gpt2", -1),
    ("phi", "unigram", 3),
    ("with images", "gemma", 0),
]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
def pair(request, tmp_path_factory):
    """(folder of a model, folder of its smaller copy, the report)."""
    folder = tmp_path_factory.mktemp("trim")
    family, kind, padded = request.param
    model = write_model(folder / "model", family, kind, padded=padded)
    assert len(list(model.glob("*.safetensors"))) > 1, "in several files"
    report = trim_vocab(model, [write(folder / "corpus.jsonl", CORPUS)], folder / "small", HALF)
    return model, folder / "small", report


def numbering(small):
    return {old: new for new, old in enumerate(json.loads((small / "kept_ids.json").read_text()))}


@torch.no_grad()
def test_kept_texts_have_the_same_states_and_renormalised_probabilities(pair):
    folder, small, report = pair
    new = numbering(small)
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (folder, small)]
    models = [load_model(place, dtype=torch.float64) for place in (folder, small)]
    kept = [old for old in new if old < models[0].get_input_embeddings().weight.shape[0]]
    assert len(kept) == models[1].get_input_embeddings().weight.shape[0] < 0.9 * report.entries_before
    for text in LINES[:3]:
        before, after = (tokenizer(text)["input_ids"] for tokenizer in tokenizers)
        assert after == [new[i] for i in before]
        states = []
        for model, ids in zip(models, (before, after), strict=True):
            row = torch.tensor([ids])
            states.append(hidden_states(model, row, torch.ones_like(row))[0])
        assert torch.equal(*states), "to the last bit"
        wide, narrow = (Head.of(model).logits(x)[0] for model, x in zip(models, states, strict=True))
        torch.testing.assert_close(narrow.log_softmax(-1), wide[:, kept].log_softmax(-1), rtol=0, atol=1e-10)
    assert report.largest_state_gap == 0


def test_weights_settings_and_templates_follow(pair):
    folder, small, report = pair
    new = numbering(small)
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (folder, small)]
    configs = [AutoConfig.from_pretrained(place) for place in (folder, small)]
    assert configs[1].get_text_config().vocab_size == len(
        [i for i in new if i < configs[0].get_text_config().vocab_size]
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "boi_token_id"):
        for before, after in (
            (c, d) for c, d in ((configs[0], configs[1]), tuple(c.get_text_config() for c in configs))
        ):
            if getattr(before, name, None) is not None:
                assert getattr(after, name) == new[getattr(before, name)], name
    before, after = (GenerationConfig.from_pretrained(place) for place in (folder, small))
    turn = tokenizers[0].convert_tokens_to_ids("<turn>")
    assert before.eos_token_id == [tokenizers[0].eos_token_id, turn]
    assert after.eos_token_id == [tokenizers[1].eos_token_id, tokenizers[1].convert_tokens_to_ids("<turn>")]
    assert tokenizers[1].chat_template == tokenizers[0].chat_template
    said = [{"role": "user", "content": LINES[1]}]
    ids = [t.apply_chat_template(said, tokenize=True, return_dict=True)["input_ids"] for t in tokenizers]
    assert len(ids[0]) == len(ids[1])
    for token in (*SPECIAL, "<turn>", *RESERVED):
        assert tokenizers[1].convert_tokens_to_ids(token) == new[tokenizers[0].convert_tokens_to_ids(token)]
    assert tokenizers[1].all_special_tokens == tokenizers[0].all_special_tokens
    assert len(tokenizers[1]) == report.entries
    assert not (small / "tokenizer.model").exists()


def test_every_other_weight_is_as_it_was(pair):
    folder, small, report = pair
    before, after = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (folder, small))
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {
        n for n in before if n.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight", "lm_head.bias"))
    }
    kept = [old for old in numbering(small) if old < max(len(before[name]) for name in changed)]
    for name in changed:
        assert torch.equal(after[name], before[name][kept]), name
    for path in small.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    assert report.parameters < report.parameters_before


def test_the_report_counts_what_it_says(pair):
    folder, small, report = pair
    tokenizer, new = AutoTokenizer.from_pretrained(folder), numbering(small)
    model = load_model(folder)
    kept = torch.tensor([i in new for i in range(model.get_input_embeddings().weight.shape[0])])
    start = tokenizer.bos_token_id
    held = [
        row["text"]
        for row in CORPUS
        if int.from_bytes(hashlib.sha256(row["text"].encode()).digest()[:8], "big") < 0.3 * 2**64
    ]
    assert 0 < len(held) == report.held_out_texts
    assert report.texts == len(CORPUS) - len(held)
    rows = [[start, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in held]
    # The plain way: all logits at once.
    outside, nats, tokens = 0.0, 0.0, 0
    with torch.no_grad():
        for ids in rows:
            logps = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            outside -= float(logps[:, kept].logsumexp(-1).sum())
            nats -= float(logps.gather(-1, torch.tensor(ids[1:])[:, None]).sum())
            tokens += len(ids) - 1
    size, words = (sum(map(len, parts)) for parts in ([t.encode() for t in held], [t.split() for t in held]))
    assert report.kl.mean == pytest.approx(outside / tokens, rel=0.03)
    assert report.nats_per_byte_before.mean == pytest.approx(nats / size, rel=0.03)
    assert report.tokens_per_word_before.mean == pytest.approx(tokens / words)
    assert report.covered == 1, "without a size all that the corpus uses is kept"
    seen = {
        i
        for row in CORPUS
        if row["text"] not in held
        for i in tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    }
    assert seen <= set(new)
    assert report.kl.low <= report.kl.mean <= report.kl.high
    saved = json.loads((small / "vocabulary.json").read_text())
    assert saved["entries"] == report.entries == len(new)
    assert saved["kl"]["mean"] == report.kl.mean
    card = (small / "README.md").read_text()
    names(card, (f"{report.entries:,}", f"{report.entries_before:,} entries"), f"{report.kl.mean:.4f}")
    names(report.text(), (f"{report.entries:,}", f"{report.entries_before:,} entries"))


def test_masses_and_scores_equal_the_plain_softmax():
    torch.manual_seed(0)
    head = Head(torch.randn(17_000, 4, dtype=torch.float64), torch.randn(17_000, dtype=torch.float64), 5.0, 0.5)
    hidden, labels = torch.randn(520, 4, dtype=torch.float64), torch.randint(0, 17_000, (520,))
    kept = torch.rand(17_000) < 0.1
    kept[8192:16384] = False
    logps, inside = token_mass(head, hidden, labels, kept)
    plain = head.logits(hidden)[0].log_softmax(-1)
    torch.testing.assert_close(logps, plain.gather(-1, labels[:, None])[:, 0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inside, plain[:, kept].logsumexp(-1), rtol=1e-10, atol=1e-10)
    assert token_mass(head, hidden, labels)[1].eq(0).all()


def test_scores_do_not_depend_on_the_batch(llama):
    model = load_model(llama, dtype=torch.float64)
    rows = [[1, 17, 80], [1, 5], [1, *range(40, 60)], [1, 9, 9, 9, 9]]
    one, all_at_once = (score_texts(model, rows, batch_size=n, description="x") for n in (1, 4))
    for a, b in zip(one, all_at_once, strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    assert [score.tokens for score in one] == [2, 1, 20, 4]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("one") / "model", "llama", "llama2")


def digests(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name not in ("vocabulary.json", "record.json")
    }


def test_neither_order_nor_repetition_of_the_corpus_matters(small_model, tmp_path):
    one, other = write(tmp_path / "a.jsonl", CORPUS), write(tmp_path / "b.jsonl", [{"text": t} for t in LINES])
    (tmp_path / "c").mkdir()
    turned = write(tmp_path / "c" / "a.jsonl", CORPUS[::-1])
    settings = HALF.model_copy(update={"size": 330})
    reports = [
        trim_vocab(small_model, corpus, tmp_path / name, settings)
        for corpus, name in (([one, other], "x"), ([other, one], "y"), ([turned, other], "z"))
    ]
    first, second, third = (digests(tmp_path / name) for name in "xyz")
    assert first == second
    assert {k: v for k, v in first.items() if k != "README.md"} == {k: v for k, v in third.items() if k != "README.md"}
    assert reports[0] == reports[1]
    assert reports[2].kl == reports[0].kl
    assert reports[0].entries == 330
    assert reports[0].covered < 1


def test_held_out_text_of_its_own_counts_nowhere(small_model, tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", CORPUS)
    held = write(tmp_path / "held.jsonl", [*CORPUS[:2], {"text": "Café, naïve, très bon. " * 80}])
    report = trim_vocab(small_model, [corpus], tmp_path / "out", HALF, eval_data=held)
    assert (report.texts, report.held_out_texts, report.eval_data) == (len(CORPUS) - 2, 3, str(held))
    assert report.held_out_covered < 1
    assert report.tokens_per_word.mean > report.tokens_per_word_before.mean


def test_conversations_and_pairs_are_read_as_they_will_be_tokenised(small_model, tmp_path):
    said = [{"role": "user", "content": LINES[0]}, {"role": "assistant", "content": LINES[1]}]
    corpus = write(tmp_path / "c.jsonl", [{"messages": said}] * 2)
    pairs = write(tmp_path / "p.jsonl", text_pairs(12))
    held = write(tmp_path / "h.jsonl", [{"prompt": "The film ", "completion": "begins"}])
    report = trim_vocab(small_model, [corpus, pairs], tmp_path / "out", HALF, eval_data=held)
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    expected = 2 * len(tokenizer.apply_chat_template(said, tokenize=True, return_dict=True)["input_ids"])
    for row in text_pairs(12):
        for side in ("chosen", "rejected"):
            expected += len(tokenizer(row["prompt"] + row[side], add_special_tokens=False)["input_ids"])
    assert report.tokens == expected
    assert report.texts == 2 + 24


SAID = [{"role": "user", "content": "Hi"}]
ANSWER = [{"role": "assistant", "content": "Yes"}]


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"text": "a", "label": 1}, ["a"]),
        ({"messages": SAID}, [SAID]),
        ({"prompt": "a "}, ["a "]),
        ({"instruction": "a ", "response": "b"}, ["a b"]),
        ({"prompt": SAID, "completion": ANSWER}, [SAID + ANSWER]),
        ({"prompt": "a ", "chosen": "b", "rejected": "c", "reward_margin": 1.0}, ["a b", "a c"]),
        ({"chosen": SAID + ANSWER, "rejected": [*SAID, *SAID]}, [SAID + ANSWER, SAID + SAID]),
        ({"prompt": "a ", "responses": ["b", "c", "d"], "scores": [1, 3, 2]}, ["a c", "a b"]),
    ],
)
def test_every_layout_gives_its_texts(row, texts, tmp_path):
    found = list(read_texts(write(tmp_path / "d.jsonl", [row, row])))
    assert [text for _, text in found] == texts * 2
    assert found[0][0].endswith("d.jsonl, line 1")
    assert found[-1][0].endswith("d.jsonl, line 2")
    if all(isinstance(value, str) for value in row.values()):
        pd.DataFrame([row, row]).to_csv(tmp_path / "d.csv", index=False)
        assert [text for _, text in read_texts(tmp_path / "d.csv")] == texts * 2
    pd.DataFrame([row, row]).to_parquet(tmp_path / "d.parquet")
    assert [text for _, text in read_texts(tmp_path / "d.parquet")] == texts * 2


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"text": None}, ("text", "null")),
        ({"text": 3}, ("text", "3")),
        ({"messages": [{"from": "critic", "value": "x"}]}, ("role", "'critic'")),
        ({"prompt": "a", "completion": ANSWER}, ("prompt", "completion")),
        ({"words": "a"}, ("'text'", "'words'")),
        ({"text": "\ud800"}, ("text", r"\ud800")),
    ],
)
def test_rows_without_text_are_told_by_their_place(row, named, tmp_path):
    data = write(tmp_path / "d.jsonl", [row])
    with refused(DataError, "d.jsonl", "line 1", named):
        list(read_texts(data))


def untrimmed(named, *arguments, error=ConfigError, **how):
    with refused(error, *named) as caught:
        trim_vocab(*arguments, **how)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_trimmed_is_refused_and_nothing_is_left(small_model, tmp_path):
    corpus = [write(tmp_path / "corpus.jsonl", CORPUS)]
    adapter = shutil.copytree(small_model, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    quantised, scorer, second = (shutil.copytree(small_model, tmp_path / n) for n in ("q", "s", "v"))
    config = json.loads((small_model / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    (second / "config.json").write_text(json.dumps(config | {"vocab_size_per_layer_input": 400}))
    spec = json.loads((small_model / "tokenizer.json").read_text())
    spec["model"] = {"type": "WordLevel", "vocab": spec["model"]["vocab"], "unk_token": "<unk>"}
    (scorer / "tokenizer.json").write_text(json.dumps(spec))
    before = sorted(path.name for path in tmp_path.iterdir())
    out = tmp_path / "out"
    untrimmed([adapter, "adapter"], adapter, corpus, out)
    untrimmed([quantised], quantised, corpus, out)
    untrimmed([second, ("vocab_size_per_layer_input", "400")], second, corpus, out)
    untrimmed([scorer, "WordLevel"], scorer, corpus, out, HALF)
    untrimmed([("size", "5"), small_model], small_model, corpus, out, HALF.model_copy(update={"size": 5}))
    untrimmed(["corpus"], small_model, [], out)
    untrimmed([tmp_path / "none.jsonl"], small_model, [tmp_path / "none.jsonl"], out, error=DataError)
    least = TrimSettings(held_out_share=1e-9)
    untrimmed(["--held_out_share", "--eval"], small_model, corpus, out, least, error=DataError)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    out.mkdir()
    (out / "mine.txt").write_text("x")
    for overwrite in (False, True):
        untrimmed([out], small_model, corpus, out, error=StorageError, overwrite=overwrite)
    assert (out / "mine.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"vocab_size": 99}),
        ("config.json", {"bos_token_id": "x"}),
        ("config.json", {"eos_token_id": [[1]]}),
        ("tokenizer.json", {"model": {"type": "BPE"}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}),
        ("tokenizer.json", {"added_tokens": 3}),
        ("tokenizer.json", None),
        ("generation_config.json", []),
    ],
)
def test_damaged_folders_are_told_in_one_sentence(small_model, tmp_path, file, change):
    folder = shutil.copytree(small_model, tmp_path / "model")
    path = folder / file
    found = change if change in ([], None) else json.loads(path.read_text()) | change
    path.write_text("{" if found is None else json.dumps(found))
    untrimmed([folder], folder, [write(tmp_path / "corpus.jsonl", CORPUS)], tmp_path / "out", HALF)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "model"]


def test_a_model_that_came_out_as_another_is_not_written(small_model, tmp_path, monkeypatch):
    # As if it had weights for each word outside embedding and head, which kept their old numbers.
    def turned_round(model, kept):
        trim_rows(model, kept)
        weight = model.get_input_embeddings().weight
        weight.data = weight.data.flip(0)

    trim_rows = trimming.trim_rows
    monkeypatch.setattr(trimming, "trim_rows", turned_round)
    corpus = write(tmp_path / "corpus.jsonl", CORPUS)
    untrimmed([small_model], small_model, [corpus], tmp_path / "out", HALF)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_the_command(small_model, tmp_path, capsys):
    settings = tmp_path / "trim.toml"
    corpus = write(tmp_path / "corpus.jsonl", CORPUS)
    settings.write_text(f'corpus = ["{corpus}"]\nheld_out_share = 0.3\nsize = 340\n')
    words = ["trim-vocab", str(small_model), "--config", str(settings), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--drop_reserved", "--size", "335"]) == 0
    names(capsys.readouterr().out, "335", "KL(trimmed || original)")
    assert "<unused3>" not in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert main([*words, "--overwrite"]) == 0
    names(capsys.readouterr().out, "340")
    assert main(["trim-vocab", str(small_model), "--output_dir", str(tmp_path / "x")]) == 2
    names(capsys.readouterr().err, "--corpus")


@pytest.mark.slow  # SFT, responses, labels and a policy
def test_an_experiment_takes_the_folder_as_its_model(tmp_path, module_cache):
    model = write_model(tmp_path / "model", "gemma3", "gpt2")
    small = tmp_path / "small"
    trim_vocab(model, [write(tmp_path / "corpus.jsonl", [{"text": t} for t in LINES])], small, HALF)
    rows = AutoConfig.from_pretrained(small).vocab_size
    result = run_experiment(
        "smoke",
        tmp_path / "run",
        overrides=[f"model={small}", "pairs.tiers=['high']", "oracle.reviews=40", "pairs.prompts=20", "pairs.train=12",
                   "evaluation.prompts=8"],
        only=["policy/high/dpo/seed0"],
    )  # fmt: skip
    assert not result.failed
    (sft,) = (tmp_path / "run").glob("sft-*")
    assert AutoConfig.from_pretrained(sft / "model").vocab_size == rows
    (adapter,) = (tmp_path / "run").glob("policy/high/dpo/seed0-*/**/adapter_model.safetensors")
    assert load_model(sft / "model", adapter=adapter.parent).config.vocab_size == rows


@pytest.mark.slow  # trimming, SFT, responses, a reward model and its margins
def test_an_experiment_trims_its_base_model(tmp_path, module_cache, monkeypatch):
    model = write_model(tmp_path / "model", "gemma3", "gpt2")
    words = AutoConfig.from_pretrained(model).vocab_size
    whole = load_corpus(PackagedIMDB())
    monkeypatch.setattr("madpo.operations.trimming.corpus_tokens.load_corpus", lambda _: whole.iloc[:300])
    result = run_experiment(
        "smoke",
        tmp_path / "run",
        overrides=[f"model={model}", f"vocabulary.size={words - 40}", "pairs.tiers=['high']", "oracle.reviews=40",
                   "pairs.prompts=20", "pairs.train=12", "evaluation.prompts=8"],
        only=["margins/high/seed0"],
    )  # fmt: skip
    assert not result.failed
    kept = result.records["base"].metrics
    assert kept["entries"] == words - 40
    assert 0 < kept["kl"].mean < 5
    (base,) = (tmp_path / "run").glob("base-*/model")
    (sft,) = (tmp_path / "run").glob("sft-*/model")
    assert {AutoConfig.from_pretrained(place).vocab_size for place in (base, sft)} == {words - 40}
    # The reward model finds its base next to it, also when the run's folder has moved.
    (tmp_path / "run").rename(tmp_path / "moved")
    (rewards,) = (tmp_path / "moved").glob("reward_model/high/seed0-*")
    assert RewardModel.load(rewards).inner.config.vocab_size == words - 40
    assert str(tmp_path) not in (rewards / "reward_model.json").read_text().replace(str(model), "")
