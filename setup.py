"""Build of the native extension; metadata lives in pyproject.toml.

ACGKD_FAST_BUILD chooses what is built:

    auto   C++ kernels; CUDA kernels too where nvcc is found and torch has CUDA (or FORCE_CUDA=1)
    cpu    C++ kernels only
    cuda   both; fails where nvcc is missing
    none   nothing: the package runs on plain torch

MAX_JOBS, TORCH_CUDA_ARCH_LIST, FORCE_CUDA, DEBUG and CUDA_HOME are honoured.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
# 2.10 is the oldest torch whose stable interface has what the kernels call.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Without a GPU to ask: what torch's own CUDA 12.8 and 13 wheels serve, as far as nvcc knows them.
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")

DEBUG = os.environ.get("DEBUG", "0") == "1"
FLAGS = {
    "cxx": [
        *(["-O0", "-g"] if DEBUG else ["-O3", "-g0"]),
        "-fvisibility=hidden",
        # What vector code needs of -ffast-math; infinities and NaN keep their meaning.
        *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
        *("-Wall", "-Wno-psabi"),
        STABLE_ABI,
    ],
    "nvcc": [*(["-O0", "-G"] if DEBUG else ["-O3", "-lineinfo"]), "-Xcompiler", "-fvisibility=hidden", STABLE_ABI],
}


def stop(message: str) -> SystemExit:
    return SystemExit(f"acgkd-fast: error: {message}")


@dataclass(frozen=True)
class Plan:
    """What to build: "none", "cpu" or "cpu+cuda", why, and with which CUDA toolkit."""

    kernels: str
    reason: str
    cuda_home: Path | None = None


def find_cuda_home() -> Path | None:
    """The toolkit that CUDA_HOME or CUDA_PATH names; else that of the nvcc on PATH; else the usual place."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    # nvcc on PATH may be a wrapper script, hence the look at the headers.
    homes = [Path(named)] if named else [Path(nvcc).resolve().parents[1]] if nvcc else []
    if not named:
        homes.append(Path("/usr/local/cuda"))
    return next((h for h in homes if (h / "bin/nvcc").exists() and (h / "include/cuda_runtime.h").exists()), None)


def nvcc_says(home: Path, option: str) -> str:
    return subprocess.run([home / "bin/nvcc", option], capture_output=True, text=True, check=True).stdout


def cuda_version(home: Path) -> str:
    found = re.search(r"release (\d+\.\d+)", nvcc_says(home, "--version"))
    return found.group(1) if found else "unknown"


def why_no_cuda(home: Path | None, forced: bool) -> str | None:
    """Why CUDA kernels cannot be built, or None if they can."""
    import torch

    if home is None:
        return "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)"
    if not list(ROOT.glob("csrc/cuda/*.cu")):
        return "there are no CUDA sources"
    if torch.version.cuda is None:
        return None if forced else f"torch {torch.__version__} has no CUDA"
    version = cuda_version(home)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {version}, torch {torch.__version__} of CUDA {torch.version.cuda}"
    return None


def make_plan() -> Plan:
    choice = os.environ.get("ACGKD_FAST_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda", "none"):
        raise stop(f"ACGKD_FAST_BUILD: expected auto, cpu, cuda or none, got {choice!r}")
    if choice == "none":
        return Plan("none", "ACGKD_FAST_BUILD=none")
    if choice == "cpu":
        return Plan("cpu", "ACGKD_FAST_BUILD=cpu")
    forced = choice == "cuda" or os.environ.get("FORCE_CUDA", "0") == "1"
    home = find_cuda_home()
    obstacle = why_no_cuda(home, forced)
    if obstacle is None:
        asked = "ACGKD_FAST_BUILD=cuda" if choice == "cuda" else "FORCE_CUDA=1"
        return Plan("cpu+cuda", asked if forced else "nvcc and a torch with CUDA were found", home)
    if forced:
        raise stop(f"CUDA kernels were asked for, but {obstacle}")
    return Plan("cpu", f"no CUDA kernels: {obstacle}")


def extension(name: str, folder: str, suffix: str) -> Extension:
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"csrc/{folder}/*{suffix}"))
    headers = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h"))
    return Extension(f"acgkd_fast.{name}", sources, depends=headers, py_limited_api=True)


def arch_list(home: Path) -> str:
    """TORCH_CUDA_ARCH_LIST if set, else empty where a GPU can be asked, else the default ones."""
    import torch

    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if given or torch.cuda.is_available():
        return given
    known = nvcc_says(home, "--list-gpu-arch").split()
    archs = [arch for arch in DEFAULT_ARCHS if f"compute_{arch.replace('.', '')}" in known]
    return ";".join(archs) + "+PTX"


def record(folder: Path, plan: Plan, **details: Any) -> None:
    """What `acgkd_fast.build_info()` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    info = {"kernels": plan.kernels, "reason": plan.reason, **details}
    (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


class BuildWithoutTorch(build_ext):
    """Lets metadata through, and stops a real build with the cure."""

    def run(self) -> None:
        raise stop(
            "torch cannot be imported in the build environment: install torch, then use "
            "`pip install --no-build-isolation`, or set ACGKD_FAST_BUILD=none for plain torch operators"
        )


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        if os.environ.get("ACGKD_FAST_BUILD") == "none":
            record(ROOT / "acgkd_fast" if self.editable_mode else Path(self.build_lib, "acgkd_fast"), make_plan())


def native_build() -> type[build_ext]:
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return BuildWithoutTorch

    class BuildNative(cpp_extension.BuildExtension):
        """Settles the plan only when something is really built, so that metadata never fails."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.plan: Plan | None = None

        def run(self) -> None:
            self.plan = make_plan()
            if self.plan.kernels == "cpu":
                self.extensions = [e for e in self.extensions if not e.name.endswith("_cuda")]
            print(f"acgkd-fast: building {self.plan.kernels} kernels ({self.plan.reason})", file=sys.stderr)
            super().run()

        def build_extensions(self) -> None:
            assert self.plan is not None
            details: dict[str, Any] = {"torch": str(torch.__version__), "cuda": None, "arch_list": None}
            home = self.plan.cuda_home
            if home is not None:
                archs = arch_list(home)
                if archs:
                    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
                # torch looks for a toolkit only if it has CUDA itself.
                cpp_extension.CUDA_HOME = str(home)
                details.update(cuda=cuda_version(home), arch_list=archs or "of the visible GPU")
            for ext in self.extensions:
                device = "cuda" if ext.name.endswith("_cuda") else "cpu"
                ext.include_dirs = [str(ROOT / "csrc"), *cpp_extension.include_paths(device)]
                ext.library_dirs = cpp_extension.library_paths(device)
                ext.libraries = ["c10", "torch", "torch_cpu"]
                ext.extra_compile_args = {language: list(flags) for language, flags in FLAGS.items()}
                if device == "cuda":
                    # Static, so that the library loads beside any torch, also where no CUDA runtime is installed.
                    ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
            super().build_extensions()
            said = subprocess.run([self.compiler.compiler_cxx[0], "--version"], capture_output=True, text=True).stdout
            built = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
            record(
                ROOT / "acgkd_fast" if self.editable_mode else built, self.plan, **details, compiler=said.split("\n")[0]
            )

    return BuildNative


def main() -> None:
    if os.environ.get("ACGKD_FAST_BUILD") == "none":
        native: dict[str, Any] = {"cmdclass": {"build_py": BuildPython}}
    else:
        extensions = [extension("_C", "cpu", ".cpp")]
        if list(ROOT.glob("csrc/cuda/*.cu")):
            extensions.append(extension("_C_cuda", "cuda", ".cu"))
        native = {
            "cmdclass": {"build_ext": native_build()},
            "ext_modules": extensions,
            "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
        }
    setup(
        packages=[*find_packages(include=["acgkd_fast", "acgkd_fast.*"]), "acgkd_fast.kernels"],
        package_dir={"acgkd_fast.kernels": "kernels"},
        **native,
    )


main()
