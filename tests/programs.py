"""What compiled programs contain."""

import math
import re


def largest_array(program):
    """Elements of the largest array in a compiled program."""
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)
