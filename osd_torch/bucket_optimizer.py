"""An optimizer's steps of buckets: refresh, project, apply, and steps at full rank.

`BucketOptimizer` is the part of `osd_torch.subspace.SubspaceOptimizer` that steps some parameters,
whose gradients are known to be finite.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from osd_torch.basis_step import is_due, set_basis_
from osd_torch.bucket_step import Method, apply_, project, step_full_rank_, transport_
from osd_torch.buckets import Bucket, bucket_of, in_buckets, rule_of
from osd_torch.numerics import Number, float32_or_more, without_autocast
from osd_torch.sharding import Reduce, first_index, on_host, part_of, squared_norm
from osd_torch.sketch import Sketch
from osd_torch.state import Group, basis_of, copied, lr_of, name_of, unwrapped
from osd_torch.stateful import StatefulOptimizer


class BucketOptimizer(StatefulOptimizer):
    """An optimizer that steps parameters of one kind together.

    See `osd_torch.subspace.SubspaceOptimizer`, which takes the steps.

    Attributes:
        held: See `SubspaceOptimizer`.
    """

    decays_first = False  # whether weight decay comes before the update
    held: dict[Tensor, Sketch]
    _reduce: Reduce | None = None

    def step_group(
        self,
        group: Group,
        params: Sequence[Tensor],
        held: dict[Tensor, Sketch],
        squares: Mapping[Tensor, Tensor],
    ) -> None:
        """One step of parameters of a group, in place.

        Args:
            group: Their group.
            params: Parameters with a gradient or a held sketch.
            held: The held sketches; each is dropped when it has been applied.
            squares: The squared norms of the gradients.
        """
        for param in params:
            self.state_of(group, param)
            if group["rank"] is not None and param not in held:
                self.refresh(group, param, squares[param])
        for bucket in in_buckets(self, group, params, held):
            sketches = [held.pop(param) for param in bucket.params if param in held]
            sketch = bucket.joined_sketch(sketches) if sketches else None
            square = bucket.joined_squares([squares[param] for param in bucket.params])
            self.step_bucket(group, bucket, self.method(group, bucket), sketch, square)

    def step_bucket(
        self,
        group: Group,
        bucket: Bucket,
        method: Method,
        sketch: Sketch | None,
        square: Tensor | None,
        is_finite: Tensor | None = None,
    ) -> None:
        """One step of a bucket, in place.

        Args:
            group: The parameters' group.
            bucket: The parameters.
            method: How they are stepped.
            sketch: Of the gradients, if it is held.
            square: The squared norm of each gradient, if known.
            is_finite: Whether the step is taken, if only the device knows it.
        """
        gradient = bucket.gradient(method.side)
        if is_finite is not None and gradient is not None:
            gradient = torch.where(is_finite, gradient, 0)
        if group["rank"] is None:
            assert gradient is not None
            own = self.full_rank_gradient(group, bucket, float32_or_more(gradient))
            transform = functools.partial(self.full_rank_direction, group)
            step_full_rank_(method, bucket, own, transform, is_finite)
            return
        if sketch is None:
            assert gradient is not None
            sketch = project(method, bucket, gradient, None, square)
        apply_(method, bucket, sketch, gradient, is_finite)

    def method(self, group: Group, bucket: Bucket) -> Method:
        """How a bucket of a group is stepped, at the current rates."""
        rule, first = rule_of(self, group, bucket), bucket.params[0]
        step = None if bucket.on_device else bucket.step
        keys = self.rounding_keys(group, bucket.params, step) if isinstance(step, int) else ()
        coefficients = functools.partial(self.coefficients, group)
        method = Method(rule, coefficients, keys)
        if group["rank"] is not None:
            method = method._replace(
                side=self.side(group, first),
                lift=self.lift(group),
                basis_rule=self.basis_rule(group),
                transports=bool(group.get("transport_moments")),
            )
        return self.at_current_rates(group, method)

    def at_current_rates(self, group: Group, method: Method) -> Method:
        """A group's method with its current learning rate and step size of P."""
        moves = method.basis_rule is not None and method.basis_rule.gradient is not None
        projector_lr = self.projector_lr(group) if moves else 0.0
        return method._replace(lr=lr_of(group), projector_lr=projector_lr)

    def is_due(self, group: Group, param: Tensor) -> bool:
        """Whether the next nonzero gradient sets P.

        True at the first part of an update whose step is a refresh of the rule's clock, and from
        then on until a nonzero gradient arrives.
        """
        return is_due(self.basis_rule(group), self.state_of(group, param), param in self.held)

    @torch.no_grad()
    @without_autocast()
    def refresh(self, group: Group, param: Tensor, square: Tensor | None = None) -> None:
        """Sets P from the gradient if P is due and the gradient is nonzero.

        Args:
            group: The parameter's group.
            param: A parameter with a `grad`.
            square: The squared norm of its gradient, if known.
        """
        if not self.is_due(group, param):
            return
        bucket, name = self._alone(group, param), name_of(self, param)
        gradient = self._gradient(group, bucket)
        start = f"{group['seed']}/{unwrapped(name)}"
        if not bucket.is_stack:
            self._refresh(group, bucket, gradient, f"{start}/{bucket.step}", name, square)
            return
        squares, first = on_host(squared_norm(gradient).unbind()), first_index(param)
        for i, matrix in enumerate(bucket.matrices()):
            if is_due(self.basis_rule(group), matrix.state, param in self.held):
                key, name_of_part = f"{start}/{matrix.step}/{first + i}", f"{name}[{first + i}]"
                self._refresh(group, matrix, gradient[i], key, name_of_part, squares[i])

    def _refresh(
        self,
        group: Group,
        matrix: Bucket,
        gradient: Tensor,
        key: str,
        name: str,
        square: Tensor | None,
    ) -> None:
        """Sets P of one matrix, if the gradient is nonzero; see `set_basis_`."""
        method, old = self.method(group, matrix), basis_of(matrix.state)
        if method.transports:
            old = copied(old)
        rule = self.basis_rule(group)
        if set_basis_(rule, matrix.state, gradient, method.side, key, name, square):
            transport_(method, matrix, old)

    def _gradient(self, group: Group, bucket: Bucket) -> Tensor:
        """M of a projected bucket, or its stack; raises ValueError if there is none."""
        gradient = bucket.gradient(self.side(group, bucket.params[0]))
        if gradient is None:
            names = ", ".join(repr(name_of(self, param)) for param in bucket.params)
            raise ValueError(f"parameter {names} has no gradient: call backward first")
        return gradient

    def _alone(self, group: Group, param: Tensor) -> Bucket:
        """The bucket of one parameter."""
        return bucket_of({**group, "capturable": False}, [param], [self.state_of(group, param)])

    @torch.no_grad()
    @without_autocast()
    def project(self, group: Group, param: Tensor, square: Tensor | None = None) -> Sketch:
        """Computes the sketch of one projected parameter's gradient, with what its rules need.

        Args:
            group: The parameter's group.
            param: A parameter with a `grad`.
            square: The squared norm of its gradient, if known.
        """
        bucket = self._alone(group, param)
        method = self.method(group, bucket)
        known = None if bucket.is_stack else square
        return project(method, bucket, self._gradient(group, bucket), self._reduce, known)

    @torch.no_grad()
    @without_autocast()
    def apply(self, group: Group, param: Tensor, sketch: Sketch) -> None:
        """One step of W and of P from a sketch, in place.

        Reads the gradient itself only if a rule needs it.
        """
        bucket = self._alone(group, param)
        method = self.method(group, bucket)
        apply_(method, bucket, sketch, bucket.gradient(method.side))

    def full_rank_direction(self, group: Group, direction: Tensor) -> Tensor:
        """Transforms the rule's direction for parameters that are not projected."""
        return direction

    def full_rank_gradient(self, group: Group, bucket: Bucket, gradient: Tensor) -> Tensor:
        """The input of the rule for parameters that are not projected, in float32 or float64."""
        return gradient

    def rounding_keys(self, group: Group, params: Sequence[Tensor], step: int) -> tuple[str, ...]:
        """Identify the random bits that round weights at a step, from 0; empty: to nearest.

        A resumed run repeats the bits, and so does every process that holds the same shard of a
        weight. Different shards have different bits.
        """
        if not group.get("stochastic_rounding") or params[0].dtype != torch.bfloat16:
            return ()
        start = f"stochastic_rounding/{group['seed']}"
        return tuple(
            f"{start}/{unwrapped(name_of(self, param))}/{step}/{','.join(map(str, part_of(param)))}"
            for param in params
        )

    def coefficients(self, group: Group, rate: Number) -> tuple[Number, Number]:
        """(alpha, beta) of `W <- beta * W + alpha * D`, a step with decoupled weight decay."""
        keep = 1 - lr_of(group) * group["weight_decay"]
        return (-rate if self.decays_first else -rate * keep), keep


def gradient_of(param: Tensor) -> Tensor:
    """A parameter's gradient; raises ValueError if it has none."""
    if param.grad is None:
        raise ValueError("this parameter has no gradient")
    return param.grad
