"""Where metrics go besides metrics.jsonl: event files for TensorBoard, and Weights & Biases. Both are optional extras.

Both get the numbers of metrics.jsonl under the same names, so TensorBoard and W&B group them by the six acts of PPO
(`act/`, `analyse/`, `judge/`, `shape/`, `credit/`, `improve/`) and by `eval/`. A tracker that fails is told of once and
gets no more; the run goes on.
"""

import importlib
import json
import secrets

from ..common.errors import InputError
from ..common.files import write_text
from ..common.log import say

FOLDER = "tensorboard"  # in a run's directory
FINISH = 60.0  # seconds that the end of a run waits for W&B's uploads; `wandb sync` sends what is left
WANDB_ID = "wandb-id.txt"  # there, too: by it a resumed run goes on in the same W&B run


def check_trackers(config):
    """InputError where a tracker's library is not installed, before anything else happens."""
    for name in ("tensorboard", "wandb"):
        if getattr(config, name):
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise InputError(f'--{name} needs {error.name}: pip install ".[{name}]"') from None


def open_trackers(run, done):
    """The trackers that a run's settings ask for. done: steps that are done; what stands behind them goes.

    One that cannot be opened (no login, no network, a full disk) is told of, and the run goes on without it: by now an
    older run may have made room for this one.
    """
    asked = [
        (name, kind) for name, kind in (("tensorboard", TensorBoard), ("wandb", WandB)) if getattr(run.config, name)
    ]
    found = []
    for name, kind in asked:
        try:
            found.append(kind(run, done))
        except Exception as error:  # whatever a library raises
            reason = f"{type(error).__name__}: {error}"
            say(f"warning: --{name}: {reason}; this run goes on without it. {kind.remedy}".rstrip())
    return found


class TensorBoard:
    """Event files in <run>/tensorboard. A resumed run hides the events of steps that it takes again."""

    name, remedy = "tensorboard", ""

    def __init__(self, run, done):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run.directory / FOLDER, purge_step=done + 1 if done else 0)
        if not done:
            self.writer.add_text("settings", f"```\n{json.dumps(run.record['config'], indent=2)}\n```", 0)

    def write(self, step, numbers):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandB:
    """A run of Weights & Biases. Without a network: WANDB_MODE=offline, and `wandb sync` later."""

    name = "wandb"
    remedy = "Log in (wandb login), or set WANDB_MODE=offline."

    def __init__(self, run, done):
        import wandb

        kept = run.directory / WANDB_ID
        if not kept.exists() or not kept.read_text(encoding="utf-8").strip():
            write_text(kept, secrets.token_hex(6))
        self.run = wandb.init(
            project=run.config.wandb, name=f"{run.task.name}/{run.directory.name}", dir=str(run.directory),
            id=kept.read_text(encoding="utf-8").strip(), resume="allow", config=run.record["config"],
            settings=wandb.Settings(console="off", finish_timeout=FINISH),
        )  # fmt: skip
        # Our own step is the axis: a resumed run takes steps again, and W&B's own counter only goes up.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step, numbers):
        self.run.log({"step": step, **numbers})

    def close(self):
        self.run.finish()


class Trackers:
    """Some trackers as one, of which none can end the run."""

    def __init__(self, trackers=()):
        self.trackers = list(trackers)

    def write(self, metrics):
        """metrics: a line of metrics.jsonl; what is no number is left out."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and name != "step"}
        self._each(lambda tracker: tracker.write(metrics["step"], numbers))

    def close(self):
        self._each(lambda tracker: tracker.close())

    def _each(self, act):
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except Exception as error:  # whatever a library raises: it must not take the run with it
                self.trackers.remove(tracker)
                say(f"warning: --{tracker.name}: {type(error).__name__}: {error}; it gets no more from this run")
