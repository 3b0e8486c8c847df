"""Small models of several families, batches of pairs, and log-probabilities by a loop over tokens."""

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 211
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=4, layer_types=WINDOWS)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=4, final_logit_softcapping=2.0)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
}


def build(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[family]().eval()
    if family != "gemma2":  # its eager attention casts a float64 mask to float32, where it is infinite
        model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights are so small that every logit would be near 0
            parameter.mul_(4)
    return model


def brute_force(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """One row, one token at a time, without padding, through the model's own logits."""
    sums = []
    for ids, attention, mask in zip(*rows.values(), strict=True):
        ids, mask = ids[attention.bool()], mask[attention.bool()]
        logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        terms = [logp[position - 1, ids[position]] for position in range(1, len(ids)) if mask[position]]
        sums.append(sum(terms, torch.zeros((), dtype=logp.dtype)))
    return torch.stack(sums)


def pair_batch(pairs: list[tuple[int, int, int]], side: str, seed: int = 0, unshared: tuple[int, ...] = ()) -> dict:
    """Rows of (prompt, chosen, rejected) lengths: chosen rows, then rejected ones, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(1, VOCAB, (count,), generator=generator).tolist()

    prompts = [draw(prompt) for prompt, _, _ in pairs]
    chosen = [(p, draw(c)) for p, (_, c, _) in zip(prompts, pairs, strict=True)]
    rejected = [
        (draw(len(p)) if i in unshared else p, draw(r))
        for i, (p, (_, _, r)) in enumerate(zip(prompts, pairs, strict=True))
    ]
    rows = chosen + rejected
    length = max(len(p) + len(c) for p, c in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, completion in rows:
        pad = [0] * (length - len(prompt) - len(completion))
        for name, row in (
            ("input_ids", prompt + completion),
            ("attention_mask", [1] * (len(prompt) + len(completion))),
            ("completion_mask", [0] * len(prompt) + [1] * len(completion)),
        ):
            columns[name].append(pad + row if side == "left" else row + pad)
    return {name: torch.tensor(values) for name, values in columns.items()}


PAIRS = [(5, 6, 4), (3, 1, 1), (7, 9, 2), (1, 4, 8), (4, 0, 3), (2, 5, 5)]
