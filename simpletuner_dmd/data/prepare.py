"""From dataset entries to data that is ready for training: scan, fill the caches, plan the batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.errors import Problem, UserError
from simpletuner_dmd.config.schema import TrainConfig
from simpletuner_dmd.data.batches import Group, PreparedData, Sample
from simpletuner_dmd.data.buckets import LatentGeometry
from simpletuner_dmd.data.doctor import SAMPLES, Vae, examine_latents, examine_text, padding_is_zero
from simpletuner_dmd.data.encode import Clip, EncodeText, EncodeVideo, cache_latents, cache_text, clip_of
from simpletuner_dmd.data.manifest import MADE_HERE, manifest_path, restore, stands_in, write_manifest
from simpletuner_dmd.data.plan import DataPlan
from simpletuner_dmd.data.scan import DatasetScan, PromptSample, Rejected, VideoSample, look, quarantine_file, scan_all
from simpletuner_dmd.data.settings import text_cache
from simpletuner_dmd.data.store import LatentStore
from simpletuner_dmd.data.text_store import TextStore, text_key
from simpletuner_dmd.data.video import UnusableFile


@dataclass
class Caches:
    """Caches that are filled, and what filling them took.

    clips: per dataset with latents, its samples as they are cached. prompts, prompts_made, latents_made: how many
    different prompts the run needs, and how many of them and of the latents this process encoded. findings: what the
    doctor has to say.
    """

    scans: list[DatasetScan]
    clips: dict[str, list[Clip]]
    latent_stores: dict[str, LatentStore]
    text_store: TextStore
    prompts: int
    prompts_made: int = 0
    latents_made: int = 0
    findings: list[str] = field(default_factory=list)


def fill_caches(
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
    vae: Vae | None = None,
    main: bool = True,
    progress: bool = True,
) -> Caches:
    """Scans `datasets`, encodes what the caches lack, and looks at the result. The arguments are those of `prepare`."""
    latents = needs_latents or config.eval_dataset_id is not None
    scans, restored = _scan(datasets, config, latent_geometry, vae_fingerprint if latents else None, main)
    folder, write_batch = text_cache(list(datasets), config)
    text = TextStore(folder, config.compress_disk_cache)
    captions = [caption for scan in scans for sample in scan.usable for caption in sample.captions]
    prompts = list(dict.fromkeys([negative_prompt, *extra_prompts, *captions]))
    caches = Caches(scans, {}, {}, text, len(prompts))
    caches.prompts_made = cache_text(
        text,
        prompts,
        text_fingerprint,
        encode_text,
        write_batch=write_batch,
        max_rows=config.tokenizer_max_length,
        progress=progress,
    )
    caches.findings += examine_text(text, prompts[: 4 * SAMPLES], text_fingerprint, config.tokenizer_max_length)
    for scan in scans:
        if not (needs_latents or scan.settings.id == config.eval_dataset_id) or scan.settings.kind == "prompts":
            continue
        assert encode_video is not None, "latents are needed, so a VAE must be given"
        ready = restored.get(scan.settings.id)
        place = scan.settings.vae_cache if ready is None or ready[0].name != MADE_HERE else scan.settings.folder
        store = LatentStore(place, config.compress_disk_cache)
        if ready is None:
            clips, made = _fill_latents(
                scan, store, config, encode_video, latent_geometry, vae_fingerprint, main, progress
            )
            caches.latents_made += made
            write_manifest(manifest_path(scan.settings), clips, vae_fingerprint, scan)
        else:
            clips = _still_cached(scan, store, ready[1])
        caches.clips[scan.settings.id], caches.latent_stores[scan.settings.id] = clips, store
        if vae is not None:
            found = examine_latents(store, clips, vae, decode=main)
            caches.findings += [f"{scan.settings.id}: {line}" for line in found]
    return caches


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
    vae: Vae | None = None,
    main: bool = True,
    progress: bool = True,
) -> PreparedData:
    """Scans `datasets`, encodes what the caches lack, and returns the data of the run.

    datasets: the entries to train on, and the text_embeds entry if the text cache is not config.json's.
    Encoders are called only for what is missing, so they may load their model at the first call. The fingerprints
    name everything about the model that changes its output. max_latent_frames: longer latents are cut to this many.
    vae: for the doctor; without it the latents are taken as they are. A dataset whose video files are gone is read
    from its cache. Several processes may call this at once: they share the encoding and end with the same data; `main`
    is true in the one that moves undecodable files away and decodes for the doctor.
    Raises UserError: nothing usable, disk full, or `needs_latents` with a dataset of prompts.
    """
    if needs_latents:
        _require_videos(datasets, config)
    caches = fill_caches(
        datasets,
        config,
        encode_text=encode_text,
        encode_video=encode_video,
        text_fingerprint=text_fingerprint,
        vae_fingerprint=vae_fingerprint,
        latent_geometry=latent_geometry,
        needs_latents=needs_latents,
        negative_prompt=negative_prompt,
        extra_prompts=extra_prompts,
        vae=vae,
        main=main,
        progress=progress,
    )
    groups = [
        group
        for scan in caches.scans
        for group in _groups(scan, caches.clips.get(scan.settings.id), latent_geometry, max_latent_frames)
    ]
    data = PreparedData(
        scans=caches.scans,
        groups=groups,
        text_store=caches.text_store,
        text_fingerprint=text_fingerprint,
        latent_stores=caches.latent_stores,
        negative_prompt=negative_prompt,
        text_rows=config.tokenizer_max_length,
        seed=config.seed,
        plan=DataPlan.of(caches.scans, config),
        findings=caches.findings,
    )
    length = len(caches.text_store.load(text_key(negative_prompt, text_fingerprint)))
    assert padding_is_zero(data.negative_text.rows_BLD, [length]), "text is padded with zeros"
    return data


def look_at_dataset(entry: DatasetEntry, config: TrainConfig, geometry: LatentGeometry) -> DatasetScan:
    """As `look`; a dataset whose video files are gone is read from its cache. Raises UserError."""
    manifest = stands_in(entry, config)
    if manifest is not None:
        return restore(manifest, entry, config, geometry)[0]
    return look(entry, config, geometry=geometry)


def _scan(
    datasets: Sequence[DatasetEntry], config: TrainConfig, geometry: LatentGeometry, fingerprint: str | None, main: bool
) -> tuple[list[DatasetScan], dict[str, tuple[Path, list[Clip]]]]:
    """(scans in the order of `datasets`, of those read from their cache: the manifest and the clips)."""
    by_id: dict[str, DatasetScan] = {}
    restored: dict[str, tuple[Path, list[Clip]]] = {}
    rest: list[DatasetEntry] = []
    for entry in datasets:
        manifest = None if entry.disabled else stands_in(entry, config, fingerprint)
        if manifest is None:
            rest.append(entry)
            continue
        by_id[entry.id], clips = restore(manifest, entry, config, geometry, fingerprint)
        restored[entry.id] = manifest, clips
    if not restored or any(entry.is_training_data and not entry.disabled for entry in rest):
        quarantine = main and config.delete_problematic_images
        by_id |= {scan.settings.id: scan for scan in scan_all(rest, config, geometry=geometry, quarantine=quarantine)}
    return [by_id[entry.id] for entry in datasets if entry.id in by_id], restored


def _still_cached(scan: DatasetScan, store: LatentStore, clips: list[Clip]) -> list[Clip]:
    """The clips whose latents are whole; the others, which cannot be made again, join `scan.rejected`."""
    kept = [clip for clip in clips if store.has(clip.key)]
    store.flush()
    names = {clip.key for clip in kept}
    scan.rejected += [
        Rejected(clip.sample.path, "its cached latents are gone or damaged, and there is no video file")
        for clip in clips
        if clip.key not in names
    ]
    scan.usable = [clip.sample for clip in kept]
    if not kept:
        raise UserError(
            f"nothing is left of {scan.settings.id}: no video files in {scan.settings.folder}, no whole latents in "
            f"{store.folder}",
            key=f"{scan.settings.id}.instance_data_dir",
            fix="bring the files back, or make them again",
        )
    return kept


def _require_videos(datasets: Sequence[DatasetEntry], config: TrainConfig) -> None:
    source = str(config.data_backend_config or "multidatabackend.json")
    problems = [
        Problem(
            source,
            entry.id,
            "this training needs videos, and the dataset holds prompts only",
            'give a "dataset_type": "video" dataset, or choose a training that needs none (dmd with rollout: simulate)',
        )
        for entry in datasets
        if entry.dataset_type == "prompts" and not entry.disabled
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
    main: bool,
    progress: bool,
) -> tuple[list[Clip], int]:
    """Caches one dataset; files that fail only now join `scan.rejected`.

    Returns the clips that are cached, and how many of them this process encoded.
    """
    clips: list[Clip] = []
    late: list[Rejected] = []
    for sample in scan.usable:
        assert isinstance(sample, VideoSample)
        try:
            clips.append(clip_of(sample, scan.settings, store, fingerprint))
        except UnusableFile as error:
            late.append(Rejected(error.path, error.reason, error.damaged))
    made, found = cache_latents(store, clips, encode, geometry, batch_size=config.vae_batch_size, progress=progress)
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
        if main and config.delete_problematic_images:
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
    return clips, made


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
