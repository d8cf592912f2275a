"""Muon for a projector's matrices and AdamW for its other weights, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

OPTIMIZERS = ("adamw", "muon")
OTHERS = 1 / 3  # rate of AdamW for the weights that are not matrices, relative to Muon's


def usual_rate(optimizer: str, weights: Iterable[torch.nn.Parameter]) -> float:
    """A peak rate to begin with: LLaVA's 1e-3 for AdamW; for Muon what did well on aim-tiny (docs/LOG.md), by width.

    A step of Muon changes a matrix by 0.2 sqrt(its longer side) times the rate, in spectral norm. The rate falls as
    that grows, so that a step moves fused tokens equally far on every backbone: .019 where the side is 1024.

    Args:
        optimizer: one of `OPTIMIZERS`.
        weights: of the projector.
    """
    if optimizer == "adamw":
        return 1e-3
    return 0.6 * max(max(weight.shape) for weight in weights if weight.ndim == 2) ** -0.5


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan et al., 2024; scaled as in arXiv 2502.16982) beside AdamW, behind one interface.

    Both get their rate from the same schedule: groups of both are in `param_groups`.

    Args:
        weights: what is trained; matrices go to Muon, all else to AdamW at a third of the rate.
        lr: peak rate of Muon.
        weight_decay: of the matrices.
        betas: of AdamW.
        others: are trained too, by AdamW whatever their shape: embeddings, an LM head.

    Raises:
        ValueError: there is no matrix.
    """

    def __init__(
        self,
        weights: Iterable[torch.nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
        others: Iterable[torch.nn.Parameter] = (),
    ) -> None:
        weights = list(weights)
        matrices = [weight for weight in weights if weight.ndim == 2]
        others = [*(weight for weight in weights if weight.ndim != 2), *others]
        if not matrices:
            raise ValueError(
                "Muon is for matrices, and none is trained (FSDP 1 flattens them; FSDP 2 does not): use adamw."
            )
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts: list[torch.optim.Optimizer] = [muon]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=OTHERS * lr, betas=betas, weight_decay=0.0))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's own groups, whose rates a schedule sets, and on its own state."""
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[begin:end], self.state
            begin = end

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of both."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()
