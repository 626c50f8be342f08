"""Search over strategies: generate, bound, simulate, rank."""

from mopsim.search.driver import DEFAULT_FAMILIES, Options, SearchResult, search

__all__ = ["DEFAULT_FAMILIES", "Options", "SearchResult", "search"]
