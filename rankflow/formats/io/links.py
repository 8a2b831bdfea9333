"""Links in a folder that may be a stranger's: followed only where they stay within it, so that nothing else of this
machine is read as if it were part of it, or copied into what is then given away."""

from __future__ import annotations

from pathlib import Path

from rankflow.errors import AdapterError

_REPOSITORIES = ("models--", "datasets--", "spaces--")


def check_own(path: Path, folder: Path) -> None:
    """
    Raises:
        AdapterError: `path`, which is in `folder`, is a link that leads out of it; of a snapshot in a cache of the
            Hugging Face hub, out of that repository's blobs too.
    """
    real, home = path.resolve(), folder.resolve()
    if not real.is_relative_to(home) and not any(real.is_relative_to(blobs) for blobs in _blobs(home)):
        raise AdapterError(
            f"{path}: is a link that leads out of its folder, to {real}; put the file itself there if it belongs to "
            "this adapter or model, or remove the link"
        )


def _blobs(home: Path) -> list[Path]:
    """Where the files of a snapshot, or of a folder within one, are kept: beside the snapshots of one repository."""
    return [
        parent.parent / "blobs"
        for parent in home.parents
        if parent.name == "snapshots" and parent.parent.name.startswith(_REPOSITORIES)
    ]
