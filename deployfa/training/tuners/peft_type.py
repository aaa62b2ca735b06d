"""Give PEFT's ``PeftType`` the members VEFA and LORFA.

``register_peft_method`` refuses a method whose name is not in that enum, and Python's enums are closed: there is no
public way to add one.  This does by hand what the enum's own metaclass does for each member of a class body.
"""

from __future__ import annotations

from peft import PeftType

__all__ = ["add_member"]


def add_member(name: str) -> PeftType:
    """Return ``PeftType(name)``, adding it first if PEFT does not have it; calling it twice changes nothing."""
    if name in PeftType.__members__:
        return PeftType(name)
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    # Before the maps: once a name is in them, the metaclass takes the assignment for a reassignment and refuses it.
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return PeftType(name)
