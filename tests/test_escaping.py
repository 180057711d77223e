"""Names on their way out: what each destination would act on is not in what it is given."""

import csv
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from support.hostile_names import NAMES

from ood_monitor import escaping

PLAIN = ["up_blocks.3/conv.weight", "inbox/0001.png", "log_likelihood", "camera 1", "名前.png"]

#: What a note is made of; everything else that Markdown knows is more than a name.
ALLOWED = {"paragraph_open", "paragraph_close", "inline", "text", "code_inline"}

#: What renderers make links and mentions of by themselves, some of them in text that is escaped.
UNASKED = re.compile(r"://|www\.|@\w", re.IGNORECASE)


def test_there_are_as_many_names_as_we_claim() -> None:
    assert len(set(NAMES)) >= 200


@pytest.mark.parametrize("name", sorted(set(escaping.__all__) - {"csv_text"}))
def test_all_that_goes_out_is_utf8(name: str) -> None:
    escape: Callable[[str], str] = getattr(escaping, name)
    for text in NAMES:
        escape(text).encode("utf-8")


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_name_stays_as_it_is(text: str) -> None:
    escaped = [escaping.utf8, escaping.terminal, escaping.csv_cell, escaping.html]
    assert {escape(text) for escape in escaped} == {text}
    assert escaping.markdown_code(text) == f"`{text}`"


def test_a_terminal_gets_one_line_that_it_shows() -> None:
    assert [name for name in NAMES if not escaping.terminal(name).isprintable()] == []


def test_a_terminal_shows_what_was_there() -> None:
    assert escaping.terminal("a\x1b[0m\n\u202e\udc80") == r"a\x1b[0m\x0a\u202e\udc80"


def test_no_cell_is_a_formula_and_each_is_one() -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([escaping.csv_cell(name)] for name in NAMES)
    rows = list(csv.reader(io.StringIO(file.getvalue(), newline="")))
    assert file.getvalue().count("\n") == len(NAMES)
    cells = [row[0] if row else "" for row in rows]
    assert [cell for cell in cells if cell.lstrip()[:1] in tuple("=+-@＝＋－＠\t\r\n")] == []
    assert [escaping.csv_text(cell) for cell in cells] == list(map(escaping.terminal, NAMES))


def test_a_cell_that_is_text_already_is_told_from_one_that_was_made_so() -> None:
    assert escaping.csv_cell("=1") == "'=1"
    assert escaping.csv_cell("'=1") == "''=1"
    assert escaping.csv_text(escaping.csv_cell("'=1")) == "'=1"


def parsed(markdown: str) -> list[tuple[str, str]]:
    """Kinds and contents of all that a page of Markdown holds."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = tokens.parse(markdown)
    inner = [child for token in found for child in token.children or []]
    return [(token.type, token.content) for token in [*found, *inner]]


@pytest.mark.parametrize("escape", [escaping.markdown_code, escaping.markdown_text])
def test_markdown_makes_nothing_but_text_of_a_name(escape: Callable[[str], str]) -> None:
    for name in NAMES:
        for around in ("{}", "(drift, stream {}, 3 samples)", "Layers: {}, {}"):
            page = around.format(*[escape(name)] * 2)
            found = parsed(page)
            assert {kind for kind, _ in found} <= ALLOWED, (name, page)
            text = "".join(content for kind, content in found if kind == "text")
            assert not UNASKED.search(text), (name, page)
            assert not re.search(r"<|>|\n", page), (name, page)


def test_a_name_is_in_one_span_of_code() -> None:
    for name in NAMES:
        kinds = [kind for kind, _ in parsed(f"x {escaping.markdown_code(name)} y")]
        assert kinds.count("code_inline") == 1, name


def test_a_sentence_reads_as_it_was_written() -> None:
    text = "Drift: 3 of 1,234 at p-value 0.004 (about 2e-5); `x_y` <b> 5 % *so*"
    assert "".join(c for kind, c in parsed(escaping.markdown_text(text)) if kind == "text") == text


def test_what_is_long_leaves_room_for_the_rest() -> None:
    for name in NAMES:
        assert len(escaping.markdown_code(name)) <= 163
        assert len(escaping.markdown_text(name)) <= 1501
    assert escaping.markdown_code("a/" * 200 + "end.png").endswith("a/end.png`")


class Elements(HTMLParser):
    """The elements, comments and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(f"{tag} {sorted(name for name, _ in attributes)}")
        self.text += "".join(str(value) for _, value in attributes)

    def handle_comment(self, data: str) -> None:
        self.tags.append(data)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_shows_a_name_and_makes_nothing_of_it() -> None:
    for name in NAMES:
        found = Elements(f'<p title="{escaping.html(name)}">{escaping.html(name)}</p>')
        assert found.tags == ["p ['title']"], name
        assert found.text.replace("\n", "").isprintable(), name
