"""A thousand lines on which tokenizers are compared: prose, code, digits, emoji, scripts, spaces; the same every time.

Run by tests, and by the script that asked transformers for its ids.
"""

import random
import unicodedata

WORDS = (
    "the of and a to in it's was he she they'll I've don't WE'RE You'D model weights light language river mountain "
    "quantization unbelievable naïve café Zürich señor façade über smørrebrød Ελλάδα москва привет שלום مرحبا नमस्ते "
    "สวัสดี 日本語 中文字符 한국어 "
    "tokenization antidisestablishmentarianism x y z HTTP JSON iPhone McDonald O'Neill rock'n'roll "
    "e\u0301te\u0301 A\u030angstro\u0308m ﬁne Ⅷ ½ ² ﷺ ǅ ß ẞ ı İ"
)
NUMBERS = (
    "0 7 42 007 1865 2026 31415 1234567890 3.14159 1,000,000 -12.5e-3 0xDEADBEEF 0b1011 1/2 50% $9.99 12:34:56 "
    "2018-01-22 v2.0.1 ١٢٣ १२३ １２３ 1_000 10²⁰ 192.168.0.1 +44(0)20"
)
EMOJI = "😀 🎉 👍🏽 👩‍👩‍👧‍👦 🇫🇷 ❤️ 🧑‍💻 ☃ 🏴‍☠️ 😀😀😀 ✅ → ★ ¯\\_(ツ)_/¯ :-)"
CODE = (
    "def f(x: int) -> int:",
    "    return x**2 + y[0] if x != 3 else None  # why?",
    "\tfor (int i = 0; i < n; ++i) { a[i] += b[i] >> 2; }",
    "<div class='a b'>&nbsp;</div><!-- c -->",
    "SELECT * FROM t WHERE id >= 10 AND name LIKE '%x%';",
    "import os, sys; print(f'{os.getcwd()!r:>20}')",
    "$ grep -rn \"needle\" . | awk '{print $2}' && echo done",
    "{\"key\": [1, 2.5, true, null], 'k': {}}",
    "#include <stdio.h>\r\n\r\nint main(void)\r\n{\r\n        return 0;\r\n}",
    "\\begin{equation} \\frac{a}{b} \\end{equation}",
    "https://example.org/a/b?c=d&e=f#g",
    "if __name__ == '__main__':\n    main()\n\n\n# end",
)
GAPS = (
    " ",
    " ",
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    " \n ",
    "",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\r\n",
    ", ",
    ". ",
)
ODD = "<|endoftext|> <|im_start|> </s> <s> <unk> <code> <0x41> ▁ Ġ \x00 \x7f \ufeff \ufffd ... !!! —— '''"


def lines(count: int = 1000, seed: int = 7) -> list[str]:
    draw = random.Random(seed)
    # Of all characters those that were already characters in Unicode 3.2: what a letter is has settled for them.
    rare = [chr(code) for code in range(0x20000) if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs", "Co")]
    kinds = [(WORDS.split(), 60), (NUMBERS.split(), 15), (EMOJI.split(), 10), (CODE, 8), (ODD.split(), 4), (rare, 3)]
    made = ["", " ", "  ", "\n", "a", " a", "a ", "  a  b  "]
    while len(made) < count:
        parts = [draw.choice(("", "", "", " ", "  ", "\n", "\t"))]
        for kind in draw.choices([kind for kind, _ in kinds], [share for _, share in kinds], k=draw.randrange(1, 14)):
            parts += [draw.choice(kind), draw.choice(GAPS)]
        made.append("".join(parts))
    return made
