"""Records the time line of a run in which a worker is killed, and of its second launch, for chapter 15.

The times depend on the machine, so the chapter draws what was recorded here and a test holds the two together. Usage,
from the repository's root: python -m tests.benchmarks.killed_run
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
from typing import Any

OUTPUT = pathlib.Path(__file__).parent.parent.parent / "book" / "data" / "killed_run.json"
WORKERS, EVERY, EPOCHS, STEPS, LAST_STEP = 2, 5, 4, 20, 47
KINDS = ("connected", "begin", "exchange", "backup", "killed")
WIDTH, BATCH = 1024, 720  # so large that a step takes long enough to be seen


def work(folder: str, launch: str) -> None:
    """What each worker does: training that notes its times in a file, line by line, and worker 1's death."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import companion

    team = companion.connect()
    import keras
    import tensorflow as tf

    from companion import datasets

    notes = pathlib.Path(folder, f"notes-{launch}-{team.rank}")

    def note(what: str, number: int = 0) -> None:
        with notes.open("a") as file:
            file.write(json.dumps([what, time.time(), number]) + "\n")

    class Watch(keras.callbacks.Callback):
        """Stands behind LocalSGD, so that it comes after the exchange and the backup."""

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            note("begin", epoch + 1)

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if launch == "0" and team.rank == 1 and self.model.optimizer.iterations == LAST_STEP - 1:
                note("killed")
                os.kill(os.getpid(), signal.SIGKILL)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if (batch + 1) % EVERY == 0:
                note("exchange")

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            note("backup", epoch + 1)

    note("connected")
    keras.utils.set_random_seed(1)
    hidden = [keras.layers.Dense(WIDTH, activation="tanh") for _ in range(2)]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    data = datasets.digits()
    rows = slice(team.rank, None, team.size)
    batches = tf.data.Dataset.from_tensor_slices((data.x_train[rows], data.y_train[rows])).batch(BATCH).repeat()
    local = companion.LocalSGD(EVERY, backup_dir=pathlib.Path(folder, "backups"))
    model.fit(batches, epochs=EPOCHS, steps_per_epoch=STEPS, shuffle=False, verbose=0, callbacks=[local, Watch()])


def main() -> None:
    """Launches the workers twice and writes what happened when, in seconds from the beginning."""
    from companion.launch import launch
    from tests.benchmarks.__main__ import processor

    launches: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        beginning = time.time()
        for number, expected in enumerate([128 + signal.SIGKILL, 0]):
            started = time.time()
            if launch(WORKERS, __file__, [folder, str(number)], out=sys.stderr) != expected:
                raise RuntimeError(f"launch {number} must end with exit status {expected}")
            ended, workers = time.time(), []
            for rank in range(WORKERS):
                events: dict[str, list[Any]] = {what: [] for what in KINDS}
                for line in pathlib.Path(folder, f"notes-{number}-{rank}").read_text().splitlines():
                    what, when, epoch = json.loads(line)
                    second = round(when - beginning, 2)
                    events[what].append([epoch, second] if epoch else second)
                workers.append(events)
            times = {"started": round(started - beginning, 2), "ended": round(ended - beginning, 2)}
            launches.append(times | {"workers": workers})
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("tensorflow", "keras")},
        "every": EVERY,
        "epochs": EPOCHS,
        "steps": STEPS,
        "last_step": LAST_STEP,
        "launches": launches,
    }
    OUTPUT.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    work(*sys.argv[1:]) if "TF_CONFIG" in os.environ else main()
