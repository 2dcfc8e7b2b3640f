"""What the HTML pages of attr-batch have in common: the shell, the tables of facts, the escaping.

A page is self-contained: its own style and SVG, pictures as data URIs, no script; its content
security policy forbids the rest. Every text that came from outside goes through `safe`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from attr_batch.figures import visible

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(
    title: str,
    header: str,
    sections: Iterable[tuple[str, str, str]],
    footer: str,
    banner: str = "",
    styles: Sequence[str] = ("report.css",),
) -> str:
    """Return a whole page; the same input gives the same bytes.

    `header` and the bodies of `sections`, (key, heading, body), are HTML; `title`, `footer` and
    `banner`, a warning above everything, are text. Sections without a body are left out. `styles`
    are style sheets of this package, the later ones winning.
    """
    sections = [(key, heading, body) for key, heading, body in sections if body]
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections)
    bodies = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{heading}</h2>{body}</section>'
        for key, heading, body in sections
    )
    css = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in styles)
    warning = f'<p class="provisional" role="status">{safe(banner)}</p>' if banner else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{safe(title)}</title>"
        f"<style>\n{css}</style></head>\n<body>{warning}"
        f"<header>{header}</header>"
        f'<nav aria-label="Sections">{links}</nav>\n<main>{bodies}</main>\n'
        f"<footer><p>{safe(footer)}</p></footer></body></html>\n"
    )


def facts_table(rows: Iterable[tuple[str, str]], style: str = "") -> str:
    """Return a table of (name, text), both escaped; `style` is the class of the texts."""
    body = "".join(
        f'<tr><th scope="row">{safe(name)}</th><td class="{style}">{safe(text)}</td></tr>'
        for name, text in rows
    )
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def plate(svg: str, caption: str) -> str:
    """Return a figure with its caption, which is HTML."""
    return f'<figure class="plate">{svg}<figcaption>{caption}</figcaption></figure>'


def items(texts: Iterable[str]) -> str:
    """Return texts as list items."""
    return "".join(f"<li>{safe(text)}</li>" for text in texts)


def bullets(texts: Iterable[str]) -> str:
    """Return texts as a list."""
    return f"<ul>{items(texts)}</ul>"


def safe(text: str) -> str:
    """Return text from outside as HTML that shows it and does nothing else."""
    return html.escape(visible(text), quote=True)


def upper(text: str) -> str:
    """Return text with a capital first; str.capitalize would lower the rest of a name."""
    return text[:1].upper() + text[1:]


def duration(seconds: float) -> str:
    """Return seconds as "3.5 s", "2 min 05 s" or "1 h 10 min"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
