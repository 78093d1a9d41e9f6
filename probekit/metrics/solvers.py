"""Multinomial logistic regression by L-BFGS and by SGD, its gradient written out: softmax minus one-hot."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from probekit.attention import exact_float32

_OPTIONS = {"maxiter": 5000, "maxfun": 10_000, "ftol": 0.0, "maxcor": 20}


def minimum(
    x: Tensor, targets: Tensor, classes: int, l2: float, start: np.ndarray, gradient: float
) -> tuple[np.ndarray, float]:
    """The minimiser of the mean cross-entropy + l2/2 |W|^2, by L-BFGS from `start`.

    x (n, C) float64, targets (n,) below `classes` -> (classes * (C + 1),), each class's weights, then its
    bias, which isn't penalised; and the largest element of the gradient there, below `gradient` unless
    float64 or 5000 iterations end before.

    Channels of one layer are so alike that the plain problem takes hundreds of steps. It is solved along the
    principal axes of `x`, each in a unit in which the loss is about equally curved: a change of variables,
    so that the minimiser is the same, found in a tenth of the steps.
    """
    width = x.shape[1]
    axes, unit = _axes(x, classes, l2)
    along = (x @ axes).mul_(unit[:-1])
    decay = l2 * unit[:-1].square()
    rows = torch.arange(len(x), device=x.device)

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(theta).to(x.device).view(classes, -1)
        z = torch.addmm(w[:, -1] * unit[-1], along, w[:, :-1].T)
        total = z.logsumexp(1)
        loss = (total - z[rows, targets]).mean() + (decay / 2 * w[:, :-1].square()).sum()
        z.sub_(total[:, None]).exp_()
        z[rows, targets] -= 1
        z /= len(x)
        slope = torch.cat([z.T @ along + decay * w[:, :-1], (z.sum(0) * unit[-1])[:, None]], 1)
        return loss.item(), slope.cpu().numpy().ravel()

    def turned(values: np.ndarray, each: Tensor) -> Tensor:
        """(classes, C + 1) times `each`, back from the principal axes."""
        w = torch.from_numpy(values).to(x.device).view(classes, -1) * each
        return torch.cat([w[:, :-1] @ axes.T, w[:, -1:]], 1)

    w = torch.from_numpy(start).to(x.device).view(classes, -1)
    begin = torch.cat([w[:, :-1] @ axes, w[:, -1:]], 1) / unit
    theta, slope = begin.cpu().numpy().ravel(), math.inf
    # No unit is below 1, so a slope is no steeper in the old variables, but for the turn of the axes: by the
    # root of their number at most.
    for tolerance in (gradient, gradient / math.sqrt(width + 1)):
        if slope > gradient:
            found = minimize(
                objective,
                theta,
                jac=True,
                method="L-BFGS-B",
                options={**_OPTIONS, "gtol": tolerance},
            )
            theta, slope = found.x, turned(found.jac, 1 / unit).abs().max().item()
    return turned(theta, unit).cpu().numpy().ravel(), slope


def _axes(x: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Principal axes of x (n, C) in columns, (C, C), and the unit along each and of the bias, (C + 1,), from
    the curvature of the loss where all classes are equally likely. The smallest unit is 1."""
    spread, axes = torch.linalg.eigh(x.T @ x / len(x))
    spread = torch.cat([spread.clamp(min=0), spread.new_ones(1)])
    curvature = spread * (classes - 1) / classes**2
    curvature[:-1] += l2
    curvature.clamp_(min=1e-12 * curvature.max())
    return axes, (curvature.max() / curvature).sqrt()


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
