"""The curves of a run for TensorBoard, written without torch and without TensorFlow."""

import io
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fedllm_flwr.runs.atomic import write_bytes
from fedllm_flwr.runs.breakdown import PHASES, cumulative_bytes
from fedllm_flwr.runs.directory import MANIFEST, RunDirectory
from fedllm_flwr.runs.snapshot import Record, Snapshot

FOLDER = "tensorboard"
TAGS = {
    "accuracy": "accuracy/test",
    "validation_accuracy": "accuracy/validation",
    "worst_client_accuracy": "accuracy/worst_client",
    "loss": "loss/test",
    "validation_loss": "loss/validation",
    "train_loss": "loss/training",
    "bits_per_character": "loss/bits_per_character",
    "seconds": "seconds/round",
    "server_memory_bytes": "memory/server_bytes",
} | {f"{phase}_seconds": f"seconds/{phase}" for phase in PHASES}


def write_tensorboard(run: RunDirectory) -> Path:
    """Write the curves of all rounds so far, replacing what an earlier call wrote.

    The steps are rounds. The wall times are those of the rounds, counted from the start of the run, so that
    TensorBoard's relative time is right; calling this again later does not move them.

    Args:
        run: A run, finished or not.

    Returns:
        The folder to give to ``tensorboard --logdir``.
    """
    snapshot = Snapshot.read(run)
    folder = run.path / FOLDER
    folder.mkdir(exist_ok=True)
    old = sorted(folder.glob("events.out.tfevents.*"))
    # A TensorBoard that is open goes on to files whose names sort later, so a rebuilt file gets the next number.
    number = int(old[-1].suffixes[-1][1:]) + 1 if old else 0
    write_bytes(folder / f"events.out.tfevents.{number:06d}", _events(snapshot))
    for path in old:
        path.unlink()
    return folder


def _events(snapshot: Snapshot) -> bytes:
    clock = (snapshot.path / MANIFEST).stat().st_mtime
    stream = io.BytesIO()
    writer = RecordWriter(stream)
    writer.write(Event(wall_time=clock, file_version="brain.Event:2").SerializeToString())
    sent = zip(
        cumulative_bytes(snapshot, "uplink"), cumulative_bytes(snapshot, "downlink"), strict=True
    )
    for record, (uplink, downlink) in zip(snapshot.rounds, sent, strict=True):
        clock += record.get("seconds", 0.0)
        scalars = _scalars(record) | {"bytes/uplink": uplink, "bytes/downlink": downlink}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = Event(wall_time=clock, step=record["round"], summary=Summary(value=values))
        writer.write(event.SerializeToString())
    return stream.getvalue()


def _scalars(record: Record) -> dict[str, float]:
    return {tag: float(record[key]) for key, tag in TAGS.items() if key in record}
