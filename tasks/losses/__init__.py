"""Objectives of distillation: pure mathematics, typed input to typed output. This package imports no torch by itself.

Names of tensors end in their shape, one letter per axis:

    N  packed completion tokens of a micro-batch, masked ones included
    K  entries of a support (top-K lists), padded on the right
    C  categories that a divergence compares: K, or K + 1 with a bucket for the rest
    G  samples of a prompt in a round, padded on the right
    V  vocabulary (rows of the output head)
    D  hidden size
    M  unmasked tokens among N, or one chunk of them

`p` is the live student, `q` the teacher, `u = q / p`, everything at temperature 1 and in natural logarithms.

A method is a point in a small product of axes. `config.py` names the axes and refuses what makes no sense;
`divergences.py`, `trust_regions.py` and `token_weights.py` have one registered class per choice (`kinds.py`), `support.py`
what lies outside a top-K list; `direct.py`, `policy_gradient.py` and `sft.py` are the estimators, `head.py` computes what
they want of the live student. The trainer alone weighs and sums over tokens.
"""
