"""Whether a model can compute packed rows: no state may depend on the tokens of another completion or pair.

Decided at the first use of a model, on three short pairs, by two exact tests that hold in any precision:

- The gradient of all other states with respect to a branch's embeddings is zero, to the last bit.
- Branches of equal length change places, and the states of all other tokens keep every bit. This finds leaks that have
  no gradient. Places are exchanged rather than tokens replaced, so that each layer sees the same set of token states:
  each expert of a mixture gets as many tokens as before, and matrix products of equal shape round alike. Some kernels
  round by the place of a row even so: a change of the size of rounding is allowed where the first test has passed.

A comparison with padded rows follows. It finds positions that are counted by index.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from madpo.core.errors import is_shortage
from madpo.models.engine.dependence import depends, without_numbers
from madpo.models.engine.packed_attention import row_states
from madpo.models.engine.packing import Packing, pack
from madpo.models.modes import evaluating

PROMPT, COMPLETION, PAIR = 6, 5, 16
"""Tokens of a prompt, of a completion and of a pair in the tests."""
EXCHANGES = (
    (slice(PAIR + PROMPT, PAIR + PROMPT + COMPLETION), slice(2 * PAIR + PROMPT, 2 * PAIR + PROMPT + COMPLETION)),
    (slice(2 * PAIR - COMPLETION, 2 * PAIR), slice(3 * PAIR - COMPLETION, 3 * PAIR)),
    (slice(0, PAIR), slice(PAIR, 2 * PAIR)),
)
"""Tokens that change places: the chosen completions of the second and third pair, which have one prompt; their
rejected completions; the first and the second pair."""


@torch.inference_mode(False)
@torch.no_grad()
def packs(model: nn.Module, plain: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether the model gives the same states packed as in rows; found at the first call for a model.

    One on paper is taken for such a model.

    Args:
        plain: function of (input_ids, attention_mask) that gives the states of padded rows.
    """
    known: bool | None = getattr(model, "_madpo_packs", None)
    if known is None:
        with evaluating(model):
            reason = None if without_numbers(model) else _obstacle(model, plain)
        if reason is not None:
            warnings.warn(
                f"{type(model).__name__} cannot share prompts ({reason}); its rows are padded instead, which is slower",
                stacklevel=2,
            )
        known = reason is None
        model._madpo_packs = known  # type: ignore[assignment]
    return known


def _obstacle(model: nn.Module, plain: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """Why the model cannot compute packed rows; None where it can."""
    rows = _test_rows(model)
    packing = pack(*rows, predict=False)
    packing.probes = True
    try:
        states = row_states(model, packing)
    except NotImplementedError as error:
        return str(error)
    except (TypeError, KeyError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        if is_shortage(error):  # which says nothing of the model
            raise
        return f"its forward does not take packed rows: {error}"
    if not packing.attended:
        return "its attention does not go through transformers' attention functions"
    half = torch.finfo(states.dtype).bits == 16 or torch.is_autocast_enabled(states.device.type)
    # Measured in bfloat16 on real and on random tokens: Gemma-3-270M 0.05 at most, SmolLM2-135M 0.02. Positions by
    # index give 0.5 to 1.5. In float32 the right path stays below 5e-5.
    rounding = 0.15 if half else 1e-3
    kept = [_kept(places, len(packing.branch), states.device)[None] for places in EXCHANGES]
    leaks = depends(model, lambda: row_states(model, packing), [(mask, ~mask) for mask in kept])
    if leaks or _moves(model, packing, states) > (0 if leaks is None else rounding):
        return "its states depend on the tokens of other completions"
    found, wanted = states[0].index_select(0, packing.predictors), plain(rows[0], rows[1])[packing.scored]
    # In half precision a mixture of experts may route single tokens otherwise, so the mean.
    apart = _distances(found, wanted).mean() if half else _distances(found, wanted).max()
    return None if apart <= rounding else f"its states differ by {float(apart):.2g} from those of padded rows"


def _moves(model: nn.Module, packing: Packing, states: Tensor) -> float:
    """How far states move, in parts of their norms, when tokens of other branches change places; 0 for equal bits."""
    ids, worst = packing.input_ids, 0.0
    for here, there in EXCHANGES:
        packing.input_ids = ids.clone()
        packing.input_ids[:, here], packing.input_ids[:, there] = ids[:, there], ids[:, here]
        kept = _kept((here, there), ids.shape[1], ids.device)
        found = row_states(model, packing)[0, kept]
        if not torch.equal(found.nan_to_num(), states[0, kept].nan_to_num()):
            worst = max(worst, float(_distances(found, states[0, kept]).max()))
    packing.input_ids = ids
    return worst


def _kept(places: tuple[slice, slice], tokens: int, device: torch.device) -> Tensor:
    """Tokens that keep their places."""
    kept = torch.ones(tokens, dtype=torch.bool, device=device)
    for place in places:
        kept[place] = False
    return kept


def _distances(found: Tensor, wanted: Tensor) -> Tensor:
    apart: Tensor = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1).clamp(min=1e-6)
    return apart


def _test_rows(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Three pairs, the second and third with the same prompt: ids, attention and completion masks."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    tokens = torch.arange(3 * PAIR, device=table.device) * 7 % max(len(table) - 3, 1) + 3
    prompts = tokens[: 2 * PROMPT].view(2, PROMPT)[[0, 1, 1, 0, 1, 1]]
    completions = tokens[2 * PROMPT : 2 * PROMPT + 6 * COMPLETION].view(6, COMPLETION)
    ids = torch.cat([prompts, completions], dim=1)
    completion_mask = torch.zeros_like(ids)
    completion_mask[:, PROMPT:] = 1
    return ids, torch.ones_like(ids), completion_mask
