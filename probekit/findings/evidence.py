"""What a run has to say: its models by objective, their curves, and the effects between them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from probekit.errors import StoreError, UsageError
from probekit.findings.curves import Curves, read_curves
from probekit.findings.effects import Statistic, Term, effect
from probekit.findings.finding import Baseline, Effect, NotMeasured
from probekit.findings.quantities import Quantity
from probekit.findings.spans import Over
from probekit.names import quoted
from probekit.store.runfolder import weights_of

if TYPE_CHECKING:
    from probekit.store.runfolder import Run


@dataclass(frozen=True)
class Subject:
    """What a claim compares: a model, or several trainings of one.

    objective: ``CL``, ``MIM``, ``supervised``, ``hybrid``, ``untrained`` or ``other``; empty before its cell
               has begun
    untrained: its weights are random, drawn for the run or bundled
    miniature: it is one of a pack's bundled miniatures
    """

    name: str
    models: tuple[str, ...]
    objective: str
    untrained: bool
    miniature: bool = False


class Evidence:
    """One dataset of a run, as findings see it.

    groups: models that are trainings of one: each a list of references, or of one ``NAME[:VARIANT]`` that
            means all of the run's models of that name. Nothing is grouped without being told: two
            weights files of one model may be two seeds, or two epochs

    Raises `UsageError` for a dataset or a group that isn't in the run or doesn't belong together.
    """

    def __init__(self, run: Run, dataset: str, groups: Iterable[Sequence[str]] = (), folder: str = ""):
        if dataset not in run.datasets:
            raise UsageError(
                f"the run has no dataset {quoted(dataset)}", hint=f"it has {', '.join(run.datasets)}"
            )
        self.run, self.dataset = run, dataset
        self.folder = folder or str(run.path)
        self._curves: dict[tuple[str, Quantity], Curves | NotMeasured] = {}
        self._captured = False
        singles = [self._single(model) for model in run.models]
        self.subjects = tuple(_grouped(singles, groups))

    def _single(self, model: str) -> Subject:
        try:
            about = self.run.about(model, self.dataset)
        except StoreError:
            about = {}  # its curves say what is wrong
        self._captured |= bool(about.get("capture"))
        objective = str(about.get("objective", ""))
        bundled = weights_of(about).get("kind") == "bundled"
        return Subject(model, (model,), objective, self.run.untrained(model), bundled)

    @property
    def grouped(self) -> bool:
        return any(len(subject.models) > 1 for subject in self.subjects)

    @property
    def untrained(self) -> tuple[Subject, ...]:
        return tuple(subject for subject in self.subjects if subject.untrained)

    def of(self, objective: str) -> tuple[Subject, ...]:
        """The trained subjects of an objective. Raises `NotMeasured` where there is none."""
        found = tuple(s for s in self.subjects if s.objective == objective and not s.untrained)
        if found:
            return found
        others = [s.name for s in self.subjects if s.objective in ("", "other") and not s.untrained]
        said = f" ({_listed(others)} may be one, but nothing says so)" if others else ""
        command = self.command("all", models=["NAME:VARIANT"])  # the folder keeps the others
        raise NotMeasured(
            f"the run has no trained {objective} model{said}",
            hint=f"`probekit list models` shows which are {objective}, then `{command}`",
        )

    def untrained_like(self, subject: Subject) -> tuple[Subject, ...]:
        """The untrained networks a subject is held against: those of its name and variant, else all."""
        families = {_family(model) for model in subject.models}
        own = tuple(s for s in self.untrained if {_family(m) for m in s.models} & families)
        return own or self.untrained

    def curves(self, quantity: Quantity | str, model: str) -> Curves:
        """A model's curves over its encoder's layers. Raises `NotMeasured`."""
        quantity = Quantity(quantity) if isinstance(quantity, str) else quantity
        key = (model, quantity)
        if key not in self._curves:
            try:
                self._curves[key] = read_curves(self.run, self.dataset, model, quantity, self.command)
            except NotMeasured as error:
                self._curves[key] = error
        found = self._curves[key]
        if isinstance(found, NotMeasured):
            raise found
        return found

    def effect(
        self,
        weights: Sequence[tuple[Subject, float]],
        quantity: Quantity | str,
        over: Over,
        statistic: Statistic | None = None,
    ) -> Effect:
        """The weighted sum of a quantity over layers of several subjects: ``[(cl, 1), (mim, -1)]``.

        How its interval is made: see `probekit.findings.effects.effect`. Raises `NotMeasured`.
        """
        terms = [
            Term(weight, tuple(self.curves(quantity, model) for model in subject.models))
            for subject, weight in weights
        ]
        return effect(terms, over, self.run.seed, statistic)

    def baselines(
        self,
        weights: Sequence[tuple[Subject, float]],
        attributed: Sequence[Subject],
        quantity: Quantity | str,
        over: Over,
    ) -> tuple[Baseline, ...]:
        """The same effect with untrained networks in the place of the subjects a claim is about, and how far
        these go beyond it. Raises `NotMeasured` where an untrained network lacks the metric."""
        found = []
        for trained in attributed:
            sign = 1.0 if dict(weights)[trained] > 0 else -1.0
            for random in self.untrained_like(trained):
                instead = [(random if s == trained else s, w) for s, w in weights]
                found.append(
                    Baseline(
                        random.name,
                        trained.name,
                        self.effect(instead, quantity, over),
                        self.effect([(trained, sign), (random, -sign)], quantity, over),
                    )
                )
        return tuple(found)

    def command(self, *metrics: str, models: Sequence[str] = ()) -> str:
        """The command that measures metrics in this run, with its settings."""
        words = ["probekit", "run"]
        if self._captured:
            words += ["--replay", "CAPTURE"]  # where it lay isn't recorded
            words += ["--metrics", ",".join(metrics), "--out", self.folder]
            return shlex.join(words)
        words += [word for model in models or self.run.models for word in ("--model", model)]
        words += ["--metrics", ",".join(metrics), "--dataset", self.dataset]
        for key, value in self.run.info["settings"].items():
            if value in (None, False) or (key, value) in _DEFAULTS:
                continue
            words.append(f"--{key.replace('_', '-')}")
            if value is not True:
                words.append("x".join(map(str, value)) if isinstance(value, list) else str(value))
        return shlex.join([*words, "--out", self.folder])


_DEFAULTS = (("seed", 0), ("dtype", "float32"), ("on_bad_image", "skip"))  # what needs no saying


def _family(model: str) -> str:
    """``NAME:VARIANT`` of a reference, without options and weights."""
    name = model.partition("@")[0]
    return ":".join(part for part in name.split(":") if "=" not in part)


def _grouped(singles: Sequence[Subject], groups: Iterable[Sequence[str]]) -> list[Subject]:
    """Subjects in the run's order, grouped ones where their first model stands."""
    by_model = {single.name: single for single in singles}
    taken: dict[str, Subject] = {}
    for group in groups:
        members = list(dict.fromkeys(m for name in group for m in _members(name, by_model)))
        if len(members) < 2:
            raise UsageError(
                f"{quoted(','.join(group))} is one model of the run: a group takes several trainings",
                hint=f"its models are {_listed(list(by_model))}",
            )
        if twice := next((m for m in members if m in taken), None):
            raise UsageError(f"model {quoted(twice)} is in two groups", hint="a model is one training of one")
        found = [by_model[m] for m in members]
        for what, values in (
            ("objectives", [s.objective or "unknown" for s in found]),
            ("weights", ["untrained" if s.untrained else "trained" for s in found]),
        ):
            if len(set(values)) > 1:
                pairs = ", ".join(f"{quoted(s.name)} {v}" for s, v in zip(found, values, strict=True))
                raise UsageError(
                    f"a group's models have different {what}: {pairs}", hint="group seeds of one"
                )
        families = {_family(m) for m in members}
        title = families.pop() if len(families) == 1 else members[0]
        subject = Subject(
            f"{title} ({len(members)} trainings)",
            tuple(members),
            found[0].objective,
            found[0].untrained,
            any(s.miniature for s in found),
        )
        taken |= dict.fromkeys(members, subject)
    return list(dict.fromkeys(taken.get(single.name, single) for single in singles))


def _members(name: str, models: Mapping[str, Subject]) -> list[str]:
    if name in models:
        return [name]
    near = [m for m in models if _family(m) == name or _family(m).partition(":")[0] == name]
    trained = [m for m in near if not models[m].untrained]
    if not near:
        raise UsageError(f"the run has no model {quoted(name)}", hint=f"it has {_listed(models)}")
    return trained or near


def _listed(names: Sequence[str]) -> str:
    return ", ".join(quoted(name) for name in names)
