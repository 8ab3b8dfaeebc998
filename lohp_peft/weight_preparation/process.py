"""Where stage 1 runs."""

from accelerate import Accelerator, PartialState

from lohp_peft.tasks.encoder import TextEncoder


def process_of(encoder: TextEncoder, accelerator: Accelerator | None) -> Accelerator | PartialState:
    """This process, with the base model on its device.

    Args:
        encoder: Encoder of the base model.
        accelerator: Moves the base model to its device; `None` leaves it where it is, but for an accelerator that a
            launcher such as `accelerate launch` gave to this process or that it uses already.

    Returns:
        The accelerator, or the state of the process.
    """
    process = accelerator or PartialState(cpu=encoder.stays_on_cpu)
    if accelerator is not None or (encoder.device.type == "cpu" and not encoder.stays_on_cpu):
        encoder.base_model.to(process.device)
    return process
