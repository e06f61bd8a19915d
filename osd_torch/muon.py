"""Muon in a subspace, and at full rank: `SubspaceMuon`."""

from __future__ import annotations

import functools
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from osd_names import FirstMoment, MuonScale, SecondMoment, check_moments, check_muon
from osd_torch.composition import PublishedOptimizer, Subspace
from osd_torch.full_rank import full_rank_adam
from osd_torch.groups import check_beta, check_betas
from osd_torch.layout import check_basis_dtype
from osd_torch.lift import Lift
from osd_torch.newton_schulz import MUON_COEFFICIENTS, orthogonalize, orthogonalized
from osd_torch.numerics import check_number
from osd_torch.residuals import add_gradient
from osd_torch.rules import SGD, Rule, Trace
from osd_torch.rules_8bit import Trace8bit
from osd_torch.state import Group, named_parameters

# Options of Muon's orthogonalization.
MUON_DEFAULTS: dict[str, Any] = {
    "ns_steps": 5, "ns_coefficients": MUON_COEFFICIENTS, "ns_dtype": None, "muon_scale": "adamw",
}  # fmt: skip


@functools.cache
def muon_lift(
    steps: int,
    coefficients: tuple[float, float, float],
    dtype: torch.dtype | None,
    scale: MuonScale,
) -> Lift:
    """The full gradient plus the momentum, orthogonalized: one object for equal options."""
    options: dict[str, Any] = {"steps": steps, "coefficients": coefficients, "dtype": dtype}
    return orthogonalized(add_gradient(), scale=scale, **options)


class SubspaceMuon(PublishedOptimizer):
    """Momentum in a subspace plus the full gradient, orthogonalized; weight decay first.

        m <- b m + R,   R = P^T M
        W <- (1 - lr wd) W - lr s O(M + P (D - R))

    for a projected matrix. D is m, or `R + b m` with Nesterov momentum; O moves all singular values
    close to 1 (Newton-Schulz); s is a scale. With a full-rank P this is Muon. Parameters that are
    not projected are trained by AdamW, or in groups with `use_muon=True` by Muon itself. With a
    momentum of 0 no moment is kept.

    The state of a projected (m, n) matrix is r max(m, n) numbers for m, r min(m, n) for P, and the
    state of P's optimizer.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate of the projected matrices, a number or a tensor.
        momentum: b.
        nesterov: Whether to use Nesterov momentum.
        weight_decay: Decoupled, multiplied by lr, before the update.
        full_lr: Learning rate of the parameters that are not projected if `rank` is given; None:
            lr. In groups it is `lr`.
        betas: AdamW's betas for the parameters that are not projected.
        eps: AdamW's eps for these.
        second_moment: For matrices that are not projected: "full", or "row", one number for each
            entry of the longer axis; see `osd_torch.adam_of_rows.AdamOfRows`.
        first_moment: "full", or "8bit" for the first moment of these matrices with "row", and for
            the momentum.
        ns_steps: Number of Newton-Schulz steps.
        ns_coefficients: Coefficients of its polynomial.
        ns_dtype: Dtype of the iteration; None: float32 or float64.
        muon_scale: "adamw", "muon" or "none"; see `orthogonalized`.
        **subspace: See `Subspace`.

    Raises:
        ValueError: See `SubspaceAdamW`; also for `muon_scale` or Newton-Schulz options that are out
            of range.

    References:
        Muon (https://kellerjordan.github.io/posts/muon/; scale "adamw" of arXiv 2502.16982) on the
        subspace of arXiv 2408.12857.

    Example:
        >>> import torch, osd_torch
        >>> model = torch.nn.Sequential()
        >>> model.add_module("mlp", torch.nn.Linear(24, 16))
        >>> optimizer = osd_torch.SubspaceMuon(
        ...     model.named_parameters(), lr=0.02, full_lr=0.01, momentum=0.8, rank=4)
        >>> model(torch.ones(2, 24)).square().sum().backward()
        >>> optimizer.step()
    """

    decays_first = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        full_lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        second_moment: SecondMoment = "full",
        first_moment: FirstMoment = "full",
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
        ns_dtype: torch.dtype | None = None,
        muon_scale: MuonScale = "adamw",
        **subspace: Unpack[Subspace],
    ) -> None:
        defaults: dict[str, Any] = dict(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, betas=betas,
            eps=eps, second_moment=second_moment, first_moment=first_moment, ns_steps=ns_steps,
            ns_coefficients=tuple(ns_coefficients), ns_dtype=ns_dtype, muon_scale=muon_scale,
            use_muon=False,
        )  # fmt: skip
        if full_lr is not None:
            check_number("full_lr", full_lr)
        super().__init__(params, {**defaults, "full_lr": full_lr}, **subspace)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters; see `PublishedOptimizer`."""
        full_lr = self.defaults["full_lr"]
        by_adam = param_group.get("rank") is None and not param_group.get("use_muon")
        if full_lr is not None and by_adam:
            param_group = {"lr": full_lr, **param_group}
        super().add_param_group(param_group)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_betas(group)
        check_beta("momentum", group["momentum"])
        check_muon(group["muon_scale"], group["nesterov"], group["momentum"])
        check_basis_dtype(group["ns_dtype"], "ns_dtype")
        if group["use_muon"]:
            check_use_muon(group)
        by_adam = group["rank"] is None and not group["use_muon"]
        check_moments(group["second_moment"] if by_adam else "row", group["first_moment"])
        if group["lift"] is not None:
            for name, default in MUON_DEFAULTS.items():
                if group[name] != default:
                    raise ValueError(
                        f"{name} is {group[name]!r}, but lift is given, which does not read it: "
                        "leave it out, or pass it to orthogonalized(...)"
                    )
        self.lift(group)
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Momentum, or Adam at full rank."""
        if group["rank"] is None and not group["use_muon"]:
            return full_rank_adam(group)
        if not group["momentum"]:
            return SGD()
        kind = Trace8bit if group["first_moment"] == "8bit" else Trace
        return kind(group["momentum"], group["nesterov"])

    def lift(self, group: Group) -> Lift:
        """The full gradient plus the momentum, orthogonalized."""
        steps, coefficients, dtype, scale = (group[name] for name in MUON_DEFAULTS)
        return group["lift"] or muon_lift(steps, tuple(coefficients), dtype, scale)

    def full_rank_direction(self, group: Group, direction: Tensor) -> Tensor:
        """Orthogonalized, in a group with `use_muon`."""
        if not group["use_muon"]:
            return direction
        steps, coefficients, dtype, scale = (group[name] for name in MUON_DEFAULTS)
        return orthogonalize(
            direction, "output", steps=steps, coefficients=coefficients, dtype=dtype, scale=scale
        )


def check_use_muon(group: Group) -> None:
    """Raises ValueError for a group that Muon cannot train at full rank."""
    if not isinstance(group["use_muon"], bool):
        raise ValueError(f"use_muon is {group['use_muon']!r}: expected True or False")
    if group["rank"] is not None:
        raise ValueError(
            f"use_muon is True, but rank is {group['rank']!r}: a group with a rank is trained by "
            "Muon in a subspace; leave one of them out"
        )
    for name, param in named_parameters(group):
        if param.ndim != 2:
            raise ValueError(
                f"parameter '{name}' has shape {tuple(param.shape)}, which is not a matrix: put it "
                "into a group without use_muon"
            )
