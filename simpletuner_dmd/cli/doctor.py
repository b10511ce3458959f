"""`simpletuner doctor`: what this machine can do for a run, one line each, before anything is configured."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

OK, NOTE, BAD = "ok", "note", "bad"
MARKS = {OK: "ok  ", NOTE: "note", BAD: "BAD "}
LIBRARIES = ("diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "optimum-quanto", "lycoris-lora")
KERNELS = {"flash_attn": "flash-attn-2", "flash_attn_interface": "flash-attn-3", "sageattention": "sageattention"}
LITTLE_DISK = 30e9  # the weights of the 1.3B with its text encoder are 29 GB on the Hub
ROUNDING = 0.02  # relative error that an int8 product may have


@dataclass(frozen=True)
class Finding:
    """One line. state: "ok"; "note", which limits what can be done; "bad", with which no run can work."""

    name: str
    state: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{MARKS[self.state]}  {self.name + ':':<13} {self.text}"
        return f"{line}\n                    {self.fix}" if self.fix else line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--offline", action="store_true", help="ask the Hub nothing")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if a run can work here, 2 if something stands in the way of every run."""
    findings = []
    for finding in examine(offline=args.offline):
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    ok = all(finding.state != BAD for finding in findings)
    if args.json:
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=2))
    return 0 if ok else 2


def examine(*, offline: bool = False) -> Iterator[Finding]:
    """Every check in turn, each as soon as it is known."""
    yield python()
    yield libraries()
    try:
        import torch  # noqa: F401  the rest computes with it
    except ImportError as error:
        yield Finding("torch", BAD, f"cannot be imported: {error}", "install it: pip install -e . in this folder")
        return
    checks: list[Callable[[], Finding]] = [device, matrices, quantised, attention, memory, disk, video]
    for check in checks:
        yield check()
    yield Finding("hub", NOTE, "not asked (--offline)") if offline else hub()


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", BAD, f"{version}, must be 3.11 to 3.13", "make the environment with one of these")
    place = f"environment {sys.prefix}" if sys.prefix != sys.base_prefix else "no virtual environment"
    return Finding("python", OK, f"{version}, {place}")


def libraries() -> Finding:
    found, absent = [], []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    if absent:
        return Finding("libraries", BAD, f"not installed: {', '.join(absent)}", "pip install -e . in this folder")
    return Finding("libraries", OK, ", ".join(found))


def device() -> Finding:
    """What computes, and with which build of PyTorch."""
    import torch

    if torch.cuda.is_available():
        cards = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            cards.append(f"{torch.cuda.get_device_name(number)} with {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return Finding("device", OK, f"{'; '.join(cards)}; torch {torch.__version__}, {kind}")
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    text = f"CPU only ({threads}); torch {torch.__version__}"
    if shutil.which("nvidia-smi"):
        return Finding("device", NOTE, f"{text}; there is an NVIDIA driver that this build does not use",
                       "install with SIMPLETUNER_PLATFORM=cuda, and look at `nvidia-smi`")  # fmt: skip
    return Finding("device", NOTE, f"{text}: enough for the demo, not for a real Wan")


def matrices() -> Finding:
    """A product in bf16, the format of a real run."""
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator).to(where) for _ in range(2))
    exact = left @ right
    found = (left.bfloat16() @ right.bfloat16()).float()
    error = float((found - exact).norm() / exact.norm())
    if error > ROUNDING:
        return Finding("bf16", BAD, f"a matrix product is {100 * error:.0f} % off", "use mixed_precision no, or update")
    if where == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("bf16", NOTE, "emulated by this card, slow", "mixed_precision fp16 (LoRA only)")
    return Finding("bf16", OK, "matrix products are right")


def quantised() -> Finding:
    """int8 by optimum-quanto: a layer quantised and run."""
    import torch
    from optimum.quanto import freeze, qint8, quantize

    where = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).to(where).requires_grad_(False)
        value = torch.randn(8, 64).to(where)
    exact = layers(value)
    quantize(layers, weights=qint8)
    freeze(layers)
    error = float((layers(value).detach() - exact).norm() / exact.norm())
    if error > ROUNDING:
        return Finding("int8", BAD, f"int8-quanto is {100 * error:.0f} % off", "use base_model_precision no_change")
    return Finding("int8", OK, f"int8-quanto runs, {100 * error:.1f} % off")


def attention() -> Finding:
    """PyTorch's own attention is always there; the others are libraries."""
    found = [name for module, name in KERNELS.items() if importlib.util.find_spec(module)]
    others = f"; attention_mechanism {', '.join(found)} installed" if found else ""
    return Finding("attention", OK, f"PyTorch's own{others}")


def memory() -> Finding:
    import psutil

    seen = psutil.virtual_memory()
    return Finding("memory", OK, f"{seen.available / 1e9:.0f} of {seen.total / 1e9:.0f} GB of host memory free")


def disk() -> Finding:
    """Where results and downloaded models go."""
    from huggingface_hub.constants import HF_HUB_CACHE

    lines, little = [], False
    for what, folder in {"here": Path.cwd(), "Hub cache": Path(HF_HUB_CACHE)}.items():
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(above).free
        lines.append(f"{what} {free / 1e9:.0f} GB free ({folder})")
        little |= free < LITTLE_DISK
    fix = "the 1.3B alone is 29 GB on the Hub; HF_HOME names another folder for models" if little else ""
    return Finding("disk", NOTE if little else OK, ", ".join(lines), fix)


def video() -> Finding:
    """A clip written as mp4 and read again, by the library that training uses: no ffmpeg program is needed."""
    import numpy as np

    from simpletuner_dmd.data.video import read_clip, write_mp4

    frames = np.zeros((5, 32, 32, 3), np.uint8)
    frames[:, 8:24, 8:24] = 255
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames, 16)
        again = read_clip(path, num_frames=len(frames), framerate=16)
    if again.shape != frames.shape or abs(float(again.mean()) - float(frames.mean())) > 8:
        return Finding("video", BAD, "a clip does not come back as it was written", "reinstall av (PyAV)")
    import av

    return Finding("video", OK, f"mp4 written and read by PyAV {av.__version__}")


def hub() -> Finding:
    """The token, and whether it may write. Never worse than a note: training needs no Hub once the models are there."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    place = "" if constants.ENDPOINT == "https://huggingface.co" else f" at {constants.ENDPOINT}"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", NOTE, "switched off (HF_HUB_OFFLINE)")
    token = get_token()
    if not token:
        return Finding("hub", NOTE, f"no token{place}: nothing can be uploaded", "hf auth login")
    try:
        who = HfApi().whoami(token)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        refused = "refuses the token" if status in (401, 403) else f"answers {status}"
        return Finding("hub", NOTE, f"the Hub{place} {refused}", "hf auth login")
    except Exception as error:  # noqa: BLE001  an optional service; which HTTP library the Hub's client uses is its own
        return Finding("hub", NOTE, f"cannot be reached{place} ({type(error).__name__})",
                       "models must be in the local cache; HF_ENDPOINT names a mirror")  # fmt: skip
    role = who.get("auth", {}).get("accessToken", {}).get("role", "unknown")
    if role == "read":
        return Finding("hub", NOTE, f"{who['name']}{place}, but the token may only read", "make one that may write")
    return Finding("hub", OK, f"{who['name']}{place}, the token may {'write' if role == 'write' else f'do: {role}'}")
