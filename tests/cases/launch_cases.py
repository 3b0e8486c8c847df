"""What two processes and one must do alike; run by a launcher, by a fork, or by a test itself."""

import contextlib
import functools
import io
import json
import os
import signal
import socket
import sys
import types
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from torch.nn.attention import flex_attention as flex
from transformers import AutoModelForCausalLM, TrainerCallback

from losses_cases import EVERY_LOSS, UNION, first_of_each_class
from madpo import DPO, MADPO, PreferenceConfig, PreferenceTrainer
from madpo.commands.cli import main
from madpo.core import processes
from madpo.losses import Custom
from madpo.models.engine import packed_attention
from madpo.models.load import load_tokenizer
from madpo.operations import scoring
from madpo.training import checkpoints as disk
from trainer_settings import QUIET

BATCH = 8  # pairs per optimiser step, over all processes
PAIRS = 21  # two full steps and one of 5, of which the second process has one pair and repeats others
HELDOUT = 5
LIMIT = 12  # tokens; one pair has a prompt that leaves no room for completions
PART = 8  # pairs per part of `madpo score`


def pairs(count, seed, *, positive=False):
    """Rows with every column that a loss may need; ODPO's offset is a logarithm and wants positive margins."""
    generator = np.random.default_rng(seed)

    def ids(low, high):
        return [int(i) for i in generator.integers(5, 200, generator.integers(low, high))]

    rows = [
        {
            "pair_id": 100 + i,
            "prompt_ids": ids(2, 5),
            "chosen_ids": ids(1, 7),
            "rejected_ids": ids(1, 7),
            "reward_margin": (abs if positive else float)(float(generator.normal(1, 3))),
            "chosen_score": float(generator.normal(6, 1)),
            "rejected_score": float(generator.normal(4, 1)),
            "weight": float(generator.choice([0.5, 1.0, 2.0])),
            # Apart from the policy: a log-ratio of pure rounding is not the same in batches of other lengths.
            "ref_chosen_logps": float(generator.normal(-25, 5)),
            "ref_rejected_logps": float(generator.normal(-25, 5)),
        }
        for i in range(count)
    ]
    rows[3]["prompt_ids"] = ids(LIMIT, LIMIT + 1)
    return Dataset.from_list(rows)


def trainer_of(
    folder,
    out,
    loss,
    *,
    micro,
    accumulation,
    dropout=0.0,
    reference=True,
    peft=True,
    collator=None,
    data=None,
    **changes,
):
    settings = {
        **QUIET,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": LIMIT,
        "pair_weights": True,
        "adam_epsilon": 1e-5,  # a gradient that is only rounding must not become a step of full length
    }
    train, heldout = (pairs(n, seed, positive=loss.kind == "odpo") for seed, n in enumerate((PAIRS, HELDOUT)))
    if data is not None:
        train, heldout = data, None
    if not reference:
        train, heldout = train.remove_columns(["ref_chosen_logps", "ref_rejected_logps"]), None
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=PreferenceConfig(output_dir=str(out), **{**settings, **changes}),
        loss=loss,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=load_tokenizer(folder),
        data_collator=collator,
        peft_config=lora if peft else None,
    )


OWN = Custom(target="madpo.losses:BetaDPO", parameters={"keep": 0.5})
CLASSES = {name: (EVERY_LOSS[name], 2) for name in ("madpo", "beta_dpo")}
"""Name -> (loss, micro-batches per step), of ``make test``: a sum over pairs, and statistics of a step."""

_REST = dict.fromkeys((*first_of_each_class(), *UNION, "beta_dpo-official"))
OTHERS = {name: (EVERY_LOSS[name], 2) for name in _REST if name in EVERY_LOSS and name not in CLASSES}
OTHERS |= {"custom": (Custom(target="madpo.losses:BetaDPO", parameters={"keep": 0.5}), 2)}
OTHERS |= {f"{name}, one micro-batch": (EVERY_LOSS[name], 1) for name in ("dpo", "beta_dpo", "alpha_dpo")}
"""The rest of the union, and of what a trainer does."""


def columns(folder: Path, out: Path) -> dict[str, list[float]]:
    """Reference columns of 21 pairs in batches of 4: six batches, the last of one pair. Margins of 18 pairs."""
    trainer = trainer_of(folder, out / "columns", DPO(), micro=4, accumulation=1, reference=False)
    found = {name: list(trainer.train_dataset[name]) for name in ("ref_chosen_logps", "ref_rejected_logps")}
    known = trainer.train_dataset.remove_columns([*found, "reward_margin"]).select(range(18))
    probed = PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=PreferenceConfig(output_dir=str(out / "probed"), **QUIET, per_device_train_batch_size=4),
        loss=MADPO(),
        train_dataset=known,
        processing_class=load_tokenizer(folder),
    )
    return {**found, "reward_margin": list(probed.train_dataset["reward_margin"])}


def score(out: Path, name: str) -> int:
    """``madpo score`` of ``out/pairs.jsonl``."""
    scoring.PART = PART
    place = ["--reward_model", str(out / "reward"), "--output_dir", str(out / name)]
    return main(["score", str(out / "pairs.jsonl"), *place])


def probed(folder: Path, out: Path) -> int:
    """``madpo score --probe`` of the same pairs."""
    scoring.PART = PART
    return main(["score", str(out / "pairs.jsonl"), "--probe", str(folder), "--output_dir", str(out / "probed")])


def auto(folder: Path, out: Path) -> int:
    """``madpo train`` with no loss named, on the same pairs without margins, in steps of 8 pairs."""
    args = {"bf16": "false", "num_train_epochs": "1", "learning_rate": "1e-2", "adam_epsilon": "1e-5"}
    args |= {"per_device_train_batch_size": str(BATCH // processes.world_size()), "max_steps": "2"}
    args["precompute_ref_batch_size"] = str(BATCH)
    options = [word for name, value in args.items() for word in (f"--args.{name}", value)]
    place = ["--model_name_or_path", str(folder), "--output_dir", str(out / "auto"), "--loss.kl", "0.01"]
    short = ["--loss.kl_prompts", "2", "--loss.kl_tokens", "4", "--lora.rank", "2", "--dtype", "float32"]
    return main(["train", str(out / "pairs.jsonl"), *place, *short, *options])


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def trajectories(folder: Path, out: Path, processes: int, cases: dict) -> dict:
    """Of every case the logged rows, the evaluation, the loss's statistics and the final weights."""
    found = {}
    for name, (loss, accumulation) in cases.items():
        micro = BATCH // accumulation // processes
        trainer = trainer_of(folder, out / "trainer", loss, micro=micro, accumulation=accumulation)
        with contextlib.redirect_stdout(io.StringIO()):  # transformers prints every row
            trainer.train()
            evaluation = trainer.evaluate()
        clock = ("runtime", "per_second")
        rows = [{k: v for k, v in row.items() if not k.endswith(clock)} for row in trainer.state.log_history]
        found[name] = {
            "rows": rows,
            "evaluation": {k: v for k, v in evaluation.items() if not k.endswith(clock)},
            "state": {k: float(v) for k, v in trainer.loss_state.state_dict().items()},
            "weights": {k: v.flatten().tolist() for k, v in weights(trainer).items()},
        }
    return found


def launched(folder: Path, out: Path) -> None:
    """What each process of a launch does, ending with mistakes that one of them meets."""
    os.chdir(out)
    out = Path()
    found = {
        "columns": columns(folder, out),
        "trajectories": trajectories(folder, out, processes.world_size(), CLASSES),
    }
    (out / f"{processes.rank()}.json").write_text(json.dumps(found))
    assert score(out, "scored") == score(out, "continued") == score(out, "scored") == probed(folder, out) == 0
    if processes.rank() == 1:
        load = scoring.load_scorer

        def diverged(*args, **kwargs):
            scorer = load(*args, **kwargs)
            torch.nn.init.constant_(scorer.model.inner.score.weight, float("inf"))
            return scorer

        scoring.load_scorer = diverged
    assert score(out, "diverged") == 2
    # A mistake in a training reaches the other process as a broken connection. As if started again: one more sentence.
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    settings = ("--args.bf16", "false", "--dtype", "float32", "--epochs", "1", "--batch_size", "2", "--loss", "dpo")
    place = ["--model_name_or_path", str(folder), "--output_dir", str(out / "policy")]
    raise SystemExit(main(["train", str(out / "broken.jsonl"), *place, *settings]))


def others(folder: Path, out: Path) -> None:
    """The trajectories that ``launched`` leaves out, and ``auto``."""
    os.chdir(out)
    found = trajectories(folder, Path(), processes.world_size(), OTHERS)
    Path(f"{processes.rank()}.json").write_text(json.dumps(found))
    assert auto(folder, Path()) == 0


# ---- Launches from one process: for the price of a second each, instead of ten ----

RESUMED = EVERY_LOSS["beta_dpo"]  # with statistics, and random states of two processes through dropout
FULL_SETTINGS = {"micro": 2, "accumulation": 2, "peft": False, "learning_rate": 1e-3}


def launch(work) -> dict[int, int]:
    """``work()`` in two processes by torchrun's own launcher; exit codes by process, {} if all went well."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    place = {"rdzv_backend": "static", "rdzv_endpoint": f"127.0.0.1:{port}", "rdzv_configs": {"rank": 0}}
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", max_restarts=0, local_addr="127.0.0.1", **place
    )
    try:
        elastic_launch(config, work)()
    except ChildFailedError as error:
        return {number: failure.exitcode for number, failure in error.failures.items()}
    return {}


class Dies(TrainerCallback):
    """Ends one process by SIGKILL, in the middle of a step or when its checkpoint is about to get its name."""

    def __init__(self, rank, step, *, saving=False):
        self.rank, self.step, self.saving = rank, step, saving

    def on_substep_end(self, args, state, control, **kwargs):
        if processes.rank() == self.rank and state.global_step + 1 == self.step:
            if self.saving:
                disk.os = types.SimpleNamespace(**{**vars(os), "rename": self.die})
            else:
                self.die()

    def die(self, *names):
        print(f"process {self.rank} dies", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def resumable(folder: Path, out: Path, death: Dies | None = None) -> None:
    """Six steps, a checkpoint every second; goes on from the newest. Leaves what the training came to."""
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    trainer = trainer_of(folder, out, RESUMED, micro=2, accumulation=2, dropout=0.1, **settings)
    trainer.export_checkpoints = False
    if death:
        trainer.add_callback(death)
    trainer.train(resume_from_checkpoint=True if disk.folders(out) else None)
    clock = ("runtime", "per_second")
    rows = [{k: v for k, v in row.items() if not k.endswith(clock)} for row in trainer.state.log_history]
    (out / f"rows{processes.rank()}.json").write_text(json.dumps(rows, sort_keys=True))
    disk.save_tensors(weights(trainer), out / f"weights{processes.rank()}.safetensors")


def open_fsdp() -> dict:
    """Settings of FSDP2. accelerate keeps FSDP from processors, though torch can do it: this opens that gate."""
    made, plugins = AcceleratorState.__init__, []

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        plugins.extend(plugin for plugin in (kwargs.get("fsdp_plugin"),) if plugin is not None)
        if plugins:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]

    AcceleratorState.__init__ = init
    wrapping = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "FULL_STATE_DICT",
    }
    return {"fsdp": True, "fsdp_config": wrapping}


def sharded(folder: Path, out: Path, loss, **settings) -> None:
    """The same under FSDP2."""
    trainer = trainer_of(folder, out / "trainer", loss, **open_fsdp(), **settings)
    trainer.train()
    assert trainer.sharded
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
    found = {"losses": [row["loss"] for row in trainer.state.log_history if "loss" in row], **trainer.evaluate()}
    trainer.save_model(str(out / "saved"))
    if processes.is_main_process():
        (out / "found.json").write_text(json.dumps(found))


def long_course(folder: Path, out: Path, micro: int, **settings) -> dict:
    """Losses and final weights of two steps of 4 pairs, each longer than a block of FlexAttention."""
    generator = np.random.default_rng(3)
    names, columns = ("prompt_ids", "chosen_ids", "rejected_ids"), ("ref_chosen_logps", "ref_rejected_logps")
    rows = [
        {name: generator.integers(5, 200, generator.integers(45, 90)).tolist() for name in names}
        | dict.fromkeys(columns, -100.0)
        | {"weight": 1.0}
        for _ in range(8)
    ]
    settings = {"max_length": None, "num_train_epochs": 1, **settings}
    data = Dataset.from_list(rows)
    trainer = trainer_of(folder, out / "trainer", DPO(), micro=micro, accumulation=1, data=data, **settings)
    trainer.train()
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in weights(trainer).items()}
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"losses": losses, "weights": {name: p.flatten().tolist() for name, p in whole.items()}}


def flexed(folder: Path, out: Path, *, fsdp: bool) -> None:
    """The same in one of two processes, with FlexAttention, whose operator has gradients on a processor as well."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].shape[2])
        return flex.flex_attention(*args, **kwargs)

    os.environ[packed_attention.ATTENTION] = "flex"
    flex._validate_device, packed_attention._compiled_flex = lambda *tensors: None, lambda device: counted
    found = long_course(folder, out, 2, **(open_fsdp() if fsdp else {}))
    (out / f"{processes.rank()}.json").write_text(json.dumps(found | {"calls": calls}))


def drive_flexed(folder: Path, out: Path) -> None:
    """Both launches of that, from one process."""
    for name in ("ddp", "fsdp"):
        (out / name).mkdir()

        @functools.wraps(flexed)
        def entry(name=name):
            flexed(folder, out / name, fsdp=name == "fsdp")

        if ended := launch(entry):
            raise SystemExit(f"{name}: {ended}")


def drive(folder: Path, out: Path, slow: bool) -> None:
    """The other launches, from one process that has loaded the libraries; prints how each ended."""

    def run(name, work, *arguments, **settings):
        @functools.wraps(work)
        def entry():
            work(folder, out / name, *arguments, **settings)

        ended = launch(entry)
        print(json.dumps([name, ended, sorted(path.name for path in (out / name).iterdir())]), flush=True)

    if not slow:
        run("two", launched)
        return
    run("others", others)
    run("whole", resumable)
    for name, death in (("step", Dies(1, 4)), ("saving", Dies(0, 4, saving=True))):
        run(name, resumable, death)
        run(name, resumable)
    run("fsdp", sharded, EVERY_LOSS["beta_dpo"], micro=2, accumulation=2)
    run("fsdp-full", sharded, DPO(), **FULL_SETTINGS)
