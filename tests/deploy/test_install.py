"""deploy/install.sh in a root that imitates a Xavier NX; no network, no root."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Dict, List

import pytest

from deploy.board import LATENTD, PIP, PLAIN_TORCH, ROOT, Board, python38

# As numpy 1.21 to 1.25 have it: only the metadata beside tell the version.
NUMPY = """from __future__ import annotations

from ._version import get_versions

__ALL__ = ['version', '__version__', 'full_version', 'git_revision', 'release']

vinfo: dict[str, str] = get_versions()
version = vinfo["version"]
__version__ = vinfo.get("closest-tag", vinfo["version"])
full_version = vinfo['version']
"""


def test_it_says_what_the_board_is_and_what_it_did(board: Board) -> None:
    said = board.install()
    for line in (
        "  board: NVIDIA Jetson Xavier NX Developer Kit",
        "  L4T 35.6.5 (JetPack 5)",
        "  torch 2.1.0a0+41361538.nv23.06 with CUDA 11.4, which stays as it is",
        "  TensorRT 8.5.2.2",
        "  memory: 6832 MiB",
        "  installed latentd 1.2.3",
        "  did install",
    ):
        assert line in said.splitlines(), said
    assert "include-system-site-packages = true" in (board.venv / "pyvenv.cfg").read_text()
    assert board.noted("latentd")[-1] == f"service install --exec /opt/latentd/bin/latentd --root={board.root}"


def test_pip_is_bound_to_nvidias_torch_and_never_asked_for_one(board: Board) -> None:
    board.install()
    pins = board.noted("pins")
    assert "torch===2.1.0a0+41361538.nv23.06" in pins
    assert [line for line in pins if line.startswith("torch=")] == ["torch===2.1.0a0+41361538.nv23.06"]
    asked = board.noted("pip")
    assert all("--constraint" in line for line in asked)
    assert not any("torch" in line for line in asked)


def test_a_numpy_that_is_new_enough_stays_and_an_old_one_gets_a_pinned_one_beside_it(board: Board) -> None:
    said = board.install()
    assert "numpy 1.17.4 of the machine is too old" in said
    assert next(line for line in board.noted("pins") if line.startswith("numpy=")).startswith("numpy==")
    metadata = {"numpy-1.23.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: numpy\nVersion: 1.23.5\n"}
    board.plant(board.site, {"numpy/version.py": NUMPY, **metadata})
    assert "numpy 1.23.5 of the machine stays" in board.install()
    assert "numpy===1.23.5" in board.noted("pins")


def test_an_onnxruntime_of_the_machine_is_not_installed_again(board: Board) -> None:
    board.install()
    assert board.noted("pip")[-1].endswith("[onnxruntime]")
    board.plant(board.site, {"onnxruntime/__init__.py": '__version__ = "1.16.0"\n'})
    board.install()
    assert not board.noted("pip")[-1].endswith("[onnxruntime]")


def test_a_second_run_is_an_upgrade_in_the_same_environment(board: Board) -> None:
    board.install()
    (board.venv / "mark").touch()
    (board.root / "etc/latentd").mkdir()
    (board.root / "etc/latentd/config.toml").write_text("mine")
    said = board.install()
    assert "the environment /opt/latentd is there" in said
    assert (board.venv / "mark").exists()
    assert (board.root / "etc/latentd/config.toml").read_text() == "mine"


def test_an_environment_of_another_python_is_made_anew(board: Board) -> None:
    board.install()
    board.tool("python", f'#!/bin/sh\ncase "$*" in *base_prefix*) echo elsewhere ;; *) exec {python38()} "$@" ;; esac\n')
    assert "made anew" in board.install(PYTHON=str(board.tools / "python"))
    (board.venv / "bin/python").unlink()
    (board.venv / "bin/python").symlink_to("/no/such/python3.8")
    assert "made anew" in board.install()


@pytest.mark.parametrize("is_upgrade", [False, True])
def test_an_environment_that_a_power_cut_emptied_is_made_anew(board: Board, is_upgrade: bool) -> None:
    """The power goes while pip works, or after it, before all is on the disk."""
    if is_upgrade:
        board.install()
        board.tool("cut", "#!/bin/sh\nkill -KILL $PPID\n")
        board.install(code=-9, LATENTD_PIP=str(board.tools / "cut"))
    else:
        board.tool("sync", "#!/bin/sh\nkill -KILL $PPID\n")
        board.install(code=-9)
        (board.tools / "sync").unlink()
    (site,) = board.venv.glob("lib/python*/site-packages")
    (site / "onnx.py").write_bytes(b"")
    assert "made anew" in board.install()
    assert "the environment /opt/latentd is there" in board.install()


def test_an_upgrade_for_which_pip_finds_no_network_leaves_the_environment_as_it_was(board: Board) -> None:
    board.install()
    board.install(code=1, LATENTD_PIP="false")
    assert "the environment /opt/latentd is there" in board.install()


def test_an_environment_of_the_version_before_which_left_no_mark_survives_a_pip_that_finds_no_network(board: Board) -> None:
    board.install()
    assert {path.name for path in board.venv.iterdir() if path.is_file()} <= {"pyvenv.cfg", ".gitignore"}, "as that version made it"
    said = board.install(code=1, LATENTD_PIP="false")
    assert "the environment /opt/latentd is there" in said
    assert subprocess.run([str(board.venv / "bin/latentd"), "--version"], env={"NOTES": str(board.notes)}).returncode == 0


@pytest.mark.parametrize("lost", ["lib/python*/site-packages/onnx.py", "bin/latentd"])
def test_an_environment_without_a_mark_that_does_not_work_is_made_anew(board: Board, lost: str) -> None:
    board.install()
    (path,) = board.venv.glob(lost)
    path.unlink()
    assert "made anew" in board.install()


def test_what_lies_in_the_folder_of_the_caller_is_not_imported(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board.plant(tmp_path / "here", {f"{name}.py": "raise SystemExit('not this one')\n" for name in ("torch", "onnx", "latentd", "venv")})
    monkeypatch.chdir(tmp_path / "here")
    board.install()
    (tmp_path / "here/python").symlink_to(python38())
    assert "did install" in board.install("--root", "../root", PYTHON="./python")
    assert board.noted("latentd")[-1].endswith(f" --root={board.root}")


@pytest.mark.parametrize("start", ["", "#!/no/such/python\n"])
def test_a_latentd_that_does_not_run_is_not_installed(board: Board, start: str) -> None:
    board.tool("latentd", start)
    assert "/opt/latentd/bin/latentd does not run" in board.install(code=1)


def test_the_checkout_is_left_as_it_was(board: Board) -> None:
    before = {path: path.stat().st_mtime_ns for path in ROOT.iterdir()}
    board.install()
    assert {path: path.stat().st_mtime_ns for path in ROOT.iterdir()} == before


def test_check_changes_nothing(board: Board) -> None:
    said = board.install("--check")
    assert "Installing" not in said
    assert not board.venv.exists()
    assert board.noted("pip") == []


def test_a_torch_that_pip_put_there_is_refused(board: Board) -> None:
    board.plant(board.site, {"torch/version.py": PLAIN_TORCH})
    said = board.install(code=1)
    assert "torch 2.4.1 has no CUDA" in said
    assert "pip3 uninstall torch" in said
    assert not board.venv.exists()
    assert "note: torch 2.4.1 has no CUDA" in board.install("--force")


NO_BLAS = "raise OSError('libopenblas.so.0: cannot open shared object file: No such file or directory')\n"


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_a_torch_that_can_not_be_imported_is_refused_with_the_packages_that_it_needs(board: Board, options: List[str]) -> None:
    board.plant(board.site, {"torch/__init__.py": NO_BLAS})
    said = board.install(*options, code=1)
    assert "torch 2.1.0a0+41361538.nv23.06 can't be imported: OSError: libopenblas.so.0" in said
    assert "apt-get install libopenblas-base libopenmpi-dev libomp-dev" in said
    assert not board.venv.exists()


def test_torch_is_imported_with_what_the_unit_sets_on_a_jetson(board: Board) -> None:
    board.plant(board.site, {"torch/__init__.py": "import os\nassert os.environ['OPENBLAS_CORETYPE'] == 'ARMV8'\n"})
    board.install()
    board.plant(board.root, {"proc/device-tree/compatible": "raspberrypi,4-model-b\0"})
    assert "can't be imported: KeyError: 'OPENBLAS_CORETYPE'" in board.install("--force", code=1)


def test_an_installation_that_can_not_be_imported_is_none(board: Board) -> None:
    board.tool("pip", PIP.replace(" touch ", " echo "))
    said = board.install(code=1)
    assert "what was installed can't be imported: ModuleNotFoundError" in said
    assert board.noted("latentd") == [], "no service is installed"


def test_a_pip_that_brings_a_torch_of_its_own_all_the_same_is_found(board: Board) -> None:
    board.tool("pip", PIP + '\nfor lib in "$BIN"/../lib/python*; do mkdir -p "$lib/site-packages/torch"; done\n')
    assert "in front of NVIDIA's" in board.install(code=1)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"proc/device-tree/compatible": "raspberrypi,4-model-b\0"}, "this is no Jetson"),
        ({"etc/nv_tegra_release": "# R36 (release), REVISION: 4.0, GCID: 1\n"}, "L4T 36.4.0 is not JetPack 5"),
        ({"etc/nv_tegra_release": "?"}, "does not tell the release"),
        ({"etc/group": "root:x:0:\n"}, "there is no group video"),
    ],
)
def test_another_machine_is_refused_with_a_reason(board: Board, files: Dict[str, str], said: str) -> None:
    board.plant(board.root, files)
    assert said in board.install(code=1)
    assert not board.venv.exists()


def needs_a_python_without_torch() -> None:
    if subprocess.run([python38(), "-s", "-c", "import torch"], stderr=subprocess.DEVNULL).returncode == 0:
        pytest.skip(f"{python38()} has a torch of its own")


def test_without_torch_or_python_it_says_what_to_install(board: Board) -> None:
    needs_a_python_without_torch()
    assert "there is no python9" in board.install(code=1, PYTHON="python9")
    shutil.rmtree(str(board.site / "torch"))
    assert "Install NVIDIA's wheel" in board.install(code=1)


def test_a_torch_in_the_home_of_root_is_none_for_the_service_does_not_see_it(board: Board) -> None:
    needs_a_python_without_torch()
    command = [python38(), "-c", "import site; print(site.getusersitepackages())"]
    site = subprocess.run(command, env={"HOME": str(board.root)}, stdout=subprocess.PIPE, check=True).stdout.decode().strip()
    Path(site).mkdir(parents=True)
    shutil.move(str(board.site / "torch"), str(Path(site, "torch")))
    assert "for all users first" in board.install("--check", code=1)


def test_a_full_disk_is_found_before_anything_is_made(board: Board) -> None:
    board.tool("df", "#!/bin/sh\necho Filesystem\necho /dev/mmcblk0p1 14000000 13900000 100000 99% /\n")
    said = board.install(code=1)
    assert "has 97 MiB free; 1500 are needed" in said
    assert not board.venv.exists()


def test_little_memory_and_no_swap_are_notes(board: Board) -> None:
    board.plant(board.root, {"proc/meminfo": "MemTotal: 2000000 kB\nSwapTotal: 0 kB\n"})
    said = board.install("--check")
    assert "note: memory: 1953 MiB" in said
    assert "note: no swap" in said


def test_a_folder_that_is_no_environment_is_left_alone(board: Board) -> None:
    board.plant(board.root, {"opt/latentd/precious": "mine"})
    assert "is no environment" in board.install(code=1)
    board.install("--uninstall")
    assert (board.venv / "precious").exists()


def test_a_service_that_can_not_be_installed_ends_it_with_its_words(board: Board) -> None:
    board.tool("latentd", LATENTD.replace('echo did "$2"', "echo no systemd here; exit 1"))
    assert "no systemd here" in board.install(code=1)


def test_options_are_explained_and_unknown_ones_refused(board: Board) -> None:
    assert "--purge-state" in board.install("--help")
    assert "--frobnicate is no option" in board.install("--frobnicate", code=1)


@pytest.mark.parametrize("name", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("deploy/**/*.sh")))
def test_a_plain_shell_can_read_every_script(name: str) -> None:
    for shell in filter(shutil.which, ("sh", "dash")):
        subprocess.run([shell, "-n", name], cwd=ROOT, check=True)


def test_the_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck not found: apt-get install shellcheck")
    subprocess.run(["shellcheck", *map(str, ROOT.glob("deploy/**/*.sh"))], check=True)
