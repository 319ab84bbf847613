"""What a model looks at: `attention.py` (maps of all heads, their patterns, a page to walk through them) and
`attribution.py` (which words an answer rests on: `targets` says what is explained, `gradients` how, `words` what a word
is). `bert_jax/page.py` makes pages that need no network of `bert_jax/pages/`.
"""
