"""Which exports of a run can be served.

Owns finding them: a folder counts by the provenance that the export writes last, however it was made. Imports torch
only when it reads one.
"""

import re
from dataclasses import dataclass

from data_service import storage

__all__ = ["FinishedExport", "finished_exports"]

_STEP_FOLDER = re.compile(r"step_\d{8,}")


@dataclass(frozen=True)
class FinishedExport:
    """A Hugging Face folder made from a checkpoint."""

    uri: str
    step: int
    digest: str
    """Digest of the weights, as `trainer.export.Provenance` holds it."""


def finished_exports(export_uri: str) -> dict[int, FinishedExport]:
    """The whole exports in `STORAGE/NAME/export` by training step.

    A folder without provenance, configuration or weights is left out: its export was not finished, or parts of it were
    deleted.

    Raises:
        ManifestInvalidError: a provenance is garbled.
    """
    from trainer.export import read_provenance

    finished: dict[int, FinishedExport] = {}
    for name in filter(_STEP_FOLDER.fullmatch, storage.list_names(export_uri)):
        uri = storage.join(export_uri, name)
        files = storage.list_names(uri)
        provenance = read_provenance(uri)
        whole = "config.json" in files and any(file.endswith(".safetensors") for file in files)
        if provenance is not None and whole:
            finished[provenance.step] = FinishedExport(uri, provenance.step, provenance.digest)
    return finished
