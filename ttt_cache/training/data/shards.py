"""The cache on the disk: tokenised recordings in shards, and an index of them.

    index.json                    what it was made from, the shards, their sha256, the recordings
    shard-00000.safetensors       the codes of each recording, int32 [K, T], by its number

Shards hold consecutive recordings of the manifest. A shard and the index that names it are written
together, so the index never names what is not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ttt_cache.files import write_whole

INDEX = "index.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A finished file: its name, its checksum, and which recordings it holds."""

    file: str
    sha256: str
    bytes: int
    names: list[str]
    frames: list[int]


@dataclass
class Index:
    """What `index.json` says.

    Attributes:
        fingerprint: sha256 of what the cache was made from, by name.
        codebooks: K, streams per recording.
        shard_frames: frames after which a shard was closed.
        total_shards: shards that the finished cache will have.
        shards: those that are finished, in order.
    """

    fingerprint: dict[str, str]
    codebooks: int
    shard_frames: int
    total_shards: int
    shards: dict[int, Shard] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the index of a cache.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another format; the message names the file.
        """
        path = folder / INDEX
        text = path.read_bytes()
        remedy = f"delete {folder} and tokenise anew"
        try:
            fields = json.loads(text)
            if (made_as := fields.pop("format")) == FORMAT:
                shards = {int(key): Shard(**entry) for key, entry in fields.pop("shards").items()}
                return cls(**fields, shards=shards)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): {remedy}") from None
        raise ValueError(
            f"{path}: format must be {FORMAT}, got {made_as!r}: it was made by another version of "
            f"ttt_cache; {remedy}"
        )

    def as_json(self) -> str:
        """The text of the file."""
        shards = {str(number): asdict(self.shards[number]) for number in sorted(self.shards)}
        return json.dumps({"format": FORMAT, **asdict(self), "shards": shards}, indent=1)


class TokenCache:
    """A finished cache, opened for reading.

    Attributes:
        frames: the length of each recording, in the manifest's order.
        fingerprint: what the cache was made from.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.fingerprint = index.fingerprint
        shards = [index.shards[number] for number in sorted(index.shards)]
        self.frames = [frames for shard in shards for frames in shard.frames]
        self._files = [folder / shard.file for shard in shards for _ in shard.frames]

    @classmethod
    def open(cls, folder: Path | str) -> TokenCache:
        """Open a cache; every shard is read once and compared with its checksum.

        Raises:
            FileNotFoundError: there is no index in the folder.
            ValueError: the cache is unfinished, or a shard is missing, truncated or corrupt; the
                message names the file and says what to do.
        """
        folder = Path(folder)
        index = Index.read(folder)
        if len(index.shards) < index.total_shards:
            raise ValueError(
                f"{folder} is unfinished: {len(index.shards)} of {index.total_shards} shards are "
                "there; tokenise again, it goes on where it stopped"
            )
        for shard in index.shards.values():
            verify(folder, shard)
        return cls(folder, index)

    def codes(self, recordings: Iterable[int]) -> Iterator[Tensor]:
        """Load recordings by number, one after the other, each int32 `[K, T]`."""
        for file, numbers in groupby(recordings, lambda number: self._files[number]):
            with safe_open(file, framework="pt") as tensors:
                for number in numbers:
                    yield tensors.get_tensor(str(number))


def complete(folder: Path) -> bool:
    """Whether every shard of a cache is there, whole or not; raises as `Index.read` does."""
    if not (folder / INDEX).exists():
        return False
    index = Index.read(folder)
    there = [number for number, shard in index.shards.items() if (folder / shard.file).exists()]
    return len(there) == index.total_shards


def verify(folder: Path, shard: Shard) -> None:
    """Compare a shard with its checksum; `ValueError` names the file and says what to do."""
    path = folder / shard.file
    remedy = f"delete {path} and tokenise again: only this shard is made anew"
    if not path.exists():
        raise ValueError(f"{path} is missing: tokenise again, only this shard is made anew")
    if (size := path.stat().st_size) != shard.bytes:
        raise ValueError(f"{path} has {size} bytes, {shard.bytes} were written: {remedy}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        raise ValueError(f"{path} is corrupt (its sha256 is not the one in {INDEX}): {remedy}")


def write_shard(
    folder: Path, index: Index, number: int, first: int, names: list[str], codes: list[Tensor]
) -> None:
    """Write shard `number` and the index that names it.

    Args:
        first: the number of the first of its recordings.
        names: the recordings, as the manifest calls them.
        codes: their codes, int32 `[K, T]`.

    Raises:
        OSError: the disk is full or the folder cannot be written; no part of the shard stays, and
            the shards that are finished do.
    """
    data = save({str(first + i): tensor.contiguous() for i, tensor in enumerate(codes)})
    shard = Shard(
        file=f"shard-{number:05d}.safetensors",
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        names=names,
        frames=[tensor.shape[1] for tensor in codes],
    )
    path = folder / shard.file
    index.shards[number] = shard
    try:
        _write({path: lambda file: file.write_bytes(data)}, folder, index)
    except OSError as error:
        del index.shards[number]
        raise _told(error, path, index) from error


def write_index(folder: Path, index: Index) -> None:
    """Write the index alone; raises `OSError` as `write_shard` does."""
    try:
        _write({}, folder, index)
    except OSError as error:
        raise _told(error, folder / INDEX, index) from error


def _write(shard: Mapping[Path, Callable[[Path], object]], folder: Path, index: Index) -> None:
    write_whole({**shard, folder / INDEX: lambda file: file.write_text(index.as_json())})


def _told(error: OSError, path: Path, index: Index) -> OSError:
    return OSError(
        error.errno,
        f"{error.strerror}; {len(index.shards)} of {index.total_shards} shards are finished and "
        "stay: mend this and start again",
        str(path),
    )
