"""The documents' commands are real: each is run here, or its verb and keys are read by the real command line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from simpletuner_dmd.cli.main import VERBS, main
from simpletuner_dmd.cli.wizard.given import WORDS
from simpletuner_dmd.config import TrainConfig, load
from simpletuner_dmd.config.layers import option_field

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "documentation").glob("*.md"))]
QUICK = [
    "max_train_steps=4",
    "train_batch_size=2",
    "checkpoint_step_interval=4",
    "validation_step_interval=4",
    "benchmark_num_inference_steps=2",
    "distillation_config.critic_warmup_steps=1",
    "lr_warmup_steps=0",
]


def commands(path: Path) -> list[str]:
    """The lines of the document's bash blocks, without comments, and the commands within its sentences and tables."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    verbs = "|".join(VERBS)
    lines += re.findall(rf"`((?:simpletuner (?:{verbs})|python |\./train\.sh|tests/run\.sh)[^`…]*)`", prose)
    return [line for line in lines if line and not line.startswith("#")]


EVERY = [(path, line) for path in DOCUMENTS for line in commands(path)]


@pytest.mark.parametrize(("path", "line"), EVERY, ids=[f"{path.name}: {line}" for path, line in EVERY])
def test_a_documents_command_exists(path: Path, line: str) -> None:
    program, *arguments = shlex.split(line)
    if program in ("simpletuner", ".venv/bin/simpletuner"):
        verb, *rest = arguments
        assert verb in VERBS
        if "--example" in rest:
            assert load(example=rest[rest.index("--example") + 1]).config
        for argument in rest:
            if "=" in argument and not argument.startswith("--"):
                key = argument.split("=", 1)[0]
                assert option_field(key) is not None or (verb == "configure" and key in WORDS), argument
    elif program in ("python", ".venv/bin/python"):
        target = arguments[0] if arguments[0] != "-m" else arguments[1].replace(".", "/") + ".py"
        assert (ROOT / target).is_file()
        source = (ROOT / target).read_text(encoding="utf-8")
        flags = [argument for argument in arguments if argument.startswith("--")]
        assert all(f'"{flag}"' in source for flag in flags), flags
    else:
        assert (ROOT / program).is_file(), "a command of the documents is a file of the project"
        assert (ROOT / program).stat().st_mode & 0o111, "and can be run"


def test_links_and_keys_of_the_documents_exist() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (path.parent / target).exists() or target.startswith("http"), f"{path.name}: {target}"
    quick_start = (ROOT / "documentation" / "QUICKSTART.md").read_text(encoding="utf-8")
    keys = [
        key for row in re.findall(r"^\| (`.*?) \|", quick_start, re.MULTILINE) for key in re.findall(r"`(.*?)`", row)
    ]
    assert len(keys) >= 8
    for key in keys:
        assert option_field(key) is not None, key


def test_the_quick_start_from_copying_to_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk of QUICKSTART.md on the tiny Wan that ships with the package, with few steps."""
    monkeypatch.chdir(tmp_path)
    assert main(["examples", "copy", "demo", "config/my-run"]) == 0
    config = json.loads((tmp_path / "config/my-run/config.json").read_text(encoding="utf-8"))
    assert set(config) <= set(TrainConfig.model_fields)
    assert main(["check", "--env", "my-run"]) == 0
    assert main(["train", "--env", "my-run", *QUICK]) == 0
    run = Path(load(env="my-run").config.output_dir)
    assert (run / "report" / "index.html").is_file()
    (dataset,) = json.loads((run / "data_plan.json").read_text(encoding="utf-8"))["datasets"]
    assert dataset["counts"]["usable"] > 0 and dataset["buckets"]
    assert main(["sample", str(run), "--prompt", "a yellow circle moves up", "--seed", "7"]) == 0
    assert len(list((run / "samples").rglob("*.mp4"))) == 1
    assert main(["export", str(run), "--raw"]) == 0
    assert json.loads((run / "export" / "distill.json").read_text(encoding="utf-8"))["weights"] == "raw"


def test_the_prompts_dataset_of_the_quick_start_is_read(tmp_path: Path) -> None:
    text = (ROOT / "documentation" / "QUICKSTART.md").read_text(encoding="utf-8")
    block = re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0]
    (tmp_path / "multidatabackend.json").write_text(block, encoding="utf-8")
    (tmp_path / "my-prompts.txt").write_text("a cat\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(
        json.dumps({"distillation_method": "dmd", "data_backend_config": "multidatabackend.json"}), encoding="utf-8"
    )
    loaded = load(config=str(tmp_path / "config.json"), cwd=tmp_path, environ={})
    assert loaded.datasets[0].dataset_type == "prompts"
    assert loaded.datasets[0].size == (832, 480)


def test_the_dataset_files_of_the_documents_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from simpletuner_dmd.config.datasets import read_entries

    for name in ("FILMS_KEY", "FILMS_SECRET"):
        monkeypatch.setenv(name, "x")
    text = (ROOT / "documentation" / "DATALOADER.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) if block.lstrip()[0] in "[{"]
    assert len(blocks) == 2
    for block in blocks:
        found = read_entries(json.loads(block), "DATALOADER.md")
        assert found.problems == [] and found.entries
