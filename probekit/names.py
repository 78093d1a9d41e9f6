"""The texts people type: references to models, metrics and datasets, selectors, folder names.

    model    [PACK/]NAME[:VARIANT][:key=value]...[@WEIGHTS]    also  ./file.py:function, pkg.module:function
    metric   [PACK/]NAME[:key=value]...
    dataset  [PACK/]NAME[:ARGUMENT]

A variant may say where timm finds the model: ``timm:hf-hub:ORG/NAME``, ``timm:local-dir:FOLDER``.
The first ``@`` ends a model's name: what follows is the weights, whatever it contains. So neither a
variant nor the path of a ``./file.py`` may hold an ``@``, and neither may hold a ``:``.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from probekit.errors import UsageError

if TYPE_CHECKING:
    from probekit.specs import Option

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

# timm's own: what follows names a repository or a folder, which may hold a "=" but no ":".
_SOURCES = ("hf-hub", "local-dir")

_FORMS = {
    "model": "write NAME[:VARIANT][:key=value][@WEIGHTS], for example 'moco:vit-b16@random'",
    "metric": "write NAME[:key=value], for example 'nmi:compat=cl-vs-mim'",
    "dataset": "write NAME[:ARGUMENT], for example 'folder:/data/val'",
}


@dataclass(frozen=True)
class ModelRef:
    """A model as typed. `variant` is empty and `weights` None where the text names none."""

    pack: str | None
    name: str
    variant: str = ""
    options: dict[str, str] = field(default_factory=dict, hash=False)
    weights: str | None = None

    @property
    def is_file(self) -> bool:
        """``./file.py:build``: `name` is a path and `variant` an attribute of that file."""
        return self.name.endswith(".py")

    @property
    def is_module(self) -> bool:
        """Could be ``pkg.module:build``; the catalog's own names come first."""
        dotted = "." in self.name and _ATTRIBUTE.fullmatch(self.name) is not None
        return dotted and not self.is_file and _ATTRIBUTE.fullmatch(self.variant) is not None

    def __str__(self) -> str:
        variant = f":{self.variant}" if self.variant else ""
        weights = "" if self.weights is None else f"@{self.weights}"
        return f"{_head(self.pack, self.name)}{variant}{_tail(self.options)}{weights}"


@dataclass(frozen=True)
class MetricRef:
    """A metric as typed."""

    pack: str | None
    name: str
    options: dict[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return _head(self.pack, self.name) + _tail(self.options)


@dataclass(frozen=True)
class DatasetRef:
    """A dataset as typed: ``NAME[:ARGUMENT][?key=value&key=value]``.

    argument: what follows the first colon (a path may hold more of them), None without one
    """

    pack: str | None
    name: str
    argument: str | None = None
    options: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        options = "&".join(f"{key}={self.options[key]}" for key in sorted(self.options))
        argument = "" if self.argument is None else f":{self.argument}"
        return _head(self.pack, self.name) + argument + (f"?{options}" if options else "")


def _head(pack: str | None, name: str) -> str:
    return name if pack is None else f"{pack}/{name}"


def _tail(options: Mapping[str, str]) -> str:
    # Sorted, so that two spellings of one choice are one text and one folder.
    return "".join(f":{key}={options[key]}" for key in sorted(options))


def quoted(text: object, limit: int = 120) -> str:
    """A text from outside in quotes, on one line and cut to `limit`, for a message."""
    shown = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", "?", str(text))
    return f"'{shown if len(shown) <= limit else shown[: limit - 3] + '...'}'"


def _malformed(kind: str, text: object, why: str, hint: str | None = None) -> UsageError:
    return UsageError(
        f"{quoted(text)} is not a {kind} name: {why}",
        hint=hint or _FORMS.get(kind, "write NAME or PACK/NAME"),
    )


def _text(kind: str, text: object) -> str:
    if not isinstance(text, str):
        raise _malformed(kind, text, f"it is {type(text).__name__}, not text")
    if not text.strip():
        raise _malformed(kind, text, "it is empty")
    if _CONTROL.search(text):
        raise _malformed(kind, text, "it contains a control character or a line break")
    return text


def _pack_and_name(kind: str, text: str, head: str, hint: str | None = None) -> tuple[str | None, str]:
    pack, slash, name = head.rpartition("/")
    if not head:
        raise _malformed(kind, text, "nothing stands before the first ':' or '@'")
    for part in (pack, name) if slash else (name,):
        if not _NAME.fullmatch(part):
            why = f"{quoted(part)} holds something other than letters, digits, '-', '_' and '.'"
            raise _malformed(kind, text, why if part else "a name next to '/' is missing", hint)
    return (pack if slash else None), name


def _options(kind: str, text: str, parts: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            why = f"{quoted(part)} is not key=value" if part else "nothing stands between or after its colons"
            raise _malformed(kind, text, why)
        if not _KEY.fullmatch(key):
            raise _malformed(kind, text, f"{quoted(key)} can't be an option's name")
        if key in options:
            raise _malformed(kind, text, f"option {quoted(key)} is given twice")
        options[key] = value
    return options


def parse_model(text: str) -> ModelRef:
    """Raises `UsageError` for anything that isn't a model reference."""
    text = _text("model", text)
    rest, at, weights = text.partition("@")
    if at and not weights.strip():
        raise _malformed("model", text, "nothing follows the '@'", "write '@random' or '@/path/to/weights'")
    head, *parts = rest.split(":")
    if head.endswith(".py"):
        pack, name = None, head
    elif head.count("/") > 1 or head.startswith(("/", "./", "../", "~")):
        hint = "a model in a file is './file.py:function'; weights follow an '@': 'moco:vit-b16@/path'"
        raise _malformed("model", text, "a path must end in '.py'", hint)
    else:
        pack, name = _pack_and_name("model", text, head)
    variant = ""
    if parts and "=" not in parts[0]:
        variant = parts.pop(0)
        if variant in _SOURCES:
            place = parts.pop(0) if parts else ""
            if not place.strip():
                raise _malformed("model", text, f"nothing follows {quoted(variant + ':')}")
            variant = f"{variant}:{place}"
        if not variant:
            raise _malformed("model", text, "nothing stands between or after its colons")
        if variant != variant.strip():
            raise _malformed("model", text, f"variant {quoted(variant)} starts or ends with a space")
    if head.endswith(".py") and not _ATTRIBUTE.fullmatch(variant):
        why = f"{quoted(variant)} is not a Python name" if variant else "it names no function of the file"
        raise _malformed(
            "model", text, why, f"write {quoted(head + ':FUNCTION')}, a function that returns a module"
        )
    return ModelRef(pack, name, variant, _options("model", text, parts), weights if at else None)


def parse_metric(text: str) -> MetricRef:
    """Raises `UsageError` for anything that isn't a metric reference."""
    text = _text("metric", text)
    head, *parts = text.split(":")
    hint = "a metric in a file is loaded with `--plugin FILE` and used by its name" if ".py" in head else None
    pack, name = _pack_and_name("metric", text, head, hint)
    return MetricRef(pack, name, _options("metric", text, parts))


def parse_dataset(text: str) -> DatasetRef:
    """Raises `UsageError` for anything that isn't a dataset reference."""
    text = _text("dataset", text)
    whole, options = text, {}
    # a '?' that is part of a path isn't followed by key=value
    if found := re.search(r"\?([A-Za-z_]\w*=[^&?]*(?:&[A-Za-z_]\w*=[^&?]*)*)$", text):
        whole = text[: found.start()]
        options = dict(pair.split("=", 1) for pair in found[1].split("&"))
    head, colon, argument = whole.partition(":")
    looks_like_path = head.startswith(("/", ".", "~")) or head.count("/") > 1
    hint = f"images in a folder are {quoted('folder:' + text)}" if looks_like_path else None
    pack, name = _pack_and_name("dataset", text, head, hint)
    if colon and not argument.strip():
        raise _malformed("dataset", text, "nothing follows the ':'")
    return DatasetRef(pack, name, argument if colon else None, options)


def parse_plain(kind: str, text: str) -> MetricRef:
    """``[PACK/]NAME`` with nothing after it: a report, a finding, a command."""
    text = _text(kind, text)
    return MetricRef(*_pack_and_name(kind, text, text))


def read_options(options: Mapping[str, Option], given: Mapping[str, str], owner: str) -> dict[str, Any]:
    """Every option by name, as given or by default, in the default's type. Raises `UsageError`."""
    values = {key: option.default for key, option in options.items()}
    for key, text in given.items():
        if key not in options:
            have = f"its options are {', '.join(options)}" if options else "it has no options"
            near = did_you_mean(key, list(options))
            raise UsageError(f"{owner} has no option {quoted(key)}", hint=f"{near} {have}" if near else have)
        values[key] = _value(options[key], key, text, owner)
    return values


def _value(option: Option, key: str, text: str, owner: str) -> str | int | float | bool | None:
    wanted: str | None = None
    value: str | int | float | bool | None = text
    if option.choices:
        value = next((choice for choice in option.choices if text == option_text(choice)), None)
        wanted = f"one of {', '.join(quoted(option_text(c)) for c in option.choices)}"
    elif isinstance(option.default, bool):
        value = _BOOLEANS.get(text.lower())
        wanted = "true or false"
    elif isinstance(option.default, int | float):
        guessed = guess_value(text)
        whole = isinstance(option.default, int)
        number = isinstance(guessed, int if whole else int | float) and not isinstance(guessed, bool)
        value = type(option.default)(guessed) if number else None
        wanted = "a whole number" if whole else "a number"
    if value is None:
        raise UsageError(f"option {quoted(key)} of {owner} can't be {quoted(text)}", hint=f"it is {wanted}")
    return value


_BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def option_text(value: object) -> str:
    """How an option's value is written after ``key=``."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def guess_value(text: str) -> str | int | float | bool:
    """A value by its looks, where nothing declares its type."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        with contextlib.suppress(ValueError):
            value = number(text)
            if math.isfinite(value):
                return value
    return text


_HASHED = re.compile(r"\.[0-9a-f]{8}$")


def slug(text: str) -> str:
    """A folder name for a reference: letters, digits, ``._-@``; ``:`` becomes ``--``.

    Two different texts never get one name: a hash follows where the text can't be read back from the
    name. Capitals count as unreadable, because some file systems don't tell them from small letters.
    """
    body = re.sub(r"[^A-Za-z0-9._@\-]+", "-", text.replace(":", "--")).strip("-.")
    readable = (
        body != ""
        and body.replace("--", ":") == text
        and "---" not in body
        and not _HASHED.search(body)
        and len(body) <= 100
        and body == body.lower()
    )
    if readable:
        return body
    short = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    body = re.sub(r"-{3,}", "--", body)[:80].strip("-.")
    return f"{body or 'x'}.{short}"


def nearest(name: str, names: Sequence[str]) -> list[str]:
    """Up to three of `names` that a person may have meant, best first."""
    folded: dict[str, list[str]] = {}
    for known in dict.fromkeys(names):
        folded.setdefault(known.casefold(), []).append(known)
    key = name.casefold()
    close = difflib.get_close_matches(key, list(folded), n=3, cutoff=0.6)
    if len(key) >= 3:  # 'distance' for 'attention_distance' is too short for difflib's ratio
        close += [known for known in folded if key in known and known not in close]
    return [known for match in close for known in folded[match]][:3]


def did_you_mean(name: str, names: Sequence[str]) -> str | None:
    """The hint's first half, None where nothing is near."""
    found = [quoted(near) for near in nearest(name, names)]
    return f"did you mean {' or '.join(found)}?" if found else None


def split(selectors: Sequence[str]) -> list[str]:
    """The parts of comma-separated, repeatable selectors, blanks dropped."""
    texts = [selectors] if isinstance(selectors, str) else selectors
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def is_broad(selector: str) -> bool:
    """Whether a selector speaks of names it doesn't spell out: ``all``, a glob, ``!name``."""
    head = selector.partition("@")[0]
    return selector.startswith("!") or head == "all" or (any(c in head for c in "*?[") and "=" not in head)


def expand(selectors: Sequence[str], names: Sequence[str], keep_unknown: bool = False) -> list[str]:
    """The names that selectors choose, each once, in the order asked for.

    A selector is a name, a glob, ``all``, or one of these after ``!``, which takes names away wherever
    it stands; only exclusions means all but those. A known name may carry options and weights
    (``nmi:compat=cl-vs-mim``, ``moco:*@random``), which are kept. Raises `UsageError` for an unknown
    name, a glob that matches nothing, and selectors that leave nothing. With `keep_unknown` a plain
    name passes as it is, for a lookup that knows more names than can be listed.
    """
    parts = split(selectors)
    names = list(dict.fromkeys(names))
    if not parts:
        if not selectors:
            return []
        raise UsageError("no name is given", hint="'all' chooses everything")
    dropped = {name for part in parts if part[0] == "!" for name in _chosen(part[1:], names, True)}
    wanted = [part for part in parts if part[0] != "!"] or ["all"]
    chosen = dict.fromkeys(text for part in wanted for text in _chosen(part, names, False, keep_unknown))
    kept = [text for text in chosen if _known(text, names) not in dropped]
    if not kept:
        raise UsageError(f"{quoted(','.join(parts))} leaves nothing to choose")
    return kept


def _known(text: str, names: Sequence[str]) -> str | None:
    """The longest of `names` that `text` is, or extends by options or weights."""
    prefix = text.partition("@")[0]
    while prefix not in names:
        prefix, colon, _ = prefix.rpartition(":")
        if not colon:
            return None
    return prefix


def _chosen(selector: str, names: Sequence[str], families: bool, keep: bool = False) -> list[str]:
    head, at, weights = selector.partition("@")
    if head in names:
        return [selector]
    if head == "all":
        hits = list(names)
    elif is_broad(head):
        hits = [name for name in names if fnmatch.fnmatchcase(name, head)]
    elif keep or _known(selector, names):
        return [selector]
    else:
        hits = [name for name in names if families and name.startswith(f"{head}:")]
    if not hits and head != "all":
        what = "matches no name" if is_broad(head) else "is not a known name"
        raise UsageError(f"{quoted(selector)} {what}", hint=did_you_mean(head, names) or _known_names(names))
    return [name + at + weights for name in hits]


def _known_names(names: Sequence[str]) -> str | None:
    shown = ", ".join(names[:6])
    return f"known: {shown}{', ...' if len(names) > 6 else ''}" if names else None
