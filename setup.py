"""The C++ extension, and `kernels/` as `nabla_tau.kernels`; everything else is in pyproject.toml."""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

# ParallelCompile without naive_recompile: that shortcut misses edits of header files.
ParallelCompile("MAX_JOBS").install()

# On macOS PyTorch brings an OpenMP library of its own, and a second one in the process ends it; Apple's compiler has
# none. There the threads are those of C++ (csrc/parallel.h), and of OpenMP there is what needs no library.
MACOS = sys.platform == "darwin"
OPENMP = ["-fopenmp-simd", "-DNABLA_TAU_STD_THREADS"] if MACOS else ["-fopenmp"]

setup(
    packages=[*find_packages(include=["nabla_tau*"]), "nabla_tau.kernels"],
    package_dir={"nabla_tau.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "nabla_tau._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            # No -ffast-math and no -march: results do not depend on the machine that built the wheel, and
            # wider SIMD is chosen at run time (csrc/simd.h).
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", *OPENMP],
            extra_link_args=[] if MACOS else OPENMP,
        )
    ],
)
