"""Smaller tokenizers: every shape, any text, and the packaged models' own; and configurations with new ids."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from madpo.core.errors import ConfigError
from madpo.models.packaged import PACKAGED, cache_dir
from madpo.models.vocabulary import Vocabulary, named_ids, refuse_untranslated, renumbered
from refusals import refused
from vocabulary_cases import LINES, RESERVED, SPECIAL, TEXT, TOKENIZERS

WORDS = sorted({word for line in LINES for word in line.split()})
HALF = LINES[:3]
"""What the smaller tokenizers are made for."""


def counts_of(tokenizer, texts):
    found = {}
    for text in texts:
        for i in tokenizer.encode(text, add_special_tokens=False).ids:
            found[i] = found.get(i, 0) + 1
    return found


class Trimmed:
    """A tokenizer, what is kept of it, and the smaller one."""

    def __init__(self, tokenizer, texts, **how):
        self.before = tokenizer
        self.vocabulary = Vocabulary(json.loads(tokenizer.to_str()), "it")
        self.counts = counts_of(tokenizer, texts)
        self.choice = self.vocabulary.choose(self.counts, **{"size": None, "named": [], **how})
        self.new = {old: i for i, old in enumerate(self.choice.ids)}
        self.after = Tokenizer.from_str(json.dumps(self.vocabulary.trimmed(self.new)))

    def check(self, text):
        """The same tokens where all are kept; the same text back in any case; nothing unknown that was known."""
        before = self.before.encode(text)
        after = self.after.encode(text)
        if all(i in self.new for i in before.ids):
            assert after.ids == [self.new[i] for i in before.ids]
        # A reserved token that was dropped is plain text from then on, before which some tokenizers put a space.
        plain = {i for i in before.ids if i not in self.new and self.before.id_to_token(i) in RESERVED}
        for skip in (False,) if plain else (False, True):
            said = [
                one.decode(it.ids, skip_special_tokens=skip) for one, it in ((self.before, before), (self.after, after))
            ]
            assert said[0] == said[1] or (plain and "".join(said[0].split()) == "".join(said[1].split()))
        unknown = self.vocabulary.ids.get("<unk>", -1)  # packaged byte-level models have none
        assert after.ids.count(self.new.get(unknown, -1)) == before.ids.count(unknown)


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def trimmed(request):
    return Trimmed(TOKENIZERS[request.param](), HALF)


def test_kept_entries_are_numbered_densely_under_their_old_names(trimmed):
    assert trimmed.after.get_vocab() == {
        t: trimmed.new[i] for t, i in trimmed.vocabulary.ids.items() if i in trimmed.new
    }
    assert sorted(trimmed.after.get_vocab().values()) == list(range(len(trimmed.new)))
    assert len(trimmed.new) < 0.95 * len(trimmed.vocabulary.ids)
    assert trimmed.choice.ids == sorted(trimmed.choice.ids)
    before, after = (json.loads(t.to_str()) for t in (trimmed.before, trimmed.after))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert before[part] == after[part]
    names = [added["content"] for added in after["added_tokens"]]
    assert names == [added["content"] for added in before["added_tokens"]], "every added token stays"
    assert {*SPECIAL, "<turn>", *RESERVED} <= set(names)


def test_what_begins_and_ends_a_text_has_its_new_id(trimmed):
    before, after = (t.encode("the film") for t in (trimmed.before, trimmed.after))
    plain = trimmed.after.encode("the film", add_special_tokens=False).ids
    assert [trimmed.before.id_to_token(i) for i in before.ids] == after.tokens
    assert len(after.ids) - len(plain) == len(before.ids) - len(
        trimmed.before.encode("the film", add_special_tokens=False).ids
    )


def test_texts_of_the_corpus_keep_their_tokens_and_others_fall_into_pieces(trimmed):
    for text in HALF:
        assert all(i in trimmed.new for i in trimmed.before.encode(text, add_special_tokens=False).ids)
        trimmed.check(text)
    longer = 0
    for text in (
        *LINES,
        "<turn>user Hello</s>\n\n\nx",
        "<unused3> of",
        "▁",
        "\u2581\u2581 a",
        "",
        " ",
        "日本語 🎬\x00\r\n\t",
        "a" * 300,
    ):
        trimmed.check(text)
        longer += len(trimmed.after.encode(text).ids) - len(trimmed.before.encode(text).ids)
    assert longer > 0


@given(
    parts=st.lists(
        st.one_of(st.sampled_from([*WORDS, *SPECIAL, "<turn>", "<unused1>", " ", "\n", "\n\n"]), st.text(max_size=6)),
        max_size=14,
    )
)
def test_any_text_comes_back_as_it_did(trimmed, parts):
    trimmed.check("".join(parts))
    trimmed.check(" ".join(parts))


def test_each_kept_entry_is_built_from_kept_entries(trimmed):
    model = json.loads(trimmed.after.to_str())["model"]
    if model["type"] != "BPE":
        return
    whole = trimmed.before.model
    reached = 0
    for token, i in trimmed.vocabulary.ids.items():
        chain = trimmed.vocabulary.chain(token)
        assert chain[-1] == token
        if len(chain) > 1:  # the library builds it too
            assert [piece.value for piece in whole.tokenize(token)] == [token]
            reached += 1
            if i in trimmed.new:
                assert {trimmed.vocabulary.ids[part] for part in chain} <= set(trimmed.new)
    assert reached > 100
    before = [tuple(pair) for pair in json.loads(trimmed.before.to_str())["model"]["merges"]]
    after = [tuple(pair) for pair in model["merges"]]
    rest = iter(before)
    assert all(pair in rest for pair in after), "the merges are some of the old ones, in their order"


def test_the_size_is_kept_and_a_larger_one_holds_the_smaller(trimmed):
    least = trimmed.choice.always
    before = set()
    for size in (least, least + 7, least + 40, len(trimmed.new), 10_000):
        found = Trimmed(trimmed.before, HALF, size=size)
        assert len(found.new) == min(size, len(trimmed.new))
        assert before <= set(found.new)
        before = set(found.new)
        for text in LINES:
            found.check(text)
    with refused(ConfigError, ("size", least - 1), f"{least} entries"):
        Trimmed(trimmed.before, HALF, size=least - 1)


def test_the_order_of_the_corpus_does_not_matter_and_ties_go_to_the_lower_id(trimmed):
    size = trimmed.choice.always + 25
    ids = list(trimmed.counts)
    random.Random(0).shuffle(ids)
    how = {"size": size, "named": []}
    assert trimmed.vocabulary.choose({i: trimmed.counts[i] for i in ids}, **how) == trimmed.vocabulary.choose(
        trimmed.counts, **how
    )
    always = set(Trimmed(trimmed.before, HALF, size=trimmed.choice.always).new)
    tied = [i for i, token in trimmed.vocabulary.tokens.items() if i not in always and len(token) == 3]
    tied = [i for i in tied if len(trimmed.vocabulary.chain(trimmed.vocabulary.tokens[i])) == 1] or tied
    chosen = trimmed.vocabulary.choose(dict.fromkeys(reversed(tied), 4), size=None, named=[]).ids
    few = trimmed.vocabulary.choose(dict.fromkeys(reversed(tied), 4), size=len(chosen) - 1, named=[]).ids
    assert set(chosen) - set(few) == {max(i for i in chosen if i in tied)}


def test_the_most_used_stay():
    found = Trimmed(TOKENIZERS["gpt2"](), ["the the the the film"], size=None)
    least = found.choice.always
    # " the" is built of "he", "t" + "he" or " t"; its chain goes before what occurs once.
    few = Trimmed(found.before, ["the the the the film"], size=least + 3)
    kept = set(few.after.get_vocab()) - set(Trimmed(found.before, ["a"], size=least).after.get_vocab())
    assert "Ġthe" in kept
    assert not any("ilm" in token for token in kept)


def test_reserved_tokens_go_on_request_unless_the_corpus_has_them():
    for kind in TOKENIZERS:
        found = Trimmed(TOKENIZERS[kind](), [*HALF, "<unused4> and"], drop_reserved=True)
        names = {added["content"] for added in json.loads(found.after.to_str())["added_tokens"]}
        spelled = kind not in ("characters", "unigram")  # whose alphabet has no "<"
        assert names.intersection(RESERVED) == ({"<unused4>"} if spelled else set(RESERVED))
        assert {*SPECIAL, "<turn>"} <= names
        for text in (*LINES, "<unused3><unused4>", "x<unused11>y"):
            found.check(text)


def test_characters_outside_the_corpus_fall_into_bytes_but_for_those_the_decoder_needs():
    found = Trimmed(TOKENIZERS["gemma"](), ["a"])
    kept = found.after.get_vocab()
    assert "\u2581" in kept
    assert "é" not in kept
    assert found.after.encode("é", add_special_tokens=False).tokens == ["<0xC3>", "<0xA9>"]
    assert "é" in Trimmed(TOKENIZERS["characters"](), ["a"]).after.get_vocab()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"type": "WordPiece"}, ("tokenizer", "WordPiece")),
        ({"type": "WordLevel"}, ("tokenizer", "WordLevel")),
        ({"end_of_word_suffix": "</w>"}, ("end_of_word_suffix", "'</w>'")),
        ({"continuing_subword_prefix": "##"}, ("continuing_subword_prefix", "'##'")),
        ({"dropout": 0.1}, ("dropout", "0.1")),
    ],
)
def test_other_kinds_are_refused(change, named):
    spec = json.loads(TOKENIZERS["gpt2"]().to_str())
    spec["model"] |= change
    with refused(ConfigError, named):
        Vocabulary(spec, "it")


CONFIG = {
    "vocab_size": 100,
    "bos_token_id": 50,
    "eos_token_id": [50, 60],
    "pad_token_id": -1,
    "image_token_index": 70,
    "text_config": {"vocab_size": 100, "eos_token_id": 60, "sliding_window": 50},
    "vision_config": {"vocab_size": 32, "hidden_size": 50},
    "id2label": {0: "a", 1: "b"},
    "suppress_tokens": [50, 51],
    "bad_words_ids": [[50, 60], [51]],
    "forced_bos_token_id": {"en": 60, "de": 400},
    "head_dim": 50,
    "use_cache": True,
    "unk_token_id": None,
}


def test_configurations_get_new_ids_at_every_depth():
    assert named_ids(CONFIG, 100) == {50, 60, 70}
    assert renumbered(CONFIG, {50: 0, 60: 1, 70: 2}, 100, 3) == {
        **CONFIG,
        "vocab_size": 3,
        "bos_token_id": 0,
        "eos_token_id": [0, 1],
        "image_token_index": 2,
        "text_config": {"vocab_size": 3, "eos_token_id": 1, "sliding_window": 50},
        "suppress_tokens": [0],
        "bad_words_ids": [[0, 1]],
        "forced_bos_token_id": {"en": 1, "de": 400},
    }
    refuse_untranslated(CONFIG, "it")
    with refused(ConfigError, "sequence_bias"):
        refuse_untranslated({"text_config": {"sequence_bias": [[[1], 2.0]]}}, "it")
    with refused(ConfigError, ("vocab_size_per_layer_input", "262144")):
        refuse_untranslated({"vocab_size_per_layer_input": 262_144}, "it")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_the_packaged_models_tokenizers(name):
    model = PACKAGED[name]
    path = cache_dir() / "models" / f"{name}-{model.sha256[:8]}" / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"{name} is not unpacked")
    found = Trimmed(Tokenizer.from_file(str(path)), [TEXT, *LINES], drop_reserved=True)
    assert len(found.new) < 3000
    assert len(found.after.get_vocab()) == len(found.new)
    for text in (
        *LINES,
        TEXT,
        "Completely different words, überhaupt 日本語 🎬 \u2581\u2581\n\n\n\t x\x00",
        "<h1><unused9>",
    ):
        found.check(text)
    generator = random.Random(0)
    for _ in range(200):
        found.check(
            "".join(
                chr(generator.choice([generator.randrange(32, 1000), generator.randrange(0x4E00, 0xD7FF)]))
                for _ in range(20)
            )
        )
        found.check(" ".join(generator.sample(WORDS, 8)))
