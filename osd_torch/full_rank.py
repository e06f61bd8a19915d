"""Adam at full rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from osd_names import FirstMoment, SecondMoment, check_moments
from osd_torch.adam_of_rows import AdamOfRows
from osd_torch.buckets import Bucket
from osd_torch.composition import PublishedOptimizer
from osd_torch.groups import check_betas
from osd_torch.numerics import check_number
from osd_torch.rules import Adam, Rule
from osd_torch.state import Group


def full_rank_adam(group: Group) -> Rule:
    """Adam with the group's options, for parameters that are not projected."""
    betas, eps = tuple(group["betas"]), group["eps"]
    if group["second_moment"] == "full":
        return Adam(betas, eps)
    return AdamOfRows(betas, eps, group["first_moment"] == "8bit")


class FullRankAdam(PublishedOptimizer):
    """`adam` and `adamw` for bfloat16 parameters, and with moments that `torch.optim` lacks.

    Moments are float32. In `torch.optim` they would be bfloat16, in which `0.999 * v` rounds to v
    and never decays.

    Args:
        params: Parameters, (name, parameter) pairs, or groups without rank.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, multiplied by lr, before the update.
        l2: Weight decay that is added to the gradient.
        second_moment: For matrices: "full", or "row", one number for each entry of the longer axis;
            see `osd_torch.adam_of_rows.AdamOfRows`.
        first_moment: For these with "row": "full", or "8bit".
        stochastic_rounding: Whether to round weights up or down at random; see `make_optimizer`.
        seed: Seed of stochastic rounding.
        foreach: Whether parameters of one shape are stepped together; see `Subspace`.
        capturable: Whether a step reads nothing on the host; see `Subspace`.

    Raises:
        ValueError: See `SubspaceAdamW`.
    """

    decays_first = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        l2: float = 0.0,
        second_moment: SecondMoment = "full",
        first_moment: FirstMoment = "full",
        stochastic_rounding: bool = False,
        seed: int = 0,
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults |= dict(l2=l2, second_moment=second_moment, first_moment=first_moment)
        defaults |= dict(foreach=foreach, capturable=capturable)
        super().__init__(params, defaults, stochastic_rounding=stochastic_rounding, seed=seed)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_betas(group)
        check_number("weight_decay", group["l2"])
        check_moments(group["second_moment"], group["first_moment"])
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Adam."""
        return full_rank_adam(group)

    def full_rank_gradient(self, group: Group, bucket: Bucket, gradient: Tensor) -> Tensor:
        """The gradient plus its L2 term."""
        return (
            gradient.add(bucket.joined(bucket.params), alpha=group["l2"])
            if group["l2"]
            else gradient
        )
