"""setup.py chooses what fits the machine."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_py() -> ModuleType:
    specification = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("tools", "system", "machine", "expected"),
    [
        ({"nvidia-smi"}, "Linux", "x86_64", "cuda"),
        ({"rocm-smi"}, "Linux", "x86_64", "rocm"),
        (set(), "Darwin", "arm64", "apple"),
        (set(), "Darwin", "x86_64", "cpu"),
        (set(), "Linux", "aarch64", "cpu"),
    ],
)
def test_the_platform_is_found(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tools: set[str], system: str,
                               machine: str, expected: str) -> None:  # fmt: skip
    monkeypatch.delenv("SIMPLETUNER_PLATFORM", raising=False)
    monkeypatch.setattr(setup_py, "answers", lambda command: command in tools)
    monkeypatch.setattr(setup_py.platform, "system", lambda: system)
    monkeypatch.setattr(setup_py.platform, "machine", lambda: machine)
    assert setup_py.find_platform() == expected


def test_the_platform_can_be_chosen(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMPLETUNER_PLATFORM", "CPU")
    assert setup_py.find_platform() == "cpu"
    monkeypatch.setenv("SIMPLETUNER_PLATFORM", "tpu")
    with pytest.raises(SystemExit, match="must be one of"):
        setup_py.find_platform()


def test_bitsandbytes_is_only_for_machines_that_can_run_it(setup_py: ModuleType) -> None:
    assert "bitsandbytes" not in " ".join(setup_py.DEPENDENCIES)
    for name in ("rocm", "apple", "cpu"):
        assert setup_py.EXTRAS[name] == []
    marker = Requirement(setup_py.EXTRAS["cuda"][0]).marker
    assert marker is not None
    runs = [("Linux", "x86_64"), ("Linux", "aarch64"), ("Windows", "AMD64")]
    for system, machine in [*runs, ("Darwin", "arm64"), ("Linux", "ppc64le")]:
        environment = {"platform_system": system, "platform_machine": machine}
        assert marker.evaluate(environment) is ((system, machine) in runs)


def test_the_newest_torch_that_is_known_to_work_is_allowed_and_no_newer(setup_py: ModuleType) -> None:
    torch = next(Requirement(line) for line in setup_py.DEPENDENCIES if line.startswith("torch>"))
    assert torch.specifier.contains("2.13.0")
    assert not torch.specifier.contains("2.14.0")


@pytest.mark.parametrize("script", ["train.sh", "install.sh", "tests/run.sh", ".ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111


def test_every_file_of_the_package_that_is_not_code_is_installed() -> None:
    import tomllib

    package = ROOT / "simpletuner_dmd"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    covered = {file for pattern in patterns["package-data"]["simpletuner_dmd"] for file in package.glob(pattern)}
    other = {
        file
        for file in package.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc") and "__pycache__" not in file.parts
    }
    assert other and other <= covered, sorted(other - covered)
