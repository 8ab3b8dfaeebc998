"""Adapters as points in a weight space; the only place that knows how PEFT spells a key."""

from lohp_peft.adapters.injection import injected
from lohp_peft.adapters.layout import AdapterLayout, ModuleSpec, base_model_fingerprint
from lohp_peft.adapters.space import Adapter, CoreSpace, EncodedAdapter, LoraBSpace, WeightSpace

__all__ = [
    "Adapter",
    "AdapterLayout",
    "CoreSpace",
    "EncodedAdapter",
    "LoraBSpace",
    "ModuleSpec",
    "WeightSpace",
    "base_model_fingerprint",
    "injected",
]
