"""Training of linear probes: against scikit-learn, torch's own SGD, an objective written out, known cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax

from probekit.errors import DoesNotApply, MetricError
from probekit.metrics.probing import GRADIENT, L2_GRID, LR_GRID, Recipe, fit, fit_many, held_out
from probekit.metrics.solvers import descend


def clouds(n=300, width=8, classes=4, apart=1.0, seed=0):
    """Correlated normal features of unlike scale around a centre per class, and their labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    labels[:classes] = np.arange(classes)
    centres = apart * random.standard_normal((classes, width))
    mixing = np.eye(width) + 0.3 * random.standard_normal((width, width))
    x = (centres[labels] + random.standard_normal((n, width)) @ mixing) * np.geomspace(0.1, 10, width) + 3
    return x.astype(np.float32), labels


def normalised(x, norm, of=None):
    """The three norms as their formulas; `of`: the training features."""
    x, of = (np.asarray(a, dtype=np.float64) for a in (x, x if of is None else of))
    if norm == "bn":
        return (x - of.mean(0)) / np.sqrt(((of - of.mean(0)) ** 2).mean(0) + 1e-6)
    if norm == "ln":
        return (x - x.mean(1)[:, None]) / np.sqrt(x.var(1)[:, None] + 1e-6)
    return x


@pytest.mark.parametrize("norm", ["bn", "ln", "none"])
@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_agrees_with_scikit_learn(norm, l2):
    sklearn = pytest.importorskip("sklearn.linear_model")
    (x, y), (test, labels) = clouds(seed=1), clouds(n=200, seed=2)
    probe = fit(x, y, 4, Recipe(norm=norm, l2=l2))
    # the same objective: C sum of losses + |W|^2 / 2 is n C times the mean + |W|^2 / (2 n C)
    other = sklearn.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-9, max_iter=20000)
    other.fit(normalised(x, norm), y)
    expected = other.predict_proba(normalised(test, norm, x))
    np.testing.assert_allclose(softmax(probe.logits(test), axis=1), expected, atol=1e-4)
    assert (probe.decide(test) == labels).mean() == pytest.approx(
        other.score(normalised(test, norm, x), labels), abs=1e-12
    )


def objective(w, b, x, y, l2):
    z = x @ w + b
    return (logsumexp(z, axis=1) - z[np.arange(len(y)), y]).mean() + l2 / 2 * (w**2).sum()


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_it_is_the_minimum_of_the_objective_written_out(l2):
    x, y = clouds(n=120, width=5, classes=3)
    probe = fit(x, y, 3, Recipe(l2=l2))
    z = normalised(x, "bn")
    assert probe.gradient <= GRADIENT
    best = objective(probe.weights, probe.bias, z, y, l2)
    steps, numeric = 1e-5, []
    for array in (probe.weights, probe.bias):
        for place in np.ndindex(array.shape):
            moved = [array.copy(), array.copy()]
            moved[0][place] += steps
            moved[1][place] -= steps
            values = [
                objective(m, probe.bias, z, y, l2)
                if array is probe.weights
                else objective(probe.weights, m, z, y, l2)
                for m in moved
            ]
            assert min(values) >= best - 1e-12
            numeric.append((values[0] - values[1]) / (2 * steps))
    assert np.abs(numeric).max() < 1e-6  # central differences: step^2 and rounding / step


@pytest.mark.parametrize(("n", "batch"), [(256, 64), (250, 64), (40, 1024)])
def test_sgd_is_torchs_own(n, batch):
    """Step by step against nn.Linear, torch.optim.SGD and LambdaLR in float32."""
    x, y = clouds(n=n)
    recipe = Recipe(solver="sgd", lr=0.1, l2=0.05, batch=batch, epochs=7)
    probe = fit(x, y, 4, recipe, seed=5)
    z = torch.from_numpy(normalised(x, "bn")).float()
    head = torch.nn.Linear(8, 4)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    size = min(batch, n)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1 * size / 256, momentum=0.9, weight_decay=0.05)
    steps = 7 * -(-n // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: 0.5 * (1 + np.cos(np.pi * t / steps)))
    order = torch.Generator().manual_seed(5)
    for _ in range(7):
        for rows in torch.randperm(n, generator=order).split(size):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(head(z[rows]), torch.from_numpy(y)[rows]).backward()
            optimiser.step()
            schedule.step()
    # float32 through some dozens of steps
    np.testing.assert_allclose(probe.weights, head.weight.detach().numpy().T, atol=2e-5)
    np.testing.assert_allclose(probe.bias, head.bias.detach().numpy(), atol=2e-5)


def test_sgd_ends_near_the_minimum_and_says_how_near():
    x, y = clouds()
    exact = fit(x, y, 4, Recipe(l2=0.05))
    near = fit(x, y, 4, Recipe(solver="sgd", lr=0.3, epochs=300, batch=300))
    # sgd decays the bias too, which moves it a little
    np.testing.assert_allclose(softmax(near.logits(x), 1), softmax(exact.logits(x), 1), atol=0.03)
    assert near.gradient < 1e-4
    assert fit(x, y, 4, Recipe(solver="sgd", lr=0.3, epochs=1)).gradient > 1e-2


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_separable_classes_are_told_apart_and_random_labels_are_not(solver):
    x, y = clouds(n=400, apart=10)
    test, labels = clouds(n=400, apart=10, seed=0)
    assert (fit(x, y, 4, Recipe(solver=solver)).decide(test) == labels).all()
    random = np.random.default_rng(3)
    x, y = random.standard_normal((2000, 8)), random.integers(0, 4, 2000)
    test, labels = random.standard_normal((2000, 8)), random.integers(0, 4, 2000)
    right = (fit(x, y, 4, Recipe(solver=solver)).decide(test) == labels).mean()
    assert right == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 2000))  # 4 sd


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_many_are_each_as_alone(solver):
    sets = [clouds(width=w, seed=w)[0] for w in (8, 8, 5)]
    labels = clouds()[1]
    together = fit_many(sets, labels, 4, Recipe(solver=solver), seed=2)
    for x, probe in zip(sets, together, strict=True):
        alone = fit(x, labels, 4, Recipe(solver=solver), seed=2)
        assert (probe.weights == alone.weights).all() and (probe.l2, probe.lr) == pytest.approx(
            (alone.l2, alone.lr), nan_ok=True
        )


def test_a_stack_of_layers_and_rates_is_each_alone():
    """The batched problem of a GPU, on the CPU: two layers, three learning rates at once."""
    sets = [normalised(clouds(seed=s)[0], "bn") for s in (1, 2)]
    x, targets = torch.from_numpy(np.stack(sets)).float(), torch.from_numpy(clouds()[1])
    how = {"batch": 64, "epochs": 5, "momentum": 0.9, "seed": 3}
    rates = np.array([[0.01, 0.1, 1.0], [0.3, 0.1, 0.03]])
    weights, bias, gradient = descend(x, targets, 4, rates, 0.05, **how)
    assert weights.shape == (2, 8, 3, 4) and bias.shape == (2, 3, 4) and gradient.shape == (2, 3)
    for g, r in np.ndindex(2, 3):
        alone = descend(x[g : g + 1], targets, 4, rates[g : g + 1, r : r + 1], 0.05, **how)
        np.testing.assert_allclose(weights[g, :, r], alone[0][0, :, 0], atol=1e-5)  # float32, 25 steps
        np.testing.assert_allclose(bias[g, r], alone[1][0, 0], atol=1e-5)
        assert gradient[g, r] == pytest.approx(alone[2][0, 0], abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**20))
def test_the_order_of_training_images_does_not_matter_to_lbfgs(seed):
    x, y = clouds(n=80, width=4, seed=seed)
    order = np.random.default_rng(seed).permutation(len(x))
    a, b = fit(x, y, 4, Recipe(l2=1e-2)), fit(x[order], y[order], 4, Recipe(l2=1e-2))
    # both gradients are below 1e-7 and the curvature is at least l2
    np.testing.assert_allclose(a.weights, b.weights, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**20), st.floats(0.1, 10), st.floats(-5, 5))
def test_batch_norm_makes_scale_and_offset_irrelevant(seed, scale, offset):
    x, y = clouds(n=80, width=4, seed=seed)
    x = x.astype(np.float64)
    a, b = (fit(v, y, 4, Recipe(l2=1e-2)).logits(v) for v in (x, scale * x + offset))
    np.testing.assert_allclose(
        softmax(a, 1), softmax(b, 1), atol=2e-3
    )  # but for eps 1e-6 of a variance >= .01


def test_l2_is_chosen_on_held_out_training_images():
    """As if by hand: fit on the kept part, score on the other, the highest accuracy and then the lowest loss."""
    x, y = clouds(n=150, width=30, apart=0.4, seed=4)
    probe = fit(x, y, 4, seed=9)
    held = held_out(np.unique(y, return_inverse=True)[1], 0.2, 9)
    scores = {}
    for l2 in L2_GRID:
        part = fit(x[~held], y[~held], 4, Recipe(l2=l2))
        z = part.logits(x[held])
        loss = (logsumexp(z, axis=1) - z[np.arange(held.sum()), y[held]]).mean()
        scores[l2] = ((part.decide(x[held]) == y[held]).mean(), -loss)
    assert probe.l2 == max(scores, key=scores.get)
    fixed = fit(x, y, 4, Recipe(l2=probe.l2))
    # refitted to all images: the same minimum from another start
    np.testing.assert_allclose(softmax(probe.logits(x), 1), softmax(fixed.logits(x), 1), atol=1e-5)


def test_the_learning_rate_is_chosen_too():
    x, y = clouds(n=150, width=30, apart=0.4, seed=4)
    probe = fit(x, y, 4, Recipe(solver="sgd"), seed=9)
    held = held_out(y, 0.2, 9)
    scores = {}
    for lr in LR_GRID:
        part = fit(x[~held], y[~held], 4, Recipe(solver="sgd", lr=lr), seed=9)
        z = part.logits(x[held])
        loss = (logsumexp(z, axis=1) - z[np.arange(held.sum()), y[held]]).mean()
        scores[lr] = ((part.decide(x[held]) == y[held]).mean(), -loss)
    assert probe.lr == max(scores, key=scores.get)
    assert (probe.weights == fit(x, y, 4, Recipe(solver="sgd", lr=probe.lr), seed=9).weights).all()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 99))
def test_held_out_is_stratified(sizes, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    if max(sizes) < 2:
        with pytest.raises(DoesNotApply, match="two images"):
            held_out(labels, 0.2, seed)
        return
    held = held_out(labels, 0.2, seed)
    assert (held == held_out(labels, 0.2, seed)).all()
    for number, size in enumerate(sizes):
        assert held[labels == number].sum() == (min(max(1, round(0.2 * size)), size - 1) if size > 1 else 0)


@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 99))
def test_groups_are_held_out_whole(groups, rows, seed):
    owner = np.repeat(np.arange(groups), rows)
    held = held_out(np.zeros(len(owner)), 0.2, seed, owner).reshape(groups, rows)
    assert (held.all(1) | ~held.any(1)).all()
    assert held.all(1).sum() == max(1, round(0.2 * groups))


def test_classes_without_training_images_are_never_answered():
    x, y = clouds(classes=3)
    y = np.array([1, 4, 6])[y]
    probe = fit(x, y, 8, Recipe(l2=1e-2))
    logits = probe.logits(x)
    assert logits.shape == (300, 8)
    assert (np.isfinite(logits).all(0) == np.isin(np.arange(8), [1, 4, 6])).all()
    assert set(probe.decide(x)) <= {1, 4, 6}
    assert (probe.decide(x) == logits.argmax(1)).all()
    assert (probe.ranks(x, np.full(300, 5)) == 8).all()


def test_ranks_count_the_classes_before():
    x, y = clouds()
    probe = fit(x, y, 4, Recipe(l2=1e-2))
    order = np.argsort(-probe.logits(x), axis=1, kind="stable")
    assert (probe.ranks(x, y) == (order == y[:, None]).argmax(1)).all()
    # where all are equal, the lowest number comes first
    same = fit(np.zeros((8, 2)), [0, 1, 2, 3] * 2, 4, Recipe(l2=1e-2))
    assert (same.ranks(np.zeros((4, 2)), [0, 1, 2, 3]) == [0, 1, 2, 3]).all()


def test_a_constant_feature_does_no_harm():
    x, y = clouds()
    with_constant = np.concatenate([x, np.full((len(x), 1), 7.0, np.float32)], 1)
    a, b = fit(x, y, 4, Recipe(l2=1e-2)), fit(with_constant, y, 4, Recipe(l2=1e-2))
    np.testing.assert_allclose(a.logits(x), b.logits(with_constant), atol=1e-4)


def test_what_cannot_be_trained_says_why():
    x, y = clouds()
    with pytest.raises(DoesNotApply, match="1 of the classes"):
        fit(x, np.zeros(len(x), int), 4)
    with pytest.raises(DoesNotApply, match="no class of the train split has two images"):
        fit(x[:4], [0, 1, 2, 3], 4)
    assert fit(x[:4], [0, 1, 2, 3], 4, Recipe(l2=1e-2)).gradient <= GRADIENT
    x[3, 1] = np.inf
    with pytest.raises(MetricError, match="infinity"):
        fit(x, y, 4)


def test_sgd_that_diverges_says_so():
    x, y = clouds()
    with pytest.raises(MetricError, match="diverged"):
        fit(x * np.float32(1e18), y, 4, Recipe(solver="sgd", norm="none", lr=1.0, l2=10.0, epochs=200))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_and_cpu_agree():
    sets = [clouds(width=16, seed=s)[0] for s in range(4)] + [clouds(width=9)[0]]
    labels = clouds(width=16)[1]
    for recipe, room in ((Recipe(l2=1e-2), 1e-5), (Recipe(solver="sgd", lr=0.1, batch=64), 1e-3)):
        on = [fit_many(sets, labels, 4, recipe, device=d) for d in ("cpu", "cuda")]
        for a, b in zip(*on, strict=True):
            np.testing.assert_allclose(a.weights, b.weights, atol=room)
