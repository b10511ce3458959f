"""Captions: every strategy, and dropout that hits other samples in every epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.captions import caption_of_name, captions_beside, captions_of
from simpletuner_dmd.data.findings import NO_CAPTION, UnusableFile
from simpletuner_dmd.data.scan import WAN, look
from simpletuner_dmd.data.settings import resolve
from simpletuner_dmd.data.sources.items import Item
from simpletuner_dmd.distill.text import with_dropped_captions
from simpletuner_dmd.randomness import RandomStream
from tests.data.clips import Encoders, captioned, entry, make_config, prepared, prompts_entry, write_video


def test_a_files_own_captions_come_before_the_text_beside_it(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "a.txt").write_text("beside")
    own = Item("a.mp4", tmp_path / "a.mp4", ("one", "two"))
    plain = Item("a.mp4", tmp_path / "a.mp4")

    def captions(item: Item, **options: Any) -> tuple[str, ...]:
        return captions_of(item, resolve(entry(tmp_path, **options), config, WAN))

    assert captions(own) == ("one", "two")
    assert captions(plain) == ("beside",)
    assert captions(own, caption_strategy="filename") == ("a",)
    assert captions(own, instance_prompt="xyz", prepend_instance_prompt=True) == ("xyz one", "xyz two")
    assert captions(own, caption_strategy="instanceprompt", instance_prompt="xyz") == ("xyz",)


def test_lines_are_captions_unless_they_belong_together(tmp_path: Path, config: TrainConfig) -> None:
    path = captioned(tmp_path / "a.mp4", caption="\ufefffirst\r\n\n second \n")
    assert captions_beside(path, split=True) == ["first", "second"]
    assert captions_beside(path, split=False) == ["first second"]
    (sample,) = look(entry(tmp_path, disable_multiline_split=True), config).usable
    assert sample.captions == ("first second",)


def test_names_as_captions() -> None:
    assert caption_of_name(Path("x/a_red__circle.v2.mp4")) == "a red  circle.v2"
    assert caption_of_name(Path("___.mp4")) == ""


def test_missing_captions_are_listed_by_kind(tmp_path: Path, config: TrainConfig) -> None:
    write_video(tmp_path / "silent.mp4")
    captioned(tmp_path / "blank.mp4").with_suffix(".txt").write_text(" \n")
    captioned(tmp_path / "latin.mp4").with_suffix(".txt").write_bytes("ü".encode("latin-1"))
    captioned(tmp_path / "folder.mp4").with_suffix(".txt").unlink()
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "folder.txt" / ".keep").touch()
    captioned(tmp_path / "good.mp4")
    result = look(entry(tmp_path), config)
    assert result.counts == {"usable": 1, NO_CAPTION: 4}
    words = {bad.path.name: bad.reason for bad in result.rejected}
    assert "missing" in words["silent.mp4"] and "empty" in words["blank.mp4"] and "UTF-8" in words["latin.mp4"]
    assert "Is a directory" in words["folder.mp4"]
    write_video(tmp_path / "names" / "___.mp4")
    with pytest.raises(UnusableFile, match="its name says nothing"):
        captions_of(
            Item("___.mp4", tmp_path / "names" / "___.mp4"),
            resolve(entry(tmp_path, caption_strategy="filename"), config, WAN),
        )


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropped_by_epoch(
    data: Any, *, probability: float, epochs: int, batch: int, world: int, seed: int
) -> list[set[str]]:
    """The captions that the loss does not see, per epoch."""
    steps = data.steps_per_epoch(batch * world)
    negative = data.negative_text.rows_BLD[0]
    found: list[set[str]] = []
    for epoch in range(epochs):
        gone: set[str] = set()
        for step in range(epoch * steps, (epoch + 1) * steps):
            for rank in range(world):
                part = data.micro_batch(step, 0, rank, micro_batch_size=batch, accumulation=1, world=world)
                text = with_dropped_captions(part, RandomStream(seed, step, part.positions), probability)
                for caption, rows, own in zip(part.captions, text.rows_BLD, part.text.rows_BLD, strict=True):
                    assert torch.equal(rows, negative) or torch.equal(rows, own)
                    if torch.equal(rows, negative):
                        gone.add(caption)
        found.append(gone)
    return found


def test_dropout_hits_other_samples_in_every_epoch(tmp_path: Path, encoders: Encoders) -> None:
    count, epochs, probability = 60, 40, 0.25
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(count)))
    config = make_config(tmp_path, train_batch_size=4)
    data = prepared([prompts_entry(tmp_path / "p.txt")], config, encoders, needs_latents=False, encode_video=None)
    options: dict[str, Any] = {"probability": probability, "epochs": epochs, "seed": 7}
    gone = dropped_by_epoch(data, batch=4, world=1, **options)
    assert gone == dropped_by_epoch(data, batch=4, world=1, **options), "a resumed run drops the same"
    assert gone == dropped_by_epoch(data, batch=2, world=2, **options), "and so do two processes"
    assert all(one != other for i, one in enumerate(gone) for other in gone[:i]), "no two epochs are alike"
    times = Counter(caption for epoch in gone for caption in epoch)
    # Were the draw tied to the sample, each would be dropped in all epochs or in none; drawn afresh, each is dropped
    # Binomial(40, 1/4) times: 10 on average, deviation 2.74, and 1 to 22 at four and a half deviations.
    assert set(times) == {f"prompt {i}" for i in range(count)}
    assert all(1 <= number <= 22 for number in times.values())
    total, mean = sum(times.values()), count * epochs * probability
    assert abs(total - mean) < 4.5 * (mean * (1 - probability)) ** 0.5
    # Successive epochs overlap as independent draws do: 60 / 16 samples on average.
    overlap = sum(len(one & other) for one, other in zip(gone, gone[1:], strict=False)) / (epochs - 1)
    assert overlap == pytest.approx(count * probability**2, abs=1.5)
    data.close()
