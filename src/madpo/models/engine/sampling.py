"""Sampling completions: batched, exact, and the same whatever the batch.

``model.generate`` spends more on drawing from a quarter of a million words than on the output head's product: a
softmax, then a multinomial over all of it. Here a draw is inverse-transform sampling in two levels: sums of blocks
of the unnormalised probabilities, a search among the blocks, then a search inside one. It is the same law. A processor
walks over tiles of the vocabulary. Where nothing cuts the law's tail, it keeps the sums, and computes the logits of the
chosen block again. Greedy, top-k and top-p draws look only into the blocks with the largest logits, which have all that
a cut keeps.

The uniform numbers belong to (seed, prompt, draw, position) and to nothing else, so that a prompt gets the same
completion by itself, in any batch, in any order, and for every method that is compared on it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from madpo.core.errors import ConfigError, DataError, MadpoError, first_line, is_shortage
from madpo.core.progress import bar
from madpo.core.seeding import derived_seed
from madpo.models.engine.head import TILE, Head, backbone, in_half_precision
from madpo.models.engine.inference import Inference
from madpo.models.engine.kv_cache import growing_cache
from madpo.models.engine.logprobs import check_positions, check_reading, hidden_states, unwrapped
from madpo.models.engine.rope import rope_groups, rope_keys
from madpo.models.modes import evaluating

BLOCK = 512
"""Vocabulary entries per block of the first level; about the root of a large vocabulary, and a divisor of TILE."""
FINE = 64
"""Vocabulary entries per block whose largest logit says whether a cut may keep some of it; a divisor of TILE."""
IN_CACHE = 1 << 19
"""Logits that are drawn from at once on a processor: their weights stay in its cache, several times as fast."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the most likely one."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}, but must be 0 or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, but must be in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}, but must be 1 or above")

    @property
    def cuts(self) -> bool:
        """Whether a token's probability depends on the order of the others."""
        return self.temperature == 0 or self.top_k is not None or self.top_p < 1

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One token per row from its uniform number in [0, 1)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        z = logits if self.temperature == 1 else _wide(logits) / self.temperature
        if self.top_k is not None and self.top_k < z.shape[-1]:
            z = z.masked_fill(z < z.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            z, _ = _nucleus(z, self.top_p)
        return sample(z, uniform)

    def _draw_by_blocks(self, z: Tensor, uniform: Tensor) -> Tensor:
        """:meth:`draw` from logits in blocks, ``blocks x FINE x rows``, where something cuts their tail."""
        tops, rows = z.amax(1), torch.arange(z.shape[-1])
        if self.temperature == 0:
            block = tops.argmax(0)
            return block * FINE + z[block, :, rows].argmax(-1)
        total = (
            None if self.top_k else torch.stack([part.logsumexp((0, 1)) for part in torch.split(z, 64)]).logsumexp(0)
        )
        tokens, count = torch.empty_like(rows), self.top_k or 64
        while len(rows):
            count = min(count, len(tops))
            largest, blocks = tops.topk(min(count + 1, len(tops)), dim=0)
            blocks = blocks[:count].sort(0).values
            likely = z.gather(0, blocks[:, None].expand(-1, FINE, -1)).flatten(0, 1).T.contiguous()
            least = torch.full_like(likely[:, 0], -torch.inf)
            if self.top_k is not None:
                least = likely.topk(min(self.top_k, likely.shape[-1])).values[:, -1]
                likely = likely.masked_fill(likely < least[:, None], -torch.inf)
            if self.top_p < 1:
                likely, kept = _nucleus(likely, self.top_p, total)
                least = kept if self.top_k is None else least
            # A block that was left out has nothing to keep if all of it is below what is kept. Equal logits stay.
            done = least > largest[count] if count < len(tops) else torch.ones_like(least, dtype=torch.bool)
            if done.any():
                drawn = sample(likely[done], uniform[rows[done]])
                tokens[rows[done]] = blocks.T[done].gather(1, drawn[:, None] // FINE)[:, 0] * FINE + drawn % FINE
            rows, count = rows[~done], 4 * count
            z, tops = z[..., ~done], tops[:, ~done]
            total = None if total is None else total[~done]
        return tokens

    def draw_from(self, head: Head, states: Tensor, uniform: Tensor) -> Tensor:
        """One token per row of last states, by the same law as :meth:`draw` from their logits."""
        if states.device.type != "cpu":  # a GPU would wait for the few kernels of each tile
            return self.draw(head.logits(states)[0].contiguous(), uniform)
        if not self.cuts:
            return sample_by_tiles(head, states, uniform, self.temperature)
        z = _in_blocks(head, states)
        return self._draw_by_blocks(z if self.temperature in (0, 1) else z.div_(self.temperature), uniform)


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-transform sampling from softmax(logits), one row per uniform number in [0, 1), in two levels.

    Raises:
        DataError: a row has no finite sum of probabilities; the model has diverged.
    """
    size = len(logits) if logits.is_cuda else max(1, IN_CACHE // logits.shape[-1])
    starts = range(0, len(logits), size)
    return torch.cat([_two_levels(logits[i : i + size], uniform[i : i + size]) for i in starts])


def _two_levels(logits: Tensor, uniform: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    weights = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    weights.sub_(logits.amax(-1, keepdim=True)).exp_()
    if vocabulary % BLOCK:
        weights = nn.functional.pad(weights, (0, BLOCK - vocabulary % BLOCK))
    blocks = weights.view(rows, -1, BLOCK)
    # A block is summed in the weights' own precision (1e-7 of the probability at worst), sums of blocks in float64.
    block, share = _search(blocks.sum(-1).double(), uniform)
    position, _ = _search(blocks[torch.arange(rows, device=logits.device), block].double(), share)
    return block * BLOCK + position


def sample_by_tiles(head: Head, states: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """:func:`sample` from the logits / temperature (> 0) of ``states`` [rows, hidden], a tile of them at a time.

    Raises:
        DataError: as there.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    top = states.new_full((len(states),), torch.finfo(wide).min, dtype=wide)
    sums: list[Tensor] = []
    tops: list[Tensor] = []
    for start in range(0, head.weight.shape[0], TILE):
        z = _wide(head.logits(states, start, start + TILE)[0].T)  # entries by rows
        if temperature != 1:
            z.div_(temperature)
        top = torch.maximum(top, z.amax(0))
        z.sub_(top).exp_()
        if len(z) % BLOCK:
            z = nn.functional.pad(z, (0, 0, 0, -len(z) % BLOCK))
        sums.append(z.view(-1, BLOCK, len(top)).sum(1))
        tops.append(top.expand_as(sums[-1]))
    weights = torch.cat(sums).double() * (torch.cat(tops) - top).double().exp()
    block, share = _search(weights.T.contiguous(), uniform)
    parts = [
        head.logits(row[None], first, first + BLOCK)[0][0] / temperature
        for row, first in zip(states.to(wide), (block * BLOCK).tolist(), strict=True)
    ]
    inside = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-torch.inf)
    position, _ = _search(torch.softmax(inside.double(), -1), share)
    return block * BLOCK + position


def _in_blocks(head: Head, states: Tensor) -> Tensor:
    """Logits of ``states`` [rows, hidden], blocks x FINE x rows; -inf behind the vocabulary's end."""
    size = head.weight.shape[0]
    z = _wide(states).new_empty((-(-size // FINE) * FINE, len(states)))
    z[size:] = -torch.inf
    for start in range(0, size, TILE):
        z[start : min(start + TILE, size)] = head.logits(states, start, start + TILE)[0].T
    return z.view(-1, FINE, len(states))


def _search(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The column of each row that its number in [0, 1) falls into, and where inside it, again in [0, 1).

    Raises:
        DataError: a row's weights have no finite sum.
    """
    sums = weights.cumsum(-1)
    if not bool(sums[:, -1].isfinite().all()):
        raise DataError("the model's logits are not finite, so nothing can be drawn; its training has diverged")
    target = uniform.to(torch.float64)[:, None] * sums[:, -1:]
    # Rounding can point past the last column with weight: take that one.
    last = torch.searchsorted(sums, sums[:, -1:].clone())
    column = torch.minimum(torch.searchsorted(sums, target, right=True), last)
    width = weights.gather(-1, column)
    share = (target - (sums.gather(-1, column) - width)) / width
    return column.squeeze(-1), share.squeeze(-1).clamp(0, 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _nucleus(z: Tensor, top_p: float, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keep the smallest set of most likely tokens whose probability reaches top_p; and the least logit of it.

    Args:
        total: log of the sum of e^z, where z is a part of the vocabulary.
    """
    ordered, order = _wide(z).sort(dim=-1, descending=True)
    mass = ordered.softmax(-1) if total is None else (ordered - total[:, None]).exp()
    outside = (mass.cumsum(-1) - mass) >= top_p
    kept = torch.empty_like(ordered).scatter_(-1, order, ordered.masked_fill(outside, -torch.inf))
    return kept, ordered.masked_fill(outside, torch.inf).amin(-1)


def uniforms(seed: int, key: int, draw: int, count: int) -> np.ndarray:
    """The uniform numbers of one completion, from a counter-based generator of its own."""
    return np.random.Generator(np.random.Philox(key=derived_seed(seed, "generate", key, draw))).random(count)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    *,
    keys: Sequence[int],
    draw: int,
    seed: int,
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    samples: int = 1,
    batch_size: int = 128,
    description: str = "Generating",
) -> list[list[int]]:
    """Sample completions of prompts; several of one prompt share its keys and values, which are computed once.

    Args:
        model: a causal language model, or a PEFT wrapper of one.
        prompt_ids: token ids of the prompts, not empty.
        keys: one number per prompt that names it for the random numbers (its id in the corpus).
        draw: which of several completions of the same prompt this is; with ``samples``, the first of them.
        samples: completions per prompt, with the random numbers of the draws ``draw``, ``draw + 1``, ...
        eos_token_ids: end tokens; the one that was sampled is kept at the end of the completion.
        batch_size: completions at once; it changes only the speed (up to rounding in half precision).

    Returns:
        Completion ids in the order of the prompts, at most ``max_new_tokens`` each; a prompt's samples are neighbours.
    """
    if any(not len(ids) for ids in prompt_ids):
        raise ConfigError("a prompt has no token: give every prompt at least the beginning-of-text token")
    sampling = Sampling(temperature, top_p, top_k)
    inner = unwrapped(model)
    check_reading(inner)
    _check_cache(inner)
    longest = max((len(ids) for ids in prompt_ids), default=0) + max_new_tokens
    check_positions(inner, longest, "lower max_new_tokens, or leave out the longest prompts")
    order = _by_length(inner, [len(ids) for ids in prompt_ids], max_new_tokens)
    copies = min(samples, batch_size)
    completions: list[list[int]] = [[] for _ in range(len(prompt_ids) * samples)]
    new = len(completions) * max_new_tokens
    mode = Inference(inner, tokens=new + sum(map(len, prompt_ids)))
    with evaluating(model), mode, bar(description, new) as advance:
        parts = [part for group in order for part in _parts(group, batch_size // copies)]
        for rows, draws in product(parts, _parts(range(samples), copies)):
            drawn = [(i, k) for i in rows for k in draws]
            numbers = np.stack([uniforms(seed, keys[i], draw + k, max_new_tokens) for i, k in drawn])
            batch = _Batch(inner, [prompt_ids[i] for i in rows], numbers, eos_token_ids)
            for _ in range(max_new_tokens):
                if not batch.step(sampling):
                    break
                advance(len(drawn))
            advance(len(drawn) * (max_new_tokens - batch.position))
            for (i, k), ids in zip(drawn, batch.completions, strict=True):
                completions[i * samples + k] = ids
    return completions


@torch.no_grad()
def _check_cache(model: nn.Module) -> None:
    """Compare the states of two texts over a cache with those of the texts as a whole, once a model: some architectures
    count padding, or forget a part of what they have read, without a word.

    Raises:
        ConfigError: they differ, or the model cannot go on from a cache.
    """
    if getattr(model, "_madpo_cache", False):
        return
    apart = []
    with evaluating(model), Inference():
        try:
            batch = _Batch(model, [[3], [7, 4, 6, 5]], np.zeros((2, 0)), ())
            texts = [ids[mask.bool()] for ids, mask in zip(batch.ids, batch.mask, strict=True)]
            for token in (8, 3, 5):
                whole = [hidden_states(model, ids[None], torch.ones_like(ids[None]))[0, -1].float() for ids in texts]
                wanted = torch.stack(whole)
                apart.append((batch.states().float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6))
                texts = [torch.cat([ids, ids.new_tensor([token])]) for ids in texts]
                batch.take(batch.ids.new_full((2,), token))
            half = in_half_precision(batch.head.weight)
            # As for packed rows: in half precision a mixture may route single tokens otherwise.
            wrong = float(torch.stack(apart).mean()) > 0.15 if half else float(torch.stack(apart).max()) > 1e-3
            reason = "its states over a cache are others"
        except MadpoError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            if is_shortage(error):  # which says nothing of the model
                raise
            wrong, reason = True, first_line(error)
    if wrong:
        raise ConfigError(
            f"{type(model).__name__} cannot go on from texts of unlike lengths ({reason}), so responses cannot be "
            "sampled from it in batches; use another model"
        )
    model._madpo_cache = True  # type: ignore[assignment]


def _by_length(model: nn.Module, lengths: Sequence[int], more: int) -> list[list[int]]:
    """The prompts, the shortest first; those whose positions differ in their frequencies are apart.

    Raises:
        ConfigError: with ``more`` tokens a prompt gets other frequencies than those of the keys in its cache.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    sizes = torch.tensor([lengths[i] for i in order])
    keys, later = rope_keys(model, sizes), rope_keys(model, sizes + more)
    if keys is None or later is None:
        return [order]
    if len(turned := sizes[keys != later]):
        raise ConfigError(
            f"{type(model).__name__} has other positions for long texts, and a prompt of {int(turned[0])} tokens gets "
            f"them within {more} new ones; lower max_new_tokens, or leave out such prompts"
        )
    return [[order[i] for i in group.tolist()] for group in rope_groups(keys)]


def _parts(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class _Batch:
    """Rows that are being continued. A row that has ended leaves the batch with the next clearing out.

    ``numbers`` has as many rows for every prompt, one after another: each is a completion of its own, and they part
    after the prompt.
    """

    def __init__(
        self, model: nn.Module, prompts: list[Sequence[int]], numbers: np.ndarray, eos_token_ids: Collection[int]
    ) -> None:
        self.model, self.head = model, Head.of(model)
        self.device = self.head.weight.device
        self.numbers = torch.from_numpy(numbers).to(self.device)
        self.ends = torch.tensor(sorted(eos_token_ids), device=self.device)
        self.copies = len(numbers) // len(prompts)
        self.completions: list[list[int]] = [[] for _ in numbers]
        self.alive = torch.ones(len(numbers), dtype=torch.bool, device=self.device)
        self.rows = torch.arange(len(numbers), device=self.device)
        length = max(map(len, prompts))
        self.ids = torch.tensor([[0] * (length - len(p)) + [*p] for p in prompts], device=self.device)
        self.mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        self.cache = growing_cache(model)
        self.position = 0

    def states(self) -> Tensor:
        """The last state of every row; its new tokens go into the cache."""
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        found: Tensor = backbone(self.model)(
            input_ids=self.ids, attention_mask=self.mask, position_ids=positions, cache=self.cache, use_cache=True
        ).last_hidden_state
        return found[:, -1]

    def take(self, tokens: Tensor) -> None:
        """The next token of every row."""
        self.position += 1
        self.ids = tokens[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], dim=-1)

    def step(self, sampling: Sampling) -> bool:
        """Sample the next token of every row; False when all have ended."""
        states = self.states()
        if self.position == 0 and self.copies > 1:
            self.cache.batch_repeat_interleave(self.copies)
            states, self.mask = (x.repeat_interleave(self.copies, dim=0) for x in (states, self.mask))
        states = states.to(self.head.weight.dtype)
        tokens = sampling.draw_from(self.head, states, self.numbers[self.rows, self.position])
        for row, token, alive in zip(self.rows.tolist(), tokens.tolist(), self.alive.tolist(), strict=True):
            if alive:
                self.completions[row].append(token)
        self.alive &= ~torch.isin(tokens, self.ends)
        self.take(tokens)
        count = int(self.alive.sum())
        if count and count <= 0.75 * len(self.alive):  # moving the cache costs about a step
            kept = self.alive.nonzero().squeeze(-1)
            self.cache.batch_select_indices(kept)
            self.rows, self.ids, self.mask, self.alive = (x[kept] for x in (self.rows, self.ids, self.mask, self.alive))
        return count > 0
