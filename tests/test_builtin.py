"""The built-in corpus: prose without repetition, told from code and lists."""

from bert_jax.data import builtin
from bert_jax.data.corpus import read_documents

SENTENCES = (
    "The lighthouse keeper wrote a letter to his sister every evening. Nobody believed that he could live alone!"
)


def test_builtin_is_prose_without_repetition_and_starts_at_once():
    stream = read_documents(["builtin"])
    documents = [next(stream) for _ in range(300)]
    paragraphs = [line for document in documents for line in document.text.split("\n") if line]
    assert len(set(paragraphs)) == len(paragraphs)
    assert not [text for text in paragraphs if ">>>" in text or text.startswith(":param")]
    assert sum(map(len, paragraphs)) > 300_000
    assert documents[:50] == [document for document, _ in zip(read_documents(["builtin"]), range(50), strict=False)]


def test_modules_that_do_not_parse_are_skipped(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def {{ name }}():\n")
    assert list(builtin._docstrings(builtin._parse(path))) == []
    path.write_text(
        '"""Of \\d modules."""\nclass A:\n    """Of classes."""\n    def b(self):\n        """Of functions."""\n'
    )
    assert list(builtin._docstrings(builtin._parse(path))) == ["Of \\d modules.", "Of classes.", "Of functions."]


def test_prose_keeps_sentences_and_drops_code_and_lists():
    docstring = f"""{SENTENCES}

    Args:
      x: A parameter that nobody reads about.

    >>> print("This is a doctest and not a sentence.")

    Some :class:`~a.Thing` of that kind, as ``code`` shows it.

        for x in y[1:]: z = x(**w)
    """
    assert builtin._prose(docstring) == [SENTENCES, "Some a.Thing of that kind, as code shows it."]
