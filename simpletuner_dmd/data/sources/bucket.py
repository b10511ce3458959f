"""S3-compatible stores: the objects below a prefix, copied once and again only where they changed.

The copy keeps the names below the prefix, so captions beside videos and tables are found as in any folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from simpletuner_dmd.config.databackend import DatasetEntry
from simpletuner_dmd.config.errors import UserError
from simpletuner_dmd.data.disk import digest
from simpletuner_dmd.data.findings import CANNOT_FETCH, Rejected, UnusableFile
from simpletuner_dmd.data.sources.download import copy_whole, in_parallel, inside, json_whole
from simpletuner_dmd.data.sources.items import missing_extra

INDEX = ".bucket.json"


Objects = dict[str, tuple[str, str, int]]
"""Name below the prefix -> (key, tag of its content, size)."""


def mirror(entry: DatasetEntry, folder: Path) -> tuple[list[Rejected], str]:
    """Makes `folder` hold what the bucket holds below the prefix.

    Returns the objects that could not be fetched, and the name of what the bucket holds. Files of objects that are
    gone from the bucket are removed: they are copies. Raises UserError when the bucket cannot be listed.
    """
    store = open_store(entry)
    wanted = _listed(entry, store, folder)
    return _bring_up_to_date(store, folder, wanted), _named(wanted)


def content_of(entry: DatasetEntry, folder: Path) -> str:
    """The name of what the bucket holds now; nothing but the listing is fetched. Raises UserError."""
    return _named(_listed(entry, open_store(entry), folder))


def _named(wanted: Objects) -> str:
    return digest(json.dumps(sorted(wanted.items())))


def _listed(entry: DatasetEntry, store: Any, folder: Path) -> Objects:
    from botocore.exceptions import BotoCoreError

    prefix = (entry.instance_data_dir or "").strip("/")
    root = f"{entry.aws_bucket_name}/{prefix}".rstrip("/")
    try:
        listed = store.find(root, detail=True)
    except (OSError, ValueError, BotoCoreError) as error:
        raise _unreachable(entry, error) from error
    wanted: Objects = {}
    for key, about in listed.items():
        if about["type"] != "file" or key.endswith("/") or (key.rstrip("/") == root and not about["size"]):
            continue  # an empty object that stands for a folder
        name = key.removeprefix(root).lstrip("/") or Path(key).name
        inside(folder, name, f"{entry.id}.instance_data_dir")
        if any(part.startswith(".") for part in name.split("/")):
            continue  # hidden, as in a folder
        wanted[name] = (key, str(about.get("ETag", "")).strip('"'), int(about["size"]))
    if not wanted:
        raise UserError(f"s3://{root} holds no object", key=f"{entry.id}.instance_data_dir",
                        fix="correct the prefix, or upload the files")  # fmt: skip
    return wanted


def _bring_up_to_date(store: Any, folder: Path, wanted: Objects) -> list[Rejected]:
    there = _index(folder)

    from botocore.exceptions import BotoCoreError

    def one(name: str) -> str:
        key, _, size = wanted[name]
        target = folder / name
        try:
            copy_whole(target, store.open(key, "rb"), size)
        except (OSError, BotoCoreError) as error:
            reason = f"cannot fetch s3://{key}: {error}"
            raise UnusableFile(target, reason, damaged=False, kind=CANNOT_FETCH) from error
        return name

    stale = [
        name
        for name, (_, tag, size) in wanted.items()
        if there.get(name) != tag or not (folder / name).is_file() or (folder / name).stat().st_size != size
    ]
    for name in set(there) - set(wanted):
        (folder / name).unlink(missing_ok=True)
    there = {name: tag for name, tag in there.items() if name in wanted}
    failed = []
    for outcome in in_parallel(one, stale):
        if isinstance(outcome, UnusableFile):
            failed.append(Rejected.of(outcome))
        else:
            there[outcome] = wanted[outcome][1]
    json_whole(folder / INDEX, lambda file: json.dump(there, file))
    return failed


def _index(folder: Path) -> dict[str, str]:
    """name -> tag of what was copied whole."""
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    # Names come from a file that anything may have written: none may point outside.
    return {name: tag for name, tag in content.items() if isinstance(tag, str) and ".." not in Path(name).parts
            and not Path(name).is_absolute()}  # fmt: skip


def open_store(entry: DatasetEntry) -> Any:
    """The store's file system. Raises UserError when s3fs is not installed."""
    try:
        import s3fs
    except ImportError as error:
        raise missing_extra("s3", "s3fs", 'a dataset of "type": "aws"', f"{entry.id}.type") from error

    def plain(secret: Any) -> str | None:
        return secret.get_secret_value() if secret is not None else None

    return s3fs.S3FileSystem(
        key=plain(entry.aws_access_key_id),
        secret=plain(entry.aws_secret_access_key),
        token=plain(entry.aws_session_token),
        endpoint_url=entry.aws_endpoint_url,
        client_kwargs={"region_name": entry.aws_region_name} if entry.aws_region_name else {},
        config_kwargs={"connect_timeout": 20, "retries": {"max_attempts": 2}},
        # An answer from a minute ago would hide files that were just uploaded.
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def fetch_object(entry: DatasetEntry, url: str, folder: Path) -> Path:
    """The local copy of one s3:// URL. Raises UnusableFile."""
    from botocore.exceptions import BotoCoreError

    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}{Path(url).suffix[:12]}"
    if target.is_file():
        return target
    try:
        copy_whole(target, open_store(entry).open(url.removeprefix("s3://"), "rb"), None)
    except (OSError, BotoCoreError) as error:
        raise UnusableFile(target, f"cannot fetch {url}: {error}", damaged=False, kind=CANNOT_FETCH) from error
    return target


def _unreachable(entry: DatasetEntry, error: Exception) -> UserError:
    place = entry.aws_endpoint_url or "Amazon S3"
    return UserError(
        f"the bucket {entry.aws_bucket_name} of {place} cannot be listed: {error or type(error).__name__}",
        key=f"{entry.id}.aws_bucket_name",
        fix="check its name, aws_endpoint_url, aws_region_name and the keys",
    )
