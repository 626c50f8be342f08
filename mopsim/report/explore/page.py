"""One HTML file of views: data, style and scripts inside, nothing fetched."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mopsim.common.errors import MopError
from mopsim.report.lanes import NAMES
from mopsim.report.palette import COLOURS, UNKNOWN

View = dict[str, Any]
SCRIPTS = ("core.js", "table.js", "plot.js", "bars.js", "timeline.js", "page.js")
"""In this order: later ones use earlier ones."""


@dataclass(frozen=True)
class Explorer:
    """title: the finding. notes: what a reader must know. facts: what the result is of. views: plain data, as
    the scripts read it; each has `kind` (table, plot, bars, timeline) and `title`."""

    title: str
    summary: str
    views: Sequence[View]
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def html(found: Explorer) -> str:
    """The page. Its content security policy allows the scripts and the style inside by their hash, and no
    address at all. Raises MopError for what JSON cannot hold."""
    texts = files(__package__)
    colours = json.dumps({"named": COLOURS, "unknown": UNKNOWN})
    script = f"const COLOURS = {colours};\nconst NAMES = {json.dumps(NAMES)};\n" + "\n".join(
        texts.joinpath(name).read_text("utf-8") for name in SCRIPTS
    )
    script = f'"use strict";\n(() => {{\n{script}\n}})();\n'
    style = texts.joinpath("style.css").read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    try:
        data = json.dumps(asdict(found), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    except ValueError:
        raise MopError("result: a number in it, or a sum, is beyond 1e308") from None
    environment = Environment(
        loader=PackageLoader("mopsim.report", "explore"), autoescape=True, undefined=StrictUndefined
    )
    template = environment.get_template("page.html.j2")
    return template.render(page=found, policy=policy, script=script, style=style, data=data)


def _hash(text: str) -> str:
    """What a browser compares an inline script or style with."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
