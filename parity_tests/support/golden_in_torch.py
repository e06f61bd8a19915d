"""Runs osd_torch through the golden trajectories, on PyTorch's default device."""

from __future__ import annotations

import numpy as np
import torch

import osd_torch
from parity_tests.support.golden_cases import TINY_LLAMA, GoldenCase, GoldenRun


def check_matrix(case: GoldenCase, foreach: bool = False) -> None:
    """The weight and the kept bases are those of the release, within the case's tolerance.

    Args:
        case: A trajectory.
        foreach: Whether the matrix is stepped in a stack with another one, in whose place it is
            second and has the gradients with the other sign.
    """
    weight = torch.nn.Parameter(torch.tensor(case.start))
    beside = [("other.mlp.weight", torch.nn.Parameter(-torch.tensor(case.start)))] * foreach
    optimizer = osd_torch.make_optimizer(
        [*beside, ("mlp.weight", weight)],
        case.optimizer,
        case.proj_type,
        lr=case.lr,
        **case.options,
        beta1=case.beta1,
        foreach=foreach,
    )
    bases: dict[str, list[np.ndarray]] = {side: [] for side in case.bases}
    for step, (gradient, ratio) in enumerate(zip(case.gradients, case.lr_ratio, strict=True)):
        optimizer.param_groups[0]["lr"] = case.lr * ratio
        weight.grad = torch.tensor(gradient)
        for _, other in beside:
            other.grad = -weight.grad
        optimizer.step()
        if step in case.kept_steps:
            basis = osd_torch.projectors(optimizer)["mlp.weight"]
            sides = basis if isinstance(basis, osd_torch.TwoSided) else (basis,)
            for (side, found), P in zip(bases.items(), sides, strict=True):
                found.append(P.numpy(force=True).copy())
                if case.is_8bit:
                    P.copy_(torch.tensor(case.rejoined(len(found) - 1, side, found[-1])))

    error = case.error(weight.numpy(force=True))
    print(f"{case.name}: {error:.1e}, limit {case.tolerance():.0e}")
    assert error <= case.tolerance()
    case.check_bases({side: np.stack(found) for side, found in bases.items()})


def train_tiny_llama(run: GoldenRun) -> np.ndarray:
    """The losses of a run."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    model.to(torch.get_default_device())
    optimizer = osd_torch.make_optimizer(
        model.named_parameters(),
        run.optimizer,
        run.proj_type,
        lr=run.lr,
        **run.options,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: run.lr_ratio[min(step, len(run.lr_ratio) - 1)]
    )
    losses = []
    for batch in torch.tensor(run.batches).long():
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(loss.item())
        if run.grad_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.grad_clipping)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert len(osd_torch.projectors(optimizer)) == 7 * model.config.num_hidden_layers
    return np.asarray(losses)


def check_tiny_llama(run: GoldenRun) -> None:
    """The losses are those of the release, within the run's tolerance."""
    error = np.abs(train_tiny_llama(run) - run.losses)
    print(f"{run.name}: largest loss difference {error.max():.1e}, limit {run.tolerance:.0e}")
    assert error[:2].max() <= 1e-5  # before the first update
    assert error.max() <= run.tolerance
