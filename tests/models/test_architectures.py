"""Every causal family of transformers against its own forward pass: log-probabilities, adapters' gradients, dropout.

The plain forward pass of one row at a time in float32 is the truth. Log-probabilities and gradients of pairs, packed or
padded, must meet it, in float32 and in bfloat16, whatever the neighbours of a pair are.
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from families import CAUSAL, UNBUILT, VOCABULARY, tiny
from madpo.core.errors import ConfigError
from madpo.losses import DPO, LossInputs
from madpo.models.adapters import adapter_config
from madpo.models.engine.logprobs import completion_logps, install_completion_head
from madpo.models.hyperparameters import LoRA
from madpo.models.modes import without_own_noise
from quick import quick
from refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore")
FAST = ["gpt_oss", "llama", "opt", "qwen3_5_text"]
OTHER_HEAD = (
    "bert big_bird camembert data2vec-text electra ernie megatron-bert modernbert-decoder prophetnet rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
)
LOOK_AHEAD = ["cpmant", "xlm", "xlnet"]
UNREAD = ["reformer"]  # which takes no text as short as the one that decides
REFUSED = [*OTHER_HEAD.split(), *LOOK_AHEAD, *UNREAD]
KEEPS_STATE = (  # recurrences and convolutions over tokens
    "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3 mamba "
    "mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next "
    "recurrent_gemma rwkv xlstm zamba zamba2 zaya"
)
SHARES = (  # sinks, soft caps, sliding windows and mixtures among them
    "cohere2 deepseek_v3 flint gemma2 gemma3 gemma3_text gemma4_text glm4_moe gpt2 gpt_neox gpt_oss granite "
    "granite_swa granitemoe_swa llama mimo_v2_flash mistral mixtral nemotron olmoe opt phi3 phimoe qwen2 qwen3 "
    "qwen3_moe seed_oss smollm3 stablelm starcoder2"
)
NOT_IN_HALF = ["xglm"]  # its own forward adds float32 positions, which bfloat16 norms do not take on a processor
PAIR, SHORT, LONG = (1, (9, 7, 11)), (2, (14, 4, 3)), (3, (3, 12, 9))
"""Pairs: a seed, and the tokens of prompt, chosen and rejected completion."""
WEIGHTS = torch.tensor([1.0, -0.5, -1.0, 0.7])

Rows = list[Tensor]


READ = quick([f for f in sorted(CAUSAL) if f not in UNBUILT and f not in REFUSED], *FAST)


def rows(*pairs: tuple[int, tuple[int, int, int]], left: bool = False) -> Rows:
    """Ids, attention and completion masks: chosen rows, then rejected ones."""

    def draw(seed: int, count: int) -> Tensor:
        return torch.randint(4, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))

    texts = [
        (draw(seed, prompt), draw(1000 * side + seed, completions[side - 1]))
        for side in (1, 2)
        for seed, (prompt, *completions) in pairs
    ]
    length = max(len(prompt) + len(completion) for prompt, completion in texts)
    found = [torch.zeros(len(texts), length, dtype=torch.long) for _ in range(3)]
    for row, (prompt, completion) in enumerate(texts):
        size = len(prompt) + len(completion)
        start = length - size if left else 0
        for column, values in zip(
            found,
            (torch.cat([prompt, completion]), torch.ones(size), torch.arange(size) >= len(prompt)),
            strict=True,
        ):
            column[row, start : start + size] = values.long()
    return found


def plain(model: nn.Module, batch: Rows) -> Tensor:
    """Completion log-probabilities from the model's own logits, one row at a time and without padding."""
    found = []
    for ids, attended, scored in zip(*batch, strict=True):
        ids, scored = ids[attended.bool()], scored[attended.bool()]
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        tokens = F.log_softmax(logits, -1)[:-1].gather(1, ids[1:, None]).squeeze(1)
        found.append((tokens * scored[1:]).sum())
    return torch.stack(found)


def packed(model: nn.Module, batch: Rows) -> Tensor:
    return completion_logps(model, *batch, pairs=True).logps


def padded(model: nn.Module, batch: Rows) -> Tensor:
    return completion_logps(model, *batch).logps


def adapted(model: nn.Module) -> nn.Module:
    """With the adapter that a training would have, far from zero, and weights that bfloat16 can hold."""
    with torch.random.fork_rng(devices=[]):  # PEFT draws lora_A from the global generator
        torch.manual_seed(1)
        found = get_peft_model(model, adapter_config(LoRA(rank=2, alpha=4), model, "CAUSAL_LM")).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
            parameter.copy_(parameter.bfloat16())
    return found


def measured(
    model: nn.Module, logps: Callable[[nn.Module, Rows], Tensor], batch: Rows, half: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the gradient of their weighted sum with respect to the adapter."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = logps(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((found.float() * WEIGHTS).sum(), trained, allow_unused=True)
    flat = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(trained, gradients, strict=True)]
    return found.detach().float(), torch.cat(flat).float()


def apart(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Nats between log-probabilities, and the distance of the gradients in parts of their norm."""
    return float((found[0] - wanted[0]).abs().max()), float((found[1] - wanted[1]).norm() / wanted[1].norm())


@pytest.mark.parametrize("family", READ)
def test_log_probabilities_and_gradients_are_those_of_the_plain_forward_pass(family: str) -> None:
    model = adapted(tiny(family, loud=3))
    both, other, turned = rows(SHORT, PAIR), rows(LONG, PAIR), rows(SHORT, PAIR, left=True)
    half = copy.deepcopy(model)
    truth = measured(copy.deepcopy(model), plain, both)
    assert float(truth[1].norm()) > 1e-4
    for logps, batch in ((packed, both), (padded, both), (padded, turned)):
        nats, share = apart(measured(model, logps, batch), truth)
        assert nats < 1e-4, (logps, nats)
        assert share < 1e-4, (logps, share)
    shares = model.get_base_model()._madpo_packs if hasattr(model.get_base_model(), "_madpo_packs") else False
    assert shares or family not in SHARES.split()
    assert not (shares and family in KEEPS_STATE.split())
    with torch.no_grad():
        assert float((packed(model, other)[[1, 3]] - truth[0][[1, 3]]).abs().max()) < 1e-4
    if family in NOT_IN_HALF:
        return
    for parameter in half.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    rounding = apart(measured(copy.deepcopy(half), plain, both, half=True), truth)
    for logps, batch in ((packed, both), (padded, both), (padded, turned)):
        nats, share = apart(measured(half, logps, batch, half=True), truth)
        # A mixture may route a single token otherwise after rounding, which moved a gradient by 0.22 of its norm where
        # only rounding moved it by 0.02. What is wrong shows in float32, above.
        assert nats < 3 * rounding[0] + 0.2, (logps, nats, rounding)
        assert share < 3 * rounding[1] + 0.25, (logps, share, rounding)
    assert getattr(half.get_base_model(), "_madpo_packs", False) == shares
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        only = packed(half, rows(PAIR))
        for batch in (both, other):  # products of other shapes may round otherwise
            assert float((packed(half, batch)[[1, 3]] - only).abs().max()) < 3 * rounding[0] + 0.2


@pytest.mark.parametrize("family", READ)
def test_training_starts_at_the_reference(family: str) -> None:
    """With every dropout of a family at 0.4: the numbers of training are those of evaluation, to the last bit."""
    model, batch = tiny(family, noise=0.4, loud=3), rows(SHORT, PAIR)
    weights = [p for p in model.parameters() if p.requires_grad]
    reference = packed(model.eval(), batch)
    wanted = torch.autograd.grad((reference * WEIGHTS).sum(), weights, allow_unused=True)
    reference = reference.detach()
    model.train()
    checkpointed: list[nn.Module] = []
    if model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                layer._gradient_checkpointing_func = noted(layer, layer._gradient_checkpointing_func, checkpointed)
    with without_own_noise(model):
        policy = packed(model, batch)
    assert all(module.training for module in model.modules())
    assert policy.equal(reference)
    found = torch.autograd.grad((policy * WEIGHTS).sum(), weights, allow_unused=True)  # recomputes the layers
    assert bool(checkpointed) == model.supports_gradient_checkpointing
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    chosen, rejected = policy.detach().chunk(2)
    one = torch.ones(2)
    pairs = LossInputs(chosen, rejected, *reference.chunk(2), chosen_lengths=one, rejected_lengths=one)
    assert DPO()(pairs, None).per_pair.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)


def noted(layer: nn.Module, checkpoint: Callable, calls: list[nn.Module]) -> Callable:
    def called(*args: object, **kwargs: object) -> object:
        calls.append(layer)
        return checkpoint(*args, **kwargs)

    return called


@pytest.mark.parametrize("family", quick(REFUSED))
def test_families_that_would_be_read_wrongly_are_refused(family: str) -> None:
    model = tiny(family, loud=3)
    with refused(ConfigError, type(model).__name__) as caught:
        install_completion_head(model)
    assert ("is_decoder" in str(caught.value)) == (family in LOOK_AHEAD)
    assert (caught.value.__cause__ is not None) == (family in UNREAD)


@pytest.mark.slow
@pytest.mark.parametrize("family", UNBUILT)
def test_only_families_that_cannot_be_built_are_left_out(family: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError, ImportError, StrictDataclassError)):
        tiny(family, loud=3)(input_ids=torch.tensor([[4, 5, 6]]))
