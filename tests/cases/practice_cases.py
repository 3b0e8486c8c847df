"""Small preference data in every form, and the command line, for the tests of ``madpo.operations``."""

import json

import numpy as np

from madpo.commands.cli import main

GOOD = [" is a joy.", " is wonderful.", " is funny and warm.", " has a great cast."]
BAD = [" is boring.", " is awful.", " is a waste of time.", " is simply dull."]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def everything(folder):
    """All files and folders in a folder, with the contents of the files."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def text_pairs(count=60):
    generator = np.random.default_rng(0)
    rows = []
    for i in range(count):
        sides = [GOOD[generator.integers(4)], BAD[generator.integers(4)]]
        chosen, rejected = sides[:: -1 if generator.random() < 0.15 else 1]
        rows.append({"prompt": f"The film {i % 25}", "chosen": chosen, "rejected": rejected, "note": f"row {i}"})
    return rows


def run(*words):
    assert main([str(word) for word in words]) == 0


def ids_of(tokenizer, prompt, completion):
    return [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]


def logps(model, tokenizer, prompt, completion):
    """Summed log-probability of the completion and its end token, from the full logits."""
    import torch

    ids = torch.tensor([ids_of(tokenizer, prompt, completion)])
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        found = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    return found.gather(-1, ids[0, start:, None]).sum().item()


def conversation(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def implicit(row):
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def with_turns(row):
    """A system prompt, a turn before, and the question."""
    before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    return {
        **conversation(row),
        "prompt": [*before, {"role": "assistant", "content": "Hello."}, *conversation(row)["prompt"]],
    }


FORMATS = {
    "text": lambda row: {k: row[k] for k in ("prompt", "chosen", "rejected")},
    "text, the prompt inside": implicit,
    "messages": conversation,
    "messages, the prompt inside": lambda row: implicit(conversation(row)),
    "a system prompt and turns": with_turns,
}


def classifier(model, folder):
    """A sequence classifier with one output, in ``folder``: a reward model as others publish them."""
    from madpo.models.load import load_classifier, load_tokenizer

    load_classifier(model, num_labels=1, new_head=True).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder
