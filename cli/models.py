"""``deployfa models``."""

from __future__ import annotations

import msgspec

from deployfa.cli.console import print_json, show
from deployfa.cli.options import Json

__all__ = ["ListedRecipe", "models"]


class ListedRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """One row of ``models --json``."""

    name: str
    task: str
    about: str
    sites: str
    asset: str | None


def models(json: Json = False) -> None:
    """List the recipes: which models are known, what is adapted in them."""
    from deployfa.models import load_recipe, recipe_names

    found = []
    for recipe in map(load_recipe, recipe_names()):
        sites = recipe.sites if isinstance(recipe.sites, str) else ", ".join(recipe.sites)
        found.append(
            ListedRecipe(name=recipe.name, task=recipe.task, about=recipe.about, sites=sites, asset=recipe.asset)
        )
    if json:
        print_json(found)
        return
    from rich.table import Table

    table = Table(title="Recipes (deployfa train --recipe NAME)")
    for column in ("name", "task", "what is adapted", "brings its model"):
        table.add_column(column)
    for listed in found:
        table.add_row(listed.name, listed.task, listed.about, "yes" if listed.asset else "no")
    show(table)
