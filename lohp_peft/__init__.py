"""Lo-Hp: a learned optimization policy that generates LoRA adapters. Importing registers the method with PEFT."""

__version__ = "0.1.0"
