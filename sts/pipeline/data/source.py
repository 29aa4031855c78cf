"""The files of a public data set: from a mirror or the pinned archive, and compared by checksum."""

import hashlib
import http.client
import json
import os
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from huggingface_hub.errors import HTTPError
from PIL import Image
from tqdm import tqdm

from sts.pipeline.data.rows import Rows
from sts.pipeline.files import sha256_file

DOWNLOADS = Path("data/raw")
MOST_FILES, MOST_BYTES = 2_000_000, 2 * 10**9  # of an archive; bytes of one of a small set

BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# what PIL raises for a damaged image; SyntaxError is a broken PNG chunk
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, *BOMB)
# what the hub's client raises where a file can't be had; HTTPError is a connection that broke off
NOT_HAD = (OSError, ValueError, HTTPError)


class DataError(RuntimeError):
    """Data that can't be had or used; the message says which, where, and what to do."""


@dataclass(frozen=True)
class Source:
    """The files of a public data set."""

    archive: str
    """URL of a .tar.gz of one commit."""
    folder: str
    """The part of the archive that is used."""
    mirror: str
    """Name of the folder in a mirror."""
    sha256: str
    """Of the rows that are read (`checksum`)."""


def folder_of(name: str, source: Source, folders: dict[str, str], mirror: str | None) -> Path:
    """The folder of a set: `folders[name]`, else in the mirror, else downloaded before, else
    downloaded now. Raises DataError if it can't be had."""
    if folders.get(name):
        return Path(folders[name])
    root, folder = mirror_folder(mirror), DOWNLOADS / name
    if root and (root / source.mirror).is_dir():
        return root / source.mirror
    if not folder.is_dir():
        download(name, source, folder)
    return folder


def check(name: str, sha256: str, folder: Path, load: Callable[[], dict[str, Rows]]) -> None:
    """Raise DataError unless the rows in a folder can be read and are those of the set's entry."""
    places = "data.folders, STS_DATA_MIRROR and data.mirror say where"
    fresh = f"Put a good copy there ({places}) and run again"
    if folder.is_relative_to(DOWNLOADS):  # else it is the user's, and stays
        fresh = "Delete that folder (or set STS_DATA_MIRROR to a good copy) and run again"
    try:
        digest = checksum(load())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"data set {name}: {folder} can't be read: {error}. {fresh}") from error
    if digest != sha256:
        images = [row["image"] for _, rows in load().values() for row in rows]
        files = dict.fromkeys(image for image in images if isinstance(image, Path))
        damaged = [str(file) for file in files if not _opens(file)]
        raise DataError(
            f"data set {name}: the files in {folder} are not those of its entry: checksum "
            f"{digest}, expected {sha256}; images that don't open: "
            f"{', '.join(damaged[:3]) or 'none'}. {fresh}"
        )


def mirror_folder(mirror: str | None) -> Path | None:
    """The folder with copies of source files; the variable STS_DATA_MIRROR wins over `mirror`.
    Raises DataError if it is not a folder."""
    mirror = os.environ.get("STS_DATA_MIRROR") or mirror
    if mirror and not Path(mirror).is_dir():
        raise DataError(
            f"the data mirror {mirror} is not a folder. Correct STS_DATA_MIRROR or data.mirror"
        )
    return Path(mirror) if mirror else None


def download(name: str, source: Source, folder: Path) -> None:
    """Fetch the used part of the source's archive into `folder`, all of it or nothing.
    Raises DataError if it can't; the message has the URL and both ways out."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        with (
            urllib.request.urlopen(source.archive, timeout=60) as response,
            tarfile.open(fileobj=response, mode="r|gz") as archive,
        ):
            members = _members(archive, source.folder)
            for member in tqdm(members, f"download {name}", unit="file", disable=None):
                archive.extract(member, part, filter="data")
        os.replace(part, folder)
    except (OSError, EOFError, http.client.HTTPException, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"data set {name}: {source.archive} can't be downloaded: {error}. Go online, or set "
            f"STS_DATA_MIRROR (or data.mirror) to a folder that holds {source.mirror}/"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _members(archive: tarfile.TarFile, folder: str) -> Iterator[tarfile.TarInfo]:
    """The files below `folder`, by their paths in it. GitHub's archives are sorted, so what comes
    after the folder need not be fetched."""
    is_inside, count, size = False, 0, 0
    for member in archive:
        path = PurePosixPath(*PurePosixPath(member.name).parts[1:])  # without <repo>-<commit>
        if path.is_relative_to(folder):
            is_inside, count, size = True, count + 1, size + member.size
            if count > MOST_FILES or size > MOST_BYTES:
                raise tarfile.TarError(f"more than {MOST_FILES} files or {MOST_BYTES} bytes in it")
            if member.isfile():
                yield member.replace(name=str(path.relative_to(folder)))
        elif is_inside:
            return
    if not is_inside:
        raise tarfile.TarError(f"the archive has no folder {folder}")


def checksum(splits: dict[str, Rows]) -> str:
    """SHA-256 of rows, wherever and in whatever layout their files lie: ids, texts and the bytes of
    the images, in order."""
    digest, file_digest = hashlib.sha256(), cache(sha256_file)
    for split, (_, rows) in splits.items():
        for row in rows:
            image = row["image"]
            is_file = isinstance(image, Path)
            content = file_digest(image) if is_file else hashlib.sha256(image.tobytes()).hexdigest()
            digest.update(json.dumps([split, {**row, "image": content}]).encode())
    return digest.hexdigest()


def _opens(path: Path) -> bool:
    try:
        Image.open(path).convert("RGB")
    except BROKEN_IMAGE:
        return False
    return True
