"""Rendering: templates of this package, with everything escaped that they show."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from glu4.pages import numbers

__all__ = ["clean", "render"]

# what no HTML document may hold, not even as a reference (HTML standard, 13.2.3.5 and 13.2.5): controls, lone surrogates and
# noncharacters; and the marks that turn the direction of what follows, with which text can be made to look like other text
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\u202a-\u202e\u2066-\u2069"
    + "".join(chr(plane << 16 | last) for plane in range(1, 17) for last in (0xFFFE, 0xFFFF))
    + "]"
)


def clean(text: str) -> str:
    """The text with U+FFFD for each character that an HTML page cannot hold."""
    return _FORBIDDEN.sub("\ufffd", text)


def render(name: str, **values: Any) -> str:
    """The page that the template of that name makes. Raises ImportError without jinja2, saying what to install."""
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError('the page needs jinja2: pip install "glu4[report]"') from error

    def load(template: str) -> str:
        return (files("glu4.pages") / template).read_text(encoding="utf-8")

    def finalize(value: Any) -> Any:
        return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value)

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(load),
        finalize=finalize,
    )
    for written in (numbers.day, numbers.interval, numbers.microseconds, numbers.moment, numbers.percent, numbers.plain):
        environment.filters[written.__name__] = written
    environment.filters["ratio"] = numbers.ratio
    return environment.get_template(name).render(**values)
