"""Which way of hardening is best for this model: a search over recipes, by audits of each."""

from lightning_cwrf.searching.candidates import default_candidates
from lightning_cwrf.searching.page import write_search_report
from lightning_cwrf.searching.result import RecipeSearch, Trial
from lightning_cwrf.searching.run import search_recipes

__all__ = ["RecipeSearch", "Trial", "default_candidates", "search_recipes", "write_search_report"]
