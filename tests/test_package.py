"""The package as users get it: sdist, wheel, a clean environment; editable; the folder `kernels` never by itself."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = (
    "import torch, nabla_tau, nabla_tau.kernels.reference as r; from nabla_tau import _C; "
    "from nabla_tau.suites.data import fashion_mnist; x, y = fashion_mnist(); assert x.shape == (10000, 1, 28, 28); "
    "print(nabla_tau.__file__, r.__file__, _C.__file__)"
)


def run(*command: object, cwd: Path) -> str:
    # PYTHONPATH would put other sources before what was installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    options = ("--no-deps", "--no-build-isolation", "-w", sdist.parent)
    run(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=sdist.parent)
    return next(sdist.parent.glob("*.whl"))


def clean_environment(folder: Path) -> Path:
    """The python of a new environment that sees the packages of this one, but not its nabla_tau."""
    venv, dependencies = folder / "venv", folder / "dependencies"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=folder)
    dependencies.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "nabla_tau" not in path.name:
            (dependencies / path.name).symlink_to(path)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return venv / "bin" / "python"


def sources(folder: str, *suffixes: str) -> set[str]:
    found = (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found}


def test_every_text_is_of_the_same_release():
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == version
    assert f"This is {version}:" in (ROOT / "docs" / "versions.md").read_text()


def test_the_sdist_holds_what_a_build_needs_and_no_build(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "nabla_tau/data/fashion_mnist/LICENSE", "nabla_tau/py.typed"}
    wanted |= sources("csrc", ".cpp", ".h") | sources("kernels", ".py") | sources("nabla_tau/schemas", ".json")
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o")) or "__pycache__" in name]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    (library,) = (name for name in names if name.endswith((".so", ".pyd", ".dylib")))
    assert library == f"nabla_tau/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    code = sources("nabla_tau", ".py", ".pyi", ".html", ".css", ".json", ".gz")
    code |= {f"nabla_tau/{name}" for name in sources("kernels", ".py")} | {"nabla_tau/py.typed"}
    of_package = {name for name in names if name.startswith("nabla_tau/") and not name.endswith("LICENSE")}
    assert of_package == code | {library}
    licences = [name for name in names if name.endswith("LICENSE") and ".dist-info/" in name]
    assert len(licences) == 2, "of the project and of the embedded images"
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"nabla_tau"}
    assert "nabla-tau = nabla_tau.__main__:main" in entry_points


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(wheel, tmp_path):
    python = clean_environment(tmp_path)
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=tmp_path)
    installed = run(python, "-c", USE, cwd=tmp_path).split()
    assert [str(tmp_path / "venv") in path for path in installed] == [True] * 3
    (tmp_path / "wheel_smoke.py").write_bytes((ROOT / "tests" / "wheel_smoke.py").read_bytes())
    assert "forget loss" in run(python, "wheel_smoke.py", cwd=tmp_path)
    command = python.with_name("nabla-tau")
    assert "exit codes" in run(command, "--help", cwd=tmp_path)
    assert "--fraction" in run(command, "demo", "--help", cwd=tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ldd is of Linux")
def test_the_extension_does_not_hang_on_a_version_of_torch():
    from nabla_tau import _C

    linked = run("ldd", _C.__file__, cwd=ROOT)
    assert "libstdc++" in linked
    assert not [line for line in linked.splitlines() if "torch" in line.split("=>")[0] or "libc10" in line]


@pytest.mark.skipif(importlib.util.find_spec("cibuildwheel") is None, reason="cibuildwheel is not installed")
@pytest.mark.parametrize(
    ("system", "kinds"), [("linux", ["manylinux_x86_64", "manylinux_aarch64"]), ("macos", ["macosx_arm64"])]
)
def test_the_wheels_that_a_release_would_build(system, kinds):
    command = [sys.executable, "-m", "cibuildwheel", "--platform", system, "--print-build-identifiers", str(ROOT)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(found) == sorted(f"cp3{minor}-{kind}" for minor in (10, 11, 12, 13) for kind in kinds)


@pytest.mark.slow
def test_editable_install(sdist, tmp_path):
    run("tar", "xf", sdist, cwd=tmp_path)
    source = next(path for path in tmp_path.iterdir() if path.is_dir())
    python = clean_environment(tmp_path)
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-build-isolation", "--ignore-installed", "-e", source, cwd=tmp_path)
    out = run(python, "-c", USE, cwd=tmp_path)
    assert [str(source) in path for path in out.split()] == [True] * 3


def test_kernels_folder_refuses_to_be_imported_by_itself():
    process = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode != 0
    assert "nabla_tau.kernels" in process.stderr
