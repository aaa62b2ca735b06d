"""Recipes, one per file; each module has a ``RECIPE``."""

from __future__ import annotations

import importlib
import pkgutil

from deployfa.errors import InputError
from deployfa.recipe import Recipe

__all__ = ["load_recipe", "recipe_names"]


def recipe_names() -> list[str]:
    """Every recipe in this folder, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_recipe(name: str) -> Recipe:
    """The recipe called ``name``; raises ``InputError`` with the ones there are."""
    if name not in recipe_names():
        raise InputError(f"no recipe '{name}'; recipes: {', '.join(recipe_names())}")
    recipe = importlib.import_module(f"deployfa.models.{name}").RECIPE
    assert isinstance(recipe, Recipe)
    return recipe
