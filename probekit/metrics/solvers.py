"""Multinomial logistic regression by L-BFGS and by SGD, its gradient written out: softmax minus one-hot."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from probekit.attention import exact_float32

_ITERATIONS = 5000


def minimum(
    x: Tensor, targets: Tensor, classes: int, l2: float, start: np.ndarray, gradient: float
) -> tuple[np.ndarray, float]:
    """The minimiser of the mean cross-entropy + l2/2 |W|^2, by L-BFGS from `start`.

    x (n, C) float64, targets (n,) below `classes` -> (classes * (C + 1),), each class's weights, then its
    bias, which isn't penalised; and the largest element of the gradient there, below `gradient` unless
    float64 or 5000 iterations end before.
    """
    rows = torch.arange(len(x), device=x.device)

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(theta).to(x.device).view(classes, -1)
        z = torch.addmm(w[:, -1], x, w[:, :-1].T)
        total = z.logsumexp(1)
        loss = (total - z[rows, targets]).mean() + l2 / 2 * w[:, :-1].square().sum()
        z.sub_(total[:, None]).exp_()
        z[rows, targets] -= 1
        z /= len(x)
        slope = torch.cat([z.T @ x + l2 * w[:, :-1], z.sum(0)[:, None]], 1)
        return loss.item(), slope.cpu().numpy().ravel()

    options = {"maxiter": _ITERATIONS, "maxfun": 2 * _ITERATIONS, "gtol": gradient, "ftol": 0.0, "maxcor": 20}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return found.x, float(np.abs(found.jac).max())


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
