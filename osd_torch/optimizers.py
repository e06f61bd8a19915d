"""`make_optimizer`: builds an optimizer from the published names, with the classes of `aliases`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from osd_names import (
    FULL_RANK_OPTIMIZERS,
    LION_SIGNS,
    MOMENTUM,
    MOVE_PROJECTOR,
    OPTIMIZERS,
    RESIDUALS,
    FirstMoment,
    LionSign,
    MuonScale,
    Order,
    SecondMoment,
    check_choice,
    check_flag,
    check_moments,
    check_muon,
    check_names,
    check_read,
    check_residual,
)
from osd_torch.aliases import SubspaceAdafactor, SubspaceAdamW, SubspaceAdamW8bit, SubspaceLion
from osd_torch.full_rank import FullRankAdam
from osd_torch.groups import (
    Numbers,
    check_beta,
    check_seed,
    divided,
    execution_options,
    rule_options,
    split_by_decay,
    split_by_numbers,
    split_by_selection,
    trained_parameters,
)
from osd_torch.guard import TorchAdam, TorchAdamW, TorchSGD, skipping
from osd_torch.layout import check_basis_dtype, check_dtype, check_rank
from osd_torch.muon import SubspaceMuon
from osd_torch.numerics import check_number, check_period
from osd_torch.published import RESIDUAL_LIFTS
from osd_torch.quantization import import_bitsandbytes
from osd_torch.selection import Select
from osd_torch.sharding import is_distributed
from osd_torch.state import Group


def make_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    optimizer: str,
    proj_type: str = "std",
    *,
    lr: float | Tensor,
    full_lr: float | Tensor | None = None,
    rank: int = 128,
    update_proj_gap: int = 200,
    update_proj_every: int = 1,
    scale: float = 1.0,
    weight_decay: float = 0.0,
    no_decay: Select | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    eps: float | None = None,
    momentum: float | None = None,
    nesterov: bool = False,
    muon_scale: MuonScale = "adamw",
    ns_dtype: torch.dtype | None = None,
    residual: str = "none",
    residual_scale: float | None = None,
    growth_limiter: bool = True,
    second_moment: SecondMoment = "full",
    first_moment: FirstMoment = "full",
    select: Select | None = None,
    dimension_numbers: Numbers | None = None,
    seed: int = 0,
    penalty: float = 0.0,
    projector_lr_multiple: float | None = None,
    projector_weight_decay: float | None = None,
    peak_lr: float | None = None,
    lion_sign: LionSign = "lifted",
    move_projector: Order = "after",
    basis_dtype: torch.dtype | None = None,
    transport_moments: bool = False,
    stochastic_rounding: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """Builds an optimizer by its published name.

    The defaults are those of the release; the choices of the paper (arXiv 2408.12857) are options:
    `penalty=0.1`, `projector_lr_multiple=5`, `projector_weight_decay=weight_decay`,
    `lion_sign="subspace"`, `scale=1`.

    Args:
        named_parameters: (name, parameter) pairs, such as `model.named_parameters()`.
        optimizer: `galore_adamw`, `galore_lion`, `galore_adafactor` or `galore_adamw8bit`: selected
            parameters in a subspace, all others by the same rule at full rank. `osd_muon`: momentum
            in a subspace plus the full gradient, orthogonalized, all others by AdamW (see
            `SubspaceMuon`). `adam`, `adamw`, `lion`, `adafactor`, `adam8bit` or `sgd`: everything
            at full rank. `muon`: selected parameters by Muon, all others by AdamW.
        proj_type: How P is set and moved: `std`, `reverse_std`, `left`, `right`, `full` (SVD every
            `update_proj_gap` steps); `random` or `gaussian` (drawn every `update_proj_gap` steps);
            online PCA by AdamW (`continuous`), `continuous_adam8bit`, `continuous_lion`,
            `continuous_adafactor`, `continuous_sgd`; or `oja`, a step of Oja's rule and a QR.
        lr: Learning rate, a number or a tensor; the peak if a scheduler changes it.
        full_lr: Learning rate of the parameters that are not selected. None: `lr`.
        rank: Number of columns of P; at most min(m, n) are used.
        update_proj_gap: Steps between refreshes for the SVD kinds, `random` and `gaussian`; for
            online PCA, P's step size is `1 / update_proj_gap`, times the scheduler's factor on lr.
        update_proj_every: Online PCA moves P only at steps `update_proj_every`, twice that, ... Its
            step size there, on the same schedule as W's, is the same as if P moved at every step.
            P's own step count follows from it, so it should not change within a run.
        scale: Multiplies the lifted update.
        weight_decay: Decoupled, on every parameter: after the update for the subspace optimizers
            and `lion` (before it for Adafactor), before it for `adamw`; for `adam`, L2 on the
            gradient.
        no_decay: (name, parameter) -> whether it has no weight decay. None: all have weight decay.
        beta1: Decay of the first moment, and of Lion's moment in the direction. None: 0.9, and no
            first moment for Adafactor.
        beta2: Decay of the second moment, and of Lion's moment. None: 0.999, for Lion 0.99.
        eps: Added to the root of Adam's second moment. None: 1e-6 for `galore_adamw`, otherwise
            1e-8.
        momentum: Momentum of Muon. None: 0.95; 0: no moment is kept.
        nesterov: Whether to use Nesterov momentum.
        muon_scale: Scale of Muon's update: "adamw", with which AdamW's learning rates carry over,
            "muon" or "none"; see `orthogonalized`.
        ns_dtype: Dtype of Newton-Schulz. None: float32 (float64 for float64 parameters).
        residual: What is added of the gradient outside the subspace: `none`; Fira's `norm_ratio`,
            or `norm_ratio_released` as in its code; Alice's `column_ema`; APOLLO's `gradient_only`
            (with `gaussian`), or APOLLO-Mini's `gradient_only_matrix`; FRUGAL's `sign`. See
            `osd_torch.residuals`. With a residual, Lion's own sign is taken in the subspace.
        residual_scale: Weight of the residuals `column_ema` (None: 0.4) and `sign` (None: 1).
        growth_limiter: Whether `norm_ratio` and `gradient_only` grow by at most 1 % per step.
        second_moment: Second moment of Adam for matrices that are not selected: "full", or "row",
            one number for each entry of the longer axis, so that an embedding has one per token.
        first_moment: With "row": "full", or "8bit"; Muon's momentum is then in 8 bits too.
        select: (name, parameter) -> whether it is projected, such as `select_linear(model)`. None:
            the matrices inside numbered blocks, and those with `attn`, `attention` or `mlp` in
            their name, but no embeddings, tables, heads and routers. The logger `osd_torch` reports
            the selection.
        dimension_numbers: The axes of the matrices of selected parameters with more than two axes,
            or a function from any (name, parameter) to its `SubspaceDimensionNumbers`, or to None
            for a matrix. None: stacks of experts and convolution kernels by name and shape.
        seed: Seed of `random` and `gaussian`, and of stochastic rounding.
        penalty: Weight of the orthogonality penalty in P's loss.
        projector_lr_multiple: P's step size as a multiple of lr, instead of `1 / update_proj_gap`.
        projector_weight_decay: Decoupled weight decay of P. None: 0.01 for `continuous`, otherwise
            0.
        peak_lr: The peak of lr, to which P's step size is relative. None: estimated, and never
            below an lr that was seen; see `PublishedOptimizer`.
        lion_sign: Whether Lion's sign is applied after the lift or to the low-rank direction.
        move_projector: Whether P moves after W's step or before it.
        basis_dtype: dtype of P. None: float32 (float64 for float64 parameters).
        transport_moments: Whether to carry the moments of R over when P changes (arXiv 2410.16103)
            instead of using them unchanged as moments of the new R.
        stochastic_rounding: Computes bfloat16 weights in float32 and rounds them up or down at
            random, so that the expectation is the float32 value: updates smaller than a weight's
            spacing are not lost. The random bits depend on the seed, the parameter's name and its
            step, so a resumed run and every process repeat them; each shard of a sharded parameter
            has its own bits. No effect on float32 and float64. Not with `sgd` and `adam8bit`.
        foreach: Whether parameters of one shape are stepped together; see `Subspace`.
        capturable: Whether a step reads nothing on the host; see `Subspace`.

    Returns:
        A `torch.optim.Optimizer`. A step with any non-finite gradient changes nothing and is
        counted (`skipped_steps`).

    Raises:
        ValueError: A name is unknown, an argument is out of range, or the chosen optimizer and
            projector do not read it; the message names the argument and the choices.

    References:
        Liang et al., arXiv 2408.12857, and its released code.

    Example:
        >>> import torch, osd_torch
        >>> model = torch.nn.Sequential()
        >>> model.add_module("mlp", torch.nn.Linear(24, 16))
        >>> optimizer = osd_torch.make_optimizer(
        ...     model.named_parameters(), "galore_adamw", "continuous", lr=0.01, rank=4)
        >>> model(torch.ones(2, 24)).square().sum().backward()
        >>> optimizer.step()
        >>> list(osd_torch.projectors(optimizer))
        ['mlp.weight']
    """
    check_names(optimizer, proj_type)
    check_choice("lion_sign", lion_sign, LION_SIGNS)
    check_choice("move_projector", move_projector, MOVE_PROJECTOR)
    check_rank(rank)
    check_period(update_proj_gap)
    check_period(update_proj_every, "update_proj_every")
    check_seed(seed)
    check_number("lr", lr)
    if full_lr is not None:
        check_number("full_lr", full_lr)
    for name, beta in (("beta1", beta1), ("beta2", beta2), ("momentum", momentum)):
        if beta is not None:
            check_beta(name, beta)
    if eps is not None:
        check_number("eps", eps)
    check_flag("stochastic_rounding", stochastic_rounding)
    for name, function in (("select", select), ("no_decay", no_decay)):
        if function is not None and not callable(function):
            raise ValueError(
                f"{name} is {function!r}: expected a function (name, parameter) -> bool"
            )
    check_read(
        optimizer,
        proj_type,
        {
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "momentum": momentum,
            "nesterov": nesterov,
            "muon_scale": muon_scale,
            "ns_dtype": None if ns_dtype is None else str(ns_dtype),
            "scale": scale,
            "residual": residual,
            "residual_scale": residual_scale,
            "growth_limiter": growth_limiter,
            "second_moment": second_moment,
            "first_moment": first_moment,
            "lion_sign": lion_sign,
            "transport_moments": transport_moments,
            "stochastic_rounding": stochastic_rounding,
            "update_proj_every": update_proj_every,
            "penalty": penalty,
            "projector_lr_multiple": projector_lr_multiple,
            "projector_weight_decay": projector_weight_decay,
            "peak_lr": peak_lr,
            "move_projector": move_projector,
        },
    )
    momentum = MOMENTUM if momentum is None else momentum
    check_muon(muon_scale, nesterov, momentum)
    check_basis_dtype(ns_dtype, "ns_dtype")
    check_residual(residual, residual_scale, growth_limiter, scale)
    if residual_scale is not None:
        check_number("residual_scale", residual_scale)
    check_moments(second_moment, first_moment)
    named_parameters = list(named_parameters)
    trained = trained_parameters(named_parameters)
    common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    common |= rule_options(OPTIMIZERS[optimizer].rule, optimizer, beta1, beta2, eps)
    for name, param in trained:
        check_dtype(name, param)
    if optimizer == "adam8bit" and any(is_distributed(param) for _, param in trained):
        raise ValueError(
            "optimizer is 'adam8bit', which is bitsandbytes' own and requires unsharded "
            "parameters, but these are DTensors: choose galore_adamw8bit or adamw, or do not "
            "shard the model"
        )
    rounding = {"stochastic_rounding": True, "seed": seed} if stochastic_rounding else {}
    execution = execution_options(optimizer, foreach, capturable)
    muon = {
        "momentum": momentum, "nesterov": nesterov, "muon_scale": muon_scale, "ns_dtype": ns_dtype,
    }  # fmt: skip
    if OPTIMIZERS[optimizer].rule == "muon":
        common |= {**muon, "second_moment": second_moment, "first_moment": first_moment}
    apart: dict[str, Any] = {} if full_lr is None else {"lr": full_lr}
    if second_moment != "full":
        apart |= {"second_moment": second_moment, "first_moment": first_moment}
    if optimizer in FULL_RANK_OPTIMIZERS:
        given: list[Group] = [{"params": trained}]
        if apart or optimizer == "muon":
            selected, others = split_by_selection(named_parameters, trained, select)
            if select is None:  # a stack of experts is not orthogonalized
                others += [pair for pair in selected if pair[1].ndim > 2]
                selected = [pair for pair in selected if pair[1].ndim == 2]
            given = [{"params": selected}, {"params": others, **apart}]
            given[0] |= {"use_muon": True} if optimizer == "muon" else {}
        common |= execution
        return _full_rank(optimizer, split_by_decay(given, no_decay), common, rounding)
    common |= rounding | execution

    projected, others = divided(named_parameters, trained, select, rank)
    own_scale = RESIDUALS[residual].scale if residual_scale is None else residual_scale
    lift = RESIDUAL_LIFTS[residual](scale, own_scale or 0.0, growth_limiter)
    options = {
        "rank": rank,
        "update_proj_gap": update_proj_gap,
        "update_proj_every": update_proj_every,
        "scale": scale if lift is None else 1.0,
        "lift": lift,
        "proj_type": proj_type,
        "penalty": penalty,
        "projector_lr_multiple": projector_lr_multiple,
        "projector_weight_decay": projector_weight_decay,
        "peak_lr": peak_lr,
        "move_projector": move_projector,
        "basis_dtype": basis_dtype,
        "transport_moments": transport_moments,
        "seed": seed,
    }
    of_subspace = split_by_numbers(projected, named_parameters, dimension_numbers)
    groups: list[Group] = [{**group, **options} for group in of_subspace]
    groups.append({"params": others, **apart})
    groups = split_by_decay([group for group in groups if group["params"]], no_decay)
    match optimizer:
        case "galore_adamw":
            return SubspaceAdamW(groups, **common)
        case "galore_lion":
            return SubspaceLion(groups, **common, lion_sign=lion_sign)
        case "galore_adafactor":
            return SubspaceAdafactor(groups, **common)
        case "galore_adamw8bit":
            return SubspaceAdamW8bit(groups, **common)
        case "osd_muon":
            return SubspaceMuon(groups, **common)
    raise AssertionError(optimizer)


def _full_rank(
    optimizer: str, groups: list[Group], common: dict[str, Any], rounding: dict[str, Any]
) -> torch.optim.Optimizer:
    """`rounding` is for bfloat16, which other libraries' classes do not round stochastically."""
    is_own = any(param.dtype == torch.bfloat16 for group in groups for _, param in group["params"])
    groups = [group for group in groups if group["params"]]
    is_own = is_own or any("second_moment" in group for group in groups)
    match optimizer:
        case "muon":
            return SubspaceMuon(groups, **common, **rounding)
        case "adam" if is_own:
            decay = common.pop("weight_decay")
            l2 = [{"l2": group.pop("weight_decay", decay), **group} for group in groups]
            return FullRankAdam(l2, **common, **rounding)
        case "adamw" if is_own:
            return FullRankAdam(groups, **common, **rounding)
        case "adam":
            return TorchAdam(groups, **common)
        case "adamw":
            return TorchAdamW(groups, **common)
        case "sgd":
            return TorchSGD(groups, **common)
        case "adam8bit":
            return skipping(import_bitsandbytes().optim.Adam8bit)(groups, **common)
        case "lion":
            return SubspaceLion(groups, **common, **rounding)
        case "adafactor":
            return SubspaceAdafactor(groups, **common, **rounding)
    raise AssertionError(optimizer)
