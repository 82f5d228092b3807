"""Every way to have the package: a wheel, an editable install, a checkout, beside PyPI's kernels.

Each case is a fresh interpreter that reads no .pth file of this environment, so that an editable
install of the package here cannot stand in for the one under test. Nothing is fetched, and nothing
is built in the repository: it is copied first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, files

pytestmark = pytest.mark.xdist_group("packaging")

# where torch is
SITE = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]

OPTIONAL = ("transformers", "triton", "datasets", "matplotlib", "trl", "accelerate")


def environment(*path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    settings = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INDEX": "1",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    return {**kept, **settings}


def run(*arguments: object, cwd: Path, path: Iterable[Path] = ()) -> str:
    """The output of this Python, which finds modules in cwd (after -c) and then in path."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment(*path), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(code: str, *, cwd: Path, path: Iterable[Path] = (), installed: Path | None = None) -> Any:
    """What ``code`` leaves in ``answer``; ``installed`` is a folder that works as site-packages."""
    start = "import json, site, sys\n"
    if installed is not None:
        start += f"site.addsitedir({str(installed)!r})\n"
    start += f"sys.path += {SITE!r}\n"
    return json.loads(
        run("-S", "-c", start + code + "\nprint(json.dumps(answer))", cwd=cwd, path=path)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return tmp_path_factory.mktemp


@pytest.fixture(scope="module")
def checkout(folder) -> Path:
    """The repository as it is now."""
    copy = folder("checkout")
    for path in files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    for name in ("kernels", "benchmarks"):
        (copy / "fusedpo" / name).symlink_to(Path("..", name))
    return copy


@pytest.fixture(scope="module")
def pypi_kernels(folder) -> Path:
    """Stands in for the package ``kernels`` of PyPI, so that the test needs no network.

    It has the two things that matter of the true one (0.17): its name, and the hook by which
    setuptools imports it while it builds any package.
    """
    site = folder("pypi")
    info = site / "kernels-0.17.2.dist-info"
    (site / "kernels").mkdir()
    info.mkdir()
    (site / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    (site / "kernels" / "locking.py").write_text(
        "from pathlib import Path\n"
        "def write_egg_lockfile(cmd, basename, filename):\n"
        "    Path(__file__).with_name('called').touch()\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    (info / "entry_points.txt").write_text(
        "[egg_info.writers]\nkernels.lock = kernels.locking:write_egg_lockfile\n"
    )
    return site


@pytest.fixture(scope="module")
def wheel(folder, checkout, pypi_kernels) -> Path:
    """Built beside the package ``kernels``."""
    out = folder("wheel")
    source = shutil.copytree(checkout, out / "source", symlinks=True)
    offline = ("--quiet", "--no-deps", "--no-build-isolation")
    run("-m", "pip", "wheel", *offline, "-w", out, source, cwd=source, path=[pypi_kernels])
    assert (pypi_kernels / "kernels" / "called").exists(), "the hook was not exercised"
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(folder, wheel) -> Path:
    site = folder("installed")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=wheel.parent)
    return site


@pytest.fixture(scope="module")
def editable(folder, checkout) -> Path:
    """The site folder of an editable install; what it points at is beside it, in ``source``."""
    base = folder("editable")
    source, site = shutil.copytree(checkout, base / "source", symlinks=True), base / "site"
    offline = ("--quiet", "--no-deps", "--no-build-isolation")
    run("-m", "pip", "install", *offline, "--target", site, "--editable", source, cwd=base)
    return site


# runs the engine once, and says where it was found
USE = """
import math, torch, fusedpo, fusedpo.kernels.logit_tile
logp = fusedpo.linear_logprobs(torch.eye(3), torch.eye(3), torch.arange(3))
assert (logp - 1 + math.log(math.e + 2)).abs().max() < 1e-6
answer = [fusedpo.__file__, fusedpo.kernels.logit_tile.__file__]
"""


@pytest.mark.holds(39)
def test_wheel_is_importable(installed, tmp_path):
    package = installed / "fusedpo"
    found = ask(USE, cwd=tmp_path, installed=installed)
    assert found == [str(package / "__init__.py"), str(package / "kernels" / "logit_tile.py")]


def in_source(source: Path) -> list[str]:
    return [str(source / "fusedpo" / "__init__.py"), str(source / "kernels" / "logit_tile.py")]


@pytest.mark.holds(39)
def test_editable_install_is_importable(editable, tmp_path):
    found = ask(USE, cwd=tmp_path, installed=editable)
    assert found == in_source(editable.parent / "source")


@pytest.mark.holds(39)
def test_checkout_is_importable(checkout):
    assert ask(USE, cwd=checkout) == in_source(checkout)


@pytest.mark.holds(39)
def test_checkout_without_links_is_importable(checkout, tmp_path):
    """Where git writes them as files of one line, as on Windows."""
    source = shutil.copytree(checkout, tmp_path / "source", symlinks=True)
    for name in ("kernels", "benchmarks"):
        (source / "fusedpo" / name).unlink()
        (source / "fusedpo" / name).write_text(f"../{name}")
    assert ask(USE, cwd=source) == in_source(source)


BOTH = """
import kernels
before = kernels.__file__
import fusedpo.kernels.logit_tile
del sys.modules["kernels"]
import kernels
answer = [before, kernels.__file__]
"""


@pytest.mark.holds(39)
@pytest.mark.parametrize("way", ["checkout", "editable", "installed"])
def test_pypi_kernels_stays_importable_from_a_checkout(way, checkout, pypi_kernels, request):
    """The repository as working directory, where a folder ``kernels`` comes first on the path."""
    installed = None if way == "checkout" else request.getfixturevalue(way)
    found = ask(BOTH, cwd=checkout, path=[pypi_kernels], installed=installed)
    assert found == [str(pypi_kernels / "kernels" / "__init__.py")] * 2


@pytest.mark.holds(39)
def test_wheel_holds_the_package_and_nothing_else(wheel, checkout):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {p.relative_to(checkout) for p in (checkout / "fusedpo").rglob("*.py")}
    for folder in ("kernels", "benchmarks"):
        package |= {Path("fusedpo", folder, p.name) for p in (checkout / folder).glob("*.py")}
    assert {Path(name) for name in names if name.endswith(".py")} == package
    assert "fusedpo/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fusedpo"}
    # tools are for the repository
    assert (checkout / "tools").is_dir() and not [name for name in names if "/tools/" in name]


BLOCK = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.holds(38)
@pytest.mark.fault(61)
@pytest.mark.parametrize(
    "names", [("triton",), ("transformers",), OPTIONAL], ids=["triton", "transformers", "all"]
)
def test_it_works_without(names, checkout):
    """And without a GPU, which ``environment`` hides."""
    assert ask(BLOCK.format(names=names) + USE, cwd=checkout) == in_source(checkout)


EAGER = f"""
import time
start = time.process_time()
import torch
before, middle = set(sys.modules), time.process_time()
import fusedpo
answer = {{
    "eager": sorted((set(sys.modules) - before) & set({OPTIONAL!r})),
    "share": (time.process_time() - middle) / (middle - start),
}}
"""


@pytest.fixture(scope="module")
def imports(checkout) -> list[dict[str, Any]]:
    return [ask(EAGER, cwd=checkout) for _ in range(3)]


@pytest.mark.holds(38)
def test_optional_packages_are_not_imported_eagerly(imports):
    assert imports[0]["eager"] == []


def test_import_adds_at_most_a_quarter_to_that_of_torch(imports):
    """That of transformers, by mistake, would more than double it, on a slow machine too."""
    assert min(one["share"] for one in imports) <= 0.25
