"""beta-DPO, alpha-DPO and RE-DPO: golden values, the draw, and state under splits and evaluation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losses_cases import EVERY_LOSS, batch, f64, with_columns
from madpo.core.errors import DivergedError
from madpo.losses import DPO, REDPO, AlphaDPO, BetaDPO, LossConfig, LossInputs, LossState, SimPO
from madpo.losses.adaptive import gumbel_top_k
from refusals import refused

ABDF = ("A", "B", "D", "F")
KEPT = torch.tensor([True, False, True, True])


def start(loss: LossConfig, **tensors: float) -> LossState:
    """The initial state with some statistics given."""
    return loss.init_state(0).updated(**{name: f64(value)[0] for name, value in tensors.items()})


def seed_that_keeps(loss: BetaDPO, state: LossState, kept: torch.Tensor) -> LossState:
    """The state with the first seed whose draw is ``kept`` (the golden tables fix the draw)."""
    inputs = batch(*ABDF)
    for seed in range(500):
        tried = state.updated(seed=torch.tensor(seed))
        if torch.equal(loss.observe(loss.statistic(inputs), tried).batch["kept"], kept):
            return tried
    raise AssertionError("no seed among 500 keeps these rows")


def scores(loss: BetaDPO, state: LossState) -> torch.Tensor:
    """Log-scores by their formula, from the state after the batch."""
    values = loss.statistic(batch(*ABDF))
    after = loss.observe(values, state)
    if loss.center == "fixed":
        return -0.5 * ((values - loss.initial_mean) / loss.initial_std) ** 2
    return -0.5 * ((values - after.tensors["mean"]) / after.tensors["std"]) ** 2


@pytest.mark.parametrize(
    ("loss", "state", "mean", "std", "log_scores", "beta", "losses", "average"),
    [
        (
            BetaDPO.preset("official"),
            {},
            0.068750,
            0.377147,
            [-69.024304, -65.564033, -0.016615, -20.778241],
            0.235875,
            [0.297106, 0.693147, 0.441154],
            0.477136,
        ),
        (
            BetaDPO.preset("official"),
            {"mean": 0.5, "std": 2.0},
            0.518750,
            2.177147,
            [math.log(x) for x in (0.187873, 0.090822, 0.972013, 0.660955)],
            0.208875,
            [0.329773, 0.693147, 0.465758],
            0.496226,
        ),
        (
            BetaDPO.preset("madpo_notebook"),
            {},
            0.006875,
            0.937715,
            [math.log(x) for x in (0.894352, 0.899372, 0.999973, 0.966947)],
            0.103713,
            [0.486777, 0.693147, 0.571886],
            0.583937,
        ),
        (
            BetaDPO.preset("madpo_text"),
            {},
            None,
            None,
            [math.log(x) for x in (4.006530e-05, 1.196129e-04, 1.0, 4.393693e-02)],
            0.141250,
            None,
            0.550083,
        ),
    ],
    ids=["official", "official-later", "notebook", "text"],
)
def test_beta_dpo_golden(
    loss: BetaDPO,
    state: dict[str, float],
    mean: float | None,
    std: float | None,
    log_scores: list[float],
    beta: float,
    losses: list[float] | None,
    average: float,
) -> None:
    before = start(loss, **state)
    assert scores(loss, before).tolist() == pytest.approx(log_scores, abs=6e-6)
    inputs = batch(*ABDF)
    observed = loss.observe(loss.statistic(inputs), before)
    used = loss.statistic(inputs)[KEPT].mean() if loss.order == "filter-first" else loss.statistic(inputs).mean()
    center = 0.0 if loss.center == "fixed" else observed.tensors["mean"]
    wanted = loss.beta * (1 + loss.batch_scale * (used - center))
    assert float(wanted) == pytest.approx(beta, abs=5.1e-7)
    # Under the official zero state row 0 has a score of 1e-30: no seed keeps it, so that draw is handed over.
    found = seed_that_keeps(loss, before, KEPT) if state or loss.order == "beta-first" else None
    if found is not None:
        observed = loss.observe(loss.statistic(inputs), found)
    else:
        observed = LossState(observed.tensors, {"beta": wanted, "kept": KEPT})
    assert float(observed.batch["beta"]) == pytest.approx(beta, abs=5.1e-7)
    output = loss(inputs, observed)
    if mean is not None:
        assert float(observed.tensors["mean"]) == pytest.approx(mean, abs=5.1e-7)
        assert float(observed.tensors["std"]) == pytest.approx(std, abs=5.1e-7)
    assert output.kept is not None
    assert torch.equal(output.kept, KEPT)
    if losses is not None:
        assert output.per_pair[KEPT].tolist() == pytest.approx(losses, abs=5.1e-7)
    assert output.per_pair[KEPT].mean().item() == pytest.approx(average, abs=5.1e-7)


def test_the_draw_has_the_law_of_sequential_sampling() -> None:
    log_scores = f64(*[math.log(x) for x in (0.187873, 0.090822, 0.972013, 0.660955)])
    exact = {(0, 1, 2): 0.041468, (0, 1, 3): 0.018598, (0, 2, 3): 0.642304, (1, 2, 3): 0.297630}
    counts = dict.fromkeys(exact, 0)
    draws = 4000
    for number in range(draws):
        state = LossState({"seed": torch.tensor(7), "batches": torch.tensor(number)})
        kept = gumbel_top_k(log_scores, 3, state)
        counts[tuple(kept.nonzero().flatten().tolist())] += 1
    for rows, probability in exact.items():
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[rows] / draws - probability) < 4.5 * deviation


def test_clamp_and_a_negative_beta() -> None:
    values = f64(-20, -20, -20, -20)
    official = BetaDPO.preset("official", filter=False, momentum=0)
    frozen = {"mean": 0.0, "std": 1.0, "batches": 1.0}
    # M_0 = 0 and a mean of -20: the evaluation leaves M_0 where it is.
    assert official.observe(values, start(official, **frozen), training=False).batch["beta"] == 1e-3
    unclamped = official.model_copy(update={"floor": None})
    beta = unclamped.observe(values, start(unclamped, **frozen), training=False).batch["beta"]
    assert float(beta) == pytest.approx(-1.1)


@pytest.mark.parametrize("name", [name for name, loss in EVERY_LOSS.items() if loss.stateful])
def test_degenerate_batches(name: str) -> None:
    loss = EVERY_LOSS[name]
    logps = f64(-10, -11, -12, -13)
    state = loss.init_state(0)
    for count in (4, 1, 4, 1, 1):
        part = logps[:count]
        output = loss(with_columns(part, part, part, part), state)
        assert output.state is not None
        state = output.state
        assert torch.isfinite(output.per_pair).all()
        assert all(torch.isfinite(value.double()) for value in state.tensors.values())
        if output.kept is not None:
            assert int(output.kept.sum()) == max(1, int(0.8 * count))


def test_identical_policies_are_filtered_uniformly() -> None:
    loss = BetaDPO.preset("official", keep=0.25)
    picks = [0] * 4
    for seed in range(400):
        kept = loss.observe(f64(0, 0, 0, 0), loss.init_state(seed)).batch["kept"]
        picks[int(kept.nonzero())] += 1
    assert all(abs(pick - 100) < 4.5 * math.sqrt(400 * 0.25 * 0.75) for pick in picks)


@pytest.mark.parametrize(("pairs", "keep", "kept"), [(10, 0.8, 8), (100, 0.29, 29), (35, 0.6, 21), (1, 0.4, 1)])
def test_kept_count(pairs: int, keep: float, kept: int) -> None:
    loss = BetaDPO(keep=keep)
    assert int(loss.observe(torch.zeros(pairs), loss.init_state(0)).batch["kept"].sum()) == kept


def test_both_parts_can_be_switched_off() -> None:
    inputs = batch(*ABDF)
    plain = BetaDPO(filter=False, adapt_beta=False)(inputs)
    assert torch.allclose(plain.per_pair, -torch.nn.functional.logsigmoid(0.1 * inputs.log_ratio_margin))
    assert plain.kept is not None
    assert plain.kept.all()
    assert float(BetaDPO(adapt_beta=False)(inputs).metrics["beta"]) == pytest.approx(0.1)


def test_alpha_dpo_golden() -> None:
    inputs = batch(*ABDF)
    official = AlphaDPO.official()
    output = official(inputs)
    assert output.state is not None
    assert float(output.state.tensors["mean"]) == pytest.approx(0.002855, abs=5.1e-7)
    assert float(output.state.tensors["std"]) == pytest.approx(0.012478, abs=5.1e-7)
    assert output.metrics["z/mean"].tolist() == pytest.approx([10.189247, -11.147726, -0.228806, 9.424285], abs=5.1e-7)
    assert output.per_pair.tolist() == pytest.approx([27.278494, 0, 3.570922, 22.848570], abs=5.1e-7)
    assert output.per_pair.mean().item() == pytest.approx(13.424496, abs=5.1e-7)


@pytest.mark.parametrize(
    ("scale", "losses", "average"),
    [
        ("code", [7.160777, 0.509014, 4.018150, 4.255201], 3.985785),
        ("paper", [6.926981, 0.614161, 4.018150, 4.041813], 3.900276),
    ],
)
def test_alpha_dpo_golden_with_frozen_statistics(scale: str, losses: list[float], average: float) -> None:
    loss = AlphaDPO.official(scale=scale)
    inputs = batch(*ABDF)
    frozen = start(loss, mean=0.0, std=1.0, batches=1.0)
    output = loss(inputs, loss.observe(loss.statistic(inputs), frozen, training=False))
    assert output.per_pair.tolist() == pytest.approx(losses, abs=5.1e-7)
    assert output.per_pair.mean().item() == pytest.approx(average, abs=5.1e-7)


@pytest.mark.parametrize("scale", ["code", "paper"])
def test_alpha_zero_is_simpo(scale: str) -> None:
    inputs = batch("A", "B", "C", "D", "E", "F")
    alpha = AlphaDPO.official(scale=scale, alpha=0)(inputs).per_pair
    assert torch.allclose(alpha, SimPO(beta=10, gamma_beta_ratio=0.4)(inputs).per_pair, rtol=1e-14, atol=1e-14)


def test_bias_correction_starts_at_the_first_batch_and_meets_adams() -> None:
    loss, raw = BetaDPO(), BetaDPO(bias_correction=False, initial_std=0)
    batches = [f64(1, 2, 4), f64(-1, 0, 5), f64(2, 2, 3)]
    state, other = loss.init_state(0), raw.init_state(0)
    for number, values in enumerate(batches, start=1):
        state, other = loss.observe(values, state), raw.observe(values, other)
        for name in ("mean", "std"):
            corrected = float(other.tensors[name]) / (1 - 0.9**number)
            assert float(state.tensors[name]) == pytest.approx(corrected, rel=1e-12)
        if number == 1:
            assert float(state.tensors["mean"]) == pytest.approx(7 / 3)


# State.

STATEFUL = {name: loss for name, loss in EVERY_LOSS.items() if loss.stateful}
CUTS = [(8,), (1,) * 8, (2, 2, 2, 2), (3, 5)]


def eight() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randn(8, generator=generator, dtype=torch.float64) * 4 - 40 for _ in range(4)]
    return draw[0], draw[1], draw[2], draw[3]


def step(loss: LossConfig, cut: tuple[int, ...], state: LossState) -> tuple[float, torch.Tensor, LossState]:
    """One optimiser step over 8 pairs in the given micro-batches, with statistics over all of them."""
    columns = eight()
    policy = [column.clone().requires_grad_() for column in columns[:2]]
    edges = [0, *itertools.accumulate(cut)]
    parts = [with_columns(*(column[a:b] for column in (*policy, *columns[2:]))) for a, b in itertools.pairwise(edges)]
    ready = loss.observe(torch.cat([loss.statistic(part) for part in parts]), state)
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for part, (a, b) in zip(parts, itertools.pairwise(edges), strict=True):
        output = loss(part, ready.rows(a, b))
        kept = torch.ones(b - a, dtype=torch.bool) if output.kept is None else output.kept
        total = total + output.per_pair[kept].sum()
        count += int(kept.sum())
        assert output.state is not None
    mean = total / count
    gradient = torch.cat(torch.autograd.grad(mean, policy))
    return mean.item(), gradient, output.state


@pytest.mark.parametrize("name", STATEFUL)
def test_one_batch_of_eight_equals_eight_of_one(name: str) -> None:
    loss = STATEFUL[name]
    state = loss.init_state(3)
    for _ in range(3):
        results = [step(loss, cut, state) for cut in CUTS]
        for mean, gradient, after in results[1:]:
            assert mean == pytest.approx(results[0][0], rel=1e-13)
            assert torch.allclose(gradient, results[0][1], rtol=1e-12, atol=0)
            for key, value in after.tensors.items():
                assert torch.equal(value, results[0][2].tensors[key])
        state = results[0][2]
    assert int(state.tensors["batches"]) == 3


@pytest.mark.parametrize("name", STATEFUL)
def test_a_call_observes_its_own_batch_and_never_mutates(name: str) -> None:
    loss = STATEFUL[name]
    inputs = batch(*ABDF)
    state = loss.init_state(1)
    before = state.state_dict()
    one, two = loss(inputs, state), loss(inputs, state)
    prepared = loss(inputs, loss.observe(loss.statistic(inputs), state))
    assert torch.equal(one.per_pair, two.per_pair)
    assert torch.equal(one.per_pair, prepared.per_pair)
    assert all(torch.equal(before[key], state.tensors[key]) for key in before)
    assert one.state is not None
    assert not one.state.batch
    assert int(one.state.tensors["batches"]) == 1
    assert not any(value.requires_grad for value in one.state.tensors.values())


@pytest.mark.parametrize("name", STATEFUL)
def test_evaluation_moves_nothing_and_keeps_every_pair(name: str) -> None:
    loss = STATEFUL[name]
    trained = loss(batch(*ABDF), loss.init_state(0)).state
    for state in (loss.init_state(0), trained):
        assert state is not None
        for cut in ("A", "D"), ("F",), ("D", "D"):
            inputs = batch(*cut)
            output = loss(inputs, loss.observe(loss.statistic(inputs), state, training=False))
            assert output.state is not None
            assert all(torch.equal(output.state.tensors[key], state.tensors[key]) for key in state.tensors)
            assert output.kept is None or bool(output.kept.all())
            assert torch.isfinite(output.per_pair).all()


@pytest.mark.parametrize("name", STATEFUL)
def test_a_restored_state_goes_on_as_if_nothing_happened(name: str) -> None:
    loss = STATEFUL[name]
    state = loss(batch(*ABDF), loss.init_state(9)).state
    assert state is not None
    restored = LossState.from_state_dict(state.state_dict())
    one, two = loss(batch("A", "F", "D"), state), loss(batch("A", "F", "D"), restored)
    assert torch.equal(one.per_pair, two.per_pair)
    assert one.kept is None or torch.equal(one.kept, two.kept)


def test_seeds_and_batches_draw_differently() -> None:
    loss = BetaDPO(keep=0.5)
    values = torch.zeros(64)
    first = loss.observe(values, loss.init_state(0))
    second = loss.observe(values, first.settled())
    other = loss.observe(values, loss.init_state(1))
    assert not torch.equal(first.batch["kept"], second.batch["kept"])
    assert not torch.equal(first.batch["kept"], other.batch["kept"])


@pytest.mark.parametrize("name", STATEFUL)
def test_a_diverged_policy_is_refused_before_it_enters_the_averages(name: str) -> None:
    loss = STATEFUL[name]
    logps = f64(-1, math.nan, -1)
    reference = f64(-1, -1, -1)
    with refused(DivergedError, ("row 1", "nan")):
        loss(with_columns(logps, reference, reference, reference))


def test_rows_that_do_not_match_the_inputs_are_refused() -> None:
    loss = BetaDPO()
    inputs = batch("A", "B")
    ready = loss.observe(torch.zeros(6), loss.init_state(0))
    with refused(ValueError, "'kept'", ("6 pairs", "2")):
        loss(inputs, ready)


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12),
    name=st.sampled_from(list(STATEFUL)),
    seed=st.integers(0, 2**31),
)
def test_any_margins_leave_finite_state_and_losses(values: list[float], name: str, seed: int) -> None:
    loss = STATEFUL[name]
    chosen = torch.tensor(values, dtype=torch.float64)
    zeros = torch.zeros_like(chosen)
    state: LossState | None = loss.init_state(seed)
    for _ in range(2):
        output = loss(with_columns(chosen, zeros, zeros, zeros), state)
        state = output.state
        assert state is not None
        assert torch.isfinite(output.per_pair).all()
        assert all(torch.isfinite(value.double()) for value in state.tensors.values())
        if output.kept is not None:
            assert int(output.kept.sum()) == max(1, int(0.8 * len(values) + 1e-9))


def test_every_other_loss_has_an_idle_hook() -> None:
    for name, loss in EVERY_LOSS.items():
        if name in STATEFUL:
            continue
        inputs: LossInputs = with_columns(f64(-1, -2), f64(-2, -1), f64(-1, -1), f64(-1, -1))
        ready = loss.observe(loss.statistic(inputs), loss.init_state(0)).rows(0, 2)
        assert ready.tensors == {}
        assert torch.equal(loss(inputs, ready).per_pair, loss(inputs).per_pair)


def test_re_dpo_is_its_papers_equations() -> None:
    inputs = batch(*ABDF)
    loss = REDPO()
    output = loss(inputs)
    p = torch.sigmoid(0.1 * inputs.log_ratio_margin.detach())
    w = p * 0.9 / (p * 0.9 + (1 - p) * 0.1)  # Eq. 4
    assert w.tolist() == pytest.approx([0.933840, 0.854734, 0.9, 0.920358], abs=5.1e-7)
    assert torch.allclose(output.metrics["confidence/mean"], w)
    assert torch.allclose(output.per_pair, -w * p.log() - (1 - w) * (1 - p).log())  # Eq. 5
    (gradient,) = torch.autograd.grad(output.per_pair.sum(), inputs.policy_chosen_logps)
    assert gradient.tolist() == pytest.approx([-0.032320, -0.045941, -0.04, -0.035818], abs=5.1e-7)
    assert output.state is not None
    assert float(output.state.tensors["reliability"]) == pytest.approx(0.900223302, abs=5e-10)  # Eq. 7, alpha = 0.1
    # The next batch is judged by the moved reliability, an evaluation moves nothing.
    after = output.state
    assert float(loss.observe(f64(0), after, training=False).batch["target"]) == pytest.approx(
        math.log(0.9002233 / 0.0997767), abs=1e-6
    )
    assert torch.equal(loss.observe(f64(3), after, training=False).tensors["reliability"], after.tensors["reliability"])


def test_re_dpo_begins_as_label_smoothing_and_sees_no_label_in_a_coin() -> None:
    policy = f64(-10, -12).requires_grad_()
    inputs = with_columns(policy, f64(-9, -9), f64(-10, -12), f64(-9, -9))
    gradients = [
        torch.autograd.grad(loss(inputs).per_pair.sum(), policy)[0] for loss in (REDPO(), DPO(label_smoothing=0.1))
    ]
    assert torch.allclose(*gradients)
    # A swapped pair whose labels are right as seldom as the other's are wrong is the same pair.
    one, other = batch(*ABDF), batch(*ABDF)
    swapped = other.replace(
        policy_chosen_logps=other.policy_rejected_logps,
        policy_rejected_logps=other.policy_chosen_logps,
        ref_chosen_logps=other.ref_rejected_logps,
        ref_rejected_logps=other.ref_chosen_logps,
    )
    assert torch.allclose(REDPO(reliability=0.8)(one).per_pair, REDPO(reliability=0.2)(swapped).per_pair)


def test_re_dpo_finds_the_share_of_right_labels() -> None:
    # Theorem 4.1: with margins that are the true log-odds, whole batches lead eta to the truth.
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    right = torch.bernoulli(torch.full_like(true, 0.75), generator=generator)
    preferred = torch.bernoulli(torch.sigmoid(true), generator=generator)
    margin = torch.where(preferred == right, true, -true)  # as labelled
    for start_at in (0.55, 0.95):
        loss = REDPO(reliability=start_at, momentum=0.5)
        state = loss.init_state(0)
        for _ in range(60):
            state = loss.observe(margin, state).settled()
        assert float(state.tensors["reliability"]) == pytest.approx(0.75, abs=0.01)
