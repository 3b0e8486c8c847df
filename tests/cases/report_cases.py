"""The folder of a made-up study: three tiers, two seeds, every group of methods, and texts that mean harm."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from madpo.core.metrics import Estimate
from madpo.core.seeding import rng
from madpo.report import published
from madpo.report.sources import folder_of
from madpo.runner.record import Record
from practice_cases import write

HOSTILE = "</script><script>document.title='owned'</script><!-- & \u2028 \u202e 'quoted\" <img src=x onerror=alert(2)>"
ARABIC = "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645"
LONG = "supercalifragilistic" * 40
PROMPTS = 40
TIERS = published.TIERS


def methods(*groups: str) -> list[dict[str, Any]]:
    """Rows as in an experiment, of every group or of these."""
    rows: list[dict[str, Any]] = []

    def add(name: str, group: str, loss: dict[str, Any], **more: Any) -> None:
        rows.append({"name": name, "group": group, "loss": {"beta": 0.1, **loss}, "pairs": "all", **more})

    def madpo(tau: float, c: float, part: str = "full", beta: float = 0.1) -> dict[str, Any]:
        return {"kind": "madpo", "tau": tau, "c_max": c, "c_min": None, "lam": 1.0, "part": part, "beta": beta}

    add("DPO", "core", {"kind": "dpo"})
    add("IPO", "core", {"kind": "ipo", "reduction": "sum"})
    add("β-DPO m=0.6 p=0.8", "core", {"kind": "beta_dpo", "batch_scale": 0.6, "keep": 0.8})
    add("MADPO τ=7 c=4", "core", madpo(7.0, 4.0))
    for tau, c in ((2.0, 2.0), (4.0, 2.0), (7.0, 2.0), (10.0, 2.0), (7.0, 3.0)):
        add(f"MADPO τ={tau:g} c={c:g}", "sensitivity", madpo(tau, c))
    for c in (2.0, 4.0):
        add(f"Amp-Only c={c:g}", "ablation", madpo(7.0, c, "amplify"))
        add(f"Reg-Only c={c:g}", "ablation", madpo(7.0, c, "dampen"))
    for beta in (0.03, 0.3):
        add(f"DPO β={beta:g}", "frontier", {"kind": "dpo", "beta": beta})
    add("DPO, agreeing", "rivals", {"kind": "dpo"}, pairs="agreeing")
    add(HOSTILE, "rivals", {"kind": "rdpo"})
    return [row for row in rows if not groups or row["group"] in groups]


def level(method: dict[str, Any], tier: str) -> float:
    """The mean reward of a method in this made-up world: DPO 1, MADPO 1.5, a little less on Low pairs."""
    loss = method["loss"]
    base = {"ipo": 0.2, "beta_dpo": 1.2, "rdpo": 1.49}.get(loss["kind"], 1.0)
    if loss["kind"] == "madpo":
        base = 1.02 if loss["part"] == "dampen" else 1.5 + 0.1 * (loss["c_max"] - 4)
    if method["pairs"] == "agreeing":
        base = 1.5
    return base - (0.2 if tier == "low" else 0.0) - (0.3 if loss["beta"] == 0.3 else 0.0)


class Study:
    """Writes records and what their steps leave behind."""

    def __init__(self, root: Path, *groups: str) -> None:
        self.root, self.records, self.listing, self.methods = root, {}, {}, methods(*groups)
        pairs = {"train": 30, "prompts": 70}
        self.experiment = {"model": "tiny", "seeds": [0, 1], "method": self.methods, "pairs": pairs}

    def add(self, name: str, metrics: dict[str, Any], config: Any = None, inputs: Any = None) -> Path:
        """A finished step; its folder."""
        identity = f"{len(self.listing):064x}"[::-1]
        provenance = {"seconds": 61.5, "host": HOSTILE, "started": "2026-01-01T00:00:00Z", "madpo": "0", "argv": []}
        record = Record(
            name=name, identity=identity, operation="f/1", config=config or {}, inputs=inputs or {},
            metrics=metrics, libraries={"torch": "2.13.0"}, threads=2, provenance=provenance,
        )  # fmt: skip
        self.records[name] = record
        folder = folder_of(self.root, record)
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(record.model_dump_json(), encoding="utf-8")
        self.listing[name] = {"folder": str(folder.relative_to(self.root)), "identity": identity, "groups": []}
        return folder

    def unfinished(self, name: str, error: str = "") -> None:
        """A step that is planned, or that failed."""
        identity = f"{len(self.listing):064x}"[::-1]
        folder = self.root / f"{name}-{identity[:8]}"
        self.listing[name] = {"folder": str(folder.relative_to(self.root)), "identity": identity, "groups": []}
        if error:
            folder.mkdir(parents=True)
            (folder / "error.txt").write_text(f"Traceback\n{error}\n", encoding="utf-8")

    def write(self, title: str = HOSTILE) -> Path:
        """Finish with ``run.json``."""
        about = {"title": title, "experiment": self.experiment}
        text = json.dumps({"about": about, "steps": self.listing}, ensure_ascii=False)
        (self.root / "run.json").write_text(text, encoding="utf-8")
        return self.root

    def evaluate(self, name: str, shown: str, mean: float, kl: float, seed: int) -> None:
        """Samples with exactly this mean reward; the first three prompts have texts that mean harm."""
        noise = rng(seed, "noise", name).normal(size=PROMPTS) * 0.1
        common = rng(0, "prompts").normal(size=PROMPTS)
        rewards = mean + common - common.mean() + noise - noise.mean()
        metrics = {"distinct_1": 0.5, "distinct_2": 0.7, "ended_share": 0.2, "reference_perplexity": 20.0}
        folder = self.add(name, {**metrics, "oracle_reward": Estimate(mean, mean - 0.3, mean + 0.3, PROMPTS)})
        lines = []
        for i in range(PROMPTS):
            texts = {0: HOSTILE, 1: ARABIC, 2: LONG}
            row = {
                "prompt_id": i, "sample": 0, "prompt": f"prompt {i} {texts.get(i, '')}", "tokens": 20 + i % 3,
                "response": texts.get(i, f"{shown} answers number {i}"), "ended": True,
                "oracle_reward": float(rewards[i]), "kl": kl + 0.1 * float(common[i]),
            }  # fmt: skip
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


def make_study(
    root: Path,
    tiers: tuple[str, ...] = TIERS,
    seeds: int = 2,
    frontier_seeds: int | None = None,
    groups: tuple[str, ...] = (),
) -> Study:
    """The whole study (or these groups), finished, its frontier with fewer seeds if so given; ``write`` is left."""
    study = Study(root, *groups)
    study.add("sft", {"loss": 3.0})
    for seed in range(seeds):
        study.evaluate(f"evaluation/sft/seed{seed}", "SFT", 0.0, 0.0, seed)
    for tier in tiers:
        for seed in range(seeds):
            _tier(study, tier, seed, frontier=frontier_seeds is None or seed < frontier_seeds)
    return study


def _tier(study: Study, tier: str, seed: int, *, frontier: bool) -> None:
    place = f"{tier}/seed{seed}"
    h = rng(seed, "margins", tier).normal(1.0, 2.0, size=70)
    ids = pa.array(range(70))
    pairs = study.add(f"pairs/{place}", {"pairs": 70})
    split = ["train" if i < 30 else "heldout" for i in range(70)]
    pq.write_table(pa.table({"pair_id": ids, "split": split}), pairs / "pairs.parquet")
    accuracy = Estimate(float((h[30:] > 0).mean()), 0.5, 0.9, 40)
    model = study.add(
        f"reward_model/{place}", {"heldout_accuracy": accuracy, "heldout_log_loss": 0.6, "temperature": 1.2}
    )
    pq.write_table(pa.table({"pair_id": ids[30:], "reward_margin": h[30:]}), model / "margins.parquet")
    log = [{"step": s, "loss": 0.7 - 0.01 * s} for s in range(1, 20)] + [
        {"step": s, "eval_loss": 0.69} for s in (10, 20)
    ]
    write(model / "log.jsonl", log)
    margins = study.add(f"margins/{place}", {"pairs": 70}, inputs={"pairs": study.records[f"pairs/{place}"].identity})
    pq.write_table(pa.table({"pair_id": ids, "reward_margin": h}), margins / "margins.parquet")
    for number, method in enumerate(study.methods):
        if method["group"] == "frontier" and not frontier:
            continue
        key, kl = f"method{number}", 0.5 / method["loss"]["beta"] + 1.0 * (method["loss"]["kind"] == "madpo")
        policy = study.add(f"policy/{tier}/{key}/seed{seed}", {}, {"method": method["name"], "loss": method["loss"]})
        curve = [{"step": s, "loss": 0.7 / s, "rewards/margins": 0.1 * s} for s in range(1, 31)]
        write(policy / "log.jsonl", curve)
        study.evaluate(f"evaluation/{tier}/{key}/seed{seed}", method["name"], level(method, tier), kl, seed)
