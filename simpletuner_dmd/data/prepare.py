"""From dataset entries to data that is ready for training: scan, fill the caches, plan the batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.batches import Group, PreparedData, Sample
from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.data.encode import Clip, EncodeText, EncodeVideo, cache_latents, cache_text, clip_of
from simpletuner_dmd.data.scan import DatasetScan, PromptSample, Rejected, VideoSample, quarantine_file, scan_all
from simpletuner_dmd.data.settings import text_cache
from simpletuner_dmd.data.store import LatentStore
from simpletuner_dmd.data.text_store import TextStore
from simpletuner_dmd.data.video import UnusableFile


def prepare(
    datasets: Sequence[DatasetEntry],
    config: TrainConfig,
    *,
    encode_text: EncodeText,
    encode_video: EncodeVideo | None,
    text_fingerprint: str,
    vae_fingerprint: str,
    latent_geometry: LatentGeometry,
    needs_latents: bool,
    negative_prompt: str,
    extra_prompts: Sequence[str] = (),
    max_latent_frames: int | None = None,
    progress: bool = True,
) -> PreparedData:
    """Scans `datasets`, encodes what the caches lack, and returns the data of the run.

    datasets: the entries to train on, and the text_embeds entry if the text cache is not config.json's.
    Encoders are called only for what is missing, so they may load their model at the first call. The fingerprints
    name everything about the model that changes its output. max_latent_frames: longer latents are cut to this many.
    With several processes one prepares first and the others after it: they find everything cached, and the same data.
    Raises UserError: nothing usable, disk full, or `needs_latents` with a dataset of prompts.
    """
    scans = scan_all(datasets, config, geometry=latent_geometry, quarantine=config.delete_problematic_images)
    if needs_latents:
        _require_videos(scans, config)
    clips: dict[str, list[Clip]] = {}
    stores: dict[str, LatentStore] = {}
    if needs_latents:
        assert encode_video is not None, "latents are needed, so a VAE must be given"
        for scan in scans:
            store = LatentStore(scan.settings.vae_cache, config.compress_disk_cache)
            stores[scan.settings.id] = store
            clips[scan.settings.id] = _fill_latents(
                scan, store, config, encode_video, latent_geometry, vae_fingerprint, progress
            )
    folder, write_batch = text_cache(list(datasets), config)
    text = TextStore(folder, config.compress_disk_cache)
    captions = [caption for scan in scans for sample in scan.usable for caption in sample.captions]
    cache_text(
        text,
        [negative_prompt, *extra_prompts, *captions],
        text_fingerprint,
        encode_text,
        write_batch=write_batch,
        max_rows=config.tokenizer_max_length,
        progress=progress,
    )
    groups = [
        group
        for scan in scans
        for group in _groups(scan, clips.get(scan.settings.id), latent_geometry, max_latent_frames)
    ]
    return PreparedData(
        scans=scans,
        groups=groups,
        text_store=text,
        text_fingerprint=text_fingerprint,
        latent_stores=stores,
        negative_prompt=negative_prompt,
        text_rows=config.tokenizer_max_length,
        seed=config.seed,
        keep_small_buckets=config.disable_bucket_pruning,
        global_batch=config.train_batch_size * config.gradient_accumulation_steps * config.num_processes,
    )


def _require_videos(scans: Sequence[DatasetScan], config: TrainConfig) -> None:
    source = str(config.data_backend_config or "multidatabackend.json")
    problems = [
        Problem(
            source,
            scan.settings.id,
            "this training needs videos, and the dataset holds prompts only",
            'give a "dataset_type": "video" dataset, or choose a training that needs none (dmd with rollout: simulate)',
        )
        for scan in scans
        if scan.settings.kind == "prompts"
    ]
    if problems:
        raise UserError(problems)


def _fill_latents(
    scan: DatasetScan,
    store: LatentStore,
    config: TrainConfig,
    encode: EncodeVideo,
    geometry: LatentGeometry,
    fingerprint: str,
    progress: bool,
) -> list[Clip]:
    """Caches one dataset; files that fail only now join `scan.rejected`. Returns the clips that are cached."""
    clips: list[Clip] = []
    late: list[Rejected] = []
    for sample in scan.usable:
        assert isinstance(sample, VideoSample)
        try:
            clips.append(clip_of(sample, scan.settings, store, fingerprint))
        except UnusableFile as error:
            late.append(Rejected(error.path, error.reason, error.damaged))
    _, found = cache_latents(store, clips, encode, geometry, batch_size=config.vae_batch_size, progress=progress)
    late += found
    if late:
        gone = {item.path for item in late}
        # Copies of an undecodable file share its key, so they are gone with it.
        lost = {clip.key for clip in clips if clip.sample.path in gone}
        late += [
            Rejected(clip.sample.path, "the same bytes as a file that cannot be decoded", True)
            for clip in clips
            if clip.key in lost and clip.sample.path not in gone
        ]
        clips = [clip for clip in clips if clip.key not in lost]
        scan.rejected += late
        scan.usable = [clip.sample for clip in clips]
        if config.delete_problematic_images:
            for item in late:
                if item.damaged:
                    quarantine_file(item.path, item.reason)
        if not clips:
            names = "".join(f"\n  {item.path}: {item.reason}" for item in scan.rejected)
            raise UserError(
                f"{scan.settings.folder} has no usable sample{names}",
                key=f"{scan.settings.id}.instance_data_dir",
                fix="put videos that can be decoded there",
            )
    return clips


def _groups(
    scan: DatasetScan, clips: list[Clip] | None, geometry: LatentGeometry, max_latent_frames: int | None
) -> list[Group]:
    """One group per bucket of the dataset, in the order of their names."""
    members: dict[str, list[Sample]] = defaultdict(list)
    shapes: dict[str, tuple[int, int, int, int]] = {}
    keys = [clip.key for clip in clips] if clips is not None else [None] * len(scan.usable)
    samples: Sequence[VideoSample | PromptSample] = scan.usable
    for sample, key in zip(samples, keys, strict=True):
        width, height = (
            (sample.crop.width, sample.crop.height)
            if isinstance(sample, VideoSample)
            else (sample.width, sample.height)
        )
        channels, frames, *size = geometry.latent_shape(width, height, sample.frames)
        frames = min(frames, max_latent_frames or frames)
        shapes[sample.bucket] = (channels, frames, size[0], size[1])
        members[sample.bucket].append(Sample(sample.captions, key))
    return [
        Group(
            dataset=scan.settings.id,
            bucket=bucket,
            latent_shape=shapes[bucket],
            samples=members[bucket],
            repeats=scan.settings.repeats,
            probability=scan.settings.probability,
        )
        for bucket in sorted(members)
    ]
