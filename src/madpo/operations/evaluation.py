"""``madpo evaluate``: what a policy writes to a user's prompts, against its reference, by any reward model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from madpo.core.config import Frozen
from madpo.core.errors import ConfigError, located
from madpo.core.metrics import Estimate, Metrics
from madpo.core.reports import Report
from madpo.core.statistics import bootstrap_mean, share_of
from madpo.core.storage import write_atomically
from madpo.data.messages import shown
from madpo.data.tokens import Encoder
from madpo.models.engine.responses import divergence, respond
from madpo.models.load import load_model, load_tokenizer, resolve_model
from madpo.operations.inputs import Prompt, read_prompts, tell_unused_template
from madpo.operations.pair_scorer import load_pair_encoder, load_scorer, reward_model_digest
from madpo.operations.preconditions import PolicySource, find_policy
from madpo.operations.responses import ends_of_responses, response_pairs, response_table, text_measures
from madpo.operations.running import digest, load_report, run_in_folder
from madpo.operations.settings import EvaluateSettings
from madpo.report.charts import Chart, levels
from madpo.report.command_pages import Section, command_page, settings_section
from madpo.report.drawing import draw
from madpo.report.numbers import against, short
from madpo.report.pages import Cell, Table, cell, write_page
from madpo.report.samples import browsed, static
from madpo.runner.operation import operation


class Side(Frozen):
    """One model's responses."""

    reward: Estimate
    length: Estimate
    """Tokens, the end token included."""
    distinct_1: float
    distinct_2: float
    ended_share: float
    """Responses that ended before max_new_tokens."""


# Quantity of a side -> in words, how it is written, and its digits.
_MEASURED = {
    "reward": ("reward", "number", 3),
    "length": ("length, tokens", "number", 1),
    "distinct_1": ("different words", "share", 0),
    "distinct_2": ("different pairs of words", "share", 0),
    "ended_share": ("ended before the limit", "share", 0),
}


class AtTemperature(Frozen):
    """Both models' responses at another temperature; the fields are those of :class:`EvaluateReport`."""

    temperature: float
    win_rate: Estimate
    reward_difference: Estimate
    policy_reward: Estimate
    reference_reward: Estimate


class EvaluateReport(Report):
    """What :func:`evaluate` measured; intervals are over prompts."""

    policy: str
    reference: str
    prompts: int
    samples_per_prompt: int
    prompts_digest: str | None
    policy_digest: str | None
    reference_digest: str | None
    reward_model_digest: str | None
    """SHA-256 of what was measured, and with what; None for what lies on the hub."""
    win_rate: Estimate
    """Share of responses with a higher reward than the reference's to the same prompt; ties count half."""
    reward_difference: Estimate
    kl: Estimate
    """KL(policy || reference) per response, nats, summed over its tokens."""
    policy_side: Side
    reference_side: Side
    settings: EvaluateSettings
    temperatures: tuple[AtTemperature, ...] = ()

    def verdict(self) -> str:
        """Who has the higher rewards, in a sentence."""
        return (
            f"The policy's response has the higher reward in {short(self.win_rate, 'share')} of the answers to "
            f"{self.prompts} prompts (ties count half): {against(self.win_rate, 0.5, 'one half')}."
        )

    def doubts(self) -> list[str]:
        """That the KL is not the policy's own, where responses were not drawn from its own probabilities."""
        s = self.settings
        if s.temperature == s.top_p == 1 and s.top_k is None:
            return []
        return [
            "The KL is along these responses, which were not drawn at temperature 1 from all tokens: it is not that of "
            "the policy's own responses."
        ]

    def text(self) -> str:
        """A table for a person."""
        w, d = self.win_rate, self.reward_difference
        lines = [
            self.verdict(),
            f"{self.prompts} prompts, {self.samples_per_prompt} response{'s' * (self.samples_per_prompt > 1)} each",
            f"win rate {w.mean:.1%} (95 % interval {w.low:.1%} to {w.high:.1%}), reward difference "
            f"{short(d, digits=3)}",
            f"{'':28}{'policy':>32}{'reference':>32}",
            f"{'KL, nats':28}{short(self.kl, digits=3):>32}{'0':>32}",
        ]
        for name, (words, how, digits) in _MEASURED.items():
            sides = [short(getattr(side, name), how, digits) for side in (self.policy_side, self.reference_side)]
            lines.append(f"{words:28}{sides[0]:>32}{sides[1]:>32}")
        lines += self.doubts()
        lines += [
            f"at temperature {at.temperature:g}: win rate {at.win_rate.mean:.1%} ({at.win_rate.low:.1%} to "
            f"{at.win_rate.high:.1%}), reward {short(at.policy_reward)} against {short(at.reference_reward)}"
            for at in self.temperatures
        ]
        return "\n".join(lines)


def evaluate(
    policy: str | Path,
    prompts: str | Path,
    output_dir: str | Path,
    settings: EvaluateSettings,
    *,
    overwrite: bool = False,
) -> EvaluateReport:
    """Sample from policy and reference with common random numbers, and compare.

    Writes ``evaluation.json``, ``samples.jsonl`` and ``samples.html`` (side by side).

    Args:
        policy: a folder of ``madpo train``, a PEFT adapter's folder, a model's folder, or a hub id.
        prompts: rows with ``prompt`` (text or messages); of equal prompts the first counts.
        output_dir: must not exist, or be empty.

    Raises:
        DataError, ConfigError, StorageError: one sentence; nothing is left behind.
    """
    source = find_policy(policy, settings.reference)
    given = {"policy": policy, "prompts": prompts, "reward_model": settings.reward_model}
    out = run_in_folder(
        evaluate_responses,
        settings,
        given,
        output_dir,
        overwrite=overwrite,
        memory="give a smaller --batch_size",
        protected=[source.base, source.reference],
    )
    return load_report(out / "evaluation.json", EvaluateReport)


@operation("evaluate_responses/6")
def evaluate_responses(settings: EvaluateSettings, inputs: Mapping[str, Path], out: Path) -> Metrics:
    """The operation behind :func:`evaluate`."""
    source = find_policy(inputs["policy"], settings.reference)
    prompts = read_prompts(inputs["prompts"], settings.max_prompts, settings.reading)
    prompts_digest = digest(inputs["prompts"])
    samples = _responses(source, prompts, settings)
    texts = ([s[key] for s in samples] for key in ("prompt", "response", "reference_response"))
    pairs = response_pairs(*texts)
    scorer = load_scorer(settings.reward_model, batch_size=settings.score_batch_size)
    rewards = np.stack(scorer.score_pairs(pairs, "prompt", "row"))
    for sample, (reward, reference_reward) in zip(samples, rewards.T.tolist(), strict=True):
        sample |= {"reward": reward, "reference_reward": reference_reward}
    report = _report(source, settings, pd.DataFrame(samples), prompts_digest)
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(out / "samples.jsonl", text)
    write_samples(report, samples, out / "samples.html")
    report.write(out / "evaluation.json")
    return {"win_rate": report.win_rate, "reward_difference": report.reward_difference, "kl": report.kl}


def write_samples(report: EvaluateReport, samples: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A page: what was measured, and what both wrote to the same prompts, in the order of the data.

    Args:
        samples: lines of ``samples.jsonl``.
    """
    names, sides = ("policy", "reference"), (report.policy_side, report.reference_side)
    lines = [(name, colour, side.reward, None) for name, colour, side in zip(names, (2, 7), sides, strict=True)]
    measured = [
        [Cell(words), *(cell(getattr(side, name), how, digits=digits) for side in sides)]
        for name, (words, how, digits) in _MEASURED.items()
    ]
    first = [sample for sample in samples if "temperature" not in sample]
    rows = (
        {
            "id": sample["prompt_id"],
            # A conversation has a line per message.
            "prompt": content
            if isinstance(content := sample["prompt"], str)
            else "\n".join(f"{message['role']}: {shown([message])}" for message in content),
            "responses": [sample["response"], sample["reference_response"]],
            "rewards": [sample["reward"], sample["reference_reward"]],
            "notes": ["" if sample.get(key, True) else "cut at the limit" for key in ("ended", "reference_ended")],
        }
        for sample in first
    )
    entry = browsed(names, (0, 1), rows, len(first))
    charts = [draw(Chart("rewards", "Reward", "", [levels("", "mean reward", lines)]))]
    sections = [
        Section("Measured", charts=charts, table=Table("Measured", ("", *names), measured, plain=True)),
        *([Section("Decoding temperatures", table=_temperatures(report))] if report.temperatures else []),
        Section(
            "Samples",
            note="The same random numbers drew both. All samples are in samples.jsonl.",
            answers=static(entry),
            id="samples",
        ),
        settings_section(
            {"policy": report.policy, "reference": report.reference, **report.settings.model_dump(mode="json")},
            "sampling and the reward model",
        ),
    ]
    title = f"{Path(report.policy).name} against {Path(report.reference).name}"
    says = [
        report.verdict(),
        *report.doubts(),
    ]
    tiles = {
        "win rate": cell(report.win_rate, "share"),
        "reward difference": cell(report.reward_difference, "signed"),
        "KL to the reference, nats": cell(report.kl),
        "prompts": cell(f"{report.prompts:,}"),
    }
    data = {"samples": {"all": entry}, "unit": "its reward"}
    write_page(path, command_page("evaluation", title, says, tiles, sections, data=data))


def _temperatures(report: EvaluateReport) -> Table:
    """Win rate and rewards at each decoding temperature, the first one among them."""
    first = AtTemperature(
        temperature=report.settings.temperature,
        win_rate=report.win_rate,
        reward_difference=report.reward_difference,
        policy_reward=report.policy_side.reward,
        reference_reward=report.reference_side.reward,
    )
    rows = [
        [
            Cell(f"temperature {at.temperature:g}"),
            cell(at.win_rate, "share"),
            cell(at.reward_difference, "signed", digits=3),
            *(cell(value, digits=3) for value in (at.policy_reward, at.reference_reward)),
        ]
        for at in sorted((first, *report.temperatures), key=lambda at: at.temperature)
    ]
    head = ("responses at", "win rate", "reward difference", "policy's reward", "reference's reward")
    return Table("Decoding temperatures", head, rows, plain=True)


def _responses(source: PolicySource, prompts: Sequence[Prompt], settings: EvaluateSettings) -> list[dict[Any, Any]]:
    """The lines of ``samples.jsonl`` without rewards: two responses each, drawn with the same random numbers."""
    reference_folder, base = resolve_model(source.reference), resolve_model(source.base)
    tokenizer = load_tokenizer(reference_folder)
    if load_tokenizer(base).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"{source.name} and {source.reference} have different tokenizers, so there is no KL")
    tell_unused_template(tokenizer, prompts[0].content)
    encoder, judge = Encoder(tokenizer), load_pair_encoder(settings.reward_model)
    asked = pd.DataFrame([{"prompt_id": prompt.prompt_id, "prompt": prompt.content} for prompt in prompts])
    prompt_ids = []
    for prompt in prompts:
        with located(prompt.place):
            prompt_ids.append(encoder.prompt_ids(prompt.content))
        # What the judge cannot score is refused before anything is generated.
        judge.ids(response_pairs([prompt.content], ["a"], ["a"]), prompt.place, "answer")
    reference, policy = load_model(reference_folder), load_model(base, adapter=source.adapter)
    how: dict[str, Any] = {"keys": asked["prompt_id"].tolist(), "draw": 0, "samples": settings.samples_per_prompt}
    how["ends"] = ends_of_responses(tokenizer, asked["prompt"], reference, policy)

    def written(model: Any, who: str, temperature: float) -> pd.DataFrame:
        how.update(description=f"{who}: responses", temperature=temperature)
        return response_table(asked, respond(model, tokenizer, prompt_ids, settings, **how))

    def both(temperature: float) -> pd.DataFrame:
        mine, theirs = written(policy, "Policy", temperature), written(reference, "Reference", temperature)
        return mine.join(theirs[["response", "tokens", "ended"]].add_prefix("reference_"))

    first, size = both(settings.temperature), settings.score_batch_size
    responses, pad = (own["ids"].tolist() for _, own in first.groupby("sample")), tokenizer.pad_token_id
    kl = [divergence(policy, reference, prompt_ids, ids, pad=pad, batch_size=size).kl for ids in responses]
    first.insert(3, "kl", np.concatenate(kl))
    tables = [first]
    for temperature in settings.temperatures:
        if temperature != settings.temperature:
            tables.append(both(temperature))
            tables[-1].insert(3, "temperature", temperature)
    return [sample for table in tables for sample in table.drop(columns="ids").to_dict("records")]


def _report(
    source: PolicySource, settings: EvaluateSettings, samples: pd.DataFrame, prompts_digest: str | None
) -> EvaluateReport:
    others = samples.groupby("temperature") if "temperature" in samples else ()
    further = tuple(_compared(own, settings, own["temperature"].iloc[0]) for _, own in others)
    samples = samples[samples["kl"].notna()]
    found, prompts = _compared(samples, settings, settings.temperature), samples["prompt_id"]

    def mean(values: Any) -> Estimate:
        return bootstrap_mean(values, clusters=prompts, seed=settings.seed)

    def side(who: str) -> Side:
        own = pd.DataFrame({name: samples[f"{who}{name}"] for name in ("reward", "tokens", "response", "ended")})
        return Side(reward=mean(own["reward"]), length=mean(own["tokens"]), **text_measures(own))

    return EvaluateReport(
        policy=source.name,
        reference=source.reference,
        prompts=len(np.unique(prompts)),
        samples_per_prompt=settings.samples_per_prompt,
        prompts_digest=prompts_digest,
        policy_digest=digest(source.name) or digest(resolve_model(source.base)),
        reference_digest=digest(resolve_model(source.reference)),
        reward_model_digest=reward_model_digest(settings.reward_model),
        win_rate=found.win_rate,
        reward_difference=found.reward_difference,
        kl=mean(samples["kl"]),
        policy_side=side(""),
        reference_side=side("reference_"),
        settings=settings,
        temperatures=further,
    )


def _compared(samples: pd.DataFrame, settings: EvaluateSettings, temperature: float) -> AtTemperature:
    how: dict[str, Any] = {"seed": settings.seed, "clusters": samples["prompt_id"].to_numpy()}
    mine, theirs = (samples[name].to_numpy() for name in ("reward", "reference_reward"))
    wins = np.where(mine > theirs, 1.0, np.where(mine < theirs, 0.0, 0.5))
    return AtTemperature(
        temperature=temperature,
        win_rate=share_of(wins, **how),
        reward_difference=bootstrap_mean(mine - theirs, **how),
        policy_reward=bootstrap_mean(mine, **how),
        reference_reward=bootstrap_mean(theirs, **how),
    )
