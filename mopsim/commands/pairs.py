"""Which options of mopsim's commands mean nothing beside which others."""

from mopsim.common.pairs import Given, Pair, apart, needs, paired


def _searched(given: Given) -> bool:
    from mopsim.strategies import FAMILIES

    return any(one in FAMILIES for one in given.get("--strategy", ()))


COMPARE = paired(
    needs("--sweep", "--hold"),
    needs("--out", "--format"),
    Pair(("--budget", "--runnable"), _searched, "is for the search of a family, and --strategy names none"),
)
SIZE = paired(
    needs("--days", "--confidence"),
    needs("--buy", "--capex", "--years"),
    apart("--buy", "--reserved", "--price"),
)
VALIDATE = paired(
    needs("--sealed", "--measurements"),
    apart(
        "--sealed", "--runs", "--models", "--components", "--cases", "--stack", "--out", "--format", "--jobs",
        "--hold-out", "--interval",
    ),
    needs("--runs", "--models"),
    needs("--out", "--format"),
    needs("--runs, --cases", "--stack", "--jobs", "--hold-out", "--interval"),
)  # fmt: skip
EXPLORE = paired(
    Pair(
        ("--model", "--hardware"),
        lambda given: given.get("--timelines") != 0,
        "has no use beside --timelines 0",
    )
)
PROFILE_NEW = paired(apart("--near", "--architecture"))
OF = {
    "compare": COMPARE, "size": SIZE, "validate": VALIDATE, "explore": EXPLORE, "profile new": PROFILE_NEW,
}  # fmt: skip
"""By command."""
