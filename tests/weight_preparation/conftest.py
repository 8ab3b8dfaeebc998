import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainingArguments

from lohp_peft.adapters.layout import AdapterLayout
from lohp_peft.adapters.space import LoraBSpace
from lohp_peft.tasks.encoder import TextEncoder
from lohp_peft.weight_preparation import WeightPreparationConfig
from tiny import WORDS, build_base_model, build_task, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def base_model():
    return build_base_model()


@pytest.fixture
def space(base_model):
    return LoraBSpace.seeded(AdapterLayout.from_model(base_model, ["query", "value"]), r=2, seed=0)


@pytest.fixture
def encoder(base_model, tokenizer, space):
    return TextEncoder(base_model, tokenizer, space)


@pytest.fixture
def tasks():
    return [build_task("spam"), build_task("mood", n_classes=3, seed=1)]


@pytest.fixture
def config():
    return WeightPreparationConfig(
        optimizers=("adamw", "sam"),
        seeds=(0, 1),
        optimizer_steps=8,
        record_every=3,
        rows_per_task=32,
        score_query_rows=8,
    )


@pytest.fixture
def quiet():
    return Console(quiet=True)


def rows(n=48):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(WORDS), (n, 6), generator=generator)
    return [{"input_ids": x, "attention_mask": torch.ones(6, dtype=torch.long), "labels": x[0] % 2} for x in ids]


class ToyTrainer(Trainer):
    """The loss is a fixed function of the embedding, so that no head is trained."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits = outputs.last_hidden_state.mean(1)[:, :2]
        loss = nn.functional.cross_entropy(logits, labels)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss


def lora_model(**changes):
    values = {"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"], "lora_dropout": 0.0, **changes}
    torch.manual_seed(1)
    return get_peft_model(build_base_model(), LoraConfig(**values))


def train(folder, recorder, *, model=None, callbacks=(), resume=None, optimizer=None, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "label_names": ["labels"],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 3,
        **changes,
    }
    model = model or lora_model()
    args = TrainingArguments(**values)
    data = {"train_dataset": rows(), "eval_dataset": rows(8)}
    trainer = ToyTrainer(model, args, callbacks=[recorder, *callbacks], optimizers=(optimizer, None), **data)
    trainer.train(resume_from_checkpoint=resume)
    return model
