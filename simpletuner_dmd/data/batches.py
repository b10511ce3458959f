"""Which sample is where in which step: a pure function of (seed, step), and the loading of it ahead of time.

An epoch: of each bucket, the samples (with their repeats) are put into a seeded order and cut into global batches, the
last one filled up from the order's start; then the global batches of all buckets are put into a seeded order. A global
batch is of one dataset and one bucket, so shapes never mix and every rank sees the same shape at the same time.
Processes and accumulation only cut a global batch into parts: one process with batch 4 and two with batch 2 see the
same samples at the same positions.

Shapes: B batch, C F H W latents, L text rows, D text width.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from simpletuner_dmd.data.plan import DataPlan, taking_part
from simpletuner_dmd.data.scan import DatasetScan
from simpletuner_dmd.data.store import LatentStore
from simpletuner_dmd.data.text_store import TextStore, text_key
from simpletuner_dmd.flow import Batch, TextEmbedding
from simpletuner_dmd.randomness import derive_seed, permutation

CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Sample:
    """captions: one is drawn per epoch. latent_key: its entry in the dataset's latent store, if latents are used."""

    captions: tuple[str, ...]
    latent_key: str | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """The samples of one bucket of one dataset. latent_shape: (C, F, H, W), frames already capped."""

    dataset: str
    bucket: str
    latent_shape: tuple[int, int, int, int]
    samples: Sequence[Sample]
    repeats: int = 0
    probability: float = 1.0

    @property
    def passes(self) -> int:
        """Entries per epoch."""
        return len(self.samples) * (1 + self.repeats)


class TensorCache:
    """The most recently used tensors, up to a number of bytes; safe to use from two threads."""

    def __init__(self, limit: int) -> None:
        self.limit, self._bytes = limit, 0
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Tensor | None:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: str, tensor: Tensor) -> None:
        with self._lock:
            if key in self._held:
                return
            self._held[key] = tensor
            self._bytes += tensor.nbytes
            while self._bytes > self.limit and self._held:
                self._bytes -= self._held.popitem(last=False)[1].nbytes


def _share(group: Group, kept: Sequence[Group], global_batch: int) -> int:
    """Global batches that `group` gives per epoch: all of them for the dataset of the highest probability, in
    proportion for the others. Which ones changes with the epoch, so every sample has its turn."""
    highest = max(other.probability for other in kept)
    return max(1, math.ceil(group.passes / global_batch * group.probability / highest - 1e-9))


@dataclass
class PreparedData:
    """The data of a run: cached, planned, ready. Build it with `prepare`.

    groups: all buckets. text_rows: L of every text embedding. plan: what takes part, and the sizes assumed.
    findings: what the doctor said of the caches.
    """

    scans: list[DatasetScan]
    groups: list[Group]
    text_store: TextStore
    text_fingerprint: str
    latent_stores: Mapping[str, LatentStore]
    negative_prompt: str
    text_rows: int
    seed: int
    plan: DataPlan
    cache_bytes: int = CACHE_BYTES
    findings: Sequence[str] = ()
    _pending: dict[tuple[int, ...], Future[Batch]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._tensors = TensorCache(self.cache_bytes)
        self._epoch_plan = lru_cache(maxsize=4)(self._plan_epoch)
        self.negative_text = self.text(self.negative_prompt)

    @cached_property
    def _loader(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    @property
    def global_batch(self) -> int:
        """Samples per step, as the notices and the report assume it."""
        return self.plan.global_batch

    # --- what training asks for -------------------------------------------------------------------------------------

    def text(self, prompt: str) -> TextEmbedding:
        """[1, L, D] fp32: the real rows, then zeros up to text_rows. KeyError for a prompt that was not prepared."""
        return TextEmbedding(self._padded([prompt]))

    def steps_per_epoch(self, global_batch: int) -> int:
        """Global batches until every sample was seen."""
        kept = self.kept(global_batch)
        return sum(_share(group, kept, global_batch) for group in kept)

    def micro_batch(
        self, step: int, micro: int, rank: int, *, micro_batch_size: int, accumulation: int, world: int
    ) -> Batch:
        """The micro-batch `micro` of `rank` in `step` (all from 0); the next one is loaded in the background.

        Sample i lies at position micro * world * micro_batch_size + rank * micro_batch_size + i of the global batch.
        """
        assert 0 <= micro < accumulation and 0 <= rank < world, "micro and rank count from 0"
        sizes = (micro_batch_size, accumulation, world)
        ahead = self._pending.pop((step, micro, rank, *sizes), None)
        batch = ahead.result() if ahead is not None else self._load(step, micro, rank, *sizes)
        following = (step, micro + 1) if micro + 1 < accumulation else (step + 1, 0)
        name = (*following, rank, *sizes)
        if name not in self._pending:
            for stale in self._pending.values():
                stale.cancel()
            self._pending = {name: self._loader.submit(self._load, *name)}
        return batch

    def latent_shapes(self) -> list[tuple[int, int, int, int]]:
        """Every (C, F, H, W) that a batch can have, largest first."""
        shapes = {group.latent_shape for group in self.kept(self.global_batch)}
        return sorted(shapes, key=lambda shape: (-math.prod(shape), shape))

    def held_out(self, dataset: str, count: int) -> list[Batch]:
        """The first `count` samples of a dataset that takes no part in training, each as a batch of one at a position
        of its own."""
        found = [(group, sample) for group in self.groups if group.dataset == dataset for sample in group.samples]
        return [
            Batch(
                positions=(number,),
                text=self.text(sample.captions[0]),
                negative_text=self.negative_text,
                latent_shape=group.latent_shape,
                latents_BCFHW=self._latents(group, sample)[None],
                captions=[sample.captions[0]],
            )
            for number, (group, sample) in enumerate(found[:count])
        ]

    def close(self) -> None:
        """Stops loading ahead."""
        for ahead in self._pending.values():
            ahead.cancel()
        self._pending = {}
        if "_loader" in self.__dict__:
            self._loader.shutdown(wait=True)
            del self.__dict__["_loader"]

    # --- the order --------------------------------------------------------------------------------------------------

    def kept(self, global_batch: int) -> list[Group]:
        """The groups that take part: weight above 0, and large enough unless small buckets are kept.

        Where pruning would leave nothing, nothing is pruned.
        """
        return taking_part(self.groups, global_batch, self.plan.keep_small)

    def _plan_epoch(self, epoch: int, global_batch: int) -> list[tuple[int, list[int]]]:
        """The epoch's global batches in order: (index of the group, indices of its samples)."""
        kept = self.kept(global_batch)
        batches: list[tuple[int, list[int]]] = []
        for number, group in enumerate(self.groups):
            if group not in kept:
                continue
            order = permutation(group.passes, self.seed, "order", epoch, group.dataset, group.bucket)
            for part in range(_share(group, kept, global_batch)):
                # Positions beyond the last entry wrap around to the start, several times in a tiny bucket.
                places = range(part * global_batch, (part + 1) * global_batch)
                batches.append((number, [order[place % group.passes] % len(group.samples) for place in places]))
        return [batches[index] for index in permutation(len(batches), self.seed, "batches", epoch)]

    def samples_at(self, step: int, global_batch: int) -> tuple[Group, list[int], int]:
        """(group, sample index at each position of the step's global batch, epoch)."""
        epoch, index = divmod(step, self.steps_per_epoch(global_batch))
        number, members = self._epoch_plan(epoch, global_batch)[index]
        return self.groups[number], members, epoch

    # --- loading ----------------------------------------------------------------------------------------------------

    def _load(self, step: int, micro: int, rank: int, micro_batch_size: int, accumulation: int, world: int) -> Batch:
        group, members, epoch = self.samples_at(step, world * micro_batch_size * accumulation)
        first = micro * world * micro_batch_size + rank * micro_batch_size
        positions = tuple(range(first, first + micro_batch_size))
        samples = [group.samples[members[position]] for position in positions]
        captions = [self._caption(group, members[position], epoch) for position in positions]
        latents = None
        if group.dataset in self.latent_stores:
            latents = torch.stack([self._latents(group, sample) for sample in samples])
        return Batch(
            positions=positions,
            text=TextEmbedding(self._padded(captions)),
            negative_text=self.negative_text,
            latent_shape=group.latent_shape,
            latents_BCFHW=latents,
            captions=captions,
        )

    def _caption(self, group: Group, index: int, epoch: int) -> str:
        captions = group.samples[index].captions
        if len(captions) == 1:
            return captions[0]
        return captions[derive_seed(self.seed, "caption", epoch, group.dataset, group.bucket, index) % len(captions)]

    def _latents(self, group: Group, sample: Sample) -> Tensor:
        """[C, F, H, W] fp32, cut to the first F frames that the run uses."""
        assert sample.latent_key is not None, "a sample of a cached dataset has a key"
        name = f"{group.dataset}/{sample.latent_key}"
        latents = self._tensors.get(name)
        if latents is None:
            latents = self.latent_stores[group.dataset].load(sample.latent_key)
            latents = latents[:, : group.latent_shape[1]].float().contiguous()
            self._tensors.put(name, latents)
        assert tuple(latents.shape) == group.latent_shape, "cached latents have the shape of their bucket"
        return latents

    def _padded(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_rows, D] fp32; rows past the prompt are exactly zero."""
        rows = [self._rows(prompt) for prompt in prompts]
        padded = torch.zeros(len(rows), self.text_rows, rows[0].shape[1])
        for target, source in zip(padded, rows, strict=True):
            target[: len(source)] = source
        return padded

    def _rows(self, prompt: str) -> Tensor:
        key = text_key(prompt, self.text_fingerprint)
        rows_LD = self._tensors.get(key)
        if rows_LD is None:
            if key not in self.text_store:
                raise KeyError(f"no embedding was prepared for the prompt {prompt!r}")
            rows_LD = self.text_store.load(key)
            self._tensors.put(key, rows_LD)
        return rows_LD

    # --- words ------------------------------------------------------------------------------------------------------

    @property
    def notices(self) -> list[str]:
        """What a person should know: files left out, rounding, buckets pruned or repeated."""
        found = [f"caches: {finding}" for finding in self.findings]
        for scan in self.scans:
            found += [f"{scan.settings.id}: left out {item.path}: {item.reason}" for item in scan.rejected]
            found += [f"{scan.settings.id}: {notice}" for notice in scan.notices]
        return found + self.plan.notices()

    def save_plan(self, folder: Path) -> Path:
        """Writes what `report` says, and every file that is left out, to `folder`/data_plan.json."""
        return self.plan.save(folder)

    def report(self) -> str:
        """The plan: per dataset what is usable, per bucket the count and what the crop removes."""
        lines = []
        kept = self.kept(self.global_batch)
        cropped = {(bucket.dataset, bucket.bucket): bucket.cropped for bucket in self.plan.buckets}
        for scan in self.scans:
            lines.append(f"{scan.settings.id}: {len(scan.usable)} usable, {len(scan.rejected)} left out")
            for group in (group for group in self.groups if group.dataset == scan.settings.id):
                shape = "x".join(map(str, group.latent_shape))
                line = f"  {group.bucket}: {len(group.samples)} samples, latents {shape}"
                if group.repeats:
                    line += f", {group.passes} per epoch"
                if cut := cropped[group.dataset, group.bucket]:
                    line += f", the crop removes {100 * sum(cut) / len(cut):.1f}% (at most {100 * max(cut):.1f}%)"
                lines.append(line if group in kept else line + ", left out")
        steps = self.steps_per_epoch(self.global_batch)
        lines.append(f"an epoch is {steps} step{'s' if steps != 1 else ''} of {self.global_batch} samples")
        return "\n".join(lines)
