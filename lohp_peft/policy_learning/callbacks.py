"""The `Trainer`'s callbacks around policy learning: its events, what callbacks see of the run, and its reporters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from lohp_peft.policy_learning.config import PolicyLearningConfig

LOG_EVERY = 10
VALIDATION = "validation_"


def training_arguments(
    config: PolicyLearningConfig,
    accelerator: Accelerator,
    output_dir: str | Path,
    report_to: str | Sequence[str] = "none",
) -> TrainingArguments:
    """The settings of policy learning as callbacks know them.

    Args:
        config: Settings of policy learning.
        accelerator: That of the run.
        output_dir: Folder where reporters that write files put them.
        report_to: Names of reporters, see `reporters`.
    """
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        run_name=Path(output_dir).name,
        report_to=report_to if isinstance(report_to, str) else list(report_to),
        seed=config.seed,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        logging_steps=LOG_EVERY,
        eval_strategy="steps",
        eval_steps=config.validate_every,
        save_steps=config.save_every,
        metric_for_best_model="loss",
        disable_tqdm=True,
        use_cpu=accelerator.device.type == "cpu",
        accelerator_config={"use_configured_state": True},  # else it would take the run's processes apart
    )
    arguments.load_best_model_at_end = True  # whatever the rhythm of checkpoints: the best weights are kept in memory
    return arguments


def reporters(names: str | Sequence[str]) -> list[TrainerCallback]:
    """The `Trainer`'s callbacks that report to `names`, such as `"tensorboard"`, `"trackio"` or `"wandb"`.

    Args:
        names: One name or several; `"none"` is none of them, `"all"` every one that is installed.

    Raises:
        ValueError: When a name is unknown.
        RuntimeError: Listing every reporter that is not installed.
    """
    found, problems = [], []
    for reporter in get_reporting_integration_callbacks(names if isinstance(names, str) else list(names)):
        try:
            found.append(reporter())
        except (ImportError, RuntimeError) as error:
            problems.append(str(error))
    if problems:
        raise RuntimeError(
            f"`report_to` needs packages that are not installed: {'; '.join(problems)} Or leave the name out."
        )
    return found


class Events:
    """Calls `TrainerCallback`s as the `Trainer` does, in every process, and hears what they ask for.

    Args:
        callbacks: Callbacks or their classes; the reporters of `arguments` come before them.
        arguments: What callbacks see of the settings.
        policy: The policy, which callbacks get as `model`.
        optimizer: Its optimizer.
        accelerator: That of the run.
        config: Settings, for the rhythm of logs, validations and checkpoints.
        max_steps: Training steps of the run.

    Raises:
        RuntimeError: When `arguments` were made after the accelerator and took its processes apart.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]],
        arguments: TrainingArguments,
        policy: nn.Module,
        optimizer: Any,
        accelerator: Accelerator,
        config: PolicyLearningConfig,
        max_steps: int,
    ) -> None:
        if not hasattr(accelerator.state, "num_processes"):
            raise RuntimeError(
                "Making `TrainingArguments` after the `Accelerator` resets its state. Make them first, or with "
                "accelerator_config={'use_configured_state': True}."
            )
        self.arguments = arguments
        every = [DefaultFlowCallback, *reporters(arguments.report_to or "none"), *callbacks]
        self.handler = CallbackHandler(every, policy, None, optimizer, None)
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=max_steps,
            logging_steps=LOG_EVERY,
            eval_steps=config.validate_every,
            save_steps=config.save_every,
            num_train_epochs=1,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
        )
        self("init_end")

    def __call__(self, event: str, **kwargs: Any) -> None:
        """Call `on_<event>` of every callback."""
        control = getattr(self.handler, f"on_{event}")(self.arguments, self.state, self.control, **kwargs)
        self.control = control or self.control

    def at(self, step: int) -> None:
        """Set the number of finished training steps."""
        self.state.global_step = step
        self.state.epoch = step / max(self.state.max_steps, 1)

    def validated(self, scores: Mapping[str, float], best: tuple[float, int]) -> None:
        """`on_evaluate` with the `Trainer`'s names, `eval_loss` and `eval_accuracy`; the best so far follows it."""
        self("evaluate", metrics={name.replace(VALIDATION, "eval_"): value for name, value in scores.items()})
        self.best(best)

    def best(self, best: tuple[float, int]) -> None:
        """Set the lowest validation loss so far and the training step it was measured at."""
        self.state.best_metric, self.state.best_global_step = best

    def log(self, scalars: Mapping[str, float]) -> None:
        """`on_log`, also kept in the state's history."""
        self.state.log_history.append({**scalars, "step": self.state.global_step})
        self("log", logs=dict(scalars))

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values: the history, and of callbacks what the `Trainer` keeps of them."""
        states = {name: callback.state()["attributes"] for name, callback in self._exportable().items()}
        return {"log_history": self.state.log_history, "callbacks": states}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Inverse of `record`; callbacks that it lacks start anew.

        Raises:
            ValueError: Listing what is no history, or no state of these callbacks.
        """
        history, known = record.get("log_history", []), record.get("callbacks", {})
        problems = []
        if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
            problems.append(f"'log_history' is {str(history)[:80]}")
        if not isinstance(known, dict) or not all(isinstance(state, dict) for state in known.values()):
            problems.append(f"'callbacks' is {str(known)[:80]}")
            known = {}
        found = []
        for owner, callback in self._exportable().items():
            for name, now in callback.state()["attributes"].items():
                value = known.get(owner, {}).get(name, now)
                numbers = isinstance(value, int | float) and isinstance(now, int | float)
                if not (type(value) is type(now) or numbers or None in (value, now)):
                    problems.append(f"{name!r} of {owner} is {value!r}")
                found.append((callback, name, value))
        if problems:
            raise ValueError(
                f"The checkpoint is damaged, in its record of callbacks {'; '.join(problems)}. Restore it, or remove the folder "
                "to start again."
            )
        self.state.log_history = history
        for callback, name, value in found:
            setattr(callback, name, value)

    def _exportable(self) -> dict[str, Any]:
        """By the name of its class, and where there are several of one its number after the first."""
        found: dict[str, Any] = {}
        for callback in self.handler.callbacks:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                earlier = sum(type(other).__name__ == name for other in found.values())
                found[f"{name} {earlier + 1}" if earlier else name] = callback
        return found
