"""efflm: train language models in JAX, make them smaller, and measure what that bought and what it cost.

config      frozen dataclasses: what a run is told
flags       the one bridge from them to a command line; helptext, what --help says; streams, stdout and its limits
hosts       several processes that run one program
signals     Ctrl-C and SIGTERM
trees       paths, selection, counting and bytes of trees of weights
precision   which dtype weights, matmuls and results have
ops         how a weight is used, whatever its format
model       the Transformer, and how its weights are sharded over a mesh
tokenizer   text to token ids and back; chat, the templates of conversations
data        corpora, packing, the order of sequences
train       losses, the optimizer, the step, the loop, checkpoints
infer       prefill, decode, sampling
compress    steps from a model to a model, and recipes that chain them
evaluate    quality and cost
plan        what a run would need and take on hardware that is not here
formats     models on disk
report      the table, the plot, the page
model_files what is looked at before a file of a model is read
progress    a bar on the terminal for what takes long
rundir      what every run does with its directory

Importing it starts nothing.
"""
