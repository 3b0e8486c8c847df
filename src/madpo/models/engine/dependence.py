"""Which states of a model depend on which tokens, decided exactly by gradients; and which weights are not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from madpo.core.errors import is_shortage


def depends(model: nn.Module, run: Callable[[], Tensor], cases: Sequence[tuple[Tensor, Tensor]]) -> bool | None:
    """Whether states have a gradient with respect to embeddings that they should not read.

    A gradient of exactly 0 is the same in every precision: masked attention multiplies by 0, and what leaks otherwise
    leaves something, however faint. Leaks through choices that have no gradient are not seen.

    Args:
        run: computes the states of some rows, ``rows x length x hidden``, from token ids.
        cases: pairs of masks ``rows x length``: the states that read, and the tokens that they must not depend on.

    Returns:
        None where the model's gradients cannot be taken: sharded weights, kernels without a backward pass, numbers that
        are not finite.
    """
    if sharded(model):
        return None  # shards are gathered by hooks, which must not see a backward pass inside a forward pass
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)  # type: ignore[operator]
    try:
        with torch.enable_grad():
            states = run()
            seed = torch.linspace(1, 2, states.numel(), device=states.device).view_as(states).to(states.dtype)
            found = [
                torch.autograd.grad(states, embedded[0], seed * readers[..., None], retain_graph=True)[0]
                for readers, _ in cases
            ]
    except (RuntimeError, IndexError) as error:
        if is_shortage(error):
            raise
        return None
    finally:
        handle.remove()
    if not all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in found):
        return None  # overflow says nothing; a gradient of 0 everywhere, that the embeddings are read in another way
    return any(bool(gradient[sources].any()) for gradient, (_, sources) in zip(found, cases, strict=True))


def sharded(model: nn.Module) -> bool:
    """Whether the model's weights are not all here: placeholders, or parts of what DeepSpeed or FSDP splits."""
    return any(p.is_meta or hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters())


def without_numbers(model: nn.Module) -> bool:
    """Whether the weights are fake tensors (:mod:`madpo.models.on_paper`), which have no values to check."""
    return any(isinstance(p, FakeTensor) for p in model.parameters())
