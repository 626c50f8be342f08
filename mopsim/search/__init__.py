"""Search over strategies: generate, bound, simulate, rank."""

from mopsim.search.driver import search
from mopsim.search.options import Options
from mopsim.search.result import SearchResult

__all__ = ["Options", "SearchResult", "search"]
