"""What a row does, as edits: the way back from a row, up to the rounding that made it."""

from __future__ import annotations

from collections.abc import Mapping

from deployfa.edits import Array, Edit, LowRank
from deployfa.tables.layout import Layout

__all__ = ["row_edits"]


def row_edits(row: Mapping[str, Array], layout: Layout) -> dict[str, Edit]:
    """Site → its edit, without what is zero, and so empty for the base's row.  Heads are no edits.

    A low rank is ``A = row.T: (r, k)``, ``B = row.T: (width, r)``, ``s = 1``, r the room that the layout has; a LoRFA
    that lies on the output comes back as the LoRA that equals it.
    """
    parts: dict[str, dict[str, Array]] = {}
    for vectors in layout.vectors:
        for segment in vectors.segments:
            parts.setdefault(segment.site, {})[vectors.part] = row[vectors.name][segment.start : segment.stop]
    edits = {
        site: Edit.from_tensors(site, {n: a for n, a in given.items() if a.any()}) for site, given in parts.items()
    }
    for low in layout.low_ranks:
        for number, site in enumerate(low.sites):
            a = row[low.a_name][:, number * low.rank : (number + 1) * low.rank].T
            b = row[low.b_name(site)].T
            if not (a.any() and b.any()):
                continue
            known = edits.get(site, Edit()).tensors()
            own = LowRank(a, b, 1.0)
            edit = Edit(input_low_rank=own) if low.where == "input" else Edit(output_low_rank=own)
            edits[site] = Edit.from_tensors(site, {**known, **edit.tensors()})
    return {site: edit for site, edit in edits.items() if edit.tensors()}
