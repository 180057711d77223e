"""Names that somebody may give a file, a sample, a stream or a layer to be more than a name.

They are data: each has a mark of what some destination acts on, and says nothing that would do harm
there. `MARKUP`, `FORMULAS` and so on are by what they try; `NAMES` has all, more than 200.
"""

import itertools

__all__ = ["ADDRESSES", "CONTROLS", "FORMULAS", "LONG", "MARKUP", "NAMES", "NO_UTF8", "UNUSUAL"]

#: Begin a formula in a spreadsheet.
FORMULAS = [
    f"{before}{sign}{body}"
    for before, sign, body in itertools.product(
        ("", " ", "  "), ("=", "+", "-", "@", "＝", "＋", "－", "＠"), ("1+1", "A1&B1.png")
    )
] + [f"{before}=1+1" for before in ("\t", "\r", "\n", "\r\n", "'", "''", '"', ",", ";", "x,", "x;")]

_TAGS = ["b", "i", "a", "img", "script", "style", "svg", "iframe", "details", "div", "code", "pre"]

#: Markdown and HTML.
MARKUP = [
    *(f"<{tag}>text</{tag}>" for tag in _TAGS),
    *(f"x`<{tag} title='x'>`.png" for tag in _TAGS),
    *(f'"><{tag} id="x">' for tag in _TAGS),
    "<!-- comment -->",
    "<!--",
    "-->",
    "<!-- ood-monitor:end -->",
    "<!-- ood-monitor:begin -->",
    "`<!-- ood-monitor:end -->`",
    "<![CDATA[x]]>",
    "&lt;b&gt;",
    "&#60;b&#62;",
    "&amp;",
    "[text](target.png)",
    "![picture](target.png)",
    "[text][1]",
    "[1]: target.png",
    "`][1]`",
    "*bold*",
    "**bold**",
    "__bold__",
    "_it_",
    "~~gone~~",
    "# heading",
    "> quoted",
    "- item",
    "* item",
    "1. item",
    "---",
    "===",
    "| a | b |",
    "|---|---|",
    "a|b",
    "$x$",
    "$$x$$",
    "\\(x\\)",
    "`",
    "``",
    "```",
    "a`b",
    "a``b``c",
    "`a`",
    " `",
    "` ",
    "\\`",
    "a\\",
    "\\[x\\]",
    "{{ 1 + 1 }}",
    "{% if x %}",
    "${x}",
    "%s%n%d",
    "{0}",
    ":smile:",
    "@someone",
    "#12",
]

#: What is made a link of without being asked.
ADDRESSES = [
    *(f"{scheme}://example.org/x" for scheme in ("http", "https", "HTTP", "ftp")),
    *(f"{before}http://example.org" for before in ("x ", "(", "*", "`", "<")),
    "www.example.org",
    "WWW.example.org/x",
    "someone@example.org",
    "mailto:someone@example.org",
    "<mailto:someone@example.org>",
    "javascript:void(0)",
    "data:text/html,x",
    "[x](javascript:void(0))",
    "file:///x",
    "//example.org/x",
]

#: Characters that a terminal, a log or a reader's eye obeys.
CONTROLS = [
    *(f"a{chr(code)}b" for code in [*range(1, 32), *range(127, 160)]),
    *(f"a{chr(code)}b" for code in (0x061C, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0x2060)),
    *(f"a{chr(code)}b" for code in [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF]),
    *(f"a{chr(code)}b" for code in (0xAD, 0xFFF9, 0xE0041, 0xE000, 0xFFFF, 0x10FFFF)),
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\nb: forged line",
    "a\r\nb",
    "a\rb",
    "evil\u202egnp.exe",
]

#: As `os.fsdecode` makes them of bytes, and other halves of pairs.
NO_UTF8 = [
    *(f"a{chr(code)}.png" for code in (0xDC80, 0xDCFF, 0xD800, 0xDBFF, 0xDC00, 0xDFFF)),
    "\udcc3\udc28",
    "\udced\udca0\udc80",
    "=\udc80",
    "`\udc80`",
]

LONG = ["x" * 5000, "`" * 5000, "\u202e" * 5000, "\udc80" * 5000, "<b>" * 2000, "[a](b)" * 1000]

#: No attack, and no plain word either.
UNUSUAL = ["", " ", "  x", "x  ", "名前.png", "ü", "🙂", "a b", "a\u00a0b", "%2e%2e%2f", "../x"]

NAMES = [*FORMULAS, *MARKUP, *ADDRESSES, *CONTROLS, *NO_UTF8, *LONG, *UNUSUAL]
