"""The claims of SECURITY.md, each by an attack that would succeed if it were not true."""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_report
import sample_validation
import yaml
from conftest import TINY, tiny_tree
from fuzzing import within
from PIL import Image

from attr_batch import log, report, spec, tracking, validation_report
from attr_batch.data import ImageFolder
from attr_batch.errors import AttrBatchError, DataError, LedgerConflict, SpecError
from attr_batch.ledger import Ledger, seal
from attr_batch.models import DiffusersFolder, UNet, write_safetensors
from attr_batch.properties import Call
from attr_batch.recipe import digest, file_digest
from attr_batch.tracking import Child, Mirror, Pseudonyms, Snapshot

PACKAGE = Path(__file__).parent.parent / "attr_batch"
PATIENCE = 20.0  # seconds; each attack here takes hours or all memory where it succeeds

# -- no code from data ----------------------------------------------------------------------------

# Modules and functions that run what they read, or that start programs.
FORBIDDEN = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess"),
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.hub", "torch.jit.load"),
    *("numpy.load", "np.load", "numpy.fromfile", "np.fromfile", "pandas.read_pickle"),
    *("os.system", "os.popen", "os.execv", "os.spawnv", "runpy", "yaml.load", "yaml.unsafe_load"),
    *("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "importlib.import_module"),
}
# `kind: call` of installed packages, and our own extension.
ALLOWED = {(name, "importlib.import_module") for name in ("properties.py", "native.py")}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def uses(tree: ast.AST) -> set[str]:
    """Return the dotted names that a module mentions, those that it imports among them."""
    found = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_that_runs_what_it_reads_is_called():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for name in uses(tree):
            bad = {name, name.partition(".")[0]} & FORBIDDEN
            assert not bad or (path.name, name) in ALLOWED, (path.name, name)
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword):
                assert node.arg not in ("allow_pickle", "weights_only"), path.name
            if isinstance(node, ast.Call) and dotted(node.func).endswith(".from_pretrained"):
                given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert given["trust_remote_code"] is False, path.name
                assert given["use_safetensors"] is True, path.name
                assert given["local_files_only"] is True, path.name


def test_the_search_for_such_calls_finds_them():
    code = "import torch\nfrom numpy import load\nimport joblib\ntorch.load('x')\neval('1')"
    assert {"torch.load", "numpy.load", "joblib", "eval"} <= uses(ast.parse(code)) & FORBIDDEN


@pytest.mark.parametrize("place", ["beside the job", "on PYTHONPATH"])
def test_a_call_runs_no_module_of_the_folder(tmp_path, place):
    """Neither what lies where the command runs nor what a variable points to; nothing is run."""
    (tmp_path / "evil").mkdir()
    for name in ("evil/__init__.py", "lone.py"):
        code = f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(images): return 1.0\n"
        (tmp_path / name).write_text(code)
    program = (
        "import sys, pathlib\nfrom attr_batch.properties import Call\n"
        "from attr_batch.errors import SpecError\n"
        "for target in ('evil.inner:f', 'evil:f', 'lone:f', 'os:system', 'shutil:rmtree'):\n"
        "    try: Call(kind='call', target=target).check((), 'p')\n"
        "    except SpecError as error: print(error.problems[0].what)\n"
    )
    where = {"cwd": tmp_path} if place == "beside the job" else {}
    environment = {**os.environ}
    if place == "on PYTHONPATH":
        ours = os.environ.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), ours]))
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, **where
    )
    refused = ("belongs to no installed package", "has no Python source")  # os is frozen
    assert sum(found.stdout.count(what) for what in refused) == 5, found
    assert not (tmp_path / "ran").exists()


def test_a_call_of_an_installed_package_is_in_the_spec_with_its_source():
    prop = Call(kind="call", target="numpy._core.fromnumeric:mean")
    source = sys.modules["numpy._core.fromnumeric"].__file__
    assert prop.recipe()["source"] == hashlib.sha256(Path(source).read_bytes()).hexdigest()
    assert prop.recipe()["target"] == "numpy._core.fromnumeric:mean"
    assert prop.measure(np.full((20, 1, 8, 8), 7, np.uint8)).value == 7.0


def test_a_model_folder_brings_no_code(tmp_path):
    folder = tmp_path / "model"
    UNet(block_out_channels=(8, 16)).build(1, 8, 0).save_pretrained(folder)
    Path(folder, "scheduler_config.json").write_text(
        '{"beta_schedule": "linear", "num_train_timesteps": 100}'
    )
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("evil.py", "modeling.py", "unet.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Evil"}, "custom_pipeline": "evil", "_module": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    DiffusersFolder(path=str(folder)).initial(1, 8, 0)
    assert not (tmp_path / "ran").exists()


# -- hostile specs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"k{i}: 1\n" for i in range(20_000)),
        "data: {kind: digits, contributors: [" + "[]," * 60_000 + "]}",
        "data: {kind: digits, contributors: [" + ",".join(f"a{i}" for i in range(30_000)) + "]}",
        "seed: 1" + ":59" * 80_000,
        "seed: !!int 1" + ":59" * 80_000,
        "seed: " + "9" * 200_000,
        "seed: 0x" + "f" * 200_000,
        "name: " + "[" * 100_000,
        "<<: " * 50_000,
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "data: {kind: digits, " + "x" * 1000 + ": 1}",
    ],
    ids=range(11),
)
def test_a_spec_made_to_keep_us_busy_is_refused(tmp_path, text):
    (tmp_path / "job.yaml").write_text(text)
    with within(PATIENCE), pytest.raises(SpecError) as caught:
        spec.load(tmp_path / "job.yaml")
    assert len(caught.value.problems) <= spec.MAX_PROBLEMS + 1


def test_a_spec_without_end_is_refused():
    with within(PATIENCE), pytest.raises(SpecError, match="more than"):
        spec.load("/dev/zero")


@pytest.mark.parametrize("override", ["a." * 3000 + "b=1", "properties." + "9" * 5000 + ".kind=x"])
def test_an_override_made_to_break_the_parser_is_refused(override):
    with pytest.raises(SpecError):
        spec.load(PACKAGE.parent / "examples/digits/job.yaml", [override])


# -- hostile data ---------------------------------------------------------------------------------


def folder_of(path: Path, table: str = "file_name,artist\n0.png,a\n1.png,b\n") -> ImageFolder:
    path.mkdir(exist_ok=True)
    (path / "metadata.csv").write_text(table)
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8), "red").save(path / name)
    return ImageFolder(kind="image_folder", path=str(path), contributor="artist", size=8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks)


BOMB = zlib.compress(bytes(1 << 28), 9)  # 256 MiB in 260 kB


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (png(60_000, 60_000, chunk(b"IDAT", BOMB)), "more than 80 megapixels"),
        (png(9_000, 9_000, chunk(b"IDAT", BOMB)), "more than 80 megapixels"),
        (png(8, 8, chunk(b"zTXt", b"a\0\0" + BOMB), chunk(b"IDAT", BOMB)), "not a readable image"),
        (png(8, 8, chunk(b"iCCP", b"a\0\0" + BOMB), chunk(b"IDAT", b"x")), "not a readable image"),
    ],
    ids=["pixels", "just too large", "text", "profile"],
)
def test_a_decompression_bomb_is_refused(tmp_path, data, what):
    part = folder_of(tmp_path / "images")
    (tmp_path / "images/1.png").write_bytes(data)
    with within(PATIENCE), pytest.raises(DataError, match=what):
        part.load()


def test_links_out_of_the_data_folder_are_not_followed(tmp_path):
    part = folder_of(tmp_path / "images")
    root = tmp_path / "images"
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (root / "1.png").unlink()
    (root / "1.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(DataError, match="leads out of the folder"):
        part.load()
    (root / "1.png").unlink()
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "1.png").symlink_to(root / "0.png")  # a link that stays inside is allowed
    assert len(part.load()) == 2
    (tmp_path / "secret.csv").write_text("root:x:0:0\n")
    (root / "metadata.csv").unlink()
    (root / "metadata.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(DataError, match="leads out of the folder") as caught:
        part.load()
    assert "root:x" not in str(caught.value)


# -- the store ------------------------------------------------------------------------------------


def made(tmp_path: Path) -> tuple[Ledger, Path]:
    """Return a ledger with one base, and the folder of that base."""
    ledger = Ledger(tmp_path / "store")
    work = ledger.work("bases/b")
    work.mkdir(parents=True)
    (work / "weights").write_bytes(b"weights")
    ledger.publish_thing("bases", "b", work, {"seed": 0}, 1.0)
    return ledger, tmp_path / "store/bases/b"


@pytest.mark.parametrize("name", ["../../../secret", "..", "{tmp}/secret", "a/../../secret", "\0"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path, name):
    ledger, folder = made(tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    files = {name.format(tmp=tmp_path): digest(b"secret")}
    (folder / "manifest.json").write_bytes(seal({"files": files, "inputs": {}, "seconds": 1.0}))
    with pytest.raises(LedgerConflict):
        ledger.verified_thing("bases", "b")
    assert [bad for bad, _ in ledger.bad_files()] == ["bases/b"]


def test_a_link_in_a_base_is_no_part_of_it(tmp_path):
    ledger, folder = made(tmp_path)
    (tmp_path / "elsewhere").write_bytes(b"weights")
    (folder / "weights").unlink()
    (folder / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LedgerConflict):
        ledger.verified_thing("bases", "b")


@pytest.mark.parametrize("name", ["runs/k", "bases/k", "reports/k", "plans", "work/heartbeats"])
def test_nothing_is_read_or_written_through_a_link_in_the_store(tmp_path, name):
    ledger, outside = Ledger(tmp_path / "store"), tmp_path / "outside"
    outside.mkdir()
    (outside / "x.json").write_bytes(seal({"secret": 1}))
    link = tmp_path / "store" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside, target_is_directory=True)
    store, before = ledger.store, sorted(outside.iterdir())
    for attack in (
        lambda: store.read(f"{name}/x.json"),
        lambda: store.publish(f"{name}/y.json", b"y"),
        lambda: store.replace(f"{name}/x.json", b"y"),
        lambda: store.delete(f"{name}/x.json"),
        lambda: ledger.fact(f"{name}/x.json"),
    ):
        with pytest.raises(LedgerConflict):
            attack()
    assert sorted(outside.iterdir()) == before


def test_links_and_pipes_where_files_should_be(tmp_path):
    ledger, victim = Ledger(tmp_path / "store"), tmp_path / "victim"
    victim.write_text("precious")
    for family in ("runs/k", "work/locks"):
        (tmp_path / "store" / family).mkdir(parents=True)
    (tmp_path / "store/runs/k/a.json").symlink_to(victim)
    os.mkfifo(tmp_path / "store/runs/k/b.json")
    for name in ("runs/k/a.json", "runs/k/b.json"):
        with within(PATIENCE), pytest.raises(LedgerConflict):
            ledger.store.read(name)
        assert not ledger.store.publish(name, b"new")  # what is there stays, and is refused
    ledger.store.replace("runs/k/a.json", b"new")  # the link is replaced, not what it leads to
    (tmp_path / "store" / "work" / "locks" / "l").symlink_to(victim)
    with pytest.raises(AttrBatchError), ledger.store.lock("l"):
        pass
    assert victim.read_text() == "precious"


def test_a_link_under_a_temporary_name_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".w.safetensors.{os.getpid()}.tmp").symlink_to(victim)
    write_safetensors(tmp_path / "w.safetensors", {})
    assert victim.read_text() == "precious"
    assert file_digest(tmp_path / "w.safetensors")


# -- hostile models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": [8192] * 8, "layers_per_block": 16, "norm_num_groups": 1},
        {"block_out_channels": [8] * 5000},
        {"block_out_channels": [10**30, 8]},
        {"layers_per_block": 10**9},
        {"layers_per_block": True},
        {"time_embedding_dim": 10**12},
        {"num_train_timesteps": 10**12, "time_embedding_type": "learned"},
    ],
)
def test_a_config_that_asks_for_all_memory_is_refused(tmp_path, changes):
    UNet(block_out_channels=(8, 16)).build(1, 8, 0).save_pretrained(tmp_path)
    schedule = {"beta_schedule": "linear", "num_train_timesteps": 100}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(schedule))
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    levels = len(config["block_out_channels"])
    config |= {
        "down_block_types": ["DownBlock2D"] * levels,
        "up_block_types": ["UpBlock2D"] * levels,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with within(PATIENCE), pytest.raises(DataError):
        DiffusersFolder(path=str(tmp_path)).build(1, 2**7, 0)


# -- secrets --------------------------------------------------------------------------------------

CANARY = "Zq7canary"
VARIABLES = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD"),
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_USERNAME", "ATTR_BATCH_KEY"),
)
URIS = (
    f"http://user:{CANARY}@127.0.0.1:9",
    f"http://user:{CANARY}/@127.0.0.1:9/x?token={CANARY}",
    f"postgresql+psycopg2://user:{CANARY}@127.0.0.1:9/mlflow",
    f"mysql+nothing://user:{CANARY}%40@127.0.0.1:9/mlflow?password={CANARY}",
    f"postgresql://user:p@{CANARY}:xyz@127.0.0.1:9/db?sslpassword={CANARY}",
)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
@pytest.mark.parametrize("uri", URIS)
def test_no_message_about_mlflow_holds_its_password(tmp_path, capsys, uri):
    """Libraries quote whatever part of a URI they could not read."""
    mirror = Mirror(uri, "e", "0" * 64, b"k" * 32, tmp_path / "lock")
    assert not mirror.sync(Snapshot({}, "0" * 64, {}, "0", ["a", "b"], {}, []))
    shown = capsys.readouterr().err
    assert "is not written" in shown
    assert CANARY not in shown
    assert "xyz" not in shown
    assert CANARY not in tracking.where_to_look(uri)


@pytest.mark.e2e
def test_no_secret_is_stored_or_shown(tmp_path):
    """A whole job by the real command, its MLflow away: neither store nor terminal holds one."""
    track = {"uri": URIS[1], "key_env": "ATTR_BATCH_KEY"}
    job = tiny_tree(tmp_path / "store", tracking=track)
    job["model"] = {**TINY["model"], "training": {"steps": 2, "batch": 8, "warmup": 1}}
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    said = []

    def command(*arguments: str | Path) -> int:
        found = subprocess.run(
            [sys.executable, "-m", "attr_batch.cli", *map(str, arguments)],
            env={**os.environ, **{name: f"{CANARY}{name}" for name in VARIABLES}},
            capture_output=True,
            text=True,
        )
        said.append(found.stdout + found.stderr)
        return found.returncode

    assert command("run", file) == 0, said
    assert command("status", file, "--json") == 0
    wrong = f"tracking.uri=[{json.dumps(URIS[0])}]"
    assert command("check", file, "--set", wrong) == 64
    assert not [text for text in said if CANARY in text]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "job.yaml"]
    assert len(files) > 20
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    (fact,) = (tmp_path / "store/specs").iterdir()
    assert not {"tracking", "store", "resources"} & json.loads(fact.read_text())["content"].keys()


# -- who contributes ------------------------------------------------------------------------------

PEOPLE = ("Anna Müller", "O'Brien & Co", "studio_7", "نور", "梅原", "J. R. (née Smith)", "12-x")


def test_nothing_that_is_sent_to_mlflow_names_a_contributor(tmp_path):
    """Names as labels, in properties named after labels, in reasons for failures, in paths."""
    shares = [{"kind": "class_share", "label": name} for name in PEOPLE]
    job = spec.validate(tiny_tree(tmp_path / "store", properties=shares))
    attribution, evidence, cost = sample_report.job(ids=list(PEOPLE))
    name = job.properties[0].name
    text = json.dumps([attribution, evidence], ensure_ascii=False)
    text = text.replace('"cluster_entropy"', json.dumps(name))
    attribution, evidence = json.loads(text)
    evidence["failures"] = [
        {
            "coalition": "1" * len(PEOPLE),
            "members": list(PEOPLE),
            "replicate": 0,
            "what": f"could not read /data/{person}/1.png of {person.upper()}: {person}",
        }
        for person in PEOPLE
    ]
    evidence["instruments"] = [
        {"kind": "c", "card": {"labels": list(PEOPLE), "by": dict.fromkeys(PEOPLE, 1.0)}}
    ]
    evidence["warnings"] = [f"images/{person}.png is odd" for person in PEOPLE]
    metrics = {prop.name: (1.0, 0.1) for prop in job.properties}
    snapshot = Snapshot(
        spec={
            "name": f"credit {PEOPLE[0]}",
            "data": {"contributors": dict.fromkeys(PEOPLE, "d" * 64), "labels": list(PEOPLE)},
            "properties": {prop.name: prop.recipe() for prop in job.properties},
            "order": [prop.name for prop in job.properties],
        },
        spec_digest="5e" * 32,
        numerics={},
        version="0",
        roster=list(PEOPLE),
        digests={"digits": "d1" * 32},
        children=[Child("k" * 64, "1" * len(PEOPLE), "grand", None, 0, metrics, 1.0)],
        attribution=attribution,
        evidence=evidence,
        cost=cost,
    )
    sent = Pseudonyms(b"k" * 32, PEOPLE).snapshot(replace(snapshot))
    texts = (data for name, data in tracking._artifacts(sent) if not name.endswith(".png"))
    artifacts = b"\n".join(texts).decode()
    everything = [artifacts, repr(tracking._params(sent.spec)), repr(tracking._tags(sent))]
    everything += [repr(tracking._metrics(sent)), repr(sent.children)]
    seen = "\n".join(everything).casefold()
    for person in PEOPLE:
        hashed = hashlib.sha256(person.encode()).hexdigest()[:8]  # a list of names would find it
        slug = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in person)
        escaped = json.dumps(person)[1:-1]
        for form in (person, hashed, *([slug] if slug.strip("_") else []), escaped):
            assert form.casefold() not in seen, form


# -- what is shown --------------------------------------------------------------------------------

PAYLOAD = "\"><img src=x onerror=alert(1)>'</title></style><script>1</script><!--{{7*7}}"
# Words that decide what is drawn; all other text may come from outside.
OURS = {
    *("endpoint", "design", "holdout", "shapley", "banzhaf", "leave_one_out", "estimator"),
    *("counterfactual", "baseline", "restarted", "raw", "continued", "dense", "pruned", "ridge"),
}


class Structure(HTMLParser):
    """The elements of a page in order, each with the names of its attributes and its ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, ...]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append((tag, *sorted(name for name, _ in attrs)))

    handle_startendtag = handle_starttag

    def handle_comment(self, data: str) -> None:
        self.seen.append(("comment", data))


# Where keys are names, not ours.
OPEN = {"properties", "lds", "lead", "card", "provenance", "seconds", "recipe", "numerics"}


def spoken(tree: Any, say: Any, open_keys: bool = False) -> Any:
    """Return a tree in which every text that may come from outside, keys too, is another."""
    if isinstance(tree, str):
        ours = tree in OURS or not set(tree) - set("01") or len(tree) > 200  # the last: pictures
        ours = ours or tree.startswith(("paired-ls", "replicates", "permutation", "gp"))
        return tree if ours else say(tree)
    if isinstance(tree, dict):
        return {
            (spoken(key, say) if open_keys else key): spoken(value, say, key in OPEN)
            for key, value in tree.items()
        }
    return [spoken(item, say) for item in tree] if isinstance(tree, list | tuple) else tree


REPORT = json.loads(json.dumps(sample_report.job(6, 20)))
VALIDATION = json.loads(json.dumps(sample_validation.validation()))


@pytest.mark.parametrize("kind", ["report", "validation"])
def test_no_text_becomes_an_element_of_a_page(kind):
    """Whatever stands in names, captions, reasons, cards: the page has the same elements."""

    def page(say: Any) -> str:
        if kind == "report":
            return report.page(*spoken(REPORT, say))
        return validation_report.page(spoken(VALIDATION, say))

    hostile = page(lambda text: text + PAYLOAD)
    harmless = page(lambda text: text + "x" * len(PAYLOAD))
    assert Structure(hostile).seen == Structure(harmless).seen
    assert hostile.count("alert(1)") > 20
    assert "<script" not in hostile
    assert "onerror=alert(1)>" not in hostile


def test_no_cell_of_a_table_is_a_formula():
    rows = [[start + "cmd|' /C calc'!A0", -1.5, None] for start in ("=", "+", "-", "@", "\t", "\r")]
    table = tracking._csv(["id", "value", "none"], rows).decode()
    cells = list(csv.reader(table.splitlines()[1:]))
    for row in csv.reader(table.replace("\r", "").split("\n")[1:]):
        assert not row or row[0][:1] == "'", row
    assert cells[0][1] == "-1.5"  # numbers stay numbers


def test_no_text_steers_the_terminal(capsys):
    log.warn("file \x1b]0;owned\x07\x1b[2J\x9b31m\x08 odd", "it's \u001b[0m")
    shown = capsys.readouterr().err
    assert not {c for c in shown if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n"}
    assert "odd" in shown
