"""Tokenizers side by side: where pieces go, colour on a terminal, and the page in a browser."""

import io
import re
import subprocess
import sys

import pytest

from bert_jax.data.tokenizer import compare, main, table
from bert_jax.data.tokenizer_model import KINDS, load_tokenizer
from bert_jax.data.tokenizer_training import train_tokenizer

TEXT = "Café fora <script>document.title = 'x'</script> 日本"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ESCAPE = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two vocabularies that spell "fora" otherwise."""
    folder = tmp_path_factory.mktemp("compare")
    letters = [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
    found = []
    for name, pieces in (("whole", ["fora", "café"]), ("parts", ["fo", "##ra", "caf"])):
        path = folder / name / "vocab.txt"
        path.parent.mkdir()
        path.write_text("\n".join([*SPECIAL, *pieces, *letters, *"<>/='."]), encoding="utf-8")
        (path.parent / "tokenizer_config.json").write_text('{"do_lower_case": true, "strip_accents": false}')
        found.append(str(path.parent))
    return found


class Terminal(io.StringIO):
    def isatty(self):
        return True


def printed(monkeypatch, paths, *texts, **environment):
    """What `compare` writes to a terminal."""
    monkeypatch.setattr("sys.stdout", Terminal())
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    main(["compare", "--tokenizer", *paths, *(word for text in texts for word in ("--text", text))])
    return sys.stdout.getvalue()


def test_every_piece_is_shown_once():
    prose = ["O cartão de crédito não chegou à estação. São Paulo fica longe; a manhã é fria."] * 20
    tokenizers = [train_tokenizer(kind, iter(prose), vocab_size=300) for kind in KINDS]
    for text in (" Zebra o 日本  cartão! ", "", " \n", "[MASK] fria [SEP]", "um"):
        found = compare(tokenizers, text)
        assert found.words == (text.split() or [""])
        for tokenizer, row in zip(tokenizers, found.pieces, strict=True):
            assert len(row) == len(found.words)
            assert [piece.id for word in row for piece in word] == tokenizer.encode(text).ids[1:-1]
    # A space that is a piece goes with the word behind it.
    bpe = compare(tokenizers, "de São").pieces[KINDS.index("bpe")]
    assert ["".join(piece.text for piece in word) for word in bpe] == ["Ġde", "ĠSÃ£o"]


def test_colour_tells_pieces_apart_and_changes_no_text(monkeypatch, paths):
    coloured = printed(monkeypatch, paths, TEXT, "fora")
    plain = "\n\n".join(table(paths, compare(list(map(load_tokenizer, paths)), text)) for text in (TEXT, "fora"))
    assert ESCAPE.sub("", coloured) == plain + "\n" and ESCAPE.search(plain) is None
    line = next(line for line in coloured.splitlines() if line.startswith("fora"))
    _, first, second = (ESCAPE.findall(cell) for cell in re.split(" {2,}", line))
    assert len(first) == 2 and len(second) == 4  # a shade and its end for each piece
    assert first[0] == second[0] != second[2] and second[1] == "\x1b[0m"
    unknown = {ESCAPE.findall(part)[-1] for part in coloured.split("[UNK]")[:-1]}
    assert len(unknown) == 1 and not unknown & {second[0], second[2]}


def test_columns_stand_below_each_other(monkeypatch, paths):
    """Whatever is in a text: wide characters, accents of their own, what would steer the terminal."""
    shown = printed(monkeypatch, paths, "fora 日本 e\u0301 \x1b[31m \u202ea \udc80", NO_COLOR="1")
    head, *rows = shown.splitlines()
    assert head.split() == ["whole", "parts"]  # the ends of long paths
    assert {r"\x1b[31m", r"\u202ea", r"\udc80"} <= set(shown.split()) and not {"\x1b", "\u202e"} & set(shown)
    for row in rows:
        left = row[: row.index("  ")]
        columns = sum(0 if c == "\u0301" else 2 if c in "日本" else 1 for c in left)
        place = next(place for place in range(len(left), len(row)) if row[place] != " ")
        assert place - len(left) + columns == head.index("whole")


def test_no_colour_where_it_is_not_wanted(monkeypatch, capsys, paths):
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in printed(monkeypatch, paths, TEXT, **environment)
    assert "\x1b" in printed(monkeypatch, paths, TEXT, NO_COLOR="")
    monkeypatch.undo()
    main(["compare", "--tokenizer", *paths, "--text", TEXT])
    assert "\x1b" not in capsys.readouterr().out


def test_bad_output_is_one_line(tmp_path, paths):
    command = [sys.executable, "-m", "bert_jax.data.tokenizer", "compare", "--tokenizer", *paths, "--text", "fora"]
    done = subprocess.run([*command, "--output", tmp_path / "no" / "x.html"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"bert_jax: error: --output .*x\.html: no such folder; .*\n", done.stderr)


def test_page(tmp_path, capsys, paths, opened):
    output = tmp_path / "compare.html"
    main(["compare", "--tokenizer", *paths, "--text", TEXT, "--text", "fora \udc80", "--output", str(output)])
    assert capsys.readouterr().out == f"{output}: 2 texts, 2 tokenizers\n"

    page = opened(output)
    assert page.title().startswith("Tokenizers compared: Café fora <script>") and len(page.title()) <= 100
    assert page.locator("section").count() == 2
    words = page.locator("section").first.locator(".band thead th").all_inner_texts()
    assert words == TEXT.split()

    tokenizers = list(map(load_tokenizer, paths))
    for number, tokenizer in enumerate(tokenizers):
        row = page.locator("section").first.locator(f".band tbody tr:nth-child({number + 1}) .piece")
        assert row.all_inner_texts() == tokenizer.encode(TEXT).tokens[1:-1]
        told = page.locator("section").first.locator("table").first.locator("tbody tr").nth(number).inner_text()
        ids = tokenizer.encode(TEXT).ids[1:-1]
        unknown = ids.count(tokenizer.unk_id)
        assert told.split("\t")[1:] == [str(len(ids)), f"{len(ids) / len(words):.2f}", str(unknown)]
        assert row.locator("xpath=self::*[contains(@class, 'unknown')]").count() == unknown > 0

    tip, last = page.locator("#tip"), page.locator("section").last
    last.locator(".piece").first.hover()
    assert tip.inner_text() == f"id {tokenizers[0].token_to_id('fora')}, piece 1 of 1 in fora"
    page.locator("h1").hover()
    assert not tip.is_visible()
    last.locator(".piece[tabindex='0']").focus()
    for key, piece in (("ArrowDown", "fo"), ("ArrowRight", "##ra"), ("ArrowRight", None), ("ArrowUp", None)):
        page.keyboard.press(key)
        assert piece is None or page.locator(":focus").inner_text() == piece
        assert page.locator(":focus").get_attribute("data-id") and "id" in tip.inner_text()
    assert last.locator("[tabindex='0']").count() == 1

    button = page.get_by_role("button", name="Show ids")
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    shown = "e => getComputedStyle(e, '::after').content"
    assert last.locator(".piece").first.evaluate(shown) == f'"{tokenizers[0].token_to_id("fora")}"'
