"""Puts the videos of a run side by side as one PNG, for the README.

    python benchmarks/picture.py --run output/demo --out documentation/images/demo.png

Columns: teacher, undistilled model and student; each shows the first, middle and last frame. Rows: the prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = (("teacher", "teacher"), ("undistilled", "undistilled"), ("student", "student"))
SCALE, GAP, HEAD, LEFT = 2, 10, 34, 190


def read_frames(path: Path) -> np.ndarray:
    """[T, H, W, 3] uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def rows_of(run: Path) -> dict[str, dict[str, dict[str, object]]]:
    """prompt name -> column -> the newest validation row."""
    found: dict[str, dict[str, dict[str, object]]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["event"] == "validation":
            found.setdefault(row["name"], {})[row["kind"].removesuffix("-ema")] = row
    return found


def picture(run: Path) -> Image.Image:
    rows = rows_of(run)
    font = ImageFont.load_default(size=16)
    sample = read_frames(run / str(next(iter(rows.values()))["teacher"]["file"]))
    size = sample.shape[1] * SCALE
    column_width = 3 * size + 2 * GAP
    width = LEFT + 3 * column_width + 2 * 3 * GAP
    image = Image.new("RGB", (width, HEAD + len(rows) * (size + GAP)), "white")
    draw = ImageDraw.Draw(image)
    for number, (kind, title) in enumerate(COLUMNS):
        steps = next(iter(rows.values()))[kind]["steps"]
        left = LEFT + number * (column_width + 3 * GAP)
        draw.text((left, 8), f"{title}, {steps} steps", fill="black", font=font)
    for line, by_kind in enumerate(rows.values()):
        top = HEAD + line * (size + GAP)
        words = str(by_kind["teacher"]["prompt"]).split()
        text = " ".join(words[:3]) + "\n" + " ".join(words[3:])
        draw.multiline_text((8, top + size // 2 - 20), text, fill="black", font=font)
        for number, (kind, _) in enumerate(COLUMNS):
            frames = read_frames(run / str(by_kind[kind]["file"]))
            for place, index in enumerate((0, len(frames) // 2, len(frames) - 1)):
                frame = Image.fromarray(frames[index]).resize((size, size), Image.Resampling.BICUBIC)
                image.paste(frame, (LEFT + number * (column_width + 3 * GAP) + place * (size + GAP), top))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture(arguments.run).save(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
