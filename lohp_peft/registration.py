"""Adding the method to PEFT's tables; the only code that touches them."""

from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

METHOD = "LOHP"


def ensure_peft_type(enum: Any = PeftType, name: str = METHOD) -> Any:
    """The member `name` of PEFT's enum of methods, added when it is not there.

    PEFT looks methods up in an enum that has no hook for others. Extending it by hand works on Python 3.10 to 3.13
    and where containment is answered from a table of hashable values (Ours: alternatives break on some of them).

    Args:
        enum: `PeftType`, or a string enum that looks like it.
        name: Name and value of the member.

    Returns:
        The member; the same one however often this is called.

    Raises:
        RuntimeError: When this Python's enum cannot be extended in this way.
    """
    if name in enum.__members__:
        return enum[name]
    member = str.__new__(enum, name)
    member._name_, member._value_, member.__objclass__ = name, name, enum
    member._sort_order_ = len(enum._member_names_)
    type.__setattr__(enum, name, member)  # past the guard of the enum's own `__setattr__`
    enum._member_names_.append(name)
    enum._member_map_[name] = enum._value2member_map_[name] = member
    hashable = enum.__dict__.get("_hashable_values_")
    if hashable is not None and name not in hashable:
        hashable.append(name)
    if not (enum(name) is enum[name] is getattr(enum, name) is member and member in list(enum)):
        raise RuntimeError(f"{enum.__name__} cannot be extended with {name!r} on this Python; please report it.")
    return member


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register the method under the type `LOHP`, once; a second call, as on a reload, changes nothing."""
    member = ensure_peft_type()
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD.lower(), config_cls=config_cls, model_cls=model_cls, prefix="lora_")
    CONFIG_KEYS_TO_CHECK.setdefault(member, CONFIG_KEYS_TO_CHECK[PeftType.LORA])
