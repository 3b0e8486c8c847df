"""Lean layers against the modules that they replace: values, gradients, what is kept, and when they are not used."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from engine_cases import PAIRS, build, pair_batch
from madpo.models.engine import memory_efficient as lean
from madpo.models.engine import norms
from madpo.models.engine.logprobs import completion_logps
from quick import quick

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(family: str = "gemma3", dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A tiny model with an adapter that changes its output."""
    torch.manual_seed(3)
    model = build(family).to(dtype)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, **options)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "norm" in name and "weight" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def both_ways(model: nn.Module, **rows) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probabilities and gradients of the trained parameters: plain and lean."""
    found = []
    for install in (False, True):
        copied = copy.deepcopy(model)
        if install:
            lean.install(copied)
        inner = copied.get_base_model()
        inner._madpo_packs = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lean, "install", lambda _: None)
            logps = completion_logps(copied, **rows, pairs=True).logps
        weight = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
        trained = [p for p in copied.parameters() if p.requires_grad]
        found.append([logps.detach(), *torch.autograd.grad((logps * weight).sum(), trained)])
    return found[0], found[1]


@pytest.mark.parametrize("family", quick(["gemma3", "llama", "qwen3", "mistral"], "gemma3", "llama"))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_values_and_gradients_are_those_of_the_plain_modules(family, dtype, bound):
    plain, fast = both_ways(adapted(family, dtype), **pair_batch(PAIRS, "right"))
    assert max(float(g.abs().max()) for g in plain[1:]) > 1e-3
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * float(b.abs().max()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_give_the_same_gradients(reentrant):
    model, rows = adapted("gemma3", torch.float32), pair_batch(PAIRS, "right")
    weight = torch.linspace(-1, 2, 2 * len(PAIRS))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        (completion_logps(model, **rows, pairs=True).logps * weight).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in trained.items()}

    wanted = gradients()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name, found in gradients().items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-4 * float(wanted[name].abs().max()))


def test_under_autocast_the_plain_modules_are_met_within_their_rounding():
    """bfloat16 layers, float32 adapters: both are compared with float64."""
    exact = adapted("gemma3")
    rows = pair_batch(PAIRS, "right")
    half = copy.deepcopy(exact).to(torch.bfloat16)
    for name, parameter in half.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    for parameter, rounded in zip(exact.parameters(), half.parameters(), strict=True):
        parameter.data = rounded.data.double()
    truth = both_ways(exact, **rows)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, fast = both_ways(half, **rows)
    errors = [
        [float((found.double() - wanted).norm() / wanted.norm()) for found in both]
        for wanted, *both in zip(truth, plain, fast, strict=True)
    ]
    # Rounding falls otherwise in either, so one tensor tells little; over all they are alike.
    for error, ours in errors:
        assert ours <= 3 * error + 1e-3
    error, ours = (sum(column) for column in zip(*errors, strict=True))
    assert ours <= 1.2 * error


def counted(model: nn.Module, **rows) -> int:
    """Bytes that autograd keeps of the decoder's forward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.get_base_model().model(**rows)
    return sum(kept.values())


def test_a_third_less_is_kept_for_the_backward_pass():
    model = adapted("gemma3", torch.bfloat16)
    ids = torch.arange(60).view(1, -1) % 50
    plain = counted(model, input_ids=ids)
    lean.install(model)
    assert counted(model, input_ids=ids) < 0.62 * plain


@pytest.mark.parametrize("changed", [False, True])
def test_rows_of_a_norm_are_computed_again_unless_they_were_changed(changed):
    """Through a graph that is walked twice; nothing is left of the rows."""
    layer = adapted("llama", torch.float32).get_base_model().model.layers[0]
    lean.install(layer)
    norm, readers = layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.v_proj]
    x = torch.randn(1, 5, norm.weight.shape[0], requires_grad=True)

    def gradients(plain: bool) -> list[torch.Tensor]:
        y = norm._madpo_plain(x) if plain else norm(x)
        y = y.mul_(3) if changed else y
        loss = sum((m._madpo_plain if plain else m)(y).square().sum() for m in readers)
        found = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in readers]
        inputs = [x, *(weight for pair in found for weight in pair)]
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, inputs, retain_graph=True), first, rtol=0, atol=0)
        assert plain or norms.origin_of(y) is None or norms.origin_of(y)[2].value is None
        assert plain or (norms.origin_of(y) is None) == changed
        return list(first)

    for found, wanted in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_each_known_module_is_replaced_and_state_is_not():
    model = adapted("gemma3")
    names = list(model.state_dict())
    lean.install(model)
    lean.install(model)
    replaced = [m for m in model.modules() if hasattr(m, "_madpo_plain")]
    layers = model.config.num_hidden_layers
    # Per layer: seven projections, one MLP, four norms and those of queries and keys; one norm at the end.
    assert len(replaced) == layers * (7 + 1 + 6) + 1
    assert list(model.state_dict()) == names
    assert all(m._madpo_form == 1.0 for m in replaced if type(m).__name__.endswith("RMSNorm"))
    llama = build("llama").float()
    lean.install(llama)
    assert {m._madpo_form for m in llama.modules() if type(m).__name__.endswith("RMSNorm")} == {0.0}


@pytest.mark.parametrize(
    ("shape", "offset", "swapped"), [((2, 3, 4), 1.0, False), ((7, 4), 0.0, False), ((1, 5, 2, 4), 1.0, True)]
)
@pytest.mark.parametrize("gradients", [norms._layer_norm_gradients, norms._norm_gradients])
def test_norm_value_and_gradient(shape, offset, swapped, gradients, monkeypatch):
    """Of rows that lie together and of heads that do not, by the kernel of a processor and by the formula."""
    monkeypatch.setattr(norms, "_layer_norm_gradients", gradients)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)

    def normed(s, w):
        return norms.RMSNorm.apply(s.transpose(1, 2) if swapped else s, w, 1e-3, offset)

    x = states.transpose(1, 2) if swapped else states
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (offset + factors)
    torch.testing.assert_close(normed(states, factors), wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(normed, (states, factors))


@pytest.mark.parametrize("layout", ["rows", "heads", "cut"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_gradient_in_every_layout(dtype, layout):
    """At widths that fill a processor's registers and at one that does not; against float64."""
    for width in (64, 37):
        generator = torch.Generator().manual_seed(width)
        whole, grad = torch.randn(2, 2, 9, 3, 2 * width, generator=generator).to(dtype)
        weight = torch.randn(width, generator=generator).to(dtype)
        cut, grad = whole[..., :width], grad[..., :width]
        x = {"rows": cut.contiguous(), "heads": cut.contiguous().transpose(1, 2), "cut": cut}[layout]
        grad = grad.transpose(1, 2) if layout == "heads" else grad
        leaf, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        norms.RMSNorm.apply(leaf, leaf_weight, 1e-6, 1.0).backward(grad)
        exact, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
        value = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + exact_weight)
        value.backward(grad.double())
        bound = 1e-6 if dtype is torch.float32 else 4e-3
        for found, wanted in ((leaf.grad, exact.grad), (leaf_weight.grad, exact_weight.grad)):
            assert float((found.double() - wanted).norm() / wanted.norm()) < bound


def several() -> nn.Module:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model.double()


def changed(of_model=None, of_linear=None) -> nn.Module:
    model = adapted()
    if of_model:
        of_model(model.base_model)
    for module in model.modules():
        if of_linear and isinstance(module, nn.Linear):
            of_linear(module)
    return model


WAYS_OUT = {
    "several": several,
    "off": lambda: changed(lambda base: base.disable_adapter_layers()),
    "merged": lambda: changed(lambda base: base.merge_adapter()),
    "hooked": lambda: changed(of_linear=lambda m: m.register_forward_hook(lambda module, args, out: out * 1.5)),
    "trained": lambda: changed(of_linear=lambda m: m.weight.requires_grad_(True)),
    "dora": lambda: adapted(use_dora=True),
    "bias": lambda: adapted(lora_bias=True),
}
"""Models whose adapters are not the plain ones."""


@pytest.mark.parametrize("case", WAYS_OUT)
def test_other_calls_stay_what_they_were(case):
    model = WAYS_OUT[case]()
    ids = torch.arange(12).view(1, -1)
    wanted = model(input_ids=ids).logits
    lean.install(model)
    found = model(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if case == "trained":
        weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
        assert torch.autograd.grad(found.square().sum(), weight)[0].abs().max() > 0


def test_dropout_still_drops():
    model = adapted(lora_dropout=0.5).train()
    lean.install(model)
    ids = torch.arange(12).view(1, -1)
    first, second = model(input_ids=ids).logits, model(input_ids=ids).logits
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")])
def test_each_activation_of_a_gated_mlp(activation, bias):
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4, bias=bias) for _ in range(3))
            self.act_fn = activation

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    torch.manual_seed(0)
    mlp = MLP().requires_grad_(False)
    lean.install(mlp)
    value, _ = lean._ACTIVATIONS[mlp._madpo_form]
    assert value(torch.tensor(0.7)) == activation(torch.tensor(0.7))
    mlp = copy.deepcopy(mlp)
    mlp.double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(mlp(x), mlp._madpo_plain(x), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(mlp, (x,))


def test_gradients_may_be_watched_by_hooks():
    """As FLOP counters and sharding do."""
    model = adapted()
    lean.install(model)
    watched = [p for p in model.parameters() if p.requires_grad]
    seen = []
    torch.autograd.graph.register_multi_grad_hook(watched, seen.append)
    model(input_ids=torch.arange(12).view(1, -1)).logits.square().sum().backward()
    assert len(seen) == 1


def test_a_norm_or_mlp_of_another_form_is_not_replaced():
    class CubicRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x):
            return x**3 * self.weight

    class OddMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) + x)

    model = nn.Sequential(CubicRMSNorm(), OddMLP())
    lean.install(model)
    assert not any(hasattr(m, "_madpo_plain") for m in model)
