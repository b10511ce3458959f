"""Chooses what to install for this machine; everything else about the package is in pyproject.toml.

pip install -e .          # finds CUDA, ROCm, Apple or CPU
SIMPLETUNER_PLATFORM=cpu pip install -e .
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

from setuptools import setup

PLATFORMS = ("cuda", "rocm", "apple", "cpu")

DEPENDENCIES = [
    "torch>=2.10,<2.14",
    "diffusers>=0.40,<0.43",
    "transformers>=5.10,<6",
    "peft>=0.19.1,<0.22",
    "accelerate>=1.13,<2",
    "argcomplete>=3.5,<4",
    "huggingface_hub>=1.32,<3",
    "optimum-quanto>=0.2.7,<0.3",
    "lycoris-lora>=4.1,<5",
    "torch-optimi>=0.3,<0.4",
    "safetensors>=0.6",
    "numpy",
    "av>=18,<19",
    "ftfy>=6.3,<7",
    "pillow",
    "pydantic>=2.10,<3",
    "pyyaml>=6,<7",
    "questionary>=2.1,<3",
    "tqdm",
    "wandb>=0.20,<1",
    "zstandard",
]

PYARROW = "pyarrow>=18,<28"
S3FS = "s3fs>=2025.3"
# torchao's own form of tensors in files is young: only this version was tried.
TORCHAO = "torchao>=0.18,<0.19"
BITSANDBYTES = "bitsandbytes>=0.50,<1"

# The marker names where it has wheels.
BITSANDBYTES = (
    "bitsandbytes>=0.48,<1; (platform_system == 'Linux' and (platform_machine == 'x86_64' or "
    "platform_machine == 'aarch64')) or platform_system == 'Windows'"
)

OPTIMIZERS = [BITSANDBYTES, "torchao>=0.17,<0.19", "prodigyopt>=1.1,<2"]

EXTRAS = {
    "cuda": [BITSANDBYTES],
    "rocm": [],
    "apple": [],
    "cpu": [],
    # The `-torchao` and `-bnb` precisions; the `-quanto` ones need nothing more.
    "quantisation": [TORCHAO, BITSANDBYTES],
    "tensorboard": ["tensorboard>=2.18,<3"],
    "trackio": ["trackio>=0.5,<1"],
    # Each is behind some names of `optimizer` and nothing else: 8-bit and paged state (bitsandbytes also runs on CPUs),
    # 8- and 4-bit state compiled for any device, and a learning rate that finds itself.
    "optimizers": OPTIMIZERS,
    # Parquet is what Hub datasets and large caption tables are stored in; most runs need neither.
    "parquet": [PYARROW],
    # Datasets in S3-compatible stores; brings botocore, which is larger than this tool.
    "s3": [S3FS],
    # moto is a real S3 server on loopback, for the tests of such datasets; pexpect a real terminal, pyte its screen.
    # The optimizers, because each name is run for real where the machine can.
    "dev": [
        "pytest>=8.3,<10",
        "ruff>=0.15,<0.18",
        "mypy>=1.16,<3",
        "moto[server]>=5,<6",
        "pexpect>=4.9,<5",
        "pyte>=0.8,<1",
        PYARROW,
        S3FS,
        *OPTIMIZERS,
    ],  # fmt: skip
}


def answers(command: str) -> bool:
    """Whether a vendor's tool is installed and finds a device."""
    if shutil.which(command) is None:
        return False
    try:
        return subprocess.run([command], capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find_platform() -> str:
    """One of PLATFORMS: what SIMPLETUNER_PLATFORM says, else what is found."""
    chosen = os.environ.get("SIMPLETUNER_PLATFORM", "").strip().lower()
    if chosen in PLATFORMS:
        return chosen
    if chosen:
        raise SystemExit(f"SIMPLETUNER_PLATFORM is {chosen!r}, must be one of: {', '.join(PLATFORMS)}")
    if answers("nvidia-smi"):
        return "cuda"
    if answers("rocm-smi"):
        return "rocm"
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "apple"
    return "cpu"


if __name__ == "__main__":
    found = find_platform()
    print(f"installing for: {found}")
    setup(install_requires=DEPENDENCIES + EXTRAS[found], extras_require=EXTRAS)
