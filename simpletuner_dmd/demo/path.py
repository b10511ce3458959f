"""Where the embedded tiny Wan, its prompts and its videos are. `python -m simpletuner_dmd.demo.path` prints it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

VIDEOS_PER_COMBINATION = 16
DATA_SEED = 7
HERE = Path(__file__).parent


def model_path() -> Path:
    """The tiny Wan: a diffusers pipeline folder that `WanPipeline.from_pretrained` opens."""
    return HERE / "tiny-wan"


def prompts_path() -> Path:
    """The demo's 32 captions, one per line."""
    return HERE / "prompts.txt"


def data_path() -> Path:
    """A folder of captioned mp4 files, made at the first call (a second or two) in the user's cache folder."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "simpletuner-dmd" / f"demo-videos-{DATA_SEED}-{VIDEOS_PER_COMBINATION}"
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        write_videos(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process has made it meanwhile
            if not folder.is_dir():
                raise
    return folder


def write_videos(folder: Path) -> None:
    """Writes the demo's training videos as mp4 files with a caption file beside each."""
    from simpletuner_dmd.data.video import write_mp4
    from simpletuner_dmd.demo import shapes

    folder.mkdir(parents=True, exist_ok=True)
    count = VIDEOS_PER_COMBINATION * len(shapes.TRAINING_COMBINATIONS)
    clips, combinations = shapes.draw_many(count, seed=DATA_SEED)
    for index, (clip, combination) in enumerate(zip(clips, combinations, strict=True)):
        stem = f"{index:03d}-{combination.colour}-{combination.shape}-{combination.direction}"
        write_mp4(folder / f"{stem}.mp4", clip, shapes.FRAMERATE)
        (folder / f"{stem}.txt").write_text(combination.caption + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the folder of the tiny Wan that comes with the package.")
    parser.add_argument("--data", action="store_true", help="its videos instead (made at the first use)")
    parser.add_argument("--prompts", action="store_true", help="the file of its captions instead")
    arguments = parser.parse_args()
    print(data_path() if arguments.data else prompts_path() if arguments.prompts else model_path())


if __name__ == "__main__":
    main()
