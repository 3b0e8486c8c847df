"""What a policy says of pairs before it is trained on them."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from madpo.losses import DPO
from madpo.models.engine.logprobs import completion_logps
from madpo.models.load import load_model, load_tokenizer
from madpo.training import PreferenceConfig, PreferenceTrainer
from madpo.training.columns import DataCollatorForPreference
from madpo.training.first_look import FirstLook, in_halves

pytestmark = pytest.mark.usefixtures("module_cache", "module_float32")


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.integers(0, 5))
def test_the_prompts_of_the_second_half_come_after_those_of_the_first(prompts: list[int], seed: int) -> None:
    rows = list(range(len(prompts)))
    order = in_halves(rows, prompts, seed)
    assert sorted(order) == rows
    assert order == in_halves(rows, prompts, seed)
    names = len(set(prompts))
    ends = [k for k in range(len(rows) + 1) if not {prompts[i] for i in order[:k]} & {prompts[i] for i in order[k:]}]
    assert any(len({prompts[i] for i in order[:k]}) == names // 2 for k in ends)


def test_only_new_prompts_of_the_second_half_decide_and_repeats_do_not_count() -> None:
    look, accelerator = FirstLook(), Accelerator(cpu=True)
    batches = [([5, 3], [0.1, 0.2]), ([4, 1], [0.3, 0.4]), ([0, 2], [0.5, 0.6]), ([7, 7], [0.7, 0.8])]
    for pairs, margins in batches:
        counted = torch.tensor([True, pairs != [7, 7]])
        look.note(accelerator, pairs, torch.tensor(margins), counted)
    prompts = {5: "a", 3: "b", 4: "a", 1: "c", 0: "c", 2: "d", 7: "e"}
    # Seven count, so those from the fourth on decide: pair 1, but not pair 0 of the same prompt.
    expected = {1: 0.4, 2: 0.6, 7: 0.7}
    assert look.deciding(prompts) == pytest.approx(expected)
    again = FirstLook()
    again.load(look.state())
    assert again.deciding(prompts) == look.deciding(prompts)
    again.load({})
    assert again.state() == {}


def test_a_trainer_notes_the_margins_from_before_each_step(llama, tmp_path) -> None:
    draw = np.random.default_rng(0)
    rows = [
        {
            "pair_id": i,
            **{f"{name}_ids": draw.integers(10, 300, 5).tolist() for name in ("prompt", "chosen", "rejected")},
        }
        for i in range(8)
    ]

    def trained(steps: int, look: FirstLook | None) -> PreferenceTrainer:
        trainer = PreferenceTrainer(
            load_model(llama, dtype=torch.float32),
            args=PreferenceConfig(
                output_dir=str(tmp_path / f"{steps}"), max_steps=steps, per_device_train_batch_size=2,
                learning_rate=1e-2, lr_scheduler_type="constant", train_sampling_strategy="sequential",
                save_strategy="no", report_to="none", use_cpu=True, bf16=False, max_length=None,
            ),
            loss=DPO(beta=0.5),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(llama),
        )  # fmt: skip
        trainer.first_look = look
        trainer.train()
        return trainer

    look = FirstLook()
    trained(8, look)  # two epochs, of which the first counts
    found = look.deciding({i: i for i in range(8)})
    assert [*found] == [4, 5, 6, 7]
    before = trained(3, None)
    batch = DataCollatorForPreference(pad_token_id=0)([before.train_dataset[i] for i in (6, 7)])
    with torch.no_grad():
        triple = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
        chosen, rejected = completion_logps(before.model.eval(), *triple, pairs=True).logps.chunk(2)
    reference = batch["ref_chosen_logps"] - batch["ref_rejected_logps"]
    expected = 0.5 * (chosen - rejected - reference)
    assert [found[6], found[7]] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    assert abs(found[6]) > 1e-4
