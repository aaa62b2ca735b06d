"""IA3 as PEFT keeps it: one vector l for each site, a factor on what goes in or on what comes out.

Sites that ``feedforward_modules`` names compute ``W (l ⊙ x) + c``, with l: (1, k); the others ``l ⊙ (W x + c)``, with
l: (d, 1).  Convolutions have (1, k, 1, …) and (1, d, 1, …).  As an edit: λ = l - 1, on the input or on the output.

l - 1 is taken in float64, and 1 + λ is l again for every float32 of at least 2^-29, and for 0; below, to 2^-54.
The other way loses bits: 1 + λ in float32 rounds.  So λ itself is kept beside the checkpoint, and is read back as long
as l is what it rounds to.

Source: arXiv 2205.05638; peft/tuners/ia3 in PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from deployfa.edits import Array, Edit
from deployfa.errors import EditError

__all__ = ["KEPT", "edit_from", "feedforward_modules", "kept_vectors", "restored", "vector_of"]

#: The file beside the checkpoint with every λ that l alone does not give back; PEFT does not look at it.
KEPT = "deployfa_lambda.safetensors"


def edit_from(site: str, vector: Array, config: Mapping[str, Any]) -> Edit:
    """PEFT's ``ia3_l`` of ``site`` as an edit; raises ``EditError`` if its shape is not what the config makes it."""
    size, shape = vector.size, vector.shape
    column, row = shape == (size, 1), shape == (1, size) or (len(shape) > 3 and shape[:2] == (1, size))
    modules = config.get("feedforward_modules")
    if modules is None:
        # PEFT fills it in by architecture and saves what it filled in; a shape tells, unless both would do
        if row == column or len(shape) > 2:
            raise EditError(f"site '{site}': the config has no feedforward_modules to say what l scales; copy it again")
        inputs = row
    else:
        inputs = _is_feedforward(site, modules)
    if not (row if inputs or len(shape) > 2 else column):
        kind = "the input" if inputs else "the output"
        raise EditError(
            f"site '{site}': l of shape {shape} is no factor on {kind}, as feedforward_modules says; copy it again"
        )
    lam = vector.reshape(-1).astype(np.float64) - 1.0
    return Edit(lam=lam) if inputs else Edit(output_scale=lam)


def vector_of(site: str, edit: Edit, axes: int) -> Array:
    """``l = 1 + λ`` in float32, in the shape that PEFT gives it; ``axes`` is how many a convolution's kernel has.

    Raises ``EditError`` for an edit that is no single factor, and for a factor too large for float32.
    """
    others = [name for name in edit.tensors() if name not in {"lambda", "out_lambda"}]
    if others:
        raise EditError(f"site '{site}': PEFT's IA3 has no {others[0]}; save as .safetensors")
    if edit.lam is not None and edit.output_scale is not None:
        raise EditError(
            f"site '{site}' scales input and output, and PEFT's IA3 holds one of them; save as .safetensors"
        )
    if axes == 1:
        raise EditError(f"site '{site}' is a Conv1d, which PEFT's IA3 does not know; save as .safetensors")
    lam = edit.lam if edit.lam is not None else edit.output_scale
    assert lam is not None  # the caller passes no empty edit
    vector = _rounded(lam, np.dtype(np.float32))
    if not np.isfinite(vector).all():
        raise EditError(f"site '{site}': 1 + λ is no finite float32; save as .safetensors")
    return vector.reshape((-1, 1) if edit.lam is None and not axes else (1, -1, *([1] * axes)))


def feedforward_modules(edits: Mapping[str, Edit], config: Mapping[str, Any]) -> Any:
    """What PEFT must be told so that it scales the input of exactly the sites whose edit does.

    The config's own if it says so, else the names of those sites, else, where PEFT's comparison by the end of a name
    would take another site along, a regular expression.
    """
    inputs = sorted(site for site, edit in edits.items() if edit.lam is not None)
    for choice in (config.get("feedforward_modules"), inputs):
        if choice is not None and all(_is_feedforward(site, choice) == (site in inputs) for site in edits):
            return choice
    return "|".join(re.escape(site) for site in inputs)


def kept_vectors(edits: Mapping[str, Edit]) -> dict[str, Array]:
    """``SITE/NAME`` → every λ that reading its l would not give back bit for bit, dtype included."""
    return {
        f"{site}/{name}": lam
        for site, edit in edits.items()
        for name, lam in edit.tensors().items()
        if not _same(_rounded(lam, np.dtype(np.float32)).astype(np.float64) - 1.0, lam)
    }


def restored(edits: Mapping[str, Edit], vectors: Mapping[str, Array], kept: Mapping[str, Array]) -> dict[str, Edit]:
    """``edits`` with the λ that were kept, where l is still what they round to; elsewhere l was changed since and wins.

    vectors: site → l as PEFT stores it.
    """
    found = dict(edits)
    for site, edit in edits.items():
        name = "lambda" if edit.lam is not None else "out_lambda"
        lam, vector = kept.get(f"{site}/{name}"), vectors[site].reshape(-1)
        if lam is None or lam.shape != vector.shape or (lam.dtype.kind != "f" and lam.dtype.name != "bfloat16"):
            continue
        if _same(_rounded(lam, vector.dtype), vector):
            found[site] = Edit(lam=lam) if edit.lam is not None else Edit(output_scale=lam)
    return found


def _is_feedforward(site: str, modules: Any) -> bool:
    """PEFT's rule (``_check_target_module_feedforward``): a regular expression, or names by their end."""
    try:
        if isinstance(modules, str):
            return re.fullmatch(modules, site) is not None
        return any(site.endswith(name) for name in modules)
    except (TypeError, re.error) as error:
        raise EditError(
            f"site '{site}': feedforward_modules names no modules ({error}); copy the config again"
        ) from error


def _rounded(lam: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        rounded: Array = (1.0 + lam.astype(np.float64)).astype(dtype)
    return rounded


def _same(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()
