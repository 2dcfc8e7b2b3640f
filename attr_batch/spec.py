"""The job spec: the tree of the workers themselves, read from YAML with errors a user can act on.

Every part (`data`, `model`, `sampling`, ...) is the frozen class that does the work; this module
only puts them together, reads YAML strictly, and turns validation errors into messages that name
the path, what stood there, what was wanted, and a hint.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError, field_validator

from attr_batch.baselines import Baseline
from attr_batch.bucket import is_url
from attr_batch.counterfactual import Counterfactual, Retrain, SparsifiedFinetune
from attr_batch.data import Data
from attr_batch.errors import Problem, SpecError
from attr_batch.estimators import Estimator
from attr_batch.models import Model
from attr_batch.properties import Property
from attr_batch.pruning import Pruning
from attr_batch.recipe import UNHASHED, Part, canonical
from attr_batch.sampling import Sampling

MAX_BYTES = 1 << 18  # of YAML: what PyYAML reads in about three seconds
MAX_DEPTH = 20
MAX_PROBLEMS = 50  # a message of 10,000 unknown keys helps nobody


Share = Annotated[float, Field(gt=0, lt=1)]


class Tracking(Part):
    """Where MLflow mirrors the job, and what it may know of the contributors."""

    enabled: bool = True
    uri: str | None = Field(
        default=None,
        description="MLflow tracking URI; default: $MLFLOW_TRACKING_URI, else SQLite in the store.",
    )
    experiment: str = Field(default="attr-batch", min_length=1, max_length=200)
    contributors: Literal["pseudonyms", "names"] = Field(
        default="pseudonyms",
        description="pseudonyms: keyed hashes stand for ids in all that is sent.",
    )
    key_env: str | None = Field(
        default=None,
        description="Environment variable with the key; default: a secret file in the store.",
    )


class Resources(Part):
    """What the job may use. Only the numerics class, device and cohort, moves last bits."""

    workers: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Worker processes; default: the cores, or 1 on a GPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda if there is one"
    )
    cohort: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Coalitions that a worker fine-tunes and samples at once; other kinds of "
        "counterfactual go one by one. `attr-batch pilot` says how many pay.",
    )
    base_wait: float = Field(
        default=3600.0,
        gt=0,
        description="Seconds another shard waits for the base before it exits 75.",
    )


class Subsets(Part):
    """Coalitions of one size that the oracle retrains: floor(alpha n) contributors."""

    alpha: float = Field(gt=0, lt=1, description="Share of the contributors in a subset.")
    count: int = Field(ge=5, le=10_000, description="Subsets; fewer where there are no more.")
    seeds: int = Field(default=1, ge=1, le=20, description="Retrainings of each, from new noise.")


class Steps(Part):
    """At which k, and from which weights, v(S) is compared with retraining (Eq. 6)."""

    coalitions: int = Field(default=24, ge=5, le=1000, description="Of the first `subsets`.")
    steps: tuple[PositiveInt, ...] = Field(default=(25, 50, 100, 200, 400), max_length=20)
    ema: tuple[Literal["restarted", "raw", "continued"], ...] = (
        "restarted",
        "raw",
        "continued",
    )


class Removal(Part):
    """Retraining without the contributors that a method ranks first, and with these alone."""

    methods: tuple[str, ...] = Field(
        default=("estimator", "leave_one_out"),
        max_length=20,
        description="`estimator` is the job's own; others as the comparison table calls them.",
    )
    remove: tuple[Share, ...] = (0.1, 0.2, 0.3, 0.4)
    keep: tuple[Share, ...] = (0.95, 0.9, 0.8, 0.7, 0.6)


class Validation(Part):
    """What `attr-batch validate` does beside the job. Nothing here changes the attribution."""

    oracle: Retrain = Field(
        default_factory=Retrain, description="How the model of a coalition is really trained."
    )
    subsets: tuple[Subsets, ...] = Field(
        default=(
            Subsets(alpha=0.5, count=100, seeds=2),
            Subsets(alpha=0.25, count=20),
            Subsets(alpha=0.75, count=20),
        ),
        min_length=1,
        max_length=20,
        description="The first decides. The paper has 100 at each of .25, .5, .75, three seeds.",
    )
    reference: int = Field(
        default=60,
        ge=0,
        le=10_000,
        multiple_of=2,
        description="Retrainings of a paired design: Shapley values of retraining itself.",
    )
    designs: int = Field(
        default=3, ge=1, le=50, description="Seeds of the estimator's design that are averaged."
    )
    estimators: tuple[Literal["ridge", "paired_ls", "gp", "reference"], ...] = Field(
        default=("ridge", "paired_ls", "gp", "reference"),
        description="Read the same designs; `reference` also its own, as published.",
    )
    counterfactuals: tuple[Counterfactual, ...] = Field(
        default=(), max_length=50, description="Further ways to a coalition's model, compared."
    )
    steps: Steps | None = Field(default_factory=Steps)
    removal: Removal | None = Field(default_factory=Removal)
    baselines: tuple[Baseline, ...] = Field(
        default=(), max_length=100, description="Scores that train no coalition (Table 1)."
    )

    @field_validator("subsets")
    @classmethod
    def _distinct_alphas(cls, subsets: tuple[Subsets, ...]) -> tuple[Subsets, ...]:
        alphas = [part.alpha for part in subsets]
        if len(set(alphas)) < len(alphas):
            raise ValueError("two parts have the same alpha; raise `count` or `seeds` of one")
        return subsets

    @field_validator("counterfactuals", "baselines")
    @classmethod
    def _no_twins(cls, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        if len({canonical(part.recipe()) for part in parts}) < len(parts):
            raise ValueError("two entries are the same")
        return parts


class JobSpec(Part):
    """One attribution job."""

    name: str = Field(min_length=1, max_length=200, description="Shown in report and MLflow.")
    store: Annotated[str, UNHASHED] = Field(
        default="attr-batch-store",
        pattern=r"^[^\x00]+$",
        description="Folder of results, relative to the shell's, or s3://bucket/prefix.",
    )
    seed: int = Field(default=0, ge=0, lt=1 << 53, description="Seed of training and sampling.")
    data: Data
    model: Model
    pruning: Pruning
    counterfactual: Counterfactual = Field(default_factory=SparsifiedFinetune)
    sampling: Sampling = Field(default_factory=Sampling)
    properties: tuple[Property, ...] = Field(
        min_length=1, max_length=64, description="Measured on every coalition; the headline first."
    )
    endpoints: Literal["derived", "paper"] = Field(
        default="derived",
        description="v(all) and v(none): under the same counterfactual as the coalitions, or the "
        "unpruned trained and untrained model as published.",
    )
    estimator: Estimator
    validation: Validation = Field(default_factory=Validation)
    tracking: Tracking = Field(default_factory=Tracking)
    resources: Resources = Field(default_factory=Resources)

    @field_validator("properties")
    @classmethod
    def _distinct_names(cls, properties: tuple[Property, ...]) -> tuple[Property, ...]:
        names = [prop.name for prop in properties]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two properties are called {', '.join(twice)}; give one a `name`")
        return properties


def load(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job spec, apply `--set` overrides, validate.

    Paths in the YAML are taken relative to its folder. SpecError lists all problems at once.
    """
    path = Path(path)
    tree, lines = read_yaml(path)
    if not isinstance(tree, dict):
        raise SpecError(
            f"got {_shown(tree)}, wanted a mapping of keys",
            str(path),
            "see examples/digits/job.yaml",
        )
    for override in overrides:
        key, _ = _apply(tree, override)
        lines = {at: line for at, line in lines.items() if at[: len(key)] != key}
    return _resolve_locations(validate(tree, str(path), lines), path.parent)


def validate(tree: Any, where: str = "spec", lines: dict[tuple, int] | None = None) -> JobSpec:
    """Return the JobSpec of a tree of plain values. SpecError lists all problems at once."""
    try:
        text = json.dumps(tree, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecError(f"holds a value that JSON cannot: {error}", where) from None
    try:
        return JobSpec.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise SpecError.of(_first(_problems(error, tree, where, lines or {}))) from None


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the job spec."""
    found = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


# -- YAML -----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML, made stricter: no aliases, no tags, no double keys; dates and times are text.

    1e-3 is a number. A whole number is decimal without leading zeros: 0123 and 1:30 are text.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases (*name) are not allowed"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if getattr(event, "tag", None) is not None:
            problem = "tags (!name) are not allowed: put text in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if not tag.endswith((":timestamp", ":float", ":int", ":merge", ":value"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> tuple[Any, dict[tuple, int]]:
    """Return the plain values of a YAML file and the line of every path in it."""
    try:
        with path.open("rb") as file:  # which may be a device without end
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError("no such file", str(path), "the first argument is the job's YAML") from None
    except OSError as error:
        raise SpecError(error.strerror or "cannot be read", str(path)) from None
    if len(data) > MAX_BYTES:
        raise SpecError(f"more than {MAX_BYTES} bytes", str(path), "is it the spec?")
    return _parse(data.decode("utf-8", errors="replace"), str(path))


def _parse(text: str, where: str) -> tuple[Any, dict[tuple, int]]:
    lines: dict[tuple, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise SpecError("is empty", where, "start from examples/digits/job.yaml")
        _note_lines(node, (), lines, where)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise SpecError(f"not valid YAML: {error.problem}", place) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"not valid YAML: {error}", where) from None


def _note_lines(node: yaml.Node, at: tuple, lines: dict[tuple, int], where: str) -> None:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise SpecError("a key must be a plain word", f"{where}:{line}")
            if key.value in seen:
                hint = "remove one of the two"
                raise SpecError(f"key {key.value[:60]!r} stands twice", f"{where}:{line}", hint)
            seen.add(key.value)
            lines[(*at, key.value)] = line
            _note_lines(value, (*at, key.value), lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _note_lines(value, (*at, i), lines, where)


# -- --set ----------------------------------------------------------------------------------------


def _apply(tree: dict[str, Any], override: str) -> tuple[tuple, Any]:
    """Set `path=value` in the tree, the value read as YAML; return the path."""
    place = f"--set {_masked(override)[:200]}"
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise SpecError("wanted path=value", place, "for example --set estimator.budget=120")
    value = _parse(text, place)[0] if text.strip() else None
    keys = [int(k) if re.fullmatch("[0-9]{1,9}", k) else k for k in dotted.strip().split(".")]
    if len(keys) > MAX_DEPTH:
        raise SpecError(f"nested deeper than {MAX_DEPTH} levels", place)
    node: Any = tree
    for key in keys[:-1]:
        node = _step(node, key, place)
    last = keys[-1]
    if isinstance(node, dict):
        node[str(last)] = value
    elif isinstance(node, list) and isinstance(last, int) and last <= len(node):
        node[last : last + 1] = [value]
    else:
        raise SpecError(f"there is no {dotted!r} to set", place, "lists take an index from 0")
    return tuple(keys), value


def _step(node: Any, key: str | int, place: str) -> Any:
    if isinstance(node, dict):
        if node.get(str(key)) is None:
            node[str(key)] = {}
        return node[str(key)]
    if isinstance(node, list) and isinstance(key, int) and key < len(node):
        return node[key]
    raise SpecError(f"there is nothing under {key!r}", place, "lists take an index from 0")


# -- what went wrong ------------------------------------------------------------------------------


def _problems(
    error: ValidationError, tree: Any, where: str, lines: dict[tuple, int]
) -> Iterator[Problem]:
    items = error.errors(include_url=False)
    paths = [_real_path(item["loc"], tree) for item in items]
    for item, path in zip(items, paths, strict=True):
        inside = any(len(other) > len(path) and other[: len(path)] == path for other in paths)
        if item["type"] == "too_short" and inside:
            continue  # it only counts what is wrong inside
        line = next((lines[path[:k]] for k in range(len(path), 0, -1) if path[:k] in lines), None)
        dotted = ".".join(str(key)[:60] for key in path) or "the spec"
        place = f"{where}:{line}: {dotted}" if line else f"{where}: {dotted}"
        yield _problem(item, path, place)


def _first(problems: Iterator[Problem]) -> list[Problem]:
    """Return the first `MAX_PROBLEMS`, and that there are more."""
    found = list(islice(problems, MAX_PROBLEMS))
    return [*found, Problem("and more problems like these")] if next(problems, None) else found


def _problem(item: Any, path: tuple, place: str) -> Problem:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "missing":
        return Problem("missing", place, f"add `{path[-1]}:`")
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(path[-1])[:60], _known_keys(), n=1)
        hint = f"did you mean `{close[0]}`?" if close else "`attr-batch schema` lists all keys"
        if close and close[0] == path[-1]:
            hint = "another `kind` takes it, this one does not"
        return Problem("unknown key", place, hint)
    if kind == "union_tag_not_found":
        return Problem("missing `kind`", place, "see `attr-batch schema` for the kinds there are")
    if kind == "union_tag_invalid":
        wanted = context["expected_tags"]
        tag = context["tag"][:60]
        close = difflib.get_close_matches(tag, wanted.replace("'", "").split(", "), n=1)
        hint = f"did you mean {close[0]!r}?" if close else None
        return Problem(f"got kind {tag!r}, wanted one of {wanted}", place, hint)
    if kind == "json_invalid":
        return Problem("holds text that is not valid Unicode", place)
    message = item["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return Problem(message, place)
    wanted = message.removeprefix("Input should be ")
    hint = None
    if isinstance(item["input"], str) and kind in ("int_type", "float_type", "bool_type"):
        hint = "write it without quotes"
    return Problem(f"got {_shown(item['input'])}, wanted {wanted}", place, hint)


def _real_path(loc: tuple, tree: Any) -> tuple:
    """Drop the tags of unions, which pydantic puts into the path, from an error's location."""
    path: list[str | int] = []
    node = tree
    for key in loc:
        if isinstance(node, dict) and key not in node and node.get("kind") == key:
            continue
        path.append(key)
        node = _child(node, key)
    return tuple(path)


def _child(node: Any, key: Any) -> Any:
    if isinstance(node, dict):
        return node.get(key)
    if isinstance(node, list) and isinstance(key, int) and key < len(node):
        return node[key]
    return None


@functools.cache
def _known_keys() -> list[str]:
    keys: set[str] = set()
    whole = schema()
    for definition in [whole, *whole.get("$defs", {}).values()]:
        keys |= set(definition.get("properties", {}))
    return sorted(keys)


def _shown(value: Any) -> str:
    text = _masked(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _masked(text: str) -> str:
    """Return text without the user and password of a URI in it: a message ends in a log."""
    return re.sub(r"//.*@", "//…@", text, flags=re.DOTALL)


def _resolve_locations(spec: JobSpec, folder: Path) -> JobSpec:
    """Make every `path` absolute, relative to the folder of the YAML."""
    store = spec.store if is_url(spec.store) else _expanded(spec.store, "store")
    changes: dict[str, Any] = {"store": store}
    for name in ("data", "model"):
        part = getattr(spec, name)
        given = getattr(part, "path", None)
        if given is not None:
            changes[name] = part.model_copy(update={"path": _absolute(folder, given, name)})
    baselines = tuple(
        baseline.model_copy(update={"path": _absolute(folder, given, f"validation.baselines.{i}")})
        if (given := getattr(baseline, "path", None)) is not None
        else baseline
        for i, baseline in enumerate(spec.validation.baselines)
    )
    if baselines:
        changes["validation"] = spec.validation.model_copy(update={"baselines": baselines})
    return spec.model_copy(update=changes)


def _absolute(folder: Path, given: str, where: str) -> str:
    if is_url(given):
        return given
    return str((folder / _expanded(given, f"{where}.path")).absolute())


def _expanded(path: str, where: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise SpecError(f"{path!r} names no user's home", where) from None
