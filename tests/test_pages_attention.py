"""The attention page in a browser: it shows the model's numbers, by mouse and by keyboard, and nothing leaves it."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from bert_jax import convert, load
from bert_jax.explain.attention import Maps, maps, page, patterns
from bert_jax.tasks import pretrain

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
expect = sync_api.expect
TEXT, PAIR = "The function returns a value.", 'It is "<script>alert(1)</script>" & more'


@pytest.fixture(scope="module")
def found(small_config, tokenizer, tmp_path_factory):
    """What a small model, far from zero weights, makes of a pair."""
    config = dataclasses.replace(small_config.model, initializer_range=0.3)
    folder = str(tmp_path_factory.mktemp("model") / "m")
    params = jax.device_get(jax.jit(lambda key: pretrain.init(config, key))(jax.random.key(0)))
    convert.save_model(folder, params, config, tokenizer)
    return maps(load(folder), TEXT, PAIR)


@pytest.fixture(scope="module")
def path(found, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "a page.html"
    file.write_text(page(found, patterns(found), "a model", [TEXT, PAIR]), encoding="utf-8")
    return file


def close_to(weight):
    return pytest.approx(float(weight), abs=2e-4)  # four digits, and what the page's 16 bits lose


def listed(window):
    """(from, to, weight, head) of each line in the list beside the tokens."""
    form = re.compile(r"“.*” \((\d+)\) → “.*” \((\d+)\) (\d\.\d+) head (\d+)")
    rows = [form.fullmatch(text).groups() for text in window.locator("#strongest li").all_inner_texts()]
    return [(int(start), int(end), float(weight), int(head)) for start, end, weight, head in rows]


def choose(window, layer, *heads):
    """Layer and heads of the head view."""
    window.select_option("#layer", str(layer))
    window.click("#none")
    for head in heads:
        window.locator("#chosen button").nth(head).click()


def test_tabs_by_mouse_and_keyboard(path, opened):
    window = opened(path)
    views = {"Head view": "heads", "Model view": "model", "Neuron view": "neurons", "Patterns": "patterns"}

    def expect_open(name):
        expect(window.get_by_role("tab", selected=True)).to_have_text(name)
        expect(window.get_by_role("tabpanel")).to_have_count(1)
        expect(window.locator(f"#{views[name]}")).to_be_visible()

    for name in [*views, "Head view"]:
        window.get_by_role("tab", name=name).click()
        expect_open(name)
    for name in [*views][1:]:
        window.keyboard.press("ArrowRight")
        expect_open(name)
    for key, name in (("ArrowLeft", "Neuron view"), ("Home", "Head view"), ("End", "Patterns")):
        window.keyboard.press(key)
        expect_open(name)


def test_text_is_shown_as_text(path, found, opened):
    window = opened(path)
    assert window.locator("#given span").all_inner_texts() == [TEXT, PAIR]
    assert {'"', "<", ">"} <= set(found.tokens)
    for side in ("query", "key"):
        assert window.locator(f".side.{side} .token").all_inner_texts() == found.tokens
    window.click("#tab-neurons")
    numbered = [f"{number}: {token}" for number, token in enumerate(found.tokens)]
    assert window.locator("#query option").all_inner_texts() == numbered
    assert window.locator("script").count() == 2  # data and program


def test_a_token_shows_where_it_looks_and_who_looks_at_it(path, found, opened):
    window = opened(path)
    choose(window, 1, 3)
    whole = listed(window)
    assert [weight for *_, weight, _ in whole] == sorted((weight for *_, weight, _ in whole), reverse=True)
    assert whole[0][2] == close_to(found.probabilities[1, 3].max())
    for side, axis in (("query", 0), ("key", 1)):
        window.locator(f".side.{side} .token").nth(4).hover()
        shown, weights = listed(window), found.probabilities[1, 3].take(4, axis)
        assert len(shown) == 10 and {row[axis] for row in shown} == {4}
        for *places, weight, head in shown:
            assert head == 3 and weight == close_to(weights[places[1 - axis]])
        assert shown[0][2] == close_to(weights.max())
        assert f"“{found.tokens[shown[0][1 - axis]]}”" in window.inner_text("#told")
        drawn = (weights >= 0.02 * weights.max()).sum()
        assert abs(window.locator("#lines line").count() - drawn) <= 1  # one may be at the bound
    window.mouse.move(0, 0)
    assert listed(window) == whole


def test_heads_have_a_line_style_and_a_name_each(path, found, opened):
    window = opened(path)
    window.click("#every")
    legend, names = window.inner_text("#legend"), patterns(found).names
    for head in range(4):
        assert f"head {head} (" in legend
        label = window.locator("#chosen button").nth(head).get_attribute("title")
        assert f"Head {head}: {names[int(window.input_value('#layer'))][head]}" in label
    for dashes in ("", "8 4", "2 3", "12 3 2 3"):
        expect(window.locator(f"#lines line[stroke-dasharray='{dashes}']").first).to_be_attached()
    window.click("#none")
    assert window.locator("#lines line").count() == 0 and window.inner_text("#title") == "No head is chosen"


def test_sentences_can_be_looked_at_apart(path, found, opened):
    window = opened(path)
    choose(window, 0, 1)
    for label, (first, second) in {
        "sentence A to B": (0, 1),
        "sentence B to A": (1, 0),
        "sentence B to B": (1, 1),
    }.items():
        window.select_option("#filter", label=label)
        mask = (found.type_ids[:, None] == first) & (found.type_ids == second)
        shown = listed(window)
        assert all(mask[start, end] for start, end, *_ in shown)
        assert shown[0][2] == close_to(found.probabilities[0, 1][mask].max())
        assert label in window.inner_text("#legend")


def test_the_keyboard_keeps_a_token_and_goes_on_to_its_numbers(path, found, opened):
    window = opened(path)
    choose(window, 0, 2)
    window.locator(".side.query .token").first.focus()
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        window.keyboard.press(key)
    kept = listed(window)
    assert {row[0] for row in kept} == {2}
    window.keyboard.press("Tab")  # the other column
    assert {row[1] for row in listed(window)} == {0}
    window.keyboard.press("Tab")  # the list of what was shown last
    window.keyboard.press("Enter")
    expect(window.get_by_role("tab", selected=True)).to_have_text("Neuron view")
    assert "Layer 0, head 2" in window.inner_text("#pair")
    window.click("#tab-heads")
    assert listed(window) == kept
    window.locator(".side.query .token").nth(2).focus()
    window.keyboard.press("Escape")
    assert listed(window)[0][2] == close_to(found.probabilities[0, 2].max())


def test_a_map_is_enlarged_and_read(path, found, opened):
    window = opened(path)
    window.click("#tab-model")
    expect(window.locator("#grid")).to_have_attribute("data-painted", "8")
    button = window.locator("#grid button").nth(6)
    assert "Layer 1, head 2" in button.get_attribute("aria-label")
    button.focus()
    window.keyboard.press("Enter")
    assert window.inner_text("#one-title").startswith("Layer 1, head 2")
    assert window.locator("#large .left .label").all_inner_texts() == found.tokens
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        window.keyboard.press(key)

    def expect_cell(i, j):
        tokens = found.tokens
        form = re.escape(f"“{tokens[i]}” ({i}) looks at “{tokens[j]}” ({j}): ") + r"(\d\.\d+)"
        text = re.fullmatch(form, window.inner_text("#cell"))
        assert text and float(text[1]) == close_to(found.probabilities[1, 2, i, j])

    expect_cell(2, 1)
    canvas, size = window.locator("#map"), len(found.tokens)
    cell = canvas.bounding_box()["width"] / size
    canvas.hover(position={"x": 5.5 * cell, "y": 7.5 * cell})
    expect_cell(7, 5)
    window.keyboard.press("Escape")
    expect(button).to_be_focused()
    button.click()
    window.click("#lines-of")
    expect(window.locator("#heads")).to_be_visible()
    assert window.inner_text("#legend").startswith("Layer 1. head 2 (")


def test_neurons_add_up(path, found, opened):
    window = opened(path)
    window.click("#tab-neurons")
    for name, value in {"neuron-layer": 1, "neuron-head": 0, "query": 3, "key": 6}.items():
        window.select_option(f"#{name}", str(value))
    query, key = found.query[1, 0], found.key[1, 0]
    dot = query[3] @ key[6]
    form = r"query · key = (\S+); divided by √8: (\S+); softmax over all keys: (\S+)"
    numbers = re.fullmatch(form, window.inner_text("#sum")).groups()
    expected = [dot, dot / 8**0.5, found.probabilities[1, 0, 3, 6]]
    np.testing.assert_allclose([float(number) for number in numbers], expected, atol=2e-3)
    for chart, count in {"query": 8, "key": 8, "product": 8, "softmax": len(found.tokens)}.items():
        expect(window.locator(f"#{chart}-bars rect:not(.here)")).to_have_count(count)
    window.locator("#dimension").focus()
    window.keyboard.press("ArrowRight")
    told = re.fullmatch(r"Dimension 1: (\S+) × (\S+) = (\S+)", window.inner_text("#told-dimension")).groups()
    expected = [query[3, 1], key[6, 1], query[3, 1] * key[6, 1]]
    np.testing.assert_allclose([float(number) for number in told], expected, atol=2e-3)
    rows = window.locator("#keys tr").all()
    order = np.argsort(-found.probabilities[1, 0, 3], kind="stable")
    first = rows[0].locator("td").all_inner_texts()
    assert first[:2] == [found.tokens[order[0]], str(order[0])]
    assert float(first[3]) == close_to(found.probabilities[1, 0, 3].max())
    window.locator("#softmax-bars").click(position={"x": 2, "y": 20})
    assert window.input_value("#key") == "0"


def test_patterns_are_a_table_that_sorts(path, found, opened):
    window = opened(path)
    window.click("#tab-patterns")
    known = patterns(found)

    def rows():
        return [row.locator("th, td").all_inner_texts() for row in window.locator("#table tbody tr").all()]

    assert [row[0] for row in rows()] == [f"{layer}.{head}" for layer in range(2) for head in range(4)]
    window.locator("thead button", has_text="previous token").click()
    scores = known.scores["previous token"]
    assert [float(row[3]) for row in rows()] == pytest.approx(np.sort(scores, axis=None)[::-1], abs=0.006)
    expect(window.locator("th[aria-sort='descending']")).to_have_text("previous token")
    layer, head = np.unravel_index(scores.argmax(), scores.shape)
    assert rows()[0][:2] == [f"{layer}.{head}", known.names[layer][head]]
    window.locator("thead button", has_text="previous token").click()
    assert float(rows()[-1][3]) == pytest.approx(scores.max(), abs=0.006)
    window.locator("tbody button").last.click()
    assert window.inner_text("#legend").startswith(f"Layer {layer}. head {head} (")


def test_dark_is_dark_and_paper_is_white(path, opened):
    window = opened(path)
    body = window.locator("body")
    expect(body).to_have_css("background-color", "rgb(255, 255, 255)")
    window.emulate_media(color_scheme="dark")
    expect(body).to_have_css("background-color", "rgb(21, 24, 28)")
    window.emulate_media(color_scheme="dark", media="print")
    expect(body).to_have_css("background-color", "rgb(255, 255, 255)")
    expect(window.get_by_role("tablist")).to_be_hidden()
    expect(window.locator("#lines")).to_be_visible()


def test_512_tokens_stay_usable(tmp_path, opened):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 2, 512, 16)).astype(np.float32)
    key[0, 0] = 0  # a head that looks everywhere alike
    probabilities = np.asarray(jax.nn.softmax(query @ key.swapaxes(-1, -2) / 4))
    types = (np.arange(512) >= 300).astype(np.int32)
    found = Maps([f"t{n}" for n in range(512)], types, np.arange(512) % 511 == 0, probabilities, query, key)
    file = tmp_path / "long.html"
    file.write_text(page(found, patterns(found), "random", ["…"]), encoding="utf-8")
    window = opened(file)
    window.click("#every")
    assert re.match("Drawn: the [0-9,]+ strongest of 524,288 lines", window.inner_text("#drawn"))
    assert 100 < window.locator("#lines line").count() <= 2000
    window.locator(".side.key .token").nth(500).hover()
    best = np.unravel_index(probabilities[0, :, :, 500].argmax(), (2, 512))
    start, end, weight, head = listed(window)[0]
    assert (head, start, end) == (*best, 500) and weight == close_to(probabilities[0, head, start, 500])
    window.click("#tab-model")
    expect(window.locator("#grid")).to_have_attribute("data-painted", "2", timeout=60_000)
    window.locator("#grid button").first.click()
    assert 20 < window.locator("#large .left .label").count() < 60
