"""Muon for the matrices of the residual stream, AdamW for everything else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MUON = ("wo", "wg", "wu", "wd")
MUON_DECAY = 0.1
MUON_MOMENTUM = 0.95
# AdamW's groups: the factor on the learning rate, and the weight decay (which the factor does not change).
ADAM = {"attention": (1.0, 0.1), "embedding": (1.0, 0.01), "bias": (5.0, 0.0), "norm": (1.0, 0.0)}


def _group(name: str) -> str:
    if name in ("wq", "wk", "wv"):
        return "attention"
    return "embedding" if name == "emb" else "bias" if name.startswith("b") else "norm"


class Optimizer:
    def __init__(self, model: torch.nn.Module, learning_rate: float, device: str) -> None:
        self.learning_rate, self.device = learning_rate, device
        self._model = model
        adam: dict[str, list[Tensor]] = {name: [] for name in ADAM}
        self._muon: dict[tuple[int, ...], list[Tensor]] = {}
        for full_name, parameter in model.named_parameters():
            name = full_name.split(".")[-1]
            if name in MUON:
                self._muon.setdefault(tuple(parameter.shape), []).append(parameter)
            else:
                adam[_group(name)].append(parameter)
        self._momentum = {shape: torch.zeros(len(same), *shape, device=device) for shape, same in self._muon.items()}
        groups = [{"params": adam[name], "factor": factor, "decay": decay} for name, (factor, decay) in ADAM.items()]
        self._adam = torch.optim.AdamW(
            groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0, fused=device == "cuda"
        )

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak learning rate; clears the gradients."""
        learning_rate = self.learning_rate * factor
        for group in self._adam.param_groups:
            group["lr"] = learning_rate * group["factor"]
            group["weight_decay"] = group["decay"] / group["factor"]
        self._adam.step()
        self._step_muon(learning_rate)
        for parameter in self._model.parameters():
            parameter.grad = None

    @torch.no_grad()
    def _step_muon(self, learning_rate: float) -> None:
        for shape, parameters in self._muon.items():
            gradient = torch.stack([parameter.grad for parameter in parameters])
            momentum = self._momentum[shape]
            momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            update = self._orthogonalise(gradient.lerp(momentum, MUON_MOMENTUM)) * (0.2 * math.sqrt(max(shape)))
            torch._foreach_mul_(parameters, 1 - learning_rate * MUON_DECAY)
            torch._foreach_add_(parameters, list(update.unbind(0)), alpha=-learning_rate)

    def _orthogonalise(self, matrices: Tensor) -> Tensor:
        """Five Newton-Schulz steps towards the nearest orthogonal matrices."""
        x = matrices.bfloat16() if self.device == "cuda" else matrices
        tall = x.size(-2) > x.size(-1)
        if tall:
            x = x.mT
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.mT if tall else x).float()
