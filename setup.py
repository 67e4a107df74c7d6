"""The C++ extension, and `kernels/` as `nabla_tau.kernels`; everything else is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

# ParallelCompile without naive_recompile: that shortcut misses edits of header files.
ParallelCompile("MAX_JOBS").install()

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
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"],
            extra_link_args=["-fopenmp"],
        )
    ],
)
