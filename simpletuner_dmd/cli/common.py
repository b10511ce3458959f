"""The arguments that choose a configuration, shared by the verbs that need one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner_dmd.config import LoadedConfig

RESOLVED = "config.resolved.json"  # in the output folder of a run: every option as it was
STOPPED = 3  # exit code where `health_on_red` stopped a run
INTERRUPTED = 130  # exit code after Ctrl-C, as in a shell
LAUNCHED = "SIMPLETUNER_LAUNCHED"  # set in the processes that `num_processes` starts

OVERRIDES_HELP = """\
any option of config.json can be given as well, and wins over the file:
  --learning_rate 1e-5    --learning_rate=1e-5    learning_rate=1e-5    --use_ema
  distillation_config.fake_score_lr=4e-7"""


def module_of(verb: str) -> str:
    """The module that is a verb: "extract-lora" is cli/extract_lora.py."""
    return f"simpletuner_dmd.cli.{verb.replace('-', '_')}"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config, --env, --example; every other argument becomes an override of an option."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", metavar="PATH", help="a config.json, or the folder it is in")
    which.add_argument("--env", metavar="NAME", help="the same as --config config/NAME/config.json")
    which.add_argument("--example", metavar="NAME", help="an example that comes with the package")
    # train.sh asks for it: two commands from a fresh machine to a result
    parser.add_argument("--demo-if-none", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(overrides=[])
    parser.epilog = f"{OVERRIDES_HELP}\n\n{parser.epilog or ''}".rstrip()
    parser.usage = f"{parser.prog} [--config PATH | --env NAME | --example NAME] [options] [KEY=VALUE ...]"


def load_config(args: argparse.Namespace) -> LoadedConfig:
    """The configuration that the arguments choose. Raises UserError with every mistake in it."""
    from simpletuner_dmd.config import load

    loaded = load(
        args.overrides,
        config=args.config,
        env=args.env,
        example=args.example,
        demo_if_none=args.demo_if_none,
    )
    return with_demo_paths(loaded)


def with_demo_paths(loaded: LoadedConfig) -> LoadedConfig:
    """Replaces the word "demo" by the folders of the embedded model and data."""
    from simpletuner_dmd.config import DEMO
    from simpletuner_dmd.demo import path as demo_path

    config = loaded.config
    if config.pretrained_model_name_or_path == DEMO:
        config.pretrained_model_name_or_path = str(demo_path.model_path())
    for entry in loaded.datasets:
        if entry.instance_data_dir == DEMO:
            videos = entry.dataset_type == "video"
            entry.instance_data_dir = str(demo_path.data_path() if videos else demo_path.prompts_path())
    return loaded


def arguments_again(verb: str, args: argparse.Namespace, flags: Sequence[str] = ()) -> list[str]:
    """The command line that says the same to another process; flags: the verb's own switches and their values."""
    chosen: list[str] = []
    for name in ("config", "env", "example"):
        if getattr(args, name):
            chosen += [f"--{name}", getattr(args, name)]
    return [verb, *chosen, *(["--demo-if-none"] if args.demo_if_none else []), *flags, *args.overrides]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what names a run and one of its checkpoints."""
    parser.add_argument("run", metavar="RUN", help="the output folder of a run, for example output/demo")
    parser.add_argument(
        "--checkpoint", default="latest", metavar="NAME", help="latest (default), best, or a checkpoint"
    )
    parser.add_argument("--raw", action="store_true", help="the trained weights even where there is an average (EMA)")


def quiet_libraries() -> None:
    """Keeps out of this tool's own output: the bars that diffusers and transformers draw while loading, torchao's list
    of kernels for other machines, and a line of bitsandbytes per int8 layer and forward."""
    import logging

    for name in ("torchao", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
