"""TensorBoard event files of a run, on a disk or an object store.

Owns the records (scalars, text, the mark that makes TensorBoard forget steps that were computed again) and where they
lie. The `tensorboard` package brings the protocol and the framing; nothing here loads torch or TensorFlow.

On a disk one file grows. An object store cannot append: there each flush writes the next numbered file, and TensorBoard
reads the files of a folder in the order of their names.
"""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from data_service import storage

__all__ = ["TensorBoardWriter"]

_VERSION = "brain.Event:2"
_FLUSH_S = 5.0
"""On a disk, records reach the file at least this often."""
_OBJECT_FLUSH_S = 60.0
"""On an object store a flush is a file of its own."""


class TensorBoardWriter:
    """One process's records in a folder."""

    def __init__(self, folder_uri: str) -> None:
        """Open; the files of earlier processes in the folder stay, and are read before this one's.

        Raises:
            OSError: the folder cannot be written.
        """
        self._folder = folder_uri
        self._is_local = storage.is_local(folder_uri)
        self._name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._flushed = time.monotonic()
        self._segment = 0
        if self._is_local:
            folder = Path(storage.local_path(folder_uri))
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = (folder / self._name).open("ab")
        else:
            self._file = io.BytesIO()
        self._records = RecordWriter(self._file)
        self._write(Event(file_version=_VERSION))
        self.flush()

    def forget_after(self, step: int) -> None:
        """Tell TensorBoard to drop what it has of later steps: they are computed again."""
        # the session starts at the first step that is dropped (tensorboard's event accumulator, purging)
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """One point of each figure."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def text(self, step: int, tag: str, markdown: str) -> None:
        """One text."""
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()], tensor_shape=shape)
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)
        self._write(Event(step=step, summary=Summary(value=[value])))

    def flush(self) -> None:
        """Bring every record to where readers see it."""
        self._flushed = time.monotonic()
        if self._is_local:
            self._records.flush()
            return
        assert isinstance(self._file, io.BytesIO)
        held = self._file.getvalue()
        if held:
            storage.write_bytes(f"{self._folder}/{self._name}.{self._segment:06d}", held)
            self._segment += 1
            self._file = io.BytesIO()
            self._records = RecordWriter(self._file)

    def close(self) -> None:
        """Flush and release the file."""
        self.flush()
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed >= (_FLUSH_S if self._is_local else _OBJECT_FLUSH_S):
            self.flush()
