"""A cache for trained testbeds and slow results, keyed by content and safe between processes.

An entry is a payload (JSON, or tensors as safetensors) beside a small record that names the recipe, the time it
took and the payload's checksum. Payload and record are written to temporary files and renamed into place, so a
killed process or a full disk leaves no half entry; a file lock lets one process build while the others wait.
A payload whose checksum does not match its record is removed and built anew, with a warning.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Kind = Literal["json", "tensors"]

_SUFFIX: dict[str, str] = {"json": ".json", "tensors": ".safetensors"}


def root() -> Path:
    """Folder of the cache: ``LABKIT_CACHE`` if set, else the user's cache folder of the platform."""
    named = os.environ.get("LABKIT_CACHE")
    if named:
        return Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("labkit", appauthor=False)


def write_atomic(path: Path, payload: bytes | str) -> Path:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Parameters
    ----------
    path : Path
        Where to write; the folder is made if it is missing.
    payload : bytes or str
        Content; text is encoded as UTF-8.

    Returns
    -------
    Path
        The path written.

    Raises
    ------
    OSError
        If the disk is full or the folder can't be written. The temporary file is removed.
    """
    data = payload.encode() if isinstance(payload, str) else payload
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; a result is meant to be read by whoever may read its folder.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def fingerprint(key: Mapping[str, Any], code: Iterable[Any] = ()) -> str:
    """Hash of a recipe, and of the source of the functions that carry it out.

    Parameters
    ----------
    key : mapping
        JSON-serialisable description of what is built. Order does not matter.
    code : iterable of functions, classes or modules
        Their source text enters the hash, so that an edit makes old entries unreachable.

    Returns
    -------
    str
        Sixteen hexadecimal digits.

    Examples
    --------
    >>> fingerprint({"seed": 0, "steps": 10}) == fingerprint({"steps": 10, "seed": 0})
    True
    """
    try:
        text = json.dumps(key, sort_keys=True)
    except TypeError as error:
        raise TypeError(
            f"cache key {dict(key)!r} can't be hashed: {error}. Use numbers, strings, lists and mappings."
        ) from None
    digest = hashlib.sha256(text.encode())
    for item in code:
        digest.update(inspect.getsource(item).encode())
    return digest.hexdigest()[:16]


def cached(
    name: str,
    key: Mapping[str, Any],
    build: Callable[[], T],
    *,
    kind: Kind = "json",
    code: Iterable[Any] = (),
    rebuild: bool = False,
    directory: Path | None = None,
) -> T:
    """Return the entry for `key`, building it once if it is not there.

    Parameters
    ----------
    name : str
        Readable part of the file name, such as ``"retrieval-model"``.
    key : mapping
        Everything the result depends on: configuration, seed, library versions where they matter.
    build : callable
        Makes the value. JSON values come back as JSON reads them (tuples become lists).
    kind : {"json", "tensors"}
        ``"tensors"`` stores a flat ``dict[str, Tensor]`` as safetensors; nothing is ever unpickled.
    code : iterable
        Functions whose source belongs to the key, see :func:`fingerprint`.
    rebuild : bool
        Build again even if a good entry exists.
    directory : Path, optional
        Folder of the entries; :func:`root` by default.

    Returns
    -------
    The value that `build` made, now or earlier.

    Raises
    ------
    ValueError
        If `kind` is unknown.
    TypeError
        If the key or a JSON value can't be serialised.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> cached("square", {"x": 3}, lambda: 9, directory=folder)
    9
    >>> cached("square", {"x": 3}, lambda: 1 / 0, directory=folder)   # not built again
    9
    """
    if kind not in _SUFFIX:
        raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(map(repr, _SUFFIX))}")
    from filelock import FileLock

    folder = directory if directory is not None else root()
    stem = f"{name}-{fingerprint(key, code)}"
    payload, record = folder / f"{stem}{_SUFFIX[kind]}", folder / f"{stem}.record.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{stem}.lock"):
        if not rebuild and (payload.exists() or record.exists()):
            blob = _verified(payload, record)
            if blob is not None:
                return _decode(blob, kind)
        started = time.perf_counter()
        value = build()
        blob = _encode(value, kind)
        write_atomic(payload, blob)
        write_atomic(
            record,
            json.dumps(
                {
                    "name": name,
                    "key": dict(key),
                    "sha256": hashlib.sha256(blob).hexdigest(),
                    "seconds": round(time.perf_counter() - started, 2),
                    "made": datetime.now(UTC).isoformat(timespec="seconds"),
                },
                indent=1,
            ),
        )
        # What the caller gets must not depend on whether the entry was there.
        return _decode(blob, kind)


def _verified(payload: Path, record: Path) -> bytes | None:
    """The payload if it matches its record; else remove both and return None."""
    try:
        blob = payload.read_bytes()
        expected = json.loads(record.read_text())["sha256"]
        if hashlib.sha256(blob).hexdigest() == expected:
            return blob
        reason = "its checksum does not match"
    except (OSError, ValueError, KeyError) as error:
        reason = f"it can't be read ({error})"
    # A payload without a record is what a kill between the two renames leaves: worth no alarm.
    if payload.exists() and record.exists():
        warnings.warn(f"cache entry {payload.name} is damaged: {reason}. It is built again.", stacklevel=3)
    payload.unlink(missing_ok=True)
    record.unlink(missing_ok=True)
    return None


def _encode(value: Any, kind: Kind) -> bytes:
    if kind == "json":
        try:
            return json.dumps(value).encode()
        except TypeError as error:
            raise TypeError(
                f"a cached result must be JSON: {error}; use kind='tensors' for tensors"
            ) from None
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in value.items()})


def _decode(blob: bytes, kind: Kind) -> Any:
    if kind == "json":
        return json.loads(blob)
    from safetensors.torch import load

    return load(blob)
