"""One file per question, each with a main and flags; see README.md."""
