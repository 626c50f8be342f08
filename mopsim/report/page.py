"""A report: one list of sections, written as Markdown (index.md) and as HTML (index.html) beside its
pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment

from mopsim.common.io import write_text


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading, then text, a table and a picture, each where given. picture: (file name, what it shows)."""

    title: str
    text: str = ""
    table: Table | None = None
    picture: tuple[str, str] | None = None


@dataclass(frozen=True)
class Page:
    """title: the finding. facts: the command that makes the report, profile digest, version, seed."""

    title: str
    summary: str
    sections: Sequence[Section]
    facts: dict[str, str] = field(default_factory=dict)


_MARKDOWN = """# {{ page.title }}

{{ page.summary }}
{% for section in page.sections %}

## {{ section.title }}
{% if section.text %}

{{ section.text }}
{% endif %}
{% if section.table %}

| {{ section.table.columns | join(' | ') }} |
| {{ (['---'] * section.table.columns | length) | join(' | ') }} |
{% for row in section.table.rows %}
| {{ row | join(' | ') }} |
{% endfor %}
{% endif %}
{% if section.picture %}

![{{ section.picture[1] }}]({{ section.picture[0] }})
{% endif %}
{% endfor %}

## How this was made

{% for name, value in page.facts.items() %}
- {{ name }}: `{{ value }}`
{% endfor %}
"""

_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{
page.title }}</title>
<style>
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c2833}
h1{font-size:1.7rem}h2{font-size:1.2rem;margin-top:2.2rem}img{max-width:100%}
table{border-collapse:collapse;font-size:.92rem;display:block;overflow-x:auto}
td,th{padding:.3rem .7rem;border-bottom:1px solid
#d5d8dc;text-align:right}
td:first-child,th:first-child{text-align:left}code{background:#f2f3f4;padding:.1rem .3rem}
</style></head><body>
<h1>{{ page.title }}</h1><p>{{ page.summary }}</p>
{% for section in page.sections %}<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.table %}<table><tr>{% for name in section.table.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in section.table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
{% if section.picture %}<p><img src="{{ section.picture[0] }}" alt="{{ section.picture[1] }}"></p>{% endif %}
{% endfor %}<h2>How this was made</h2><ul>
{% for name, value in page.facts.items() %}<li>{{ name }}: <code>{{ value }}</code></li>
{% endfor %}</ul></body></html>
"""


def write_page(folder: Path, page: Page) -> list[Path]:
    """Write index.md and index.html into `folder`; returns both paths."""
    written = []
    for name, text, escape in (("index.md", _MARKDOWN, False), ("index.html", _HTML, True)):
        template = Environment(autoescape=escape, trim_blocks=True, keep_trailing_newline=True).from_string(
            text
        )
        write_text(folder / name, template.render(page=page))
        written.append(folder / name)
    return written
