"""Colors of plots by what they mean."""

# Colors by what they mean: the SVG has the page's variables in their place, with values for light and dark.
INK, MUTED, LINE, PAPER, ACCENT = "#1b1f24", "#57606b", "#d0d7df", "#fffffe", "#0a5cc4"
SERIES = ("#0a5cc5", "#b3480a", "#1a7440", "#8a3ab0", "#a31d4d", "#0b6b74", "#6a5a00", "#5a5f68")
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper", ACCENT: "accent"} | {
    color: f"s{index}" for index, color in enumerate(SERIES)
}
