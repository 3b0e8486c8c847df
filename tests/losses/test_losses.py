"""Every loss: golden values, what holds for all of them, and what they refuse."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from losses_cases import CASES, EVERY_LOSS, batch, f64, with_columns
from madpo.core.errors import ConfigError, DataError
from madpo.losses import (
    DPO,
    IPO,
    MADPO,
    ODPO,
    RDPO,
    REDPO,
    RPO,
    WPO,
    AlphaDPO,
    BetaDPO,
    Custom,
    LossAdapter,
    LossConfig,
    LossInputs,
    OmniDPO,
    SimPO,
    SoftDPO,
    SoftMADPO,
)
from refusals import refused

# At beta 0.1 the cases have beta h = A 0.45, B -0.425, C 150, D 0, E -150, F 0.15. A reward margin is 2 in all of them.
GOLDEN = [
    *[(DPO(), case, value) for case, value in zip("ABDE", (0.493249, 0.928057, 0.693147, 150.0), strict=True)],
    *[
        (DPO(label_smoothing=0.1), case, value)
        for case, value in zip("ABCDE", (0.538249, 0.885557, 15.0, 0.693147, 135.0), strict=True)
    ],
    *[(IPO(), case, value) for case, value in zip("ABCDE", (0.25, 85.5625, 2235025.0, 25.0, 2265025.0), strict=True)],
    *[
        (IPO(reduction="mean"), case, value)
        for case, value in zip("ABCDE", (23.7169, 26.381064, 1.0, 25.0, 81.0), strict=True)
    ],
    *[
        (RDPO(flip_rate=0.1), case, value)
        for case, value in zip("ABCDEF", (0.436999, 0.981182, -18.75, 0.693147, 168.75, 0.544689), strict=True)
    ],
    *[
        (SimPO(beta=2, gamma_beta_ratio=0.5), case, value)
        for case, value in zip("ABDE", (1.767288, 0.783112, 1.313262, 8.500203), strict=True)
    ],
    *[(SimPO(), case, value) for case, value in zip("ABDE", (1.372368, 0.542745, 0.974077, 8.000335), strict=True)],
    *[
        (SimPO(beta=10, gamma=3.0), case, value)
        for case, value in zip("ABDE", (5.902736, 0.278101, 3.048587, 40.5), strict=True)
    ],
    *[(REDPO(), case, value) for case, value in zip("ABDF", (0.523021, 0.866319, 0.693147, 0.595850), strict=True)],
    *[
        (REDPO(reliability=0.7), case, value)
        for case, value in zip("ABDF", (0.589828, 0.759771, 0.693147, 0.638501), strict=True)
    ],
    (ODPO(), "A", 0.822093),
    (ODPO(alpha=0.5), "A", 0.642771),
    (SoftDPO(), "A", 0.546890),
    (RPO(form="sq"), "A", 2.4025),
    (RPO(form="bwd_kl"), "A", 0.181556),
    (RPO(form="fwd_kl"), "A", 0.237188),
]


@pytest.mark.parametrize(("loss", "case", "value"), GOLDEN, ids=lambda x: x if isinstance(x, str) else None)
def test_golden_value(loss: LossConfig, case: str, value: float) -> None:
    per_pair = loss(batch(case, reward_margin=2.0)).per_pair
    assert per_pair.item() == pytest.approx(value, abs=5.1e-7, rel=1e-12)


@pytest.mark.parametrize(
    ("case", "gradient"),
    [("A", -0.038936), ("B", -0.060468), ("C", -7.175096e-67), ("D", -0.05), ("E", -0.1)],
)
def test_dpo_gradient(case: str, gradient: float) -> None:
    inputs = batch(case)
    DPO()(inputs).per_pair.sum().backward()
    assert inputs.policy_chosen_logps.grad is not None
    assert inputs.policy_rejected_logps.grad is not None
    assert inputs.policy_chosen_logps.grad.item() == pytest.approx(gradient, abs=5.1e-7, rel=1e-6)
    assert inputs.policy_rejected_logps.grad.item() == -inputs.policy_chosen_logps.grad.item()


def test_dpo_far_above_zero_is_tiny_and_not_zero() -> None:
    assert DPO()(batch("C")).per_pair.item() == pytest.approx(7.175096e-66, rel=1e-6)


@pytest.mark.parametrize(
    ("margin", "h", "setting", "value", "gradient"),
    [
        (3, 4.5, (4, 0.25, 7), 0.517800, -0.040874),
        (-3, 4.5, (4, 0.25, 7), 0.000138, -0.000011),
        (9, 4.5, (4, 0.25, 7), 0.476662, -0.037627),
        (-7, -4.25, (4, 0.25, 7), 0.928057, -0.060468),
        (0.5, -4.25, (2, 0.5, 2), 1.018639, -0.066370),
        (-1, 4.5, (2, 0.5, 2), 0.373342, -0.029471),
        (5, 4.5, (2, 0, 2), 0.306083, -0.024162),
        (-10000, -1500, (4, 0.25, 7), 150.0, -0.1),
        (10000, 4.5, (2, 0.5, 7), 0.493249, -0.038936),
        (10000, 4.5, (2, 0, 2), 0.246624, -0.019468),
    ],
)
def test_madpo_loss_and_gradient(
    margin: float, h: float, setting: tuple[float, float, float], value: float, gradient: float
) -> None:
    c_max, c_min, tau = setting
    case = {4.5: "A", -4.25: "B", -1500: "E"}[h]
    inputs = batch(case, reward_margin=margin)
    per_pair = MADPO(c_max=c_max, c_min=c_min, tau=tau)(inputs).per_pair
    per_pair.sum().backward()
    assert inputs.policy_chosen_logps.grad is not None
    assert per_pair.item() == pytest.approx(value, abs=5.1e-7)
    assert inputs.policy_chosen_logps.grad.item() == pytest.approx(gradient, abs=5.1e-7)


@pytest.mark.parametrize(
    ("case", "scores", "quality", "focal", "weighted", "total"),
    [
        ("A", (8, 6), 0.802184, 0.510065, 0.233868, 0.233868),
        ("B", (4, 3.5), 0.586618, 0.119915, 0.058994, 0.060500),
        ("D", (3, 2), 0.668188, 0.328473, 0.152133, 0.152133),
    ],
)
def test_omni_dpo_golden(
    case: str, scores: tuple[float, float], quality: float, focal: float, weighted: float, total: float
) -> None:
    inputs = batch(case, chosen_score=f64(scores[0]), rejected_score=f64(scores[1]))
    output = OmniDPO()(inputs)
    assert output.metrics["weight/quality"].item() == pytest.approx(quality, abs=5.1e-7)
    assert output.metrics["weight/focal"].item() == pytest.approx(focal, abs=5.1e-7)
    assert output.per_pair.item() == pytest.approx(total, abs=5.1e-7)
    assert OmniDPO(nll_weight=0)(inputs).per_pair.item() == pytest.approx(weighted, abs=5.1e-7)


def test_omni_dpo_weight_carries_a_gradient_unless_detached() -> None:
    columns = {"chosen_score": f64(8), "rejected_score": f64(6)}
    gradients, values = [], []
    for detach in (False, True):
        inputs = batch("A", **columns)
        per_pair = OmniDPO(detach_weight=detach)(inputs).per_pair
        values.append(per_pair.item())
        (gradient,) = torch.autograd.grad(per_pair.sum(), inputs.policy_chosen_logps)
        gradients.append(gradient.item())
    assert values[0] == values[1]
    # d/du [f(u) L(z)] = f' L + f L', with u and z both moving by beta/n_w = 2/30 per nat.
    u, z, q = 2 * -0.29, 2 * 0.13, torch.sigmoid(f64(1.4)).item()
    sigma = torch.sigmoid(f64(u - 0.8)).item()
    focal, logistic = (1 - sigma) ** 3, math.log1p(math.exp(-z))
    through = -3 * sigma * focal * logistic * q * 2 / 30
    assert gradients[0] - gradients[1] == pytest.approx(through, rel=1e-9)


def wpo_inputs(chosen_adjusted: float, rejected_adjusted: float) -> LossInputs:
    """Case A with the means of log sum p^2 that give the wanted length-normalised, aligned log-probs."""
    return batch(
        "A",
        chosen_log_sum_sq=f64(-42 / 30 - chosen_adjusted),
        rejected_log_sum_sq=f64(-55.5 / 50 - rejected_adjusted),
    )


@pytest.mark.parametrize(
    ("rejected", "clamped", "unclamped"),
    [(math.log(0.233398), 0.130145, 0.130145), (0.0, 0.493249, 0.557610)],
)
def test_wpo_golden(rejected: float, clamped: float, unclamped: float) -> None:
    logits = [f64(2, 0, -1), f64(0.5, 0.5, 0)]
    aligned = [
        (torch.log_softmax(row, 0)[label] - torch.softmax(row, 0).square().sum().log()).item()
        for row, label in zip(logits, (0, 1), strict=True)
    ]
    assert aligned == pytest.approx([0.149265, 0.096025], abs=5.1e-7)
    inputs = wpo_inputs(sum(aligned) / 2, rejected)
    assert WPO(beta=0.1)(inputs).per_pair.item() == pytest.approx(clamped, abs=1e-6)
    assert WPO(beta=0.1, clamp=False)(inputs).per_pair.item() == pytest.approx(unclamped, abs=1e-6)


# What holds for every loss.

AT_REFERENCE = {
    "cdpo": math.log(2),
    "ipo": 25.0,
    "ipo-mean": 25.0,
    "simpo": -math.log(1 / (1 + math.exp(0.5))),
    # w = exp(-10/10 + 1.5 - 10/10 + 2.0) = e^1.5, clamped to 1
    "wpo-unclamped": math.exp(1.5) * math.log(2),
    "madpo": 1.134872 * math.log(2),
    "odpo": math.log1p(2),
    "odpo-linear": math.log1p(math.exp(2)),
    "rpo-sq": 4.0,
    "rpo-fwd": -math.log(2) - 0.5 * (math.log(0.880797) + math.log(0.119203)),
    "rpo": math.log(2) - 0.365334,
    "omni_dpo": torch.sigmoid(torch.tensor(1.4)).item() * torch.sigmoid(torch.tensor(0.8)).item() ** 3 * math.log(2),
    "omni_dpo-detached": torch.sigmoid(torch.tensor(1.4)).item()
    * torch.sigmoid(torch.tensor(0.8)).item() ** 3
    * math.log(2),
    "alpha_dpo": math.log1p(math.exp(4)),
    "alpha_dpo-official": math.log1p(math.exp(4)),
    "alpha_dpo-paper": math.log1p(math.exp(4)),
    "bco": 2 * math.log(2),
    "combined": 1.2 * math.log(2),
}


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_value_at_the_reference(name: str) -> None:
    logps = f64(-10, -10, -10, -10)
    per_pair = EVERY_LOSS[name](with_columns(logps, logps, logps, logps)).per_pair
    expected = AT_REFERENCE.get(name, math.log(2))
    found = per_pair.tolist()
    assert found == pytest.approx([expected] * 4, abs=2e-6), f"not log 2? then AT_REFERENCE needs a value of {name}"


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_gradient_raises_the_chosen_and_lowers_the_rejected(name: str) -> None:
    # Every target is above 0 here, so at the reference each loss must ask for a wider gap.
    policy = [f64(-10, -12, -9).requires_grad_(), f64(-10, -12, -9).requires_grad_()]
    loss = EVERY_LOSS[name](with_columns(*policy, f64(-10, -12, -9), f64(-10, -12, -9))).per_pair.sum()
    chosen, rejected = torch.autograd.grad(loss, policy)
    assert (chosen < 0).all()
    assert (rejected > 0).all()
    assert torch.allclose(chosen, -rejected, rtol=1e-12)


# The detached focal weight has no finite-difference gradient: the test above gives its difference to the other form.
@pytest.mark.parametrize("name", [name for name in EVERY_LOSS if name != "omni_dpo-detached"])
def test_gradcheck(name: str) -> None:
    loss = EVERY_LOSS[name]
    policy = [f64(-14, -18, -9.5, -30).requires_grad_(), f64(-16, -13, -9, -34).requires_grad_()]
    reference = [f64(-15, -17, -9, -31), f64(-15, -14, -10, -32)]
    margin = f64(0.7, 3.0, 9.0, 2.0)
    # The batch statistics and WPO's weight are constants to the gradient: fixed at this point.
    here = with_columns(*policy, *reference, margin=margin)
    state = loss.observe(loss.statistic(here), loss.init_state(0))
    if name.startswith("wpo"):
        # A zero mean log-prob shift of both completions leaves the weight, so move only h.
        shift = f64(0, 0, 0, 0).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda d: loss(with_columns(policy[0] + d, policy[1] - d, *reference, margin=margin)).per_pair, shift
        )
        return
    assert torch.autograd.gradcheck(
        lambda chosen, rejected: loss(with_columns(chosen, rejected, *reference, margin=margin), state).per_pair,
        policy,
    )


@pytest.mark.parametrize("name", EVERY_LOSS)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_at_extremes(name: str, kind: torch.dtype) -> None:
    far = 65504.0 if kind == torch.float16 else 1e6
    sizes = [0.0, 1e-7, 1.0, 88.0, far]
    margins = [1e-6, 0.5, far] if name == "odpo" else [-far, -88.0, -7.0, 0.0, 0.5, far]
    rows = [(-a, -b, m) for a in sizes for b in sizes for m in margins]
    chosen, rejected, margin = (torch.tensor(column, dtype=kind) for column in zip(*rows, strict=True))
    policy = [chosen.requires_grad_(), rejected.requires_grad_()]
    zeros = torch.zeros(len(rows), dtype=kind)
    inputs = with_columns(*policy, zeros, zeros, margin=margin, tokens=1)
    output = EVERY_LOSS[name](inputs)
    assert torch.isfinite(output.per_pair).all()
    assert output.per_pair.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    # Gradients as the loss hands them back, in its own precision: IPO's 2 h leaves the range of float16 itself.
    widened = (inputs.policy_chosen_logps, inputs.policy_rejected_logps)
    for gradient in torch.autograd.grad(output.per_pair.sum(), widened):
        assert torch.isfinite(gradient).all()
    assert all(torch.isfinite(value).all() for value in output.metrics.values())
    assert not any(value.requires_grad for value in output.metrics.values())


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_a_completion_without_tokens_gives_no_nan(name: str) -> None:
    logps = f64(0.0, -3.0)
    inputs = with_columns(logps, logps, logps, logps, tokens=0)
    assert torch.isfinite(EVERY_LOSS[name](inputs).per_pair).all()


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_configuration_round_trip_and_purity(name: str) -> None:
    loss = EVERY_LOSS[name]
    again = LossAdapter.validate_json(LossAdapter.dump_json(loss))
    assert again == loss
    assert pickle.loads(pickle.dumps(loss)) == loss
    with pytest.raises(ValidationError):
        loss.beta = 1.0  # type: ignore[attr-defined]
    inputs = with_columns(f64(-9, -11), f64(-12, -10), f64(-10, -10), f64(-10, -10))
    assert torch.equal(loss(inputs).per_pair, again(inputs).per_pair)


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_a_missing_column_is_named(name: str) -> None:
    loss = EVERY_LOSS[name]
    if not loss.needs:
        assert torch.isfinite(loss(batch("A", "B")).per_pair).all()
        return
    with pytest.raises(ValueError, match="|".join(sorted(loss.needs))):  # the first of them that it reads
        loss(batch("A", "B"))


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_the_reference_is_read_where_the_loss_says_so(name: str) -> None:
    loss = EVERY_LOSS[name]
    policy = (f64(-9, -11, -7), f64(-12, -10, -8))
    one = loss(with_columns(*policy, f64(-10, -10, -10), f64(-10, -10, -10))).per_pair
    two = loss(with_columns(*policy, f64(-9, -12, -10), f64(-13, -10, -10))).per_pair
    assert loss.needs_reference is not torch.equal(one, two)


@pytest.mark.parametrize("name", [name for name, loss in EVERY_LOSS.items() if "reward_margin" in loss.needs])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_margin_is_refused_with_its_row(name: str, value: float) -> None:
    logps = f64(-1, -1, -1)
    with refused(DataError, ("row 1", value)):
        EVERY_LOSS[name](with_columns(logps, logps, logps, logps, margin=f64(1, value, 2)))


def test_odpo_refuses_margins_without_a_logarithm() -> None:
    logps = f64(-1, -1)
    with refused(DataError, ("row 1", "-0.5"), "linear"):
        ODPO()(with_columns(logps, logps, logps, logps, margin=f64(1, -0.5)))


@pytest.mark.parametrize(
    ("kind", "field", "value", "bound"),
    [
        ("dpo", "beta", 0, "0"),
        ("dpo", "label_smoothing", 0.5, "0.5"),
        ("ipo", "reduction", "median", "'sum' or 'mean'"),
        ("rdpo", "flip_rate", 0.5, "0.5"),
        ("madpo", "tau", 0, "0"),
        ("madpo", "c_max", 1, "1"),
        ("madpo", "c_min", 1, "[0, 1)"),
        ("madpo", "lam", -1, "0"),
        ("madpo", "tau", math.nan, "finite"),
        ("madpo", "lam", 1e7, "1e6"),
        ("madpo", "margin_temperature", 0, "0"),
        ("soft_madpo", "c_max", 0.5, "1"),
        ("rpo", "form", "kl", "'sq', 'fwd_kl' or 'bwd_kl'"),
        ("beta_dpo", "keep", 0, "0"),
        ("beta_dpo", "preset", "paper", "'official'"),
        ("beta_dpo", "momentum", 1, "1"),
        ("alpha_dpo", "scale", "raw", "'code' or 'paper'"),
        ("wpo", "gamma", 1, "extra_forbidden"),
    ],
)
def test_bad_parameters_are_refused_with_value_and_range(kind: str, field: str, value: object, bound: str) -> None:
    with refused(ValidationError, (field, bound)):
        LossAdapter.validate_python({"kind": kind, field: value})
    with refused(ValidationError, "'nothing'", "'dpo', 'ipo'"):
        LossAdapter.validate_python({"kind": "nothing", field: value})


def test_a_loss_that_is_made_in_python_names_its_mistakes() -> None:
    with refused(ConfigError, "MADPO", "'c'", "'c_max'"):
        MADPO(c=4)  # type: ignore[call-arg]
    with refused(ConfigError, "MADPO", ("beta", "-1")):
        MADPO(beta=-1)


def test_simpo_takes_gamma_or_the_ratio() -> None:
    with refused(ConfigError, "gamma", "1.0", "gamma_beta_ratio", "0.5"):
        SimPO(gamma=1.0, gamma_beta_ratio=0.5)
    inputs = batch(*CASES)
    assert torch.equal(SimPO(beta=4, gamma=2.0)(inputs).per_pair, SimPO(beta=4, gamma_beta_ratio=0.5)(inputs).per_pair)


def test_presets_are_the_same_configuration_as_their_fields() -> None:
    from_toml = LossAdapter.validate_python({"kind": "beta_dpo", "preset": "madpo_notebook", "keep": 0.6})
    assert from_toml == BetaDPO.preset("madpo_notebook", keep=0.6)
    assert from_toml == BetaDPO(
        order="beta-first", floor=None, bias_correction=False, initial_std=1.0, keep=0.6, margin_scale="beta"
    )
    assert AlphaDPO.official(alpha=0.1).initial_std == 0


MINE = """
from typing import ClassVar, Literal
from madpo.losses import LossConfig, LossInputs, LossOutput, LossState

class Hinge(LossConfig):
    kind: Literal["hinge"] = "hinge"
    beta: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset({"reward_margin"})
    needs_reference: ClassVar[bool] = False
    stateful: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, state: LossState | None = None) -> LossOutput:
        return LossOutput((1 - self.beta * inputs.log_ratio_margin).relu(), {})

other = 3
"""


def test_custom_loss_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    loss = LossAdapter.validate_python({"kind": "custom", "target": f"{path}:Hinge", "parameters": {"beta": 0.1}})
    assert isinstance(loss, Custom)
    # The golden hinge column of cases A to E.
    assert loss(batch("A", "B", "C", "D", "E")).per_pair.tolist() == pytest.approx([0.55, 1.425, 0, 1, 151])
    assert (loss.needs, loss.needs_reference, loss.stateful) == (frozenset({"reward_margin"}), False, True)
    assert pickle.loads(pickle.dumps(loss)) == loss
    record = loss.model_dump(mode="json")
    assert LossAdapter.validate_python(record) == loss
    path.write_text(MINE.replace("1 - self", "2 - self"))
    changed = Custom(target=f"{path}:Hinge", parameters={"beta": 0.1})
    assert changed.source_digest != loss.source_digest
    assert changed(batch("D")).per_pair.item() == 2
    with refused(ValidationError, "mine.py:Hinge", "source_digest", "changed"):
        LossAdapter.validate_python(record)


def test_custom_loss_from_a_module_and_its_errors(tmp_path: Path) -> None:
    loss = Custom(target="madpo.losses.direct:IPO", parameters={"reduction": "mean", "beta": 0.1})
    assert loss.beta == 0.1
    assert torch.equal(loss.implicit_margin(batch("A")), IPO(reduction="mean").implicit_margin(batch("A")))
    assert getattr(Custom(target="madpo.losses.base:LossConfig"), "beta", 1.0) == 1.0
    assert torch.equal(loss(batch("A")).per_pair, IPO(reduction="mean")(batch("A")).per_pair)
    stateful = Custom(target="madpo.losses:BetaDPO")
    assert stateful.stateful
    assert int(stateful(batch("A", "B")).state.tensors["batches"]) == 1  # type: ignore[union-attr]
    (tmp_path / "mine.py").write_text(MINE)
    for target, named in [
        ("madpo.losses", "'madpo.losses'"),
        ("no_such_package.x:Y", "no_such_package.x"),
        (f"{tmp_path}/none.py:Y", f"{tmp_path}/none.py"),
        (f"{tmp_path}/mine.py:other", f"{tmp_path}/mine.py:other"),
        ("madpo.losses.direct:Nothing", "madpo.losses.direct:Nothing"),
    ]:
        with refused(ConfigError, named):
            Custom(target=target)
    with refused(ConfigError, "flip_rate", "0.5"):
        Custom(target="madpo.losses:RDPO", parameters={"flip_rate": 0.7})


def test_inputs_refuse_other_shapes_and_keep_float64() -> None:
    with refused(ValueError, "ref_chosen_logps"):
        LossInputs(f64(1, 2), f64(1, 2), f64(1), f64(1, 2), torch.tensor([1, 1]), torch.tensor([1, 1]))
    assert batch("A").log_ratio_margin.dtype == torch.float64
    half = torch.tensor([-300.0], dtype=torch.bfloat16)
    assert LossInputs(half, half, half, half, torch.tensor([1]), torch.tensor([1])).ref_chosen_logps.dtype == (
        torch.float32
    )


def test_soft_madpo_golden_target() -> None:
    inputs = batch("A", reward_margin=3.0)
    target = 3 * 3.744019
    p = 1 / (1 + math.exp(-target))
    expected = p * 0.493249 + (1 - p) * (0.493249 + 0.45)
    output = SoftMADPO()(inputs)
    assert output.per_pair.item() == pytest.approx(expected, abs=1e-6)
    assert output.metrics["coefficient/mean"].item() == pytest.approx(3.744019, abs=5.1e-7)


def test_config_errors_are_one_sentence_naming_the_remedy() -> None:
    from madpo.losses import margin_weight

    with refused(ConfigError, ("c_max", "1"), "DPO()"):
        margin_weight(f64(1.0), tau=1, c_max=1)
