"""The job spec: what is accepted, and that every mistake is answered with place and hint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from attr_batch import spec
from attr_batch.errors import SpecError

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/digits/job.yaml"
SCHEMA = ROOT / "docs/job.schema.json"


def tree() -> dict:
    return yaml.safe_load(EXAMPLE.read_text())


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/job*.yaml")), ids=str)
def test_every_example_loads(path):
    assert spec.load(path).properties


def test_the_committed_schema_is_fresh():
    assert json.loads(SCHEMA.read_text()) == spec.schema(), (
        "attr-batch schema > docs/job.schema.json"
    )


def test_the_example_names_the_schema():
    line = EXAMPLE.read_text().splitlines()[0]
    name = line.partition("$schema=")[2]
    assert (EXAMPLE.parent / name).resolve() == SCHEMA


def test_scientific_notation_without_a_dot_is_a_number(tmp_path):
    assert spec.read_yaml(written(tmp_path, "a: [3e-3, 1E5, -2e+1, 1.5, .5, 7]"))[0] == {
        "a": [3e-3, 1e5, -20.0, 1.5, 0.5, 7]
    }


def test_dates_and_versions_stay_text(tmp_path):
    assert spec.read_yaml(written(tmp_path, "a: 2024-01-01\nb: 1.2.3"))[0] == {
        "a": "2024-01-01",
        "b": "1.2.3",
    }


def test_set_overrides_values_parts_and_list_items():
    loaded = spec.load(
        EXAMPLE,
        [
            "estimator.budget=24",
            "sampling={solver: unipc, steps: 10}",
            "properties.0={kind: class_share, label: '3'}",
            "seed=7",
            "resources.workers=1",
        ],
    )
    assert loaded.estimator.budget == 24
    assert (loaded.sampling.solver, loaded.sampling.steps) == ("unipc", 10)
    assert loaded.properties[0].name == "class_share-3"
    assert (loaded.seed, loaded.resources.workers) == (7, 1)


def test_paths_are_relative_to_the_yaml(tmp_path):
    job = tree() | {
        "data": {"kind": "image_folder", "path": "art", "contributor": "artist", "size": 8}
    }
    loaded = spec.load(written(tmp_path, yaml.safe_dump(job)))
    assert loaded.data.path == str(tmp_path / "art")


def _with(path: str, value: object) -> dict:
    job = tree()
    node = job
    *head, last = path.split(".")
    for key in head:
        node = node[int(key)] if key.isdigit() else node[key]
    if value is DELETED:
        del node[last]
    else:
        node[int(last) if last.isdigit() else last] = value
    return job


DELETED = object()
BAD = [
    # path, value, what the message must name
    ("name", DELETED, ["name", "missing", "add `name:`"]),
    ("name", "", ["name", "at least 1 character"]),
    ("data", DELETED, ["data", "missing"]),
    ("data", {}, ["data", "kind"]),
    ("data", {"kind": "digit"}, ["data", "'digit'", "did you mean 'digits'"]),
    ("data", "digits", ["data", '"digits"']),
    ("data", {"kind": "image_folder", "path": "x"}, ["data.contributor", "missing"]),
    ("model.kind", "vit", ["model", "'vit'", "unet"]),
    ("model.block_out_channels", [24, 50], ["model", "50", "norm_num_groups"]),
    ("model.block_out_channels", [24, "48"], ["model.block_out_channels.1", '"48"', "quotes"]),
    ("model.training.steps", 0, ["model.training.steps", "got 0", "greater than 0"]),
    ("model.training.steps", 10.5, ["model.training.steps", "10.5", "integer"]),
    ("model.training.learning_rate", -1, ["model.training.learning_rate", "got -1"]),
    ("model.training.learning_rate", "fast", ["model.training.learning_rate", '"fast"', "number"]),
    ("model.training.decay", "cosin", ["model.training.decay", "cosin", "cosine"]),
    ("pruning.ratio", 1.0, ["pruning.ratio", "less than 1"]),
    ("pruning.ratio", 0, ["pruning.ratio", "greater than 0"]),
    ("pruning.ratoi", 0.5, ["pruning.ratoi", "unknown key", "did you mean `ratio`"]),
    ("counterfactual.kind", "sparse", ["counterfactual", "sparsified_finetune"]),
    ("counterfactual.ema", "short", ["counterfactual.ema", "restarted"]),
    ("sampling.solver", "euler", ["sampling.solver", "euler", "dpmpp"]),
    ("sampling.images", 1, ["sampling.images", "got 1"]),
    ("sampling.keep", "some", ["sampling.keep", "some", "grid"]),
    ("properties", [], ["properties", "at least 1 item"]),
    ("properties.1.kind", "fid", ["properties.1", "'fid'", "class_share"]),
    ("properties.1", {"kind": "class_share"}, ["properties.1.label", "missing"]),
    ("properties.2", {"kind": "cluster_entropy"}, ["properties", "cluster_entropy", "name"]),
    ("properties.0.name", "a/b", ["properties.0.name", "a/b"]),
    ("estimator", DELETED, ["estimator", "missing"]),
    ("estimator.budget", 61, ["estimator", "61 is odd", "62"]),
    ("estimator.budget", "60", ["estimator.budget", '"60"', "quotes"]),
    ("estimator.budget", True, ["estimator.budget", "true", "integer"]),
    ("estimator.confidence", 95, ["estimator.confidence", "less than 1"]),
    ("seed", -1, ["seed", "got -1"]),
    ("royalties", {}, ["royalties", "unknown key"]),
    ("resources", {"workers": 0}, ["resources.workers", "got 0"]),
    ("tracking", {"contributors": "nobody"}, ["tracking.contributors", "pseudonyms"]),
    ("endpoints", "published", ["endpoints", "derived"]),
]


@pytest.mark.parametrize(
    ("path", "value", "named"), BAD, ids=[f"{i}-{p}" for i, (p, _, _) in enumerate(BAD)]
)
def test_a_mistake_is_named_with_its_place(tmp_path, path, value, named):
    file = written(tmp_path, yaml.safe_dump(_with(path, value), sort_keys=False))
    with pytest.raises(SpecError) as caught:
        spec.load(file)
    message = str(caught.value)
    assert caught.value.exit_code == 64
    assert str(file) in message
    for text in named:
        assert text in message, message


def test_all_mistakes_are_reported_at_once_with_their_lines(tmp_path):
    text = EXAMPLE.read_text().replace("steps: 12", "steps: 0").replace("ratio: 0.5", "ratio: 2")
    with pytest.raises(SpecError) as caught:
        spec.load(written(tmp_path, text))
    assert len(caught.value.problems) == 2
    for problem in caught.value.problems:
        line = int(problem.where.split(":")[1])
        assert problem.where.rpartition(".")[2] in text.splitlines()[line - 1]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is empty"),
        ("- a\n- b", "wanted a mapping"),
        ("just text", "wanted a mapping"),
        ("a: [1, 2", "not valid YAML"),
        ("a: 1\na: 2", "stands twice"),
        ("a: &x 1\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: !custom 1", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("{[1, 2]: 3}", "plain word"),
        ("a: " + "[" * 50 + "]" * 50, "nested deeper"),
        ("a: " + "[" * 5000, "nested deeper"),
        ("a: .nan", "cannot"),
        ("x" * (spec.MAX_BYTES + 1), "more than"),
    ],
)
def test_broken_yaml_is_a_spec_error(tmp_path, text, named):
    with pytest.raises(SpecError, match=named) as caught:
        spec.load(written(tmp_path, text))
    assert caught.value.exit_code == 64


def test_a_missing_file_is_a_spec_error(tmp_path):
    with pytest.raises(SpecError, match="no such file"):
        spec.load(tmp_path / "nothing.yaml")
    with pytest.raises(SpecError, match="Is a directory"):
        spec.load(tmp_path)


@pytest.mark.parametrize(
    "override",
    ["budget", "=3", "estimator.budget", "properties.9.kind=x", "name.first=x", "seed=[1"],
)
def test_a_bad_override_is_a_spec_error(override):
    with pytest.raises(SpecError) as caught:
        spec.load(EXAMPLE, [override])
    assert override in str(caught.value)
