"""TensorBoard: ``tensorboard --logdir runs`` shows the curves, as float32, and sample episodes."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from agent_r1.run.trackers.base import Beginning, TrackerSettings, must_have


class TensorBoard:
    """Writes event files in the run's folder, without PyTorch."""

    class Settings(TrackerSettings):
        """No keys of its own."""

        name: str = "tensorboard"

    def __init__(self, settings: TrackerSettings) -> None:
        must_have("tensorboard", "tensorboard")

    def start(self, beginning: Beginning) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(beginning.folder))
        # Voids what a killed process wrote from here on. It stands at the first start as well: one
        # of the readers takes a run's first mark for its beginning.
        self._add(beginning.first, session_log=SessionLog(status=SessionLog.START))
        recipe = json.dumps(dict(beginning.settings), indent=1)
        self._text(beginning.first, "recipe", f"```json\n{recipe}\n```")

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=x) for name, x in figures.items()]
        self._add(iteration, summary=Summary(value=values))

    def table(self, iteration: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        self._text(iteration, "episodes", table)

    def close(self) -> None:
        self._writer.close()

    def _text(self, iteration: int, tag: str, text: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        plugin = SummaryMetadata.PluginData(plugin_name="text")
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
        metadata = SummaryMetadata(plugin_data=plugin, data_class=2)  # a tensor, to its readers
        value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._add(iteration, summary=Summary(value=[value]))

    def _add(self, iteration: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(step=iteration, wall_time=time.time(), **what))
        self._writer.flush()


def _cell(value: Any) -> str:
    """A cell of a Markdown table; foreign text in it is text."""
    text = html.escape(str(value)).replace("|", "&#124;").replace("`", "&#96;")
    return text.replace("\n", "<br>")
