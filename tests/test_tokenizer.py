"""Tokenizers: switches, special pieces, every format in and out, bad files, the commands."""

import hashlib
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers

from bert_jax.data.tokenizer import main
from bert_jax.data.tokenizer_model import KINDS, load_tokenizer
from bert_jax.data.tokenizer_training import train_tokenizer
from bert_jax.errors import ConfigError, DataError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "quick", "Fox", "São", "São_Paulo", "cartão", "cafe", "café", "ΟΔΟΣ", "οδος", "naive", "İzmir"]
WORDS += ["!", "~", "—"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGéãüßοδςσ0123456789"
VOCAB = list(
    dict.fromkeys(
        SPECIAL
        + ["[unused1]"]
        + WORDS
        + list(LETTERS)
        + [f"##{c}" for c in LETTERS]
        + ["##fox", "##ing", "日", "本", "##本", "[", "]", "mask", "##sk", "$", "'", "\ue000", "«", "ᄀ", "##ᅡ"]
    )
)
NASTY = [
    "",
    " \t\r\n",
    "\0\ufffd\u200b\x07",
    "the\u00a0quick\u2028fox\u3000the\x0bquick\x85cafe",
    "São cartão café cafe\u0301 CAFÉ naïve",
    "ΟΔΟΣ ΣΑΣ, ΑΣ.Σ Σ ΑΣ\u0301 ΑΣ日Α",
    "ΟΔΟΣ\x01Β ΟΔΟΣ\ufffdΒ A\x01Σ A\x7fΣ ΑΣ\u200bΑ ΑΣ\tΑ σΣ\0ς",
    "İzmir ẞ ŒUVRE ǅ K Å",
    "日本本日 日本the\U0002b820\U0002ceaf\uf900",
    "it's $5~the—«quick»!!! [MASK] [SEP]the [unused1] ##ing",
    "x" * 100 + " " + "x" * 101 + " " + "é" * 100 + " " + "e\u0301" * 60,
    "가 각 \u1fef \u0660\u061dthe \u2e52the \u166dthe \U000111c9the",
    "priv\ue000ate \ue000 \uf8ff \U000f0000the \ud800the",
    "zero\u200dwidth soft\u00adhyphen \u061cthe \u0890the \u1734the \u08d4e",
]


def write_vocab(folder, pieces=VOCAB, newline="\n", **settings):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "vocab.txt"
    path.write_bytes(newline.join([*pieces, ""]).encode())
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def pieces_of(tokenizer, text):
    return [tokenizer.id_to_token(index) for index in tokenizer.encode_batch([text])[0]]


PROSE = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.\nFoxes jump quickly over sleeping dogs.",
    "O cartão de crédito não chegou à estação. São Paulo fica longe; a manhã é fria e a maçã também.",
    "Sleeping foxes and jumping dogs are quick, quicker, quickest: jumped, jumper, sleeper, sleeps.",
] * 20


@pytest.fixture(scope="module")
def trained():
    return {kind: train_tokenizer(kind, iter(PROSE), vocab_size=400) for kind in KINDS}


def test_switches_are_independent(tmp_path):
    path = write_vocab(tmp_path, SPECIAL + ["cartão", "Cartão", "cartao", "Cartao"])
    cases = {(False, False): "Cartão", (False, True): "Cartao", (True, False): "cartão", (True, True): "cartao"}
    for (lowercase, strip_accents), piece in cases.items():
        tokenizer = load_tokenizer(path, lowercase=lowercase, strip_accents=strip_accents)
        assert pieces_of(tokenizer, "Cartão") == [piece]


@pytest.mark.parametrize("extra, cased", [(["Fox"], True), (["[UNUSED]", "fox"], False)])
def test_bare_vocab_tells_its_case_and_says_so(tmp_path, capsys, extra, cased):
    tokenizer = load_tokenizer(write_vocab(tmp_path, SPECIAL + extra))
    assert tokenizer.lowercase is not cased
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("bert_jax: ") and "vocab.txt" in said
    load_tokenizer(tmp_path, lowercase=True)
    assert capsys.readouterr().err.count("\n") == 1
    load_tokenizer(tmp_path, lowercase=True, strip_accents=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "settings, piece",
    [
        ({"do_lower_case": True, "strip_accents": None}, "cartao"),
        ({"do_lower_case": True, "strip_accents": False}, "cartão"),
        ({"do_lower_case": False, "strip_accents": None}, "Cartão"),
    ],
)
def test_config_beside_is_followed_silently(tmp_path, capsys, settings, piece):
    path = write_vocab(tmp_path, SPECIAL + ["cartão", "Cartão", "cartao"], **settings)
    assert pieces_of(load_tokenizer(path), "Cartão") == [piece]
    assert capsys.readouterr().err == ""


def test_special_ids_are_found_by_name(tmp_path):
    beto = load_tokenizer(write_vocab(tmp_path / "a", ["[MASK]", "[PAD]", "[EOS]", "[UNK]", "[CLS]", "[SEP]", "x"]))
    assert (beto.mask_id, beto.pad_id, beto.unk_id, beto.cls_id, beto.sep_id) == (0, 1, 3, 4, 5)
    names = {"mask_token": {"content": "<hide>"}, "do_lower_case": True}
    other = load_tokenizer(write_vocab(tmp_path / "b", ["<pad>", "<unk>", "<s>", "</s>", "x", "<hide>"], **names))
    assert (other.mask_id, other.special_ids) == (5, (0, 1, 2, 3, 5))
    assert other.encode("x <hide>").ids == [2, 4, 5, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_special_names_in_a_text(trained, kind):
    tokenizer = trained[kind]
    ids = tokenizer.encode("The quick [MASK] sleeps[SEP]").ids
    assert ids.count(tokenizer.mask_id) == 1 and ids.count(tokenizer.sep_id) == 2
    raw = tokenizer.encode_batch(["The quick [MASK] sleeps [SEP][CLS] [PAD]"])[0]
    assert not set(raw) & (set(tokenizer.special_ids) - {tokenizer.unk_id})


@pytest.mark.parametrize("kind", KINDS)
def test_encode_gives_spans_and_types(trained, kind):
    text, pair = "Foxes  jump\tquickly [MASK]", "sleeping dogs"
    found = trained[kind].encode(text, pair)
    assert found.ids == [trained[kind].token_to_id(token) for token in found.tokens]
    second = found.tokens.index("[SEP]") + 1
    assert [found.offsets[at] for at in (0, second - 1, -1)] == [(0, 0)] * 3
    assert found.type_ids == [0] * second + [1] * (len(found.ids) - second)
    for part, source in ((slice(1, second - 1), text), (slice(second, -1), pair)):
        spans = found.offsets[part]
        covered = {position for span in spans for position in range(*span)}
        assert {at for at, char in enumerate(source) if not char.isspace()} <= covered
        assert spans == sorted(spans) and spans[-1][1] == len(source)


def test_spans_hold_where_letters_are_folded(tmp_path, trained):
    tokenizer = load_tokenizer(write_vocab(tmp_path), lowercase=True, strip_accents=True)
    text = "\u200bCAFE\u0301 ΟΔΟΣ 日本"
    found = tokenizer.encode(text)
    assert [text[a:b] for a, b in found.offsets[1:3]] == ["CAFE", "ΟΔΟΣ"]
    trained["sentencepiece"].save(tmp_path / "sp")
    folding = load_tokenizer(tmp_path / "sp", lowercase=True, strip_accents=True)
    assert folding.encode("İİ quick").offsets[-2][1] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_and_pickle_keep_everything(trained, kind, tmp_path):
    tokenizer = trained[kind]
    tokenizer.save(tmp_path)
    file = {"wordpiece": "vocab.txt", "sentencepiece": "spiece.model"}.get(kind, "tokenizer.json")
    copies = [load_tokenizer(tmp_path), load_tokenizer(tmp_path / file), pickle.loads(pickle.dumps(tokenizer))]
    texts = [*PROSE[:3], *NASTY]
    for copy in copies:
        assert copy.fingerprint == tokenizer.fingerprint and copy.special_ids == tokenizer.special_ids
        assert copy.encode_batch(texts) == tokenizer.encode_batch(texts)
        assert copy.encode("a [MASK]", "b") == tokenizer.encode("a [MASK]", "b")
        assert (copy.continuation == tokenizer.continuation).all()


def uncached(tokenizer, texts):
    """Ids of whole texts, from the engine's own batches."""
    backend = copy_of(tokenizer)._backend
    backend._words = None
    return backend.batch(texts)


def copy_of(tokenizer):
    return pickle.loads(pickle.dumps(tokenizer))


def nasty_texts(count):
    """Random sentences of nasty words and white space."""
    rng = random.Random(0)
    words = [*SPECIAL, *WORDS, *NASTY, "日本", "日本" * 30, "x" * 100, "x" * 101, "é" * 500, "Σ", "\u0301", "a\u0301"]
    gaps = [" ", "  ", "\t", "\n", " \t ", "\u00a0", "\u3000", "\u200b", "", "-", "\u0301 "]
    return ["".join(rng.choice(words) + rng.choice(gaps) for _ in range(rng.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("cached_words", [10, 200_000])
@pytest.mark.parametrize("lowercase, strip_accents", list(itertools.product([False, True], repeat=2)))
def test_word_cache_changes_nothing(tmp_path, monkeypatch, cached_words, lowercase, strip_accents):
    monkeypatch.setattr("bert_jax.data.tokenizer_model._CACHED_WORDS", cached_words)
    tokenizer = load_tokenizer(write_vocab(tmp_path), lowercase=lowercase, strip_accents=strip_accents)
    texts = nasty_texts(500)
    wanted = uncached(tokenizer, texts)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(tokenizer.encode_batch, [texts] * 4))
    assert found == [wanted] * 4
    found[0][-1].append(0)  # the caller's own lists
    assert tokenizer.encode_batch(texts) == wanted == copy_of(tokenizer).encode_batch(texts)
    words = tokenizer._backend._words
    assert 0 < len(words) <= cached_words + 4 and max(map(len, words)) <= 24


def test_only_googles_rules_are_cached(trained, tmp_path):
    assert [kind for kind in KINDS if getattr(trained[kind]._backend, "_words", None) is not None] == ["wordpiece"]
    trained["wordpiece"].save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {**data["added_tokens"][0], "id": len(data["model"]["vocab"]), "content": "lazy dog", "special": False}
    data["added_tokens"].append(added)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert added["id"] in load_tokenizer(tmp_path / "tokenizer.json").encode_batch(["the lazy dog"])[0]


def test_fingerprint_tells_vocabularies_and_switches_apart(tmp_path):
    path = write_vocab(tmp_path / "a")
    prints = {
        load_tokenizer(path, lowercase=a, strip_accents=b).fingerprint for a in (True, False) for b in (True, False)
    }
    prints.add(load_tokenizer(write_vocab(tmp_path / "b", VOCAB[::-1]), lowercase=True, strip_accents=True).fingerprint)
    assert len(prints) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_decode_and_continuation(trained, kind):
    tokenizer = trained[kind]
    text = "the dog sleeps"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    starts = [index for index in ids[1:-1] if not tokenizer.continuation[index]]
    assert len(starts) == 3 and tokenizer.continuation.shape == (tokenizer.vocab_size,)
    assert not tokenizer.continuation[list(tokenizer.special_ids)].any()


def test_tokenizer_json_with_other_rules(trained, tmp_path):
    trained["bpe"].save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    folding = load_tokenizer(tmp_path, lowercase=True, strip_accents=True)
    assert folding.encode_batch(["NÃO É"]) == trained["bpe"].encode_batch(["nao e"])
    assert len(folding.encode_batch(["não " * 50])[0]) >= 50
    assert load_tokenizer(tmp_path).encode_batch(PROSE) == trained["bpe"].encode_batch(PROSE)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("vocab.txt", b"", "empty"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nx\n", r"\[MASK\]"),
        ("vocab.txt", b"[PAD]\n[UNK]\nx\nx\n", "line 4"),
        ("vocab.txt", b"[PAD]\ncaf\xe9\n", "line 2"),
        ("tokenizer.json", b'{"version": "1.0", "model"', "JSON"),
        ("tokenizer.json", b"[]", "object"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "WordPiece"}}', "tokenizer.json"),
        ("tokenizer.json", b'{"normalizer": {"typ": 1}}', "tokenizer.json"),
        ("x.model", b"junk" * 20, "SentencePiece"),
        ("readme.md", b"x", "holds no"),
    ],
)
def test_bad_files_are_data_errors(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_file_and_truncated_model(tmp_path, trained):
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "nothing")
    trained["sentencepiece"].save(tmp_path)
    model = tmp_path / "spiece.model"
    model.write_bytes(model.read_bytes()[:500])
    with pytest.raises(DataError, match="SentencePiece"):
        load_tokenizer(model)


def test_train_command(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(PROSE), encoding="utf-8")
    output = tmp_path / "new" / "T"
    argv = ["train", "--kind", "wordpiece", "--input", str(tmp_path / "*.txt"), "--vocab_size", "140", "--lowercase"]
    assert main([*argv, "--output", str(output)]) == 0
    assert "140 pieces" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["T"]  # no temporary folder left
    settings = json.loads((output / "tokenizer_config.json").read_text())
    assert settings["do_lower_case"] is True and settings["strip_accents"] is False
    assert "##çã" in (output / "vocab.txt").read_text(encoding="utf-8").split("\n")
    before = hashlib.sha256((output / "vocab.txt").read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match="exists already"):
        main([*argv, "--output", str(output)])
    assert before == hashlib.sha256((output / "vocab.txt").read_bytes()).hexdigest()


class Stdin:
    def __init__(self, content):
        self.buffer = io.BytesIO(content)


def test_encode_command(tmp_path, capsys, monkeypatch):
    path = str(write_vocab(tmp_path))
    monkeypatch.setattr("sys.stdin", Stdin("Café\r\n\nthe[MASK]\n".encode()))
    assert main(["encode", "--tokenizer", path, "--lowercase", "--no-strip_accents"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["tokens"][1:-1] for row in rows] == [["café"], [], ["the", "[MASK]"]]
    assert rows[1] == {"tokens": ["[CLS]", "[SEP]"], "ids": [2, 3], "type_ids": [0, 0]}
    monkeypatch.setattr("sys.stdin", Stdin(b"the\tquick\tquick\n"))
    main(["encode", "--tokenizer", path, "--pair"])
    assert json.loads(capsys.readouterr().out)["type_ids"] == [0, 0, 0, 1, 1, 1]
    for content, said in ((b"the\nthe\xff\n", "line 2: not UTF-8"), (b"the quick\n", "TAB")):
        monkeypatch.setattr("sys.stdin", Stdin(content))
        with pytest.raises(DataError, match=said):
            main(["encode", "--tokenizer", path, "--pair"] if said == "TAB" else ["encode", "--tokenizer", path])


def test_compare_lines_up_words(tmp_path, capsys):
    cased, uncased = write_vocab(tmp_path / "a"), write_vocab(tmp_path / "b", SPECIAL + ["fox", "the", "##s"])
    main(["compare", "--tokenizer", str(cased), str(uncased), "--text", "Fox  thes"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["Fox", "thes", "pieces"]
    assert rows[1].split() == ["Fox", "Fox", "fox"] and rows[2].split() == ["thes", "the", "##s", "the", "##s"]
    assert rows[1].rindex("fox") == rows[2].rindex("the ##s") == rows[3].rindex("3")
    assert rows[3].split() == ["pieces", "3", "3"]


def run(*argv, **options):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-m", "bert_jax.data.tokenizer", *argv]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, **options)


def test_command_line_edges(tmp_path):
    started = time.perf_counter()
    helped = run("--help")
    assert helped.returncode == 0 and "compare" in helped.stdout
    assert time.perf_counter() - started < 1.0
    for argv, code in ((["train", "--kind", "x"], 2), ([], 2), (["encode", "--tokenizer", str(tmp_path / "no")], 6)):
        done = run(*argv, input="")
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert done.stderr.startswith("bert_jax: error:")


def test_closed_pipe_is_quiet(tmp_path):
    path, root = write_vocab(tmp_path, do_lower_case=False), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = f"yes the | {sys.executable} -m bert_jax.data.tokenizer encode --tokenizer {path} | head -n 2"
    done = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 2 and done.stderr == ""


ADDED = {
    "added_tokens.json": {"added_tokens.json": {"[E1]": 0, "zyxq": 1}},
    "tokenizer_config.json": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "0": {"content": "[E1]", "special": True},
                "1": {"content": "zyxq", "special": False},
            }
        }
    },
    "special_tokens_map.json": {
        "added_tokens.json": {"[E1]": 0, "zyxq": 1},
        "special_tokens_map.json": {"additional_special_tokens": ["[E1]"]},
    },
}


@pytest.mark.parametrize("case", ADDED)
def test_added_pieces_are_read_used_and_written(tokenizer, tmp_path, case):
    size = tokenizer.vocab_size
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for name, content in ADDED[case].items():
        content = {key: value + size if isinstance(value, int) else value for key, value in content.items()}
        if "added_tokens_decoder" in content:
            listed = content["added_tokens_decoder"]
            content["added_tokens_decoder"] = {str(size): listed["0"], str(size + 1): listed["1"]}
        known = json.loads((tmp_path / name).read_text()) if (tmp_path / name).is_file() else {}
        (tmp_path / name).write_text(json.dumps(known | content))
    found = load_tokenizer(tmp_path)
    assert found.vocab_size == size + 2 and found.token_to_id("[E1]") == size
    text = "[E1] the function [E1] new zyxq [SEP]"
    ids = found.encode_batch([text])[0]
    assert ids.count(size) == 2 and ids.count(size + 1) == 1 and found.sep_id not in ids
    assert [index for _, index, _ in found.pieces(text)] == ids
    assert (size in found.special_ids) == (case != "added_tokens.json")
    found.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.fingerprint == found.fingerprint and again.encode_batch([text])[0] == ids
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    plain = text.removesuffix(" [SEP]")
    assert theirs(plain, add_special_tokens=False)["input_ids"] == found.encode_batch([plain])[0]


def test_a_length_and_a_japanese_analyser(tokenizer, tmp_path):
    tokenizer.save(tmp_path, longest=64)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).model_max_length == 64
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"tokenizer_class": "BertJapaneseTokenizer"}))
    with pytest.raises(DataError, match="Japanese analyser"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps(settings | {"do_lower_case": "false"}))
    with pytest.raises(DataError, match="do_lower_case in its tokenizer_config.json is 'false'; write true or false"):
        load_tokenizer(tmp_path)
