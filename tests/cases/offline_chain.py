"""A person's whole chain on a tiny model, under an audit: no socket is opened and nothing is unpickled.

Run as a program, in a process of its own, since an audit hook cannot be taken off: ``tests/test_wheel.py`` does, with
the installed wheel.
"""

import importlib
import json
import os
import pickle
import pkgutil
import socket
import sys
import tempfile
import traceback
from pathlib import Path

NETWORK = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
SEEN: dict[str, list[str]] = {"network": [], "pickle": []}

# What `chain` runs, in this order.
COMMANDS = ["check", "reward", "score", "inspect", "train", "evaluate", "sft", "beta_dpo"]


def watch(event: str, arguments: tuple) -> None:
    """The audit hook."""
    if event in NETWORK:
        SEEN["network"].append(f"{event} {arguments[1:]!r} from {_place()}")
    elif event == "pickle.find_class":
        SEEN["pickle"].append(f"{arguments!r} from {_place()}")


def _place() -> str:
    frames = [f for f in traceback.extract_stack()[:-2] if "importlib" not in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1][:8])


def import_everything() -> list[str]:
    """Every module of madpo."""
    import madpo

    names = [m.name for m in pkgutil.walk_packages(madpo.__path__, "madpo.") if not m.name.endswith("__main__")]
    for name in names:
        importlib.import_module(name)
    return names


def chain(root: Path) -> list[str]:
    """Check, reward, score, inspect, train (cut off, continued), evaluate; SFT and a policy of the study."""
    import soak
    from madpo.commands.cli import main
    from madpo.models.load import build_tiny
    from practice_cases import text_pairs, write

    done = []

    def run(*words: object) -> None:
        assert main([str(word) for word in words]) == 0, words
        done.append(str(words[0]))

    model = build_tiny("llama", root / "model", seed=1)
    data = write(root / "pairs.jsonl", text_pairs(24))
    prompts = write(root / "prompts.jsonl", [{"prompt": f"The film {i} is"} for i in range(3)])
    base = ("--model_name_or_path", model)
    run("check", data, "--tokenizer", model)
    run("reward", data, *base, "--output_dir", root / "R", "--epochs", "0.5", "--eval_share", "0.4", "--lora_rank", "2")
    run("score", data, "--reward_model", root / "R", "--output_dir", root / "S")
    scored = root / "S" / "scored.jsonl"
    run("inspect", scored)
    short = (
        "--loss",
        "madpo",
        "--lora.rank",
        "2",
        "--args.max_steps",
        "4",
        "--args.bf16",
        "false",
        "--args.save_steps",
        "2",
    )
    _cut_off(run, "train", scored, *base, "--output_dir", root / "P", *short)
    run("train", scored, *base, "--output_dir", root / "P", *short)
    run("evaluate", root / "P", "--prompts", prompts, "--reward", root / "R", "--output_dir", root / "E",
        "--max_new_tokens", "4")  # fmt: skip
    (root / "stages").mkdir()
    soak.prepare(root / "stages")
    for kind in ("sft", "beta_dpo"):
        soak.train(kind, root / "stages", root / "stages" / "out" / kind, {"epochs": 1})
        done.append(kind)
    return done


def control() -> dict[str, int]:
    """What the audit sees when something is unpickled and a socket connects: otherwise its silence proves nothing."""
    before = {kind: len(seen) for kind, seen in SEEN.items()}
    pickle.loads(pickle.dumps(Path("x")))
    with socket.socket() as door:
        door.settimeout(1)
        door.connect_ex(("127.0.0.1", 9))
    counts = {kind: len(seen) - before[kind] for kind, seen in SEEN.items()}
    for kind, count in before.items():
        del SEEN[kind][count:]
    return counts


def _cut_off(run, *words) -> None:
    from madpo.training.run import _Watch

    real = _Watch.on_log

    def on_log(self, args, state, control, logs, **kwargs):
        real(self, args, state, control, logs, **kwargs)
        if state.global_step >= 3:
            raise KeyboardInterrupt

    _Watch.on_log = on_log
    try:
        run(*words)
    except AssertionError:
        return
    finally:
        _Watch.on_log = real
    raise SystemExit("the training was not interrupted")


def main() -> None:
    """``offline_chain.py FOUND.json``."""
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
    sys.addaudithook(watch)
    modules = import_everything()
    with tempfile.TemporaryDirectory() as name:
        os.environ["MADPO_CACHE"] = str(Path(name) / "cache")
        ran = chain(Path(name))
    import madpo

    found = {"control": control(), "seen": SEEN, "madpo": madpo.__file__, "modules": modules, "ran": ran}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
