"""The plan of an epoch: which buckets take part, how often, what the crop costs, and which are too small.

A pure function of the scans, so that `check` can say it before anything is encoded.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.scan import DatasetScan, VideoSample

PLAN_FILE = "data_plan.json"


class Weighted(Protocol):
    """What decides whether a bucket takes part: its samples per epoch, and the weight of its dataset."""

    @property
    def passes(self) -> int: ...

    @property
    def probability(self) -> float: ...


W = TypeVar("W", bound=Weighted)


def taking_part(buckets: Sequence[W], global_batch: int, keep_small: bool) -> list[W]:
    """The buckets of weight above 0 that fill a batch, or all of weight above 0 where small ones are kept.

    Where pruning would leave nothing, nothing is pruned.
    """
    weighted = [bucket for bucket in buckets if bucket.probability > 0]
    if keep_small:
        return weighted
    return [bucket for bucket in weighted if bucket.passes >= global_batch] or weighted


@dataclass(frozen=True)
class BucketPlan:
    """One bucket of one dataset. cropped: the share of each picture's area that the crop removes, 0 to 1.

    repeats_needed: the `repeats` with which its samples fill a batch; None where they do already.
    """

    dataset: str
    bucket: str
    samples: int
    repeats: int
    probability: float
    takes_part: bool
    cropped: tuple[float, ...]
    repeats_needed: int | None

    @property
    def passes(self) -> int:
        """Samples per epoch."""
        return self.samples * (1 + self.repeats)

    def as_dict(self) -> dict[str, Any]:
        return {
            "bucket": self.bucket,
            "samples": self.samples,
            "samples_per_epoch": self.passes,
            "takes_part": self.takes_part,
            "repeats_needed": self.repeats_needed,
            "cropped_mean": round(sum(self.cropped) / len(self.cropped), 4) if self.cropped else 0.0,
            "cropped_most": round(max(self.cropped), 4) if self.cropped else 0.0,
        }


@dataclass(frozen=True)
class _Size:
    passes: int
    probability: float


@dataclass(frozen=True)
class DataPlan:
    """All buckets of a run, in the order of datasets and names."""

    scans: Sequence[DatasetScan]
    buckets: list[BucketPlan]
    global_batch: int
    batch_words: str
    vae_batch_size: int
    keep_small: bool

    @classmethod
    def of(cls, scans: Sequence[DatasetScan], config: TrainConfig) -> DataPlan:
        """The plan for the batch sizes and the pruning that the options ask for."""
        train, accumulation, processes = (
            config.train_batch_size,
            config.gradient_accumulation_steps,
            config.num_processes,
        )
        global_batch = train * accumulation * processes
        keep_small = config.disable_bucket_pruning
        found: list[tuple[DatasetScan, str, int, list[float], _Size]] = []
        for scan in scans:
            cropped: dict[str, list[float]] = defaultdict(list)
            for sample in scan.usable:
                if isinstance(sample, VideoSample):
                    cropped[sample.bucket].append(sample.crop.cropped)
            for bucket, count in scan.buckets.items():
                size = _Size(count * (1 + scan.settings.repeats), scan.settings.probability)
                found.append((scan, bucket, count, cropped[bucket], size))
        kept = {id(size) for size in taking_part([size for *_, size in found], global_batch, keep_small)}
        buckets = [
            BucketPlan(
                dataset=scan.settings.id,
                bucket=bucket,
                samples=count,
                repeats=scan.settings.repeats,
                probability=scan.settings.probability,
                takes_part=id(size) in kept,
                cropped=tuple(shares),
                repeats_needed=None if size.passes >= global_batch else math.ceil(global_batch / count) - 1,
            )
            for scan, bucket, count, shares, size in found
        ]
        words = (
            f"{global_batch} (train_batch_size {train} x gradient_accumulation_steps {accumulation} "
            f"x num_processes {processes})"
        )
        return cls(scans, buckets, global_batch, words, config.vae_batch_size, keep_small)

    def notices(self) -> list[str]:
        """What is too small for a batch, and which `repeats` would do."""
        found = []
        off = sorted({bucket.dataset for bucket in self.buckets if bucket.probability == 0})
        found += [f"{dataset}: probability 0, it takes no part in training" for dataset in off]
        for scan in self.scans:
            own = [b for b in self.buckets if b.dataset == scan.settings.id and b.probability > 0]
            short = [b for b in own if b.repeats_needed is not None]
            if len(own) > 1 and len(short) == len(own):
                most = max(b.repeats_needed or 0 for b in short)
                found.append(
                    f"{scan.settings.id}: none of its {len(own)} buckets fills a batch of {self.batch_words}; "
                    f"repeats: {most} would fill them all"
                )
            found += [self._too_small(bucket) for bucket in short]
        return found + self._encoded_in_part()

    def _too_small(self, bucket: BucketPlan) -> str:
        samples = "1 sample" if bucket.passes == 1 else f"{bucket.passes} samples"
        size = f"{bucket.dataset}: bucket {bucket.bucket} has {samples} for a batch of {self.batch_words}"
        advice = f"repeats: {bucket.repeats_needed} would fill it"
        if bucket.takes_part:
            return f"{size}, so some appear several times in a batch; {advice}"
        return f"{size} and is left out; {advice}, disable_bucket_pruning: true keeps it"

    def _encoded_in_part(self) -> list[str]:
        clips = {scan.settings.id for scan in self.scans if scan.settings.kind != "prompts"}
        small = [b for b in self.buckets if b.dataset in clips and b.samples < self.vae_batch_size]
        return [
            f"{bucket.dataset}: bucket {bucket.bucket} has {bucket.samples} of the {self.vae_batch_size} files that "
            "vae_batch_size asks for, and is encoded in one smaller batch"
            for bucket in small
        ]

    def as_dict(self) -> dict[str, Any]:
        """JSON: per dataset what was found and left out, per bucket its share; see documentation/DATALOADER.md."""
        return {
            "global_batch": self.global_batch,
            "datasets": [
                {
                    "id": scan.settings.id,
                    "counts": scan.counts,
                    "repeats": scan.settings.repeats,
                    "probability": scan.settings.probability,
                    "buckets": [b.as_dict() for b in self.buckets if b.dataset == scan.settings.id],
                    "left_out": [
                        {"path": str(bad.path), "kind": bad.kind, "reason": bad.reason, "fix": bad.fix}
                        for bad in scan.rejected
                    ],
                    "notices": scan.notices,
                }
                for scan in self.scans
            ],
            "notices": self.notices(),
        }

    def save(self, folder: Path) -> Path:
        """Writes `data_plan.json` into the output folder, whole or not at all."""
        path = folder / PLAN_FILE
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False), encoding="utf-8")
        temporary.replace(path)
        return path
