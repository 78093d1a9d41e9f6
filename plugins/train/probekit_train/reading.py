"""A recipe from its file and what the command line changes of it, or one sentence on what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from probekit.errors import UsageError
from probekit.names import did_you_mean, quoted
from probekit_train.recipe import RECIPES, Training


def names() -> list[str]:
    """The recipes of the pack, sorted."""
    found = files("probekit_train").joinpath("recipes").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in found if entry.name.endswith(".yaml"))


def read(name: str) -> dict[str, Any]:
    """The fields of a recipe of the pack, or of a YAML file. Raises UsageError."""
    known = names()
    if name in known:
        text, source = files("probekit_train").joinpath("recipes", f"{name}.yaml").read_text(), name
    elif name.endswith((".yaml", ".yml")) or "/" in name:
        source = name
        try:
            text = Path(name).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UsageError(f"can't read recipe {quoted(name)}: {reason.lower()}") from error
    else:
        hint = did_you_mean(name, known) or f"known: {', '.join(known)}"
        raise UsageError(f"unknown recipe {quoted(name)}", hint=f"{hint}; or give a YAML file")
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise UsageError(f"recipe {quoted(source)} is not YAML{line}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"recipe {quoted(source)} holds no fields", hint="write one 'field: value' a line")
    if isinstance(fields.get("model_args"), dict):  # the other fields have types that say what a text means
        fields["model_args"] = _number(fields["model_args"])
    return fields


def make(fields: Mapping[str, Any]) -> Training:
    """The recipe of these fields. Raises UsageError naming the field, with the nearest name."""
    objective = fields.get("objective")
    if objective not in RECIPES:
        known = list(RECIPES)
        message = f"unknown objective {quoted(objective)}" if objective else "the recipe has no 'objective'"
        hint = did_you_mean(str(objective), known) if objective else None
        raise UsageError(message, hint=hint or f"it is one of {', '.join(known)}")
    recipe = RECIPES[objective]
    try:
        return recipe.model_validate(dict(fields))
    except ValidationError as error:
        raise _in_words(error, recipe, objective) from error


def changed(fields: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The fields with every ``key=value`` set; a dot goes inside, ``views.0.blur=0``. Raises UsageError.

    Values are read as YAML: numbers, true, null, [1, 2], text.
    """
    result: dict[str, Any] = {key: _copied(value) for key, value in fields.items()}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{quoted(setting)} is not key=value", hint="for example `--set lr=0.001`")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise UsageError(f"the value of {quoted(key)} is not YAML: {quoted(text)}") from error
        _put(result, key.strip(), _number(value))
    return result


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text, for want of a dot; also inside lists and mappings."""
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    place: Any = fields
    *inside, last = path.split(".")
    for step in inside:
        if isinstance(place, dict):
            place = place.setdefault(step, {})
        elif isinstance(place, list) and step.isdecimal() and int(step) < len(place):
            place = place[int(step)]
        else:
            raise UsageError(f"the recipe has no field {quoted(path)}")
    if isinstance(place, dict):
        place[last] = value
    elif isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = value
    else:
        raise UsageError(f"the recipe has no field {quoted(path)}")


def _in_words(error: ValidationError, recipe: type[Training], objective: str) -> UsageError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    path = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _fields_at(recipe, location[:-1])
        hint = did_you_mean(location[-1], known) or f"it has {', '.join(known)}"
        return UsageError(f"a recipe for {quoted(objective)} has no field {quoted(path)}", hint=hint)
    if first["type"] == "missing":
        return UsageError(f"the recipe for {quoted(objective)} lacks {quoted(path)}")
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if not location:
        return UsageError(f"the recipe for {quoted(objective)} contradicts itself: {reason}")
    value = f" can't be {quoted(first['input'])}" if not isinstance(first["input"], (dict, list)) else ""
    return UsageError(f"field {quoted(path)} of the recipe{value}: {reason}")


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    if path[:1] == ["views"]:
        model = model.model_fields["views"].annotation.__args__[0]  # type: ignore[union-attr]
    return [field.alias or name for name, field in model.model_fields.items()]
