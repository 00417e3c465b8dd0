"""``manifest.json``: what an artefact (dataset, score file, …) is, what made it, and how to tell that it is whole.

It holds its own SHA-256 (``manifest_sha256``, computed with that value set to zeros) and that of the checksum sidecar.
A flipped bit in either is found when the artefact is opened.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_kd.artefacts.artefact_folder import refuse_existing, write_file
from megatron_kd.artefacts.checksums import SIDECAR_NAME, Checksums
from megatron_kd.errors import DataError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_ZERO_SHA256 = "0" * 64


def write_manifest(folder: Path, kind: str, body: Mapping[str, Any], checksums: Checksums) -> None:
    """Write ``checksums.json`` and then ``manifest.json`` into ``folder``.

    Args:
        folder: the artefact under construction.
        kind: of the artefact (``chunk_dataset``, ``score_file``, …).
        body: the rest of the manifest; JSON values.
        checksums: of every other file.
    """
    sidecar = checksums.to_json()
    write_file(folder / SIDECAR_NAME, sidecar)
    manifest = {"kind": kind, "format_version": FORMAT_VERSION, **body}
    manifest["checksums_sha256"] = hashlib.sha256(sidecar.encode()).hexdigest()
    manifest["manifest_sha256"] = _ZERO_SHA256
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(folder / MANIFEST_NAME, text.replace(_own_line(_ZERO_SHA256), _own_line(_text_digest(text))))


def read_manifest(folder: str | Path, kind: str | None = None) -> tuple[dict[str, Any], Checksums]:
    """Read and verify the manifest and the checksum sidecar of an artefact.

    Args:
        folder: the artefact.
        kind: the kind it must be, or None for any.

    Raises:
        DataError: there is no manifest, or it is damaged, of another kind, or of a newer format.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (expected {_article(kind)} with a {MANIFEST_NAME})")
    text = _read_text(path)
    try:
        manifest = json.loads(text)
        stated = manifest["manifest_sha256"]
        found = _text_digest(text.replace(_own_line(stated), _own_line(_ZERO_SHA256)))
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: damaged, not a manifest; copy the artefact again or make it again") from None
    if found != stated:
        raise DataError(
            f"{path}: damaged: its SHA-256 is {found[:16]}… where {str(stated)[:16]}… was written; copy it again"
        )
    if manifest.get("format_version", 0) > FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {manifest['format_version']}, but this program reads up to {FORMAT_VERSION}; "
            "use a newer one"
        )
    if kind is not None and manifest.get("kind") != kind:
        raise DataError(f"{folder}: is {_article(manifest.get('kind'))}, where {_article(kind)} is needed")
    sidecar = _read_text(folder / SIDECAR_NAME)
    digest = hashlib.sha256(sidecar.encode()).hexdigest()
    if digest != manifest["checksums_sha256"]:
        raise DataError(
            f"{folder / SIDECAR_NAME}: damaged: its SHA-256 is {digest[:16]}… "
            f"where {manifest['checksums_sha256'][:16]}… was written; copy it again"
        )
    return manifest, Checksums.from_json(sidecar, folder / SIDECAR_NAME)


def open_artefact(folder: str | Path, kind: str) -> tuple[dict[str, Any], Checksums]:
    """Open an artefact whose ``.bin`` files are verified block by block at first touch.

    Only the sizes of these are compared now; every other file is read and verified.

    Returns:
        its manifest and its checksums.

    Raises:
        DataError: it is missing, damaged, or of another kind.
    """
    manifest, checksums = read_manifest(folder, kind)
    for name in checksums.files:
        if name.endswith(".bin"):
            checksums.check_size(Path(folder), name)
        else:
            checksums.verify_file(Path(folder), name)
    return manifest, checksums


def already_made(output: str | Path, kind: str, recipe: str) -> bool:
    """Whether ``output`` already is the artefact that this recipe makes (``producer.recipe`` of its manifest).

    Raises:
        DataError: something else is there.
    """
    output = Path(output)
    if not output.exists():
        return False
    try:
        manifest, _ = read_manifest(output, kind)
    except DataError:
        refuse_existing(output)
        raise
    if manifest["producer"].get("recipe") != recipe:
        refuse_existing(output)
    return True


def recipe_of(parts: Mapping[str, Any]) -> str:
    """Return the identity of what an artefact is made from and how: 32 digits of a SHA-256 over named JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def fingerprint_of(parts: Mapping[str, Any], checksums: Checksums) -> str:
    """Return a content identity: 32 digits of a SHA-256 over named JSON values and the checksums of the files."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False) + checksums.to_json()
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages involved in making an artefact."""
    found = {"python": platform.python_version()}
    for package in ("megatron_kd", "numpy", "tokenizers", "transformers", "gigatoken", "torch", "megatron-core"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _own_line(digest: str) -> str:
    return f'"manifest_sha256": "{digest}"'


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: missing; this folder is not a whole artefact, copy or make it again") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: damaged, not UTF-8; copy the artefact again or make it again") from None


def _article(kind: str | None) -> str:
    words = (kind or "artefact").replace("_", " ")
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
