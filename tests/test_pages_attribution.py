"""The page of word importance in a real browser: what it shows, by mouse and by keys, and that it fetches nothing."""

import pytest

from bert_jax.explain.attribution import Asked, Attribution, Piece, Word, page_row
from bert_jax.page import render

SCRIPT = '<script>window.hacked=1</script> "said" & <b>done</b>'


def explained(text, scores, *, target="positive", probability=0.93, delta=0.001):
    """An attribution in which words are what stands between spaces; the second has two pieces."""
    words, pieces, end = [], [Piece("[CLS]", 0.05, True)], 0
    for number, (word, score) in enumerate(zip(text.split(), scores, strict=True)):
        start = text.index(word, end)
        end, first = start + len(word), len(pieces)
        parts = [word[:2], f"##{word[2:]}"] if number == 1 else [word]
        pieces += [Piece(part, score / len(parts), False) for part in parts]
        words.append(Word(word, score, 0, start, end, first, len(pieces), number == 2))
    pieces.append(Piece("[SEP]", -0.01, True))
    total = sum(piece.score for piece in pieces)
    return Attribution(words, pieces, target, probability, target, "", total, 2.5, 2.5 - total + delta, delta, False)


def write(path, rows):
    facts = {"kind": "classify", "steps": 64, "baseline": "pad", "model": "the/model", "texts": len(rows)}
    path.write_text(render("Word importance", "attribution", facts | {"judged": True, "rows": rows}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    good, bad, odd = "a truly fine film", "a dull and tired plot that drags", SCRIPT
    rows = [
        page_row(Asked(good, None, "positive"), explained(good, [0.01, 0.4, 1.2, -0.3])),
        page_row(Asked(bad, None, "negative"), explained(bad, [0.0, -1.5, 0.1, -0.9, 0.2, 0.0, -0.4], probability=0.6)),
        page_row(Asked(odd, None, None), explained(odd, [0.1, -0.2, 0.3, 0.4], target='a "label" <i>', delta=0.5)),
    ]
    return write(tmp_path_factory.mktemp("page") / "words.html", rows)


@pytest.fixture
def page(opened, file):
    """The page, open."""
    return opened(file)


def words_of(page, row):
    return page.locator("#rows tr").nth(row).locator(".word")


def test_a_row_has_the_fields_columns(page):
    heads = [" ".join(text.split()) for text in page.locator("thead th").all_inner_texts()]
    assert heads == [
        "True label",
        "Predicted label (probability)",
        "Attribution label",
        "Attribution score",
        "Convergence delta",
        "Word importance",
    ]
    cells = page.locator("#rows tr").first.locator("td").all_inner_texts()
    assert cells[0] == "positive" and cells[1] == "positive (0.93)" and cells[2] == "positive"
    assert cells[3].startswith("+1.350") and cells[4].startswith("+0.001")
    assert cells[5].strip() == "[CLS] a truly fine film [SEP]"
    second = page.locator("#rows tr").nth(1).locator("td")
    assert "not the true label" in second.nth(1).inner_text()
    assert "more steps" not in second.nth(4).inner_text()
    assert "only this part" not in page.locator("#rows").inner_text()  # none of them was cut
    assert "more steps" in page.locator("#rows tr").nth(2).locator("td").nth(4).inner_text()
    assert "64 steps, baseline pad" in page.locator("#facts").inner_text()


def test_text_is_shown_as_text(page):
    row = page.locator("#rows tr").nth(2)
    assert SCRIPT in row.inner_text() and 'a "label" <i>' in row.inner_text()
    assert page.evaluate("window.hacked") is None and page.locator("#rows b, #rows i, #rows script").count() == 0


def test_sign_and_strength_do_not_need_colour(page):
    fine, film, a = (words_of(page, 0).filter(has_text=text).first for text in ("fine", "film", "a"))

    def style(word, name):
        return word.evaluate(f"word => getComputedStyle(word).{name}")

    assert style(fine, "borderBottomStyle") == "solid" and style(film, "borderBottomStyle") == "double"
    assert style(a, "borderBottomColor") == "rgba(0, 0, 0, 0)"  # of no part
    sign = "word => getComputedStyle(word, '::after').content"
    assert fine.evaluate(sign).startswith('"+"') and film.evaluate(sign).startswith('"\u2212"')
    assert fine.get_attribute("aria-label") == "fine, plus 1.200"
    assert style(fine, "boxShadow") != "none" and style(film, "boxShadow") == "none"  # the third word is asked for


def test_a_word_tells_its_score_when_pointed_at(page):
    tip = page.locator("#tip")
    assert not tip.is_visible()
    words_of(page, 0).filter(has_text="truly").hover()
    assert tip.is_visible() and tip.inner_text().split("\n") == [
        "truly",
        "+0.400, 33 % of the strongest",
        "tr +0.200",
        "##uly +0.200",
    ]
    page.mouse.move(600, 10)
    assert not tip.is_visible()


def test_keys_lead_through_the_words(page):
    """One stop of the tab key a row; arrow keys move inside it and to other rows."""
    assert page.locator('#rows [tabindex="0"]').count() == 3
    page.locator("#unit").focus()
    page.keyboard.press("Tab")
    focus = "document.activeElement.textContent"
    assert page.evaluate(focus) == "fine" and "+1.200" in page.locator("#tip").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focus) == "film" and "\u22120.300" in page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    page.keyboard.press("Home")
    assert page.evaluate(focus) == "[CLS]"
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focus) == "[CLS]"
    page.keyboard.press("End")
    assert page.evaluate(focus) == "[SEP]"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focus) == "dull"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focus) == "[SEP]"  # where the row was left
    assert page.locator('#rows [tabindex="0"]').count() == 3


def test_rows_are_found_and_put_in_order(page):
    def firsts():
        return [words_of(page, row).nth(1).inner_text() for row in range(page.locator("#rows tr").count())]

    assert firsts() == ["a", "a", "<script>window.hacked=1</script>"]
    page.locator("#search").fill("DULL and")
    assert page.locator("#rows tr").count() == 1 and page.locator("#shown").inner_text() == "1 of 3 texts"
    page.locator("#search").fill("")
    page.locator("#order").select_option("wrong")
    assert "dull" in page.locator("#rows tr").first.inner_text()
    page.locator("#order").select_option("total")
    totals = [float(text[:6].replace("\u2212", "-")) for text in page.locator("td:nth-child(4)").all_inner_texts()]
    assert totals == sorted(totals, reverse=True)


def test_pieces_instead_of_words(page):
    page.locator("#unit").select_option("pieces")
    assert words_of(page, 0).all_inner_texts() == ["[CLS]", "a", "tr", "##uly", "fine", "film", "[SEP]"]
    page.locator("#unit").select_option("words")
    assert words_of(page, 0).all_inner_texts() == ["[CLS]", "a", "truly", "fine", "film", "[SEP]"]


@pytest.mark.parametrize("scheme, ground", [("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 28)")])
def test_light_and_dark(page, scheme, ground):
    """In both, words are told from their ground by 4.5 to 1 (WCAG 2.2, 1.4.3), the strongest too."""
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    contrast = page.evaluate(
        """() => {
          const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
          const light = (rgb) => rgb.map((part) => part / 255)
            .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
            .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
          const base = numbers(getComputedStyle(document.body).backgroundColor);
          return [...document.querySelectorAll('.word')].map((word) => {
            const style = getComputedStyle(word);
            const [r, g, b, alpha = 1] = numbers(style.backgroundColor);
            const ground = [r, g, b].map((part, place) => alpha * part + (1 - alpha) * base[place]);
            const [one, other] = [light(ground), light(numbers(style.color).slice(0, 3))].sort((x, y) => y - x);
            return (one + 0.05) / (other + 0.05);
          });
        }"""
    )
    assert min(contrast) >= 4.5


def test_print_leaves_the_controls_out(page):
    page.emulate_media(media="print")
    assert not page.locator(".controls").is_visible() and words_of(page, 0).first.is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_hundred_long_reviews_are_shown(opened, tmp_path):
    text = " ".join(f"word{number}" for number in range(200))
    scores = [((number * 37) % 100 - 50) / 50 for number in range(200)]
    file = write(tmp_path / "many.html", [page_row(Asked(text, None, None), explained(text, scores))] * 100)
    assert file.stat().st_size < 3_000_000
    page = opened(file)
    assert page.locator("#rows .word").count() == 100 * 202
    page.locator("#unit").select_option("pieces")
    assert page.locator("#rows .word").count() == 100 * 203
    assert page.locator(".true-column").count() == 0  # nobody knows the true labels
