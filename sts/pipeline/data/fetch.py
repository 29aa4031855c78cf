"""The files of a large public set: from a folder of the user's, or fetched one by one.

A download goes on where it was interrupted; an archive is unpacked, and noted when it is whole.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from tqdm import tqdm

from sts.pipeline.data.source import DOWNLOADS, MOST_FILES, NOT_HAD, DataError, mirror_folder
from sts.pipeline.files import sha256_file, write_json_atomic

NOTES = ".whole"  # folder of notes: of each file that is there in full, its size and SHA-256


@dataclass(frozen=True)
class File:
    """A file of a data set; a .zip is unpacked and deleted."""

    url: str
    """https://..., or <owner>/<name>/<path> of a data set of the hub."""
    into: str = "."
    """Folder, below that of the set, that it lies or is unpacked in."""
    kept_as: str = ""
    """What of it lies there in a folder that the user has; its own name by default."""
    gigabytes: float = 0.0
    """Its size, as the hub lists it or a copy of it; for the estimate."""
    revision: str = "main"
    """Commit of the data set of the hub."""
    sha256: str = ""
    """Of the file, where it is known."""

    @property
    def place(self) -> str:
        """Where it lies, or what is unpacked of it, below the folder of the set."""
        return str(PurePosixPath(self.into) / (self.kept_as or PurePosixPath(self.url).name))


def fetched_bytes(files: Sequence[File]) -> float:
    """Disk that files take while they are fetched: pictures hardly shrink in an archive, and while
    the largest is unpacked it is there twice."""
    sizes = [1e9 * file.gigabytes for file in files]
    return sum(sizes) + max(sizes, default=0.0)


def user_folder(name: str, folders: dict[str, str], mirror: str | None) -> Path | None:
    """The folder of a set that need not be fetched: `folders[name]`, or `<mirror>/<name>`."""
    root = mirror_folder(mirror)
    if folders.get(name):
        return Path(folders[name])
    return root / name if root and (root / name).is_dir() else None


def folder_of(
    name: str, files: Sequence[File], folders: dict[str, str], mirror: str | None
) -> Path:
    """The folder with all files of a set: `folders[name]`, `<mirror>/<name>`, else data/raw/<name>,
    where what is missing is fetched. Raises DataError if a file is missing or can't be had."""
    if folder := user_folder(name, folders, mirror):
        missing = [file.place for file in files if not (folder / file.place).exists()]
        if missing:
            raise DataError(
                f"data set {name}: {folder} lacks {', '.join(missing)}. Add them (docs/data.md "
                f"says how they lie), correct data.folders.{name}, or take it out to have all "
                "fetched"
            )
        return folder
    folder = DOWNLOADS / name
    for file in files:
        note = folder / NOTES / f"{file.place.replace('/', '-')}.json"
        if note.exists():
            continue
        try:
            _fetch(file, folder, note)
        except (*NOT_HAD, zipfile.BadZipFile) as error:
            raise DataError(
                f"data set {name}: {file.url} can't be had: {error}. What is whole was kept: the "
                f"same call goes on. Or set data.folders.{name} to a folder that holds the set"
            ) from error
    return folder


def _fetch(file: File, folder: Path, note: Path) -> None:
    """Fetch a file, compare it with what its source says of it, unpack it, note it."""
    path = folder / file.into / PurePosixPath(file.url).name
    path.parent.mkdir(parents=True, exist_ok=True)
    note.parent.mkdir(exist_ok=True)
    head = None
    if "://" in file.url:
        _from_web(file.url, path)
    else:
        owner, name, at = file.url.split("/", 2)
        hub = {"repo_id": f"{owner}/{name}", "filename": at, "repo_type": "dataset"}
        hub["revision"] = file.revision
        Path(hf_hub_download(**hub, local_dir=path.parent / ".hub")).replace(path)
        head = get_hf_file_metadata(hf_hub_url(**hub))
    facts = {"url": file.url, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    expected, by = file.sha256, "its entry"
    if head:
        facts["commit"] = head.commit_hash
        if not expected and head.etag and len(head.etag) == 64:  # SHA-256
            expected, by = head.etag, "the hub"
    if expected and expected != facts["sha256"]:
        path.unlink()
        raise OSError(f"SHA-256 {facts['sha256']}, not {expected} as {by} says")
    if path.suffix == ".zip":
        unpack(path, path.parent)
        path.unlink()
    write_json_atomic(note, facts)


def _from_web(url: str, path: Path) -> None:
    """Fetched with the client of the hub, which goes on where a part ends and tries again."""
    if path.exists():
        return
    part = path.with_name(f"{path.name}.part")
    with part.open("ab") as stream:
        try:
            http_get(url, stream, resume_size=part.stat().st_size)
        except HfHubHTTPError as error:
            if error.response.status_code != 416:  # it begins where the file ends: it is whole
                raise
    part.replace(path)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip into a folder; what lies there in full already, from a call before, is left.
    Raises OSError if a path leads out of the folder or it is a bomb: pictures hardly shrink in an
    archive; zipfile.BadZipFile if it is damaged."""
    with zipfile.ZipFile(archive) as packed:
        members = packed.infolist()
        unpacked, most = sum(member.file_size for member in members), 10 * archive.stat().st_size
        if unpacked > most or len(members) > MOST_FILES:
            raise OSError(
                f"{archive.name} unpacks to {len(members)} files of {unpacked} bytes: more than "
                f"{MOST_FILES} files, or than ten times itself"
            )
        for member in tqdm(members, f"unpack {archive.name}", unit="file", disable=None):
            path = folder / member.filename
            if not path.resolve().is_relative_to(folder.resolve()):
                raise OSError(f"{archive.name} has the path {member.filename}")
            if member.is_dir() or (path.is_file() and path.stat().st_size == member.file_size):
                continue
            packed.extract(member, folder)
