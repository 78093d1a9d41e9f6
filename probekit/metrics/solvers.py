"""Multinomial logistic regression by L-BFGS and by SGD, its gradient written out: softmax minus one-hot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

from probekit.attention import exact_float32

_OPTIONS = {"maxiter": 5000, "maxfun": 10_000, "ftol": 0.0, "maxcor": 20}


class Logistic:
    """The mean cross-entropy of a linear classifier of one set of features, to be minimised by L-BFGS.

    x (n, C) float64, targets (n,) below `classes`

    Channels of one layer are so alike that the plain problem takes hundreds of steps. It is solved along the
    principal axes of `x`, each in a unit in which the loss is about equally curved: a change of variables,
    so that the minimiser is the same, found in a tenth of the steps.
    """

    def __init__(self, x: Tensor, targets: Tensor, classes: int) -> None:
        self.targets, self.classes = targets[None], classes
        spread, self.axes = torch.linalg.eigh(x.T @ x / len(x))  # axes in columns
        self.spread = torch.cat([spread.clamp(min=0), spread.new_ones(1)])  # the last is the bias'
        self.x = (self.axes.T @ x.T).contiguous()  # (C, n): with few classes, products are twice as fast so

    def minimum(self, l2: float, start: np.ndarray, gradient: float) -> tuple[np.ndarray, float]:
        """The minimiser of the loss + l2/2 |W|^2, from `start`.

        (classes * (C + 1),), each class's weights, then its bias, which isn't penalised; and the largest
        element of the gradient there, below `gradient` unless float64 or 5000 iterations end before.
        """
        unit = self._unit(l2)

        def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
            w = self._each(theta, unit)
            z = torch.addmm(w[:, -1:], w[:, :-1], self.x)  # (classes, n)
            z.sub_(z.amax(0))
            own = z.gather(0, self.targets)
            total = z.exp_().sum(0)
            loss = (total.log() - own).mean() + l2 / 2 * w[:, :-1].square().sum()
            z.div_(total).scatter_(0, self.targets, -1, reduce="add").div_(z.shape[1])
            slope = torch.cat([z @ self.x.T + l2 * w[:, :-1], z.sum(1, keepdim=True)], 1) * unit
            return loss.item(), slope.cpu().numpy().ravel()

        theta, slope = self._turned(self._each(start, 1), self.axes) / unit, math.inf
        theta = theta.cpu().numpy().ravel()
        # No unit is below 1, so a slope is no steeper in the old variables, but for the turn of the axes: by
        # the root of their number at most.
        for tolerance in (gradient, gradient / math.sqrt(len(unit))):
            if slope > gradient:
                options = {**_OPTIONS, "gtol": tolerance}
                with _few_threads(self.x.numel() * self.classes):
                    found = minimize(objective, theta, jac=True, method="L-BFGS-B", options=options)
                theta = found.x
                slope = self._turned(self._each(found.jac, 1 / unit), self.axes.T).abs().max().item()
        return self._turned(self._each(theta, unit), self.axes.T).cpu().numpy().ravel(), slope

    def _unit(self, l2: float) -> Tensor:
        """Of each axis and of the bias, (C + 1,), by the loss' curvature where all classes are equally
        likely; the smallest is 1."""
        curvature = self.spread * (self.classes - 1) / self.classes**2
        curvature[:-1] += l2
        curvature.clamp_(min=1e-12 * curvature.max())
        return (curvature.max() / curvature).sqrt()

    def _each(self, values: np.ndarray, factor: Tensor | float) -> Tensor:
        """(classes, C + 1), times a factor for each column."""
        return torch.from_numpy(values).to(self.x.device).view(self.classes, -1) * factor

    @staticmethod
    def _turned(values: Tensor, axes: Tensor) -> Tensor:
        """Each class's weights on other axes; its bias stays."""
        return torch.cat([values[:, :-1] @ axes, values[:, -1:]], 1)


_SMALL = 50_000_000  # products a step


@contextmanager
def _few_threads(products: int) -> Iterator[None]:
    """One thread of scipy's, whose vectors are short, and one of torch's for a small problem: more of either
    wait busily while the other's want the cores, which takes 3 to 6 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if products < _SMALL else before)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def descend(
    x: Tensor,
    targets: Tensor,
    classes: int,
    lr: np.ndarray,
    decay: float,
    *,
    batch: int,
    epochs: int,
    momentum: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SGD with momentum from zero weights: G sets of features times R learning rates as one problem, float32.

    x (G, n, C), lr (G, R) for 256 images -> weights (G, C, R, K), bias (G, R, K), and the largest element of
    the whole objective's gradient (G, R). Every set sees the images in the same order, the last batch of an
    epoch being what is left. The step is that of torch.optim.SGD, decaying weights and bias; the rate falls
    from lr * batch / 256 to 0 as a cosine, step by step.
    """
    sets, n, width = x.shape
    heads, size = lr.shape[1], min(batch, n)
    rate = torch.from_numpy(np.repeat(lr, classes, axis=1) * (size / 256)).float().to(x.device)[:, None]
    w = torch.zeros(sets, width + 1, heads * classes, device=x.device)  # the bias in the last row
    speed = torch.zeros_like(w)
    order = torch.Generator().manual_seed(seed)
    steps, step = epochs * -(-n // size), 0

    def slope(rows: Tensor) -> Tensor:
        part = x[:, rows]
        z = torch.baddbmm(w[:, -1:], part, w[:, :-1]).view(sets, len(rows), heads, classes)
        p = z.softmax(-1)
        p[:, torch.arange(len(rows), device=x.device), :, targets[rows]] -= 1
        p = p.view(sets, len(rows), heads * classes) / len(rows)
        return torch.cat([part.transpose(1, 2) @ p, p.sum(1, keepdim=True)], 1).add_(w, alpha=decay)

    with exact_float32(x.device), torch.no_grad():
        for _ in range(epochs):
            for rows in torch.randperm(n, generator=order).to(x.device).split(size):
                speed.mul_(momentum).add_(slope(rows))
                w.addcmul_(rate, speed, value=-0.5 * (1 + math.cos(math.pi * step / steps)))
                step += 1
        end = sum(slope(rows) * (len(rows) / n) for rows in torch.arange(n, device=x.device).split(size))
    found = w.double().cpu().numpy().reshape(sets, width + 1, heads, classes)
    largest = end.abs().amax(1).view(sets, heads, classes).amax(-1)
    return found[:, :-1], found[:, -1], largest.double().cpu().numpy()
