"""Texts that break careless code."""

ODD = [
    *("\0", "a\0b", "\u202eabc\u202c", "\U0001f600\U0001f468\u200d\U0001f469", "\u200b", "\ufeff"),
    *("e\u0301\u0302\u0303" * 9, "\uffff", "\x1b[31m", "ﷺ" * 50, "x" * 20_000, "\u2028", "İ"),
    "the cat " * 5_000,
]  # fmt: skip
