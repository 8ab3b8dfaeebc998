"""The field's baselines beside ours, each a `Method`; see `base`."""

from methods.base import Adapted, Method, Setting, Support, Training
from methods.conditional import TextToLoraSFT
from methods.controls import CONTROLS
from methods.from_recordings import DragAndDrop, LocalDenoising, TextToLoraRecon, WeightDiffusion
from methods.no_training import AdamW, FullData, LinearProbe, NoAdapter, SetFit
from methods.ours import Generated, Rollout
from methods.stepped import Stepped
from methods.unconditional import FamilySpecialists, MultiTask, Reptile
from methods.zoo import BestBySupportLoss, LoraHub, Mean, Nearest, Zero

METHODS: dict[str, Method] = {
    "none": NoAdapter(),
    "none_prototype": NoAdapter("prototype"),
    "none_linear_probe": LinearProbe(),
    "adamw_10": AdamW(10, 1e-3),
    "adamw_30": AdamW(30, 1e-3),
    "adamw_80": AdamW(80, 1e-3),
    "eva_80": AdamW(80, 1e-3, init="eva", most_draws=1),
    "setfit": SetFit(),
    "mean": Mean(),
    "nearest": Nearest(),
    "nearest_5": Nearest(5),
    "best_by_support_loss": BestBySupportLoss(),
    "lorahub": LoraHub(),
    "multi_task": MultiTask(),
    "reptile": Reptile(),
    "reptile_5": Reptile(adapt_steps=5),
    "text_to_lora_recon": TextToLoraRecon(),
    "text_to_lora_sft": TextToLoraSFT(),
    "drag_and_drop": DragAndDrop(),
    "weight_diffusion": WeightDiffusion(conditional=False),
    "weight_diffusion_conditional": WeightDiffusion(conditional=True),
    "local_denoising": LocalDenoising(),
    "ours_raw": Rollout(),
    "ours": Generated(),
    "none_steps": Stepped(Zero(), 4),
    "multi_task_steps": Stepped(MultiTask(), 4, fitted_as="multi_task"),
    "multi_task_steps_16": Stepped(MultiTask(), 16, fitted_as="multi_task"),
    "ours_steps": Generated(gradient_steps=4),
    "ours_steps_16": Generated(gradient_steps=16),
    "family_specialists": FamilySpecialists(),
    "adamw_full_data": FullData(300, 1e-3),
}
"""By the name in results and tables; the last two are ceilings."""

FROM_POLICY = [name for name, method in METHODS.items() if isinstance(method, Generated | Rollout)]
"""Those that need nothing but the policy."""

__all__ = ["CONTROLS", "FROM_POLICY", "METHODS", "Adapted", "Method", "Setting", "Support", "Training"]
