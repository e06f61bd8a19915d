"""One optimizer step on one matrix in PyTorch: floor, published implementation, and optimizers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from launch.bench.contender import GAP, LR, SCALE, Arrays, Built, Case, period_of, scale_of
from launch.bench.timing import Step


def tensors(given: Arrays, device: str, dtype: str) -> tuple[Any, Any, Any]:
    """W with G in its `grad`, the same G, and P."""
    import torch

    to = lambda x: torch.from_numpy(x.copy()).to(device)
    weight = torch.nn.Parameter(to(given.weight).to(getattr(torch, dtype)))
    weight.grad = to(given.gradient).to(weight.dtype)
    return weight, weight.grad, to(given.basis)


def done(step: Step, device: str) -> Step:
    """A step that returns when the device has finished it."""
    import torch

    if device == "cpu":
        return step

    def synchronised() -> None:
        step()
        torch.cuda.synchronize()

    return synchronised


def is_right(case: Case) -> bool:
    """Whether P multiplies a matrix in PyTorch's layout from the right, on its input side."""
    return case.shape[0] >= case.shape[1]


class SevenProducts:
    """The floor in PyTorch: the products of a step, written into preallocated memory."""

    def __init__(self, weight: Any, gradient: Any, basis: Any, right: bool) -> None:
        import torch

        self.weight, self.matrix = weight.data, gradient
        if right:
            self.weight, self.matrix = self.weight.mT, gradient.mT
        self.basis, self.narrow = basis, basis.to(gradient.dtype)
        (p, r), q = basis.shape, self.matrix.shape[1]
        empty = functools.partial(torch.empty, device=basis.device)  # float32, like P
        self.low_rank = empty(r, q, dtype=gradient.dtype)
        self.correlation = empty(p, r, dtype=gradient.dtype)
        self.direction = 1e-3 * torch.randn(r, q).to(self.low_rank)
        self.inner, self.gram = empty(r, r), empty(r, r)
        self.wide, self.moved = empty(p, r), empty(p, r)

    def __call__(self) -> None:
        """Runs it once."""
        import torch

        torch.mm(self.narrow.mT, self.matrix, out=self.low_rank)
        self.weight.addmm_(self.narrow, self.direction, alpha=-LR)
        torch.mm(self.matrix, self.low_rank.mT, out=self.correlation)
        correlation = self.correlation
        if correlation.dtype != self.wide.dtype:
            correlation = self.wide.copy_(correlation)
        torch.mm(self.basis.mT, correlation, out=self.inner)
        torch.mm(self.basis.mT, self.basis, out=self.gram)
        torch.mm(self.basis, self.inner, out=self.moved)
        self.moved.addmm_(correlation, self.gram)


def floor(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """The seven products."""
    products = SevenProducts(*tensors(given, device, dtype), is_right(case))
    return Built(done(products, device))


class PublishedStep:
    """The published implementation: P by autograd through `||P P^T G - G||_F^2`, and AdamW.

    R = P^T G; Adam's direction for R, lifted by P, updates W; then P takes one step of AdamW, with
    step size 1 / gap, down the gradient of the loss on G / ||G||_F, for which P P^T is formed.
    """

    def __init__(self, weight: Any, gradient: Any, basis: Any, right: bool) -> None:
        import torch

        self.weight, self.gradient, self.right = weight.data, gradient, right
        self.basis = torch.nn.Parameter(basis.to(gradient.dtype))
        self.optimizer = torch.optim.AdamW([self.basis], lr=1 / GAP)
        low_rank = self._low_rank()
        self.first, self.second = torch.zeros_like(low_rank), torch.zeros_like(low_rank)
        self.count = 0

    def _low_rank(self) -> Any:
        basis = self.basis.data
        return self.gradient @ basis if self.right else basis.mT @ self.gradient

    def __call__(self) -> None:
        """One step."""
        beta1, beta2, eps = 0.9, 0.999, 1e-6
        low_rank = self._low_rank()
        self.count += 1
        self.first.mul_(beta1).add_(low_rank, alpha=1 - beta1)
        self.second.mul_(beta2).addcmul_(low_rank, low_rank, value=1 - beta2)
        correction = (1 - beta2**self.count) ** 0.5 / (1 - beta1**self.count)
        direction = self.first / self.second.sqrt().add_(eps)
        basis = self.basis.data
        lifted = direction @ basis.mT if self.right else basis @ direction
        self.weight.add_(lifted * SCALE, alpha=-LR * correction)
        self.move()

    def move(self) -> None:
        """Only P's step."""
        unit = self.gradient / self.gradient.norm()
        onto = self.basis @ self.basis.mT
        found = unit @ onto if self.right else onto @ unit
        (found - unit).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def published(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """The published implementation of a step."""
    step = PublishedStep(*tensors(given, device, dtype), is_right(case))
    return Built(done(step, device))


def osd(
    optimizer: str, proj_type: str, every: int = 1
) -> Callable[[Case, Arrays, str, str], Built]:
    """A subspace optimizer of `osd_torch`; GaLore's SVD is measured alone."""

    def build(case: Case, given: Arrays, device: str, dtype: str) -> Built:
        import osd_torch
        from osd_torch.bases import leading_singular_vectors
        from osd_torch.layout import to_matrix

        weight, gradient, basis = tensors(given, device, dtype)
        online = proj_type.startswith("continuous")
        made = osd_torch.make_optimizer(
            [("mlp", weight)], optimizer, proj_type, lr=LR, rank=case.rank,
            update_proj_gap=GAP if online else 10**9, update_proj_every=every,
            **scale_of(optimizer),
        )  # fmt: skip
        assert isinstance(made, osd_torch.SubspaceOptimizer)
        after_first_step(made, lambda p, rank: basis)
        side = made.side(made.param_groups[0], weight)
        matrix, old = to_matrix(gradient, side), basis.float()
        refresh = lambda: leading_singular_vectors(matrix, old, side)
        step = done(made.step, device)
        return period_of(step, every) if online else Built(step, done(refresh, device))

    return build


def after_first_step(optimizer: Any, basis_of: Callable[[int, int], Any]) -> None:
    """Gives an `osd_torch` optimizer the state after one step, without the SVD of the first step.

    That SVD takes minutes at the larger shapes.

    Args:
        optimizer: A new optimizer.
        basis_of: (p, r) -> P.
    """
    for group in optimizer.param_groups:
        for param in group["params"] if group["rank"] is not None else ():
            state = optimizer.state_of(group, param)
            state["basis"].copy_(basis_of(*state["basis"].shape))
            state["step"].fill_(1)
            state["set_at"].fill_(0)


def muon(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """`osd_torch`'s Muon at full rank."""
    import osd_torch

    weight, *_ = tensors(given, device, dtype)
    made = osd_torch.make_optimizer([("mlp", weight)], "muon", lr=LR)
    return Built(done(made.step, device))


def torch_muon(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """`torch.optim.Muon`, with the same scale."""
    import torch

    weight, *_ = tensors(given, device, dtype)
    own = torch.optim.Muon([weight], lr=LR, nesterov=False, adjust_lr_fn="match_rms_adamw")
    return Built(done(own.step, device))


def adamw(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """PyTorch's fused AdamW."""
    import torch

    weight, *_ = tensors(given, device, dtype)
    return Built(done(torch.optim.AdamW([weight], lr=LR, fused=True).step, device))


def adamw_8bit(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """bitsandbytes' AdamW with 8-bit moments."""
    bitsandbytes = importlib.import_module("bitsandbytes")
    weight, *_ = tensors(given, device, dtype)
    return Built(done(bitsandbytes.optim.AdamW8bit([weight], lr=LR).step, device))
