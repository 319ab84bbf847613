"""Properties of next-sentence pairs and of the store they point into."""

import collections
import itertools
from random import Random

import numpy as np
import pytest

from bert_jax.data import sentence_pairs
from bert_jax.data.sentence_pairs import (
    Store,
    Tokenised,
    create_store,
    cut_units,
    document_pairs,
    held_out_sources,
    random_span,
    split_store,
    truncate_pair,
    unit_examples,
)


def truncate_one_by_one(a_start, a_end, b_start, b_end, max_tokens, rng):
    """The rule as BERT's paper code states it: one token at a time from the longer span, at a random end."""
    while a_end - a_start + b_end - b_start > max_tokens:
        front = rng.random() < 0.5
        if a_end - a_start > b_end - b_start:
            a_start, a_end = a_start + front, a_end - (not front)
        else:
            b_start, b_end = b_start + front, b_end - (not front)
    return a_start, a_end, b_start, b_end


@pytest.mark.parametrize("max_tokens", [5, 8, 13])
def test_truncation_leaves_the_lengths_of_the_loop(max_tokens):
    rng = Random(0)
    for a, b in itertools.product(range(1, 20), range(1, 20)):
        spans = (0, a, 100, 100 + b, max_tokens)
        fast, slow = truncate_pair(*spans, rng), truncate_one_by_one(*spans, rng)
        assert (fast[1] - fast[0], fast[3] - fast[2]) == (slow[1] - slow[0], slow[3] - slow[2])
        assert 0 <= fast[0] < fast[1] <= a and 100 <= fast[2] < fast[3] <= 100 + b


def test_truncation_has_the_distribution_of_the_loop():
    spans, draws = (0, 9, 100, 111, 10), 20_000
    counts = []
    for function, seed in ((truncate_pair, 1), (truncate_one_by_one, 2)):
        rng = Random(seed)
        counts.append(collections.Counter(function(*spans, rng) for _ in range(draws)))
    keys = set(counts[0]) | set(counts[1])
    assert len(keys) == 5 * 7  # A loses 4 and B 6, of which any number at the front
    chi_squared = sum((counts[0][key] - counts[1][key]) ** 2 / (counts[0][key] + counts[1][key]) for key in keys)
    assert chi_squared < 66  # 34 degrees of freedom: 99.9 %


def test_truncation_of_long_spans_is_a_fair_binomial():
    rng, lost = Random(3), 1000
    fronts = [truncate_pair(0, lost + 10, 0, 10, 20, rng)[0] for _ in range(3000)]
    assert abs(np.mean(fronts) - lost / 2) < 2
    assert abs(np.var(fronts) / (lost / 4) - 1) < 0.15


def pairs_of(lengths, *, max_tokens=20, short_seq_prob=0.0, seed=0, surplus=0):
    offsets = [0, *itertools.accumulate(lengths)]
    return document_pairs(
        offsets,
        lambda target: (10**6, 10**6 + max(1, target)),
        surplus,
        max_tokens=max_tokens,
        short_seq_prob=short_seq_prob,
        rng=Random(seed),
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_sentence_is_used_once_as_own_text(seed):
    """With sentences of one token nothing is truncated, so A and true B must tile the document in order."""
    examples, _ = pairs_of([1] * 500, short_seq_prob=0.3, seed=seed)
    used = []
    for example in examples:
        used += range(example.a_start, example.a_end)
        if not example.is_random_next:
            used += range(example.b_start, example.b_end)
    assert used == list(range(500))


@pytest.mark.parametrize("seed", range(5))
def test_true_next_follows_and_lengths_hold(seed):
    rng = Random(seed)
    lengths = [1 + int(rng.random() * 15) for _ in range(400)]
    bounds = {0, *itertools.accumulate(lengths)}
    for example in pairs_of(lengths, seed=seed, short_seq_prob=0.2)[0]:
        a, b = example.a_end - example.a_start, example.b_end - example.b_start
        assert a >= 1 and b >= 1 and a + b <= 20
        if a + b < 20 and not example.is_random_next:  # not truncated
            assert example.a_end == example.b_start and example.a_end in bounds


def test_balance_is_restored_though_lone_sentences_force_random_next():
    """Sentences of the target length are gathered alone; Google's code would make all their pairs random."""
    for lengths in ([20] * 1000, [20, 20, 3] * 400, [5] * 1000):
        examples, surplus = pairs_of(lengths)
        random_next = sum(example.is_random_next for example in examples)
        assert abs(2 * random_next - len(examples)) == abs(surplus) <= 2
    assert not pairs_of([20, 20], surplus=5)[0][0].is_random_next
    assert pairs_of([20], surplus=5)[0][0].is_random_next  # nothing can follow


def test_choice_is_a_fair_coin_at_balance():
    first = [pairs_of([5] * 8, seed=seed)[0][0].is_random_next for seed in range(2000)]
    assert abs(np.mean(first) - 0.5) < 0.05


def test_short_examples_have_their_share():
    examples, _ = pairs_of([1] * 100_000, max_tokens=50, short_seq_prob=0.1)
    lengths = np.array([e.a_end - e.a_start + e.b_end - e.b_start for e in examples])
    assert abs(np.mean(lengths < 50) - 0.1 * 48 / 49) < 0.02
    assert lengths.min() == 2 and lengths.max() == 50


def write_store(folder, documents, held_out=()):
    """`documents`: (source, sentence lengths); token ids are 0, 1, 2, … over the whole store."""
    total = itertools.count()
    with create_store(folder) as store:
        for source, lengths in documents:
            store.append(
                Tokenised(
                    np.array([next(total) for _ in range(sum(lengths))], "<u2"),
                    np.array(lengths, np.int64),
                    np.array([len(lengths)]),
                    np.array([source]),
                )
            )
    split_store(folder, np.array(held_out, np.int64))
    return store


@pytest.fixture
def documents(monkeypatch):
    monkeypatch.setattr(sentence_pairs, "_BLOCK", 3)  # index blocks end within sources
    rng = Random(5)
    sources = [0, 0, 2, 3, 3, 3, 3, 3, 7, 8, 8, 9]  # numbers with gaps: documents without text
    return [(source, [1 + int(rng.random() * 9) for _ in range(1 + int(rng.random() * 6))]) for source in sources]


def test_store_gives_back_what_was_written(tmp_path, documents):
    written = write_store(tmp_path, [*documents[:3], (2, []), *documents[3:]], held_out=[1, 4])
    assert (written.sources, written.tokens) == (6, sum(sum(lengths) for _, lengths in documents))
    expected = {"train": [0, 1, 3, 4, 5, 6, 7, 8, 11], "eval": [2, 9, 10]}
    firsts = {"train": [(0, 2)] * 2 + [(2, 5)] * 5 + [(7, 1), (8, 1)], "eval": [(0, 1), (1, 2), (1, 2)]}
    starts = list(itertools.accumulate((sum(lengths) for _, lengths in documents), initial=0))
    for split, numbers in expected.items():
        with Store(tmp_path, split, np.dtype("<u2")) as store:
            assert store.pieces == len(numbers)
            for position, number in enumerate(numbers):
                piece, lengths = store.piece(position), documents[number][1]
                offsets = store.offsets(piece.sentence, piece.sentences)
                assert np.diff(offsets).tolist() == lengths and piece.tokens == sum(lengths)
                assert (piece.source_first, piece.source_pieces) == firsts[split][position]
                tokens = store.tokens(offsets[0], offsets[-1])
                assert tokens.tolist() == list(range(starts[number], starts[number + 1]))


def test_units_tile_a_split(tmp_path, documents):
    write_store(tmp_path, documents)
    total = sum(sum(lengths) for _, lengths in documents)
    units = cut_units(tmp_path, "train", total // 4)
    assert len(units) > 2 and units[0].first == 0 and units[-1].last == len(documents)
    assert all(before.last == after.first for before, after in itertools.pairwise(units))
    assert sum(unit.tokens for unit in units) == total
    assert sum(unit.sentences for unit in units) == sum(len(lengths) for _, lengths in documents)
    assert sum(unit.sources for unit in units) == 6
    assert cut_units(tmp_path, "eval", 10) == []


def test_random_next_comes_from_anywhere_but_the_own_source(tmp_path, documents):
    write_store(tmp_path, documents)
    starts = list(itertools.accumulate((sum(lengths) for _, lengths in documents), initial=0))
    rng = Random(0)
    with Store(tmp_path, "train", np.dtype("<u2")) as store:
        own = store.piece(4)
        spans = [random_span(store, own, 6, rng) for _ in range(4000)]
    found = collections.Counter(int(np.searchsorted(starts, start, side="right")) - 1 for start, _ in spans)
    outside = [number for number, (source, _) in enumerate(documents) if source != 3]
    assert sorted(found) == outside  # all others, none of source 3
    assert max(found.values()) < 1.25 * min(found.values())  # equally often
    for start, end in spans:
        document = int(np.searchsorted(starts, start, side="right")) - 1
        sentence_ends = [starts[document] + length for length in itertools.accumulate(documents[document][1])]
        reached = [place for place in sentence_ends if place >= start + 6]
        assert end == (reached[0] if reached else starts[document + 1])


def test_one_source_of_many_pieces_never_partners_itself(tmp_path):
    write_store(tmp_path, [(0, [3, 4])] * 50 + [(1, [5, 2])])
    with Store(tmp_path, "train", np.dtype("<u2")) as store:
        examples = unit_examples(store, 0, 50, max_seq_len=13, short_seq_prob=0.0, rng=Random(0))
    assert any(example.is_random_next for example in examples)
    assert all((example.b_start >= 350) == example.is_random_next for example in examples)


def test_held_out_sources_are_a_function_of_seed_and_count():
    assert held_out_sources(3, 0.5, 0).size == held_out_sources(1000, 0.0, 0).size == 0
    for sources in (4, 5, 10, 100, 1000):
        chosen = held_out_sources(sources, 0.02, 1)
        assert len(chosen) == len(set(chosen)) == max(2, round(0.02 * sources))
        assert chosen.tolist() == sorted(held_out_sources(sources, 0.02, 1)) and chosen[0] >= 0 and chosen[-1] < sources
    assert len(held_out_sources(10, 0.99, 0)) == 8  # two are left to train on
    assert held_out_sources(1000, 0.02, 1).tolist() != held_out_sources(1000, 0.02, 2).tolist()
    counts = np.bincount(np.concatenate([held_out_sources(10, 0.3, seed) for seed in range(3000)]), minlength=10)
    assert np.all(np.abs(counts - 900) < 120)
