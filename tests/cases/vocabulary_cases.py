"""Tokenizers of every shape that is trimmed, small, trained here; and models around them."""

import json

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

TEXT = """The film begins slowly, but the story grows on you. A good cast, a bad script, and a wonderful ending.
I watched this movie with my family and we all loved every minute of it. The acting is terrible and the plot is
worse. What a waste of time! The music was beautiful, the pictures were great, and the jokes made me laugh. Nobody
should ever have to see this boring, awful, stupid picture. It's one of the best films of the year, and I would
gladly see it again.  The director has no idea what to do with the actors, and neither have they. Funny, warm and
full of life: this is what cinema is for. Don't believe the critics; it is simply dull.
Café, naïve, 10/10 \u2014 très bon."""
LINES = TEXT.splitlines()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
RESERVED = [f"<unused{i}>" for i in range(12)]
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<turn>' + message['role'] + ' ' + message['content'] + '</s>' }}"
    "{% endfor %}"
)


def _byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES * 3, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(["<turn>", *RESERVED])  # behind the others, as GPT-2's and Qwen's are
    return tokenizer


def _llama3():
    """Merges ignored for whole words of the vocabulary, some of which no merge reaches; RoBERTa's post-processor."""
    spec = json.loads(_byte_level().to_str())
    vocab = spec["model"]["vocab"]
    for word in ("Ġcritics", "Ġdirector"):
        vocab.setdefault(word, len(vocab))
    spec["model"]["ignore_merges"] = True
    spec["added_tokens"] = spec["added_tokens"][: len(SPECIAL)]
    spec["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {
                "type": "RobertaProcessing",
                "sep": ["</s>", 2],
                "cls": ["<s>", 1],
                "trim_offsets": True,
                "add_prefix_space": False,
            },
        ],
    }
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens(["<turn>", *RESERVED])
    return tokenizer


def _pieces(count=300):
    """Characters and merges over text whose spaces are visible, as SentencePiece trains them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=count)
    tokenizer.train_from_iterator([line.replace(" ", "\u2581") for line in LINES * 3], trainer)
    return json.loads(tokenizer.to_str())["model"]


def _spm(normalizer, decoder):
    """Gemma's ways: bytes to fall back to, line breaks as added tokens, and every split of a word as a merge."""
    model = _pieces()
    names = [*SPECIAL, "<turn>", *RESERVED, "\n", "\n\n", *(f"<0x{i:02X}>" for i in range(256))]
    names += [piece for piece in sorted(model["vocab"], key=model["vocab"].get) if piece not in names]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [(piece[:k], piece[k:]) for piece in names for k in range(1, len(piece))]
    merges = [pair for pair in merges if all(part in vocab for part in pair) and not pair[0].startswith("<")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoder
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([*SPECIAL, "<turn>", *RESERVED])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n", "\n\n")])
    return tokenizer


def _gemma():
    tokenizer = _spm(
        normalizers.Replace(" ", "\u2581"),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def _llama2():
    return _spm(
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )


def _characters():
    """BPE on characters only: what is not in its alphabet is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[*SPECIAL, "<turn>", *RESERVED])
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return tokenizer


def _unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    special = [*SPECIAL, "<turn>", *RESERVED]
    trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(LINES * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


TOKENIZERS = {
    "gpt2": _byte_level,
    "llama3": _llama3,
    "gemma": _gemma,
    "llama2": _llama2,
    "characters": _characters,
    "unigram": _unigram,
}


def _shape(size):
    return {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _gemma3(size, **more):
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3TextConfig(**_shape(size), **windows, **more)


def _phi(size):
    """A head of its own, with a bias that is not zero."""
    shape = _shape(size) | {"num_key_value_heads": 2}
    del shape["head_dim"]
    model = PhiForCausalLM(PhiConfig(**shape))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def _with_images(size):
    """A text model inside a larger configuration, which names ids of its own at both levels."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
    }
    ids = {"image_token_id": 9, "boi_token_id": 7, "eoi_token_id": 8}
    config = Gemma3Config(
        text_config=_gemma3(size).to_dict(), vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4, **ids
    )
    return Gemma3ForConditionalGeneration(config)


MODELS = {
    "gemma3": lambda size: Gemma3ForCausalLM(_gemma3(size)),
    "llama": lambda size: LlamaForCausalLM(LlamaConfig(**_shape(size), tie_word_embeddings=False)),
    "gpt2": lambda size: GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
    "phi": _phi,
    "with images": _with_images,
}


def write_model(folder, family, kind, *, padded=0, chat=True):
    """A random model in several files with its tokenizer; ``padded`` rows of it belong to no token."""
    backend = TOKENIZERS[kind]()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT if chat else None
    torch.manual_seed(0)
    model = MODELS[family](backend.get_vocab_size() + padded).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights are so small that every logit would be near 0
            parameter.mul_(4)
    turn, end = tokenizer.convert_tokens_to_ids("<turn>"), tokenizer.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0, eos_token_id=[end, turn])
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder
