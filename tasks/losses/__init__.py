"""Objectives of distillation: pure functions from typed inputs to typed outputs. Importing the package loads no torch.

Names of tensors end in their shape, one letter per axis:

    N  packed completion tokens of a micro-batch, masked ones included
    K  entries of a support (top-K lists), padded on the right
    C  categories that a divergence compares: K, or K + 1 with a bucket for the rest
    G  samples of a prompt in a round, padded on the right
    V  vocabulary (rows of the output head)
    D  hidden size
    M  unmasked tokens among N, or one chunk of them

`p` is the live student, `q` the teacher, `u = q / p`, everything at temperature 1 and in natural logarithms.

A method is one choice on each of a few axes. `config.py` declares the axes and refuses combinations that make no sense.
`divergences.py`, `credit/`, `trust_regions.py` and `token_weights.py` have one registered class per choice (`registry.py`),
`support.py` treats the mass outside a top-K list. `direct.py`, `policy_gradient.py`, `token_credit/`, `pairs.py` and `sft.py` are
the estimators; `head.py` computes what they need of the live student. Only the trainer weights and sums over tokens.
"""
