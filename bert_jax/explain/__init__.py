"""What a model looks at: `attention.py` (maps of all heads, their patterns, a page to walk through them) and
`attribution.py` (which words an answer rests on, by integrated gradients). `page.py` writes pages that need no network.
"""
