"""What a Transformer is. Shapes are in the names of arrays, one letter an axis:

B batch, T query positions, S key positions, D width of the residual stream, N query heads, K key-value heads,
H size of a head, F feed-forward width, V vocabulary, L layers. `x_BTD` is an array of three axes.
"""

from efflm.model.attention import Branches
from efflm.model.transformer import (
    Cache,
    Gathered,
    LanguageModel,
    Transformer,
    empty_cache,
    final_states_and_gathered,
    in_dtype,
    init_params,
    require_fits,
    require_same_tokenizer,
    stack_blocks,
    unstack_blocks,
)
