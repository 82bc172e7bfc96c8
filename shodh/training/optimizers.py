"""AdamW for all parameters, or Muon for the matrices and AdamW for the rest, as one torch optimizer."""

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shodh.config import ConfigError

OptimizerName = Literal["adamw", "muon"]

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)

# A matrix with a side below this has too few singular values for their equalisation to matter.
MIN_MATRIX_SIDE = 8


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one with all their ``param_groups`` and one ``state``; each steps its own groups.

    It inherits because DeepSpeed refuses what is no torch Optimizer.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()  # torch has put new groups and a new state in place of the old

    def _share(self) -> None:
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last


class StackedMuon(torch.optim.Muon):
    """torch's Muon for matrices, and for stacks of them (one matrix per expert), slice by slice.

    A matrix or slice without gradient, that of an expert which no token visited, stands still: its momentum, however
    old, would be made as long a step as any other.
    """

    def __init__(self, matrices: Sequence[Tensor], stacks: Sequence[Tensor], **options: Any) -> None:
        super().__init__(matrices, **options)
        if stacks:
            self.add_param_group({"params": list(stacks)})

    def _init_group(
        self, group: Any, params_with_grad: list[Tensor], grads: list[Tensor], muon_momentum_bufs: list[Tensor]
    ) -> bool:
        lists = params_with_grad, grads, muon_momentum_bufs
        is_complex = super()._init_group(group, *lists)
        for tensors in lists:  # torch steps what it finds there in place, so views do
            tensors[:] = [
                matrix for tensor in tensors for matrix in (tensor.unbind() if tensor.ndim == 3 else [tensor])
            ]
        visited = torch.stack([grad.any() for grad in grads]).tolist() if grads else []  # one transfer for all
        for tensors in lists:
            tensors[:] = list(compress(tensors, visited))
        return is_complex


def build_optimizer(
    model: nn.Module, optimizer: OptimizerName, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """An optimizer with learning rate 0 over the trainable parameters; one learning rate serves all its groups.

    With "muon" every hidden matrix (``is_hidden_matrix``) follows its orthogonalised momentum, scaled by
    0.2 sqrt(longer side): the step's RMS is then 0.2, as AdamW's is in practice (Liu et al. 2025, arXiv:2502.16982).
    Raises ConfigError where the model has no such matrix.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if optimizer == "adamw":
        return torch.optim.AdamW(_decay_groups(named, weight_decay), lr=0.0, betas=betas)
    hidden = [(name, parameter) for name, parameter in named if is_hidden_matrix(name, parameter)]
    matrices, stacks = ([p for name, p in hidden if p.ndim == number and decays(name, p)] for number in (2, 3))
    kept = [p for name, p in hidden if not decays(name, p)]
    others = [(name, parameter) for name, parameter in named if not is_hidden_matrix(name, parameter)]
    if not matrices:
        raise ConfigError(
            f"engine.optimizer=muon: the model has no trainable matrix of at least {MIN_MATRIX_SIDE} x "
            f"{MIN_MATRIX_SIDE}. Set engine.optimizer=adamw."
        )
    muon = StackedMuon(matrices, stacks, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    if kept:
        muon.add_param_group({"params": kept, "weight_decay": 0.0})
    rest = [torch.optim.AdamW(_decay_groups(others, weight_decay), lr=0.0, betas=betas)] if others else []
    return JoinedOptimizer([muon, *rest])


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon suits a parameter: linear maps between many features, one or a stack, and no set of prototypes."""
    is_large = parameter.ndim in (2, 3) and min(parameter.shape[-2:]) >= MIN_MATRIX_SIDE
    return is_large and not name.endswith("prototype")


def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer at once the state that it otherwise makes in its first step, so that it can be restored."""
    for group in optimizer.param_groups:
        is_muon = "ns_steps" in group
        for parameter in group["params"]:
            names = MUON_MOMENTS if is_muon else ADAMW_MOMENTS
            moments = {name: torch.zeros_like(parameter) for name in names}
            optimizer.state[parameter] = moments if is_muon else {"step": torch.tensor(0.0), **moments}


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weights decay: those of matrices and convolutions, but no gain, bias, prototype or linear expert.

    Linear experts are solved for and kept as large numbers that move by small steps, which decay would outweigh.
    """
    return parameter.ndim >= 2 and not name.endswith("prototype") and "stencil.kernels" not in name


def _decay_groups(named: Sequence[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Those that decay and those that do not."""
    decayed = [p for name, p in named if decays(name, p)]
    kept = [p for name, p in named if not decays(name, p)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
