"""The optimizer classes, each composed of a weight rule, a basis rule and a lift."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from osd_names import LION_SIGNS, FirstMoment, LionSign, SecondMoment, check_choice, check_moments
from osd_torch.composition import PublishedOptimizer, Subspace
from osd_torch.full_rank import full_rank_adam
from osd_torch.groups import check_beta, check_betas
from osd_torch.lift import Lift, sign_after_lift
from osd_torch.numerics import check_number
from osd_torch.rules import Adafactor, Adam, Lion, Rule
from osd_torch.rules_8bit import Adam8bit
from osd_torch.state import Group

_sign_after_lift = functools.cache(sign_after_lift)


class SubspaceAdamW(PublishedOptimizer):
    """`galore_adamw`: AdamW on the low-rank gradient; weight decay after the update.

        R = P^T G,   W <- (1 - lr wd) (W - lr * lift(Adam(R)))

    As in the release, epsilon is added to the root of the second moment before bias correction.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak if a schedule changes it.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, multiplied by lr.
        second_moment: For matrices that are not projected: "full", or "row", one number for each
            entry of the longer axis; see `osd_torch.adam_of_rows.AdamOfRows`.
        first_moment: For these matrices with "row": "full", or "8bit".
        **subspace: See `Subspace`.

    Raises:
        ValueError: An option is out of range, a dtype is not float32, bfloat16 or float64, or a
            projected parameter is not a matrix.

    References:
        Liang et al., arXiv 2408.12857, algorithm 1.

    Example:
        >>> import torch, osd_torch
        >>> from osd_torch.rules import Adam
        >>> model = torch.nn.Sequential()
        >>> model.add_module("mlp", torch.nn.Linear(24, 16))
        >>> optimizer = osd_torch.SubspaceAdamW(
        ...     model.named_parameters(), lr=0.01, betas=(0.9, 0.95), rank=4,
        ...     basis=osd_torch.online_pca(Adam(), step_size=5e-3, penalty=0.1))
        >>> model(torch.ones(2, 24)).square().sum().backward()
        >>> optimizer.step()
        >>> osd_torch.projectors(optimizer)["mlp.weight"].shape
        torch.Size([16, 4])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        second_moment: SecondMoment = "full",
        first_moment: FirstMoment = "full",
        **subspace: Unpack[Subspace],
    ) -> None:
        defaults: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults |= dict(second_moment=second_moment, first_moment=first_moment)
        super().__init__(params, defaults, **subspace)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_betas(group)
        check_moments(group["second_moment"], group["first_moment"])
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Adam with epsilon as in the release."""
        if group["rank"] is None and group["second_moment"] == "row":
            return full_rank_adam(group)
        return Adam(tuple(group["betas"]), group["eps"], eps_first=True)


class SubspaceLion(PublishedOptimizer):
    """`galore_lion`: Lion on the low-rank gradient; weight decay after the update.

        D = b1 m + (1 - b1) R,   m <- b2 m + (1 - b2) R,   W <- (1 - lr wd) (W - lr * lift(D))

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak if a schedule changes it.
        betas: Weight of the moment in the direction, and its decay.
        weight_decay: Decoupled, multiplied by lr.
        lion_sign: "lifted": the sign is applied after the lift, so `scale` has no effect (the
            release). "subspace": it is applied to the low-rank direction, which is then lifted (the
            paper); this is always the case with a custom `lift`.
        **subspace: See `Subspace`.

    Raises:
        ValueError: See `SubspaceAdamW`.

    References:
        Chen et al., arXiv 2302.06675.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.SubspaceLion(layer.parameters(), lr=1e-4, rank=2)
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        lion_sign: LionSign = "lifted",
        **subspace: Unpack[Subspace],
    ) -> None:
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, lion_sign=lion_sign)
        super().__init__(params, defaults, **subspace)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_betas(group)
        check_choice("lion_sign", group["lion_sign"], LION_SIGNS)
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Lion, with its sign applied here or after the lift."""
        is_lifted = group["rank"] is not None and group["lift"] is None
        sign = not is_lifted or group["lion_sign"] == "subspace"
        return Lion(tuple(group["betas"]), sign=sign)

    def lift(self, group: Group) -> Lift:
        """W <- W - lr * sign(P D), or the plain lift of signs; see `lion_sign`."""
        if group["lift"] is not None or group["lion_sign"] == "subspace":
            return super().lift(group)
        return _sign_after_lift()


class SubspaceAdafactor(PublishedOptimizer):
    """`galore_adafactor`: Adafactor on the low-rank gradient; weight decay before the update.

    The step size is `lr` as given, relative neither to the step count nor to the parameters.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak if a schedule changes it.
        beta1: Decay of the first moment; None: no first moment.
        eps: Added to the squared gradient.
        clip_threshold: Maximum root mean square of an update before lr.
        decay_rate: The second moment's decay at step t is `1 - t ** decay_rate`.
        weight_decay: Decoupled, multiplied by lr.
        **subspace: See `Subspace`.

    Raises:
        ValueError: See `SubspaceAdamW`.

    References:
        Shazeer and Stern, arXiv 1804.04235.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.SubspaceAdafactor(layer.parameters(), lr=1e-3, rank=2, beta1=0.9)
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """

    decays_first = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        beta1: float | None = None,
        eps: float = 1e-30,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
        **subspace: Unpack[Subspace],
    ) -> None:
        rule = Adafactor(beta1, eps, clip_threshold, decay_rate)
        defaults = dict(lr=lr, weight_decay=weight_decay, **dataclasses.asdict(rule))
        super().__init__(params, defaults, **subspace)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        if group["beta1"] is not None:
            check_beta("beta1", group["beta1"])
        check_number("eps", group["eps"])
        check_number("clip_threshold", group["clip_threshold"])
        if not group["decay_rate"] <= 0:
            raise ValueError(f"decay_rate is {group['decay_rate']!r}: expected a number up to 0")
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Adafactor with the group's options."""
        return Adafactor(*(group[f.name] for f in dataclasses.fields(Adafactor)))


class SubspaceAdamW8bit(PublishedOptimizer):
    """`galore_adamw8bit`: AdamW with 8-bit moments, by bitsandbytes; weight decay after the update.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak if a schedule changes it.
        betas: Decay of the moments.
        eps: Added to the root of the second moment, after bias correction.
        weight_decay: Decoupled, multiplied by lr.
        min_8bit_size: State of fewer values stays in float32.
        **subspace: See `Subspace`.

    Raises:
        ValueError: See `SubspaceAdamW`.
        ImportError: bitsandbytes is not installed.

    References:
        Dettmers et al., arXiv 2110.02861.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.SubspaceAdamW8bit(layer.parameters(), lr=1e-3, rank=2)
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
        **subspace: Unpack[Subspace],
    ) -> None:
        rule = Adam8bit(betas, eps, min_8bit_size)
        defaults = dict(lr=lr, weight_decay=weight_decay, **dataclasses.asdict(rule))
        super().__init__(params, defaults, **subspace)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_betas(group)
        size = group["min_8bit_size"]
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"min_8bit_size is {size!r}: expected a whole number of at least 0")
        super().check_group(group)

    def rule(self, group: Group) -> Adam8bit:
        """Adam with 8-bit moments."""
        return Adam8bit(tuple(group["betas"]), group["eps"], group["min_8bit_size"])


class OnlineSubspaceDescent(PublishedOptimizer):
    """Any weight rule in a subspace; weight decay after the update.

        W <- (1 - lr wd) (W - lr * lift(rule(R))),   R = P^T G

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak if a schedule changes it.
        rule: Turns R, or the gradient of a parameter that is not projected, into a direction, such
            as `osd_torch.rules.Adam(betas=(0.9, 0.95))` or a custom `Rule`.
        weight_decay: Decoupled, multiplied by lr.
        **subspace: See `Subspace`.

    Raises:
        ValueError: See `SubspaceAdamW`; also if `rule` is not a `Rule`.

    References:
        Liang et al., arXiv 2408.12857, algorithm 1.

    Example:
        >>> import torch, osd_torch
        >>> from osd_torch.rules import SGD, Lion
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.OnlineSubspaceDescent(
        ...     layer.parameters(), lr=0.1, rule=Lion(), rank=2, side="output",
        ...     basis=osd_torch.online_pca(SGD(), step_size=lambda lr: 5 * lr),
        ...     lift=osd_torch.scaled(0.25))
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> [tuple(P.shape) for P in osd_torch.projectors(optimizer).values()]
        [(6, 2)]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rule: Rule,
        weight_decay: float = 0.0,
        **subspace: Unpack[Subspace],
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, rule=rule), **subspace)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        is_rule = callable(getattr(group["rule"], "step", None))
        if isinstance(group["rule"], type) or not is_rule:
            raise ValueError(
                f"rule is {group['rule']!r}: expected a Rule, such as osd_torch.rules.Adam()"
            )
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """The group's rule."""
        rule: Rule = group["rule"]
        return rule
