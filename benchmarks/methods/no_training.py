"""No training task is used: the frozen base model with each head, and gradients on the support set alone."""

from tempfile import TemporaryDirectory

import numpy
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import normalize

from lohp_peft import AdamWBaseline
from lohp_peft.tasks import Examples, Head, TextEncoder, solve_head
from methods.base import Adapted, Method, Setting, Support

PROBE_PENALTY = 10.0
"""scikit-learn's `C`, for embeddings of length 1; not chosen on validation tasks yet."""


class NoAdapter(Method):
    """The frozen base model with one of the closed-form heads."""

    def __init__(self, head: str = "ridge") -> None:
        self.head = head

    def adapt(self, setting: Setting, tensors: dict[str, Tensor], support: Support, told=None) -> Adapted:
        examples = support.examples
        embeddings, ridge = support.statistics.embeddings, setting.policy.config.ridge
        return Adapted(solve_head(embeddings, examples.targets, examples.n_classes, self.head, ridge=ridge))


class LinearProbe(Method):
    """Logistic regression on the frozen base model's embeddings."""

    def adapt(self, setting: Setting, tensors: dict[str, Tensor], support: Support, told=None) -> Adapted:
        return Adapted(logistic_head(support.statistics.embeddings, support.examples))


def logistic_head(embeddings: Tensor, examples: Examples) -> Head:
    """Logistic regression on normalised embeddings, classes weighed alike."""
    x = normalize(embeddings.float(), dim=-1).numpy(force=True)
    probe = LogisticRegression(C=PROBE_PENALTY, class_weight="balanced", max_iter=2000)
    probe.fit(x, numpy.asarray(examples.labels))
    weight, bias = torch.tensor(probe.coef_).float(), torch.tensor(probe.intercept_).float()
    if len(probe.classes_) == 2:  # one row tells both classes
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    head = Head(weight.new_zeros(examples.n_classes, weight.shape[1]), bias.new_full((examples.n_classes,), -1e4))
    head.weight[probe.classes_], head.bias[probe.classes_] = weight, bias
    return head


class AdamW(Method):
    """A LoRA trained on the support set, from PEFT's default start or from EVA's."""

    def __init__(self, steps: int, learning_rate: float, init: str = "default", most_draws: int | None = None) -> None:
        self.steps, self.learning_rate, self.init, self.most_draws = steps, learning_rate, init, most_draws

    def adapt(self, setting: Setting, tensors: dict[str, Tensor], support: Support, told=None) -> Adapted:
        encoder = setting.encoder
        baseline = AdamWBaseline(
            encoder.base_model,
            encoder.tokenizer,
            setting.policy,
            learning_rate=self.learning_rate,
            steps=self.steps,
            init=self.init,
            dtype=torch.bfloat16,
        )
        ((adapted, head),) = baseline.fit(support.examples, support.seed)
        return Adapted(head, encoder=adapted)


class FullData(AdamW):
    """The ceiling: AdamW on all training rows of the task, and the head on them."""

    full_data = True


class SetFit(Method):
    """SetFit (Known: 2209.11055): the whole encoder is fine-tuned on pairs of support texts, then a logistic head.

    20 pairs a text each way (Known: 2209.11055), one epoch, but at most `max_steps` steps of 16 pairs, and in bfloat16
    like AdamW. Two minutes a support set on one core, so that each task gets one.
    """

    most_draws = 1
    requires = ("setfit", "sentence_transformers")

    def __init__(self, max_steps: int = 100) -> None:
        self.max_steps = max_steps

    def adapt(self, setting: Setting, tensors: dict[str, Tensor], support: Support, told=None) -> Adapted:
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling, Transformer
        from setfit import SetFitModel, Trainer, TrainingArguments

        examples, encoder, config = support.examples, setting.encoder, setting.policy.config
        with TemporaryDirectory() as folder:
            encoder.base_model.save_pretrained(folder)
            encoder.tokenizer.save_pretrained(folder)
            body = Transformer(folder, max_seq_length=config.max_text_length)
            pooling = Pooling(encoder.base_model.config.hidden_size, pooling_mode="mean")
            model = SetFitModel(
                SentenceTransformer(modules=[body, pooling], device=str(encoder.device)), LogisticRegression()
            )
            arguments = TrainingArguments(
                output_dir=folder,
                batch_size=16,
                num_iterations=20,
                num_epochs=1,
                max_steps=self.max_steps,
                seed=support.seed,
                report_to="none",
                show_progress_bar=False,
                save_strategy="no",
            )
            texts = examples.texts
            if examples.texts_b is not None:
                texts = [f"{a} {b}" for a, b in zip(texts, examples.texts_b, strict=True)]
            rows = Dataset.from_dict({"text": list(texts), "label": list(examples.labels)})
            trainer = Trainer(model=model, args=arguments, train_dataset=rows)
            with torch.autocast(encoder.device.type, dtype=torch.bfloat16):
                trainer.train_embeddings(list(texts), list(examples.labels), args=arguments)
        reading = {"pooling": config.pooling, "max_length": config.max_text_length}
        tuned = TextEncoder(body.auto_model, encoder.tokenizer, setting.policy.space, **reading)
        with torch.no_grad():
            embeddings = tuned.embed(tuned.prepare(examples.texts, examples.texts_b))
        return Adapted(logistic_head(embeddings, examples), encoder=tuned, tuned_below=True)
