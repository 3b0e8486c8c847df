"""A tokenizer without PyTorch is the tokenizer that transformers loads, id by id."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from madpo.data import check
from madpo.models import locate as places
from madpo.models.packaged import PACKAGED, cache_dir
from practice_cases import text_pairs, write

TEXTS = [
    "The film is a joy.",
    " is  boring \n\n",
    "",
    "naïve 😀 你好 ñ",
    "<eos> a <mask>b<turn>c",
    "x" * 300,
    "a\u200fb",
]
KNOWN = [(named, kind) for named, kinds in places._KNOWN.items() for kind in kinds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer built as Gemma's: words with byte fallback, special tokens, one that is no word, a template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = [row[side] for row in text_pairs(60) for side in ("prompt", "chosen", "rejected")]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken("madpo", normalized=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


def named(folder: Path, to: Path, tokenizer_class: str, model_type: str) -> Path:
    """A copy whose configuration names a class and a model type."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    said = {name: f"<{name[:3]}>" for name in ("pad_token", "eos_token", "bos_token", "unk_token")}
    (to / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class, **said}))
    (to / "config.json").write_text(json.dumps({"model_type": model_type}))
    return to


def assert_same(place: Path) -> None:
    light, whole = places.light_tokenizer(place), AutoTokenizer.from_pretrained(place)
    assert type(light) is type(whole)
    assert light.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()
    for special in (True, False):
        assert (
            light(TEXTS, add_special_tokens=special)["input_ids"]
            == whole(TEXTS, add_special_tokens=special)["input_ids"]
        )
    ids = whole(TEXTS)["input_ids"]
    assert [light.decode(one) for one in ids] == [whole.decode(one) for one in ids]
    for name in ("all_special_ids", "eos_token_id", "bos_token_id", "chat_template", "name_or_path"):
        assert getattr(light, name) == getattr(whole, name), name
    assert len(light) == len(whole)
    messages = [{"role": "user", "content": "a <turn>"}]
    if whole.chat_template:
        rendered = [t.apply_chat_template(messages, tokenize=False) for t in (light, whole)]
        assert rendered[0] == rendered[1]


@pytest.mark.parametrize(("tokenizer_class", "model_type"), KNOWN)
def test_the_light_tokenizer_is_the_one_that_transformers_chooses(
    folder: Path, tmp_path: Path, tokenizer_class: str, model_type: str
) -> None:
    assert_same(named(folder, tmp_path / "model", tokenizer_class, model_type))


def test_what_is_not_known_is_left_to_transformers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(places, "load_tokenizer", asked.append)
    unknown = named(folder, tmp_path / "unknown", "Qwen2Tokenizer", "qwen2")
    with_code = named(folder, tmp_path / "code", "TokenizersBackend", "llama")
    (with_code / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}))
    for place in (unknown, with_code):
        places.light_tokenizer(place)
    assert asked == [unknown, with_code]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_real_tokenizers_are_the_same_without_pytorch(name: str) -> None:
    place = cache_dir() / "models" / f"{name}-{PACKAGED[name].sha256[:8]}"
    if not (place / "tokenizer.json").is_file():
        pytest.skip(f"{name} is not unpacked in {cache_dir()}")
    assert_same(place)


def test_a_check_with_a_tokenizer_loads_no_pytorch(folder: Path, tmp_path: Path) -> None:
    place = named(folder, tmp_path / "model", "GemmaTokenizer", "gemma3_text")
    data = write(tmp_path / "pairs.jsonl", text_pairs(20))
    code = (
        "import sys; from madpo.commands.cli import main; assert main(['check', *sys.argv[1:]]) == 0;"
        "assert not {'torch', 'trl', 'peft'} & set(sys.modules)"
    )
    words = [str(data), "--model_name_or_path", str(place), "--max_length", "64"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = check(data, tokenizer=AutoTokenizer.from_pretrained(place), max_length=64)
    found, _, following = done.stdout.strip().partition("\nnext: ")
    assert found == whole.text().strip()
    assert following.startswith(f"madpo train {data} --model_name_or_path {place} ")


def test_a_model_is_named_so_that_it_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "a" / "gemma-3-270m").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert places.lasting("model") == places.lasting("./model") == str(tmp_path / "a" / "model")
    assert places.lasting("../a/model") == str(tmp_path / "a" / "model")
    # A packaged model is not a folder of its name, nor is what lies on the hub.
    assert [places.lasting(name) for name in ("gemma-3-270m", "tiny-llama", "org/name")] == [
        *("gemma-3-270m", "tiny-llama", "org/name")
    ]
