"""Build the native ops; everything else about the package is in pyproject.toml.

Three shared objects end in `attr_batch/`: `_native_cpu.so` and `_native_cuda.so` (plain libraries
on the LibTorch stable ABI: one binary serves torch 2.11 and later) and `_native_info` (pybind11).
CUDA needs nvcc and a CUDA build of torch. Without a C++ compiler, ninja or torch's headers the
package installs all the same, with one warning, and runs on the reference ops.

    pip install --no-build-isolation -e .
    python setup.py compile_cuda --arch 80,90a     # check every .cu; needs no GPU, no CUDA torch

Environment: `CXX`, `CUDA_HOME`, `MAX_JOBS`; `ATTR_BATCH_BUILD=0` installs without native ops and
`ATTR_BATCH_CUDA_ARCH` (default 80,90a) lists the GPUs.
"""

import hashlib
import importlib.util
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11
DEFINES = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
# No flag may change a bit: nothing contracted, no -march, no -ffast-math. The last two only let
# sqrt and comparisons vectorise; neither alters a value.
CXX_FLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# An unknown symbol should fail when the library is loaded, with a hint, not in the middle of a job.
LINK_FLAGS = ["-shared", "-Wl,-z,now", "-Wl,--as-needed"]
CUDA_ARCH = os.environ.get("ATTR_BATCH_CUDA_ARCH", "80,90a")

CSRC = Path("csrc")
CPU_SOURCES = sorted(CSRC.glob("cpu/*.cpp"))
CUDA_SOURCES = sorted(CSRC.glob("cuda/*.cu"))


def find_torch() -> str:
    """Return torch's folder, without the seconds that importing it takes, or an empty string."""
    spec = importlib.util.find_spec("torch")
    return str(Path(spec.origin).parent) if spec and spec.origin else ""


def torch_cuda_version() -> str | None:
    folder = find_torch()
    return runpy.run_path(f"{folder}/version.py")["cuda"] if folder else None


def find_cxx() -> str:
    """Return the C++ compiler, or an empty string; so do the two below."""
    named = os.environ.get("CXX")
    return named or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")


def find_nvcc() -> str:
    """Look on PATH too: CUDA_HOME is often unset where nvcc is installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc") or ""


def find_ninja() -> str:
    """Look for the package too: pip may run in a virtual environment that is not activated."""
    if path := shutil.which("ninja"):
        return path
    return f"{sys.executable} -m ninja" if importlib.util.find_spec("ninja") else ""


def gencode(arch: str) -> list[str]:
    """Return nvcc's targets: code for each GPU, and PTX 90 for those to come."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in arch.split(",")]
    return [*flags, "-gencode=arch=compute_90,code=compute_90"]


def native_sources() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"})


def source_digest() -> str:
    digest = hashlib.sha256()
    for path in native_sources():
        digest.update(f"{path.as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Ninja:
    """A ninja file being written: compile and link statements, then one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        compile_rule = "-MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
        self.text = (
            f"rule compile\n  command = $tool $flags {compile_rule}\n  description = $tool $in\n"
            "rule link\n  command = $tool $in -o $out $flags\n  description = link $out\n"
        )

    def _build(self, out: Path, rule: str, inputs: list[Path], tool: str, flags: list[str]) -> None:
        quoted = shlex.join(flags).replace("$", "$$")
        paths = " ".join(str(p.absolute()).replace(" ", "$ ").replace(":", "$:") for p in inputs)
        target = str(out.absolute()).replace(" ", "$ ").replace(":", "$:")
        self.text += f"build {target}: {rule} {paths}\n  tool = {tool}\n  flags = {quoted}\n"

    def objects(self, sources: list[Path], tool: str, flags: list[str]) -> list[Path]:
        out = [self.folder / f"{s.parent.name}_{s.stem}.o" for s in sources]
        for source, target in zip(sources, out, strict=True):
            self._build(target, "compile", [source], tool, flags)
        return out

    def link(self, out: Path, objects: list[Path], tool: str, flags: list[str]) -> None:
        self._build(out, "link", objects, tool, flags)

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text(self.text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([*shlex.split(find_ninja()), "-C", str(self.folder), *jobs], check=True)


def torch_flags() -> list[str]:
    return [*DEFINES, "-isystem", f"{find_torch()}/include"]


def missing_tools() -> list[str]:
    tools = {"a C++ compiler": find_cxx(), "ninja": find_ninja(), "torch": find_torch()}
    return [name for name, found in tools.items() if not found]


class BuildNative(build_ext):
    """Compile with ninja what setuptools has listed, or warn once and leave it out."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_native_info"):
            return super().get_ext_filename(fullname)
        return f"{fullname.replace('.', os.sep)}.so"  # holds no Python: no ABI tag

    def run(self) -> None:
        switched_off = os.environ.get("ATTR_BATCH_BUILD") == "0"
        missing = missing_tools()
        if missing and not switched_off:
            self.warn(
                f"no native ops: {', '.join(missing)} not found; attr-batch will run on its "
                "reference ops (set ATTR_BATCH_BUILD=0 to say that this is meant)"
            )
        if missing or switched_off:
            self.extensions = []
        super().run()

    def build_extensions(self) -> None:
        cxx, torch_lib = find_cxx(), f"{find_torch()}/lib"
        ninja = Ninja(Path(self.build_temp).absolute() / "native")
        for extension in self.extensions:
            out = Path(self.get_ext_fullpath(extension.name))
            out.parent.mkdir(parents=True, exist_ok=True)
            sources = [Path(s) for s in extension.sources]
            if extension.name.endswith("_native_cuda"):
                flags = [*NVCC_FLAGS, *gencode(CUDA_ARCH), "-DUSE_CUDA", *torch_flags()]
                objects = ninja.objects(sources, find_nvcc(), flags)
                home = Path(find_nvcc()).resolve().parent.parent
                libraries = [f"-L{torch_lib}", "-ltorch_cuda", "-ltorch_cpu"]
                libraries += [f"-L{home}/lib64", f"-L{home}/lib", "-lcudart"]
            elif extension.name.endswith("_native_info"):
                objects = ninja.objects(sources, cxx, self._info_flags())
                libraries = []
            else:
                objects = ninja.objects(sources, cxx, [*CXX_FLAGS, *torch_flags()])
                libraries = [f"-L{torch_lib}", "-ltorch_cpu"]
            ninja.link(out, objects, cxx, [*LINK_FLAGS, *libraries])
        try:
            ninja.run()
        except subprocess.CalledProcessError as error:
            hint = "set ATTR_BATCH_BUILD=0 to install without native ops"
            raise SystemExit(f"error: the native ops do not compile\n  hint: {hint}") from error

    def _info_flags(self) -> list[str]:
        import pybind11

        facts = {
            "FLAGS": " ".join(CXX_FLAGS),
            "SOURCE_DIGEST": source_digest(),
            "CUDA_ARCH": CUDA_ARCH if cuda_buildable() else "",
        }
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        return [
            *CXX_FLAGS,
            *DEFINES,
            *(f"-DATTR_BATCH_{name}={json.dumps(value)}" for name, value in facts.items()),
            *(flag for path in includes for flag in ("-isystem", path)),
        ]


class CompileCuda(Command):
    """Compile every .cu for real GPUs, on a machine that need not have one."""

    description = "compile the CUDA sources to objects, as a check"
    user_options: ClassVar = [
        ("arch=", None, "comma-separated compute capabilities, default 80,90a")
    ]

    def initialize_options(self) -> None:
        self.arch = CUDA_ARCH

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        missing = [t for t in missing_tools() if t != "a C++ compiler"]
        if not find_nvcc():
            missing.append("nvcc")
        if missing:
            print(f"compile_cuda: skipped, {', '.join(missing)} not found")
            return
        start = time.monotonic()
        ninja = Ninja(Path("build/compile_cuda").absolute())
        flags = [*NVCC_FLAGS, *gencode(self.arch), "-DUSE_CUDA", *torch_flags()]
        ninja.objects(CUDA_SOURCES, find_nvcc(), flags)
        ninja.run()
        seconds = time.monotonic() - start
        print(f"compile_cuda: {len(CUDA_SOURCES)} files for {self.arch} in {seconds:.0f} s")


def cuda_buildable() -> bool:
    return bool(torch_cuda_version() and find_nvcc())


def extensions() -> list[Extension]:
    sources = {"_native_cpu": CPU_SOURCES}
    if cuda_buildable():
        sources["_native_cuda"] = CUDA_SOURCES
    python_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if python_headers and importlib.util.find_spec("pybind11"):
        sources["_native_info"] = [CSRC / "info.cpp"]
    everything = [str(path) for path in native_sources()]  # belongs in a source distribution
    return [
        Extension(f"attr_batch.{name}", [str(s) for s in files], depends=everything)
        for name, files in sources.items()
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "compile_cuda": CompileCuda},
)
