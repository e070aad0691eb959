"""Write a report's blocks as HTML: one file with its style, script, figures and frames.

Not a program; make_report.py uses it. report_page.html is the page, with {{PLACES}} to fill. The
script there draws the player from {{DATA}}: `sheets` (data URIs; a sheet has all frames of a kind
in rows), `runs` (each with the numbers of its three sheets, its colour and its PSNR by frame),
`tick` and `scale`.
"""

import base64
import html
import io
import json
import mimetypes
import re
import urllib.parse
from pathlib import Path

from PIL import Image

PAGE = Path(__file__).with_suffix(".html")
PLACE = re.compile(r"\{\{([A-Z]+)\}\}")
FORMULA = re.compile(r"\$\$.+?\$\$|\$[^\s$](?:[^$\n]*[^\s$])?\$", re.S)


def inline(text):
    """Return escaped text with `code` marked up."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


# ---------------------------------------------------------------- the writer's Markdown


def formula(state, silent):
    """Match $...$ or $$...$$ as a markdown-it rule, so that its * and _ mark nothing up."""
    match = FORMULA.match(state.src, state.pos)
    if not match:
        return False
    if not silent:
        state.push("formula", "", 0).content = match[0]
    state.pos = match.end()
    return True


def embed(folder, source):
    """Return an image file inside `folder` as a data URI; None where it isn't one."""
    try:
        path = (folder / source).resolve()
        kind = mimetypes.guess_type(path.name)[0] or ""
        inside = path.is_relative_to(folder.resolve()) and kind.startswith("image/")
        return (
            f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}" if inside else None
        )
    except (OSError, ValueError):
        return None


def markdown_renderer(folder):
    """Return a function from Markdown to HTML; None where markdown-it-py is not installed."""
    try:
        from markdown_it import MarkdownIt  # optional: requirements-dev.txt
    except ImportError:
        return None
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(
        ["table", "strikethrough"]
    )
    parser.inline.ruler.before("escape", "formula", formula)

    def show_formula(renderer, tokens, index, options, env):
        return f'<span class="formula">{html.escape(tokens[index].content)}</span>'

    def show_image(renderer, tokens, index, options, env):
        token = tokens[index]
        name = urllib.parse.unquote(token.attrGet("src") or "")  # a space is %20 there
        data = embed(folder, name)
        said = html.escape(token.content)
        if data is None:
            return f"<em>[{said or 'image'}: no image {html.escape(name)} beside report.md]</em>"
        return f'<img src="{data}" alt="{said}">'

    parser.add_render_rule("formula", show_formula)
    parser.add_render_rule("image", show_image)
    return parser.render


def written(text, render):
    """Return the user's text as HTML, plain where there is no renderer, and its place's class."""
    if not text or render is None:
        return html.escape(text), "analysis"
    rendered = render(text).strip()
    return label_columns(rendered), "analysis written"


def label_columns(text):
    """Return HTML whose table cells have the names of their columns, for narrow screens."""

    def one(match):
        heads = [
            re.sub("<[^>]+>", "", h) for h in re.findall(r"<th[^>]*>(.*?)</th>", match[0], re.S)
        ]
        row = lambda m: number_cells(m[0], heads)
        return re.sub(r"<tr>.*?</tr>", row, match[0], flags=re.S)

    return re.sub(r"<table>.*?</table>", one, text, flags=re.S)


def number_cells(row, heads):
    """Return a table row whose cells have the names of their columns."""
    names = iter(heads)
    return re.sub(r"<td", lambda _: f'<td data-column="{next(names, "")}"', row)


# ---------------------------------------------------------------- blocks


def html_table(rows):
    """Return a table with a header row as HTML."""
    head = "".join(f"<th>{inline(cell)}</th>" for cell in rows[0])
    names = [html.escape(cell.replace("`", "")) for cell in rows[0]]
    body = "".join(
        "<tr>"
        + "".join(f'<td data-column="{name}">{inline(cell)}</td>' for name, cell in zip(names, row))
        + "</tr>"
        for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_pairs(rows):
    """Return a long list of pairs as HTML, set in columns; the header row is left out."""
    pairs = "".join(
        f"<div><span>{inline(a)}</span><span>{inline(b)}</span></div>" for a, b in rows[1:]
    )
    return f'<div class="pairs">{pairs}</div>'


def html_figure(image, caption):
    """Return a PNG's bytes as an HTML figure; its letters are about as large as the page's."""
    width = round(Image.open(io.BytesIO(image)).width * 0.72)
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{width}" '
        f'alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def html_code(found):
    """Return functions as HTML, each under its file and line."""
    return "".join(
        f'<p class="place"><code>{f.name}</code> in {f.file}, line {f.line}</p>'
        f"<pre>{html.escape(f.text)}</pre>"
        for f in found
    )


def html_analysis(key, prompt, text, render):
    """Return a place for the user's analysis as HTML, with the text written so far."""
    inside, kind = written(text, render)
    return (
        f'<div class="{kind}" contenteditable="true" role="textbox" aria-multiline="true" '
        f'data-key="{key}" '
        f'data-placeholder="Your text ({key}): {html.escape(prompt)}">{inside}</div>'
    )


def write_body(blocks, analysis, figures, render):
    """Return the blocks as HTML."""
    out = []
    for kind, content in blocks:
        if kind == "h2":
            out.append(f"<h2>{html.escape(content)}</h2>")
        elif kind == "h2 same":  # on the page that is begun
            out.append(f'<h2 class="same">{html.escape(content)}</h2>')
        elif kind == "h3":
            out.append(f"<h3>{html.escape(content)}</h3>")
        elif kind in ("p", "missing"):
            out.append(f"<p>{inline(content)}</p>")
        elif kind == "table":
            out.append(html_table(content))
        elif kind == "pairs":
            out.append(html_pairs(content))
        elif kind == "figure":
            out.append(html_figure(figures[content[0]], content[1]))
        elif kind == "code":
            out.append(html_code(content))
        elif kind == "player":
            out.append('<section id="player"></section>')
            out.append(f'<p class="small screen">{html.escape(content)}</p>' if content else "")
        elif kind == "analysis":
            out.append(html_analysis(*content, analysis.get(content[0], ""), render))
    return "\n".join(out)


def write_page(blocks, title, who, name, analysis, figures, data, render):
    """Return the whole page as text; a browser saves its PDF under `name`."""
    parts = {
        "TITLE": html.escape(title),
        "NAME": html.escape(name),
        "WHO": f'<p class="who">{html.escape(who)}</p>' if who else "",
        "BODY": write_body(blocks, analysis, figures, render),
        # "<" is escaped so that no name can end the script element
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }
    return PLACE.sub(lambda match: parts[match[1]], PAGE.read_text(encoding="utf-8"))
