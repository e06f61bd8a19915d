"""An independent float64 NumPy implementation of the algorithm, easy to compare with the papers.

Online Subspace Descent (arXiv 2408.12857, algorithm 1), GaLore (arXiv 2403.03507, algorithm 2).
Matrices are in PyTorch's orientation, (output, input). Nothing here is optimized or shared with the
libraries, except the table of published names: P's gradient is that of the loss as written, with
the (p, p) matrix P P^T.

A projection is a pair (L, Q): R = L^T G Q, and W <- W - scale * L dW Q^T. If only one side is
projected, the other side's basis is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from osd_names import MOVING_BASES, PROJECTIONS

Array = np.ndarray
Rule = Callable[[Array, dict[str, Any], int, float], Array]


# ------------------------------------------------- optimizers: (g, state, t from 1, lr) -> step


def adam(
    g: Array, s: dict[str, Any], t: int, lr: float, b1: float = 0.9, b2: float = 0.999,
    eps: float = 1e-8,
) -> Array:  # fmt: skip
    """Kingma and Ba, arXiv 1412.6980, algorithm 1."""
    m = s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    v = s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    return lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def adam_eps_first(
    g: Array, s: dict[str, Any], t: int, lr: float, b1: float = 0.9, b2: float = 0.999,
    eps: float = 1e-6,
) -> Array:  # fmt: skip
    """The release's: eps joins sqrt(v) before the bias correction."""
    m = s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    v = s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    return lr * m / (np.sqrt(v) + eps) * np.sqrt(1 - b2**t) / (1 - b1**t)


def adam_of_rows(
    g: Array, s: dict[str, Any], t: int, lr: float, b1: float = 0.9, b2: float = 0.999,
    eps: float = 1e-8,
) -> Array:  # fmt: skip
    """Adam with one second moment for each entry of a matrix' longer axis."""
    if g.ndim < 2:
        return adam(g, s, t, lr, b1, b2, eps)
    across = 0 if g.shape[0] < g.shape[1] else 1
    m = s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    v = s["v"] = b2 * s.get("v", 0) + (1 - b2) * np.mean(g**2, axis=across, keepdims=True)
    return lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def trace(
    g: Array, s: dict[str, Any], t: int, lr: float, momentum: float = 0.95, nesterov: bool = False
) -> Array:
    """Heavy ball, and Nesterov's form of it as Sutskever et al. (2013) write it."""
    m = s["m"] = momentum * s.get("m", 0) + g
    return lr * (g + momentum * m if nesterov else m)


def newton_schulz(X: Array, coefficients: tuple[float, float, float]) -> Array:
    """Muon's iteration: 5 steps of a X + b X X^T X + c X X^T X X^T X from X / |X|."""
    a, b, c = coefficients
    X = X / np.linalg.norm(X)
    for _ in range(5):
        X = a * X + b * (X @ X.T) @ X + c * (X @ X.T) @ (X @ X.T) @ X
    return X


def lion(
    g: Array, s: dict[str, Any], t: int, lr: float, sign: bool = True, b1: float = 0.9,
    b2: float = 0.99,
) -> Array:  # fmt: skip
    """Chen et al., arXiv 2302.06675, program 1; without the sign: what it is taken of."""
    m = s.get("m", 0)
    s["m"] = b2 * m + (1 - b2) * g
    c = b1 * m + (1 - b1) * g
    return lr * noted_sign(c, s) if sign else c


def adafactor(g: Array, s: dict[str, Any], t: int, lr: float, beta1: float | None = None) -> Array:
    """Shazeer and Stern, arXiv 1804.04235, algorithms 4 and 5, lr given; beta1 as Hugging Face."""
    beta2 = 1 - t**-0.8
    square = g**2 + 1e-30
    if g.ndim == 2:
        row = s["row"] = beta2 * s.get("row", 0) + (1 - beta2) * square.mean(1)
        col = s["col"] = beta2 * s.get("col", 0) + (1 - beta2) * square.mean(0)
        v = np.outer(row, col) / row.mean()
    else:
        v = s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * square
    u = g / np.sqrt(v)
    u = lr * u / max(1.0, np.sqrt(np.mean(u**2)))
    if beta1 is None:
        return u
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * u
    return s["m"]


def noted_sign(c: Array, s: dict[str, Any]) -> Array:
    """sign(c); `s` notes how near to zero an entry came, for those who compare in float32."""
    s["margin"] = min(s.get("margin", np.inf), np.abs(c).min() / np.abs(c).max())
    return np.sign(c)


def sgd(g: Array, s: dict[str, Any], t: int, lr: float) -> Array:
    return lr * g


# OptimizerP, by its name in the table of published names.
PROJECTOR_RULES: dict[str, Rule] = {
    "adam": adam,
    "lion": lion,
    "adafactor": adafactor,
    "sgd": sgd,
}


# ------------------------------------------------------------------------------------- online PCA


def pca_loss(P: Array, G: Array, penalty: float) -> float:
    """Online Subspace Descent, equation 8: ||P P^T Gn - Gn||^2 + penalty ||P^T P - I||^2."""
    Gn = G / np.linalg.norm(G)
    error, gram = P @ P.T @ Gn - Gn, P.T @ P - np.eye(P.shape[1])
    return float(np.sum(error**2) + penalty * np.sum(gram**2))


def pca_gradient(P: Array, G: Array, penalty: float) -> Array:
    """d loss: with E = P P^T Gn - Gn, dE = dP P^T Gn + P dP^T Gn, and d||E||^2 = 2 <E, dE>."""
    Gn = G / np.linalg.norm(G)
    error = P @ P.T @ Gn - Gn
    first = 2 * (error @ Gn.T + Gn @ error.T) @ P
    return first + 4 * penalty * P @ (P.T @ P - np.eye(P.shape[1]))


# ---------------------------------------------------------------------------------- one parameter


def projected_sides(proj_type: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Which sides of a matrix (output, input) have a P."""
    is_tall = shape[0] >= shape[1]
    return {
        "output": ("output",),
        "input": ("input",),
        "both": ("output", "input"),
        "shorter": ("input",) if is_tall else ("output",),
        "longer": ("output",) if is_tall else ("input",),
    }[PROJECTIONS[proj_type].side]


@dataclass
class Oracle:
    """One parameter, and the steps that it takes.

    Attributes are make_optimizer's arguments; `proj_type` None: full rank. `schedule` maps the
    step, from 0, to the factor on lr.
    """

    weight: Array
    optimizer: str
    proj_type: str | None
    lr: float = 0.01
    rank: int = 4
    update_proj_gap: int = 7
    update_proj_every: int = 1
    scale: float = 1.0
    weight_decay: float = 0.0
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    schedule: Callable[[int], float] = lambda step: 1.0
    penalty: float = 0.0
    projector_lr_multiple: float | None = None
    projector_weight_decay: float | None = None
    lion_sign: str = "lifted"
    move_projector: str = "after"
    momentum: float = 0.95
    nesterov: bool = False
    muon_scale: str = "adamw"
    residual: str = "none"
    residual_scale: float | None = None
    growth_limiter: bool = True
    second_moment: str = "full"
    bases: dict[str, Array] = field(default_factory=dict)  # by side, "output" and "input"
    state: dict[str, Any] = field(default_factory=dict)
    projector_state: dict[str, Any] = field(default_factory=dict)
    lift_state: dict[str, Any] = field(default_factory=dict)
    steps: int = 0

    def step(self, G: Array, reported: dict[str, Array] | None = None) -> None:
        """One step of W and P.

        Args:
            G: The gradient, not zero.
            reported: The bases that a library holds after this step. Read at a refresh only: as
                they are by `random`, whose draws are the framework's; for their columns' signs by
                the SVD kinds.
        """
        W, t = self.weight, self.steps
        lr = self.lr * self.schedule(t)
        if self.proj_type is None:
            G = G + self.weight_decay * W if self.optimizer in ("adam", "sgd") else G
            if self.optimizer == "muon":
                dW = self._orthogonal(self.rule()(G, self.state, t + 1, 1.0), lr)
            else:
                dW = self.rule()(G, self.state, t + 1, lr)
            self.weight = self._decayed(W, dW, lr)
            self.steps += 1
            return
        continuous = PROJECTIONS[self.proj_type].basis in MOVING_BASES
        if t == 0 or (t % self.update_proj_gap == 0 and not continuous):
            self.bases = self._fresh(G, reported)
        if continuous and self.move_projector == "before":
            self._move(G)
        L = self.bases.get("output", np.eye(W.shape[0]))
        Q = self.bases.get("input", np.eye(W.shape[1]))
        R = L.T @ G @ Q
        if self.optimizer == "osd_muon":
            D = self.rule()(R, self.state, t + 1, 1.0)
            dW = self._orthogonal(G + L @ (D - R) @ Q.T, lr)
        elif self.residual != "none":
            dW = self._with_residual(G, R, lr)
        else:
            dW = self.scale * L @ self.rule()(R, self.state, t + 1, lr) @ Q.T
        signed = self.lion_sign == "lifted" and self.residual == "none"
        if self.optimizer == "galore_lion" and signed:
            dW = lr * noted_sign(dW, self.state)
        self.weight = self._decayed(W, dW, lr)
        if continuous and self.move_projector == "after":
            self._move(G)
        self.steps += 1

    def _orthogonal(self, X: Array, lr: float) -> Array:
        m, n = X.shape
        scales = {"adamw": 0.2 * max(m, n) ** 0.5, "muon": max(1, m / n) ** 0.5, "none": 1.0}
        return lr * scales[self.muon_scale] * newton_schulz(X, (3.4445, -4.7750, 2.0315))

    def _with_residual(self, G: Array, R: Array, lr: float) -> Array:
        """A residual's rule, as it is written, with the residual itself."""
        ((side, P),) = self.bases.items()
        M, R = (G, R) if side == "output" else (G.T, R.T)
        t, a, own = self.steps + 1, self.scale, self.lift_state
        correction = 1.0
        if self.optimizer == "galore_adamw":  # these lifts see Adam before its bias correction
            correction = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        D = self.rule()(R if side == "output" else R.T, self.state, t, 1.0) / correction
        D = D if side == "output" else D.T
        norms = lambda X: np.linalg.norm(X, axis=0)
        k = norms(D) / (norms(R) + 1e-8)
        if self.residual == "gradient_only_matrix":
            k = np.linalg.norm(D) / (np.linalg.norm(R) + 1e-8)
        if self.residual.startswith("norm_ratio"):
            released = self.residual == "norm_ratio_released"
            rest = self._limited((M - (a if released else 1.0) * P @ R) * k)
            update = a * P @ D + (1.0 if released else a) * rest
        elif self.residual.startswith("gradient_only"):
            update = np.sqrt(a) * self._limited(M * k)
        elif self.residual == "column_ema":
            own["e"] = 0.9 * own.get("e", 0) + 0.1 * norms(M - P @ R) ** 2
            root = np.maximum(np.sqrt(own["e"] / (1 - 0.9**t)), 1e-3 * norms(M))
            reach = (0.4 if self.residual_scale is None else self.residual_scale) * np.sqrt(
                P.shape[0] - P.shape[1]
            )
            update = P @ D + (M - P @ R) * reach / root
        else:
            weight = 1.0 if self.residual_scale is None else self.residual_scale
            update = a * P @ D + weight * np.sign(M - P @ R)
        return lr * correction * (update if side == "output" else update.T)

    def _limited(self, rest: Array) -> Array:
        """At most 1 % more than the norm before."""
        if not self.growth_limiter:
            return rest
        norm, kept = np.linalg.norm(rest), self.lift_state.get("norm", 0.0)
        factor = 1.01 / max(norm / (kept + 1e-8), 1.01) if kept > 0 else 1.0
        self.lift_state["norm"] = norm * factor
        return rest * factor

    def rule(self) -> Rule:
        """OptimizerW."""
        lifted = self.proj_type is not None and self.lion_sign == "lifted"
        lifted = lifted and self.residual == "none"
        by_rows = self.proj_type is None and self.second_moment == "row"
        if by_rows or (self.proj_type is None and self.optimizer == "osd_muon"):
            given = {"b1": self.beta1, "b2": self.beta2, "eps": self.eps}
            given = {name: x for name, x in given.items() if x is not None}
            if self.optimizer == "galore_adamw":
                given = {"eps": 1e-6, **given}
            return partial(adam_of_rows if by_rows else adam, **given)
        given = {"b1": self.beta1, "b2": self.beta2, "eps": self.eps}
        given = {name: x for name, x in given.items() if x is not None}
        return {
            "galore_adamw": partial(adam_eps_first, **given),
            "galore_lion": partial(lion, sign=not lifted, **given),
            "galore_adafactor": partial(adafactor, beta1=self.beta1),
            "adam": partial(adam, **given),
            "adamw": partial(adam, **given),
            "lion": partial(lion, **given),
            "adafactor": partial(adafactor, beta1=self.beta1),
            "sgd": sgd,
            "muon": partial(trace, momentum=self.momentum, nesterov=self.nesterov),
            "osd_muon": partial(trace, momentum=self.momentum, nesterov=self.nesterov),
        }[self.optimizer]

    def _decayed(self, W: Array, dW: Array, lr: float) -> Array:
        keep = 1 - lr * self.weight_decay
        if self.optimizer in ("adam", "sgd"):  # L2, in the gradient already
            return W - dW
        before = self.optimizer in ("adamw", "adafactor", "galore_adafactor", "muon", "osd_muon")
        return keep * W - dW if before else keep * (W - dW)

    def _fresh(self, G: Array, reported: dict[str, Array] | None) -> dict[str, Array]:
        if self.proj_type in ("random", "gaussian"):
            assert reported is not None
            return reported
        U, _, Vt = np.linalg.svd(G, full_matrices=False)
        r = min(self.rank, *G.shape)
        sides = projected_sides(str(self.proj_type), G.shape)
        bases = {side: {"output": U, "input": Vt.T}[side][:, :r] for side in sides}
        if reported is None:
            return bases
        # A singular vector's sign is free, and LAPACKs differ in it. Moments are kept across a
        # refresh, so W depends on each column's sign relative to the old one's: those, and nothing
        # else, are taken from the side under test.
        return {k: P * np.sign(np.sum(P * reported[k], axis=0)) for k, P in bases.items()}

    def _move(self, G: Array) -> None:
        # At step 0, P is of this very gradient.
        if self.steps == 0 or self.steps % self.update_proj_every:
            return
        ((side, P),) = self.bases.items()
        named, decay = PROJECTIONS[str(self.proj_type)], self.projector_weight_decay
        rule, decay = PROJECTOR_RULES[named.rule], named.weight_decay if decay is None else decay
        factor = self.schedule(self.steps)
        size = factor / self.update_proj_gap
        if self.projector_lr_multiple is not None:
            size = self.projector_lr_multiple * self.lr * factor
        M = G if side == "output" else G.T
        if named.basis == "oja":
            Q, R = np.linalg.qr(P + size * M @ (M.T @ P) / np.sum(M**2))
            self.bases = {side: Q * np.sign(np.diag(R))}
            return
        gradient = pca_gradient(P, M, self.penalty)
        number = self.steps // self.update_proj_every
        step = rule(gradient, self.projector_state, number, size)
        self.bases = {side: (1 - size * decay) * P - step}
