"""TensorBoard: event files in RUN/tensorboard/STAGE, so that curves of stages lie over each other."""

import contextlib
import time
from collections.abc import Mapping

from kforcing_jax.errors import ConfigError
from kforcing_jax.training.trackers.tracker import TrackedRun

try:
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
except ImportError:
    raise ConfigError(
        "logging.trackers = tensorboard needs the package tensorboardX; pip install 'kforcing-jax[tensorboard]'"
    ) from None


class TensorBoard:
    """`tensorboard --logdir=RUN/tensorboard` shows them; several runs under one folder are compared like this too."""

    def start(self, run: TrackedRun) -> None:
        """Makes the folder. Raises OSError."""
        self._folder = run.folder / "tensorboard"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writers: dict[str, EventsWriter] = {}

    def write(self, stage: str, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """An event for every number and text, in the file of the stage. Raises OSError."""
        try:
            writer = self._writer(stage, step)
            for value in [
                *(summary.scalar(name, value) for name, value in scalars.items()),
                *(summary.text(name, text) for name, text in texts.items()),
            ]:
                writer.write_event(Event(wall_time=time.time(), step=step, summary=value))
            writer.flush()
        except OSError:
            # What is half written ends a file: another one is begun when there is room again.
            self._writers.pop(stage, None)
            raise

    def _writer(self, stage, step):
        """Not a `SummaryWriter`, whose thread dies of a full disk, after which it blocks its caller for ever."""
        if stage not in self._writers:
            folder = self._folder / stage
            folder.mkdir(exist_ok=True)
            # Files of one second would have one name.
            writer = EventsWriter(str(folder / "events"), filename_suffix=f".{time.monotonic_ns()}")
            # What an earlier process has said of this step and later ones is not shown any more.
            start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
            writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))
            self._writers[stage] = writer
        return self._writers[stage]

    def close(self) -> None:
        """Ends the files."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
