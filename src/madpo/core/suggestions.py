"""The nearest known name for a wrong one: names that other tools use for the same thing, then close matches."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Our name -> what other tools call it. The first of our names that the place knows is suggested.
_ELSEWHERE = {
    # losses
    "dpo": "sigmoid dpo_loss cdpo",
    "rdpo": "robust robust_dpo",
    "madpo": "margin_adaptive",
    "soft_dpo": "mmpo",
    # options
    "data": "dataset dataset_name dataset_path train_data train_dataset train_file input input_file",
    "eval_data": "eval_dataset eval_file validation_file validation_data test_data valid_data",
    "eval_share": "test_split_size test_size val_size validation_split eval_split",
    "reference": "ref_model ref_model_name_or_path reference_model ref",
    "model": "ref_model ref_model_name_or_path reference_model ref model_id model_name model_path base_model",
    "loss": "loss_type loss_fn objective",
    "loss.margin_temperature": "bt_beta",
    "qlora": "load_in_4bit use_qlora quantize quantization bits",
    "full": "full_finetune full_finetuning no_lora",
    "dtype": "torch_dtype precision",
    "lora.rank": "r lora_dim",
    "learning_rate": "lr",
    "epochs": "num_epochs n_epochs num_train_epochs",
    "batch_size": "bs batch train_batch_size per_device_batch_size",
    "max_length": "max_seq_length max_seq_len max_len max_prompt_length max_completion_length cutoff_len",
    "optimisation.warmup": "warmup_ratio warmup_steps",
    "args.warmup_steps": "warmup_ratio",
    "micro_batch_size": "per_device_train_batch_size",
    "report_to": "wandb tensorboard use_wandb",
    "seed": "random_seed random_state",
    "merge": "merge_lora merge_adapter merge_and_unload save_merged",
    "output_dir": "out output save_dir output_path outdir o",
    "output": "out output_dir html",
    "overwrite": "force overwrite_output_dir",
    "reward_model": "rm reward reward_model_path reward_model_name_or_path",
    "folds": "k k_folds cv n_folds",
    "trials": "n_trials num_trials",
    "samples_per_prompt": "n num_samples n_samples num_return_sequences",
    "max_new_tokens": "max_tokens max_response_length",
    "prompts": "prompts_file prompt_file",
    "score_columns": "score_column chosen_score rejected_score",
    "processes": "n_jobs num_workers workers num_proc",
    "size": "vocab_size vocabulary_size",
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` most likely means, both dotted or not; None where nothing comes near."""
    names = list(known)
    last = word.rpartition(".")[2]
    for ours, theirs in _ELSEWHERE.items():
        if ours in names and last in theirs.split():
            return ours
    by_end = {name.rpartition(".")[2]: name for name in reversed(names)}
    if last in by_end and last.isidentifier():
        return by_end[last]
    close = difflib.get_close_matches(word, names, n=1) or difflib.get_close_matches(last, by_end, n=1)
    return by_end.get(close[0], close[0]) if close else None


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean 'x'?"`` for a near miss, else ``""``."""
    near = nearest(word, known)
    return f"; did you mean {prefix + near!r}?" if near else ""
