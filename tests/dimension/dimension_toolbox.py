"""Clouds of known dimension, and clouds that have none."""

import numpy as np


def gaussian(d, features, n, seed):
    """``[n, features]``: d-dimensional, turned into many features."""
    generator = np.random.default_rng(seed)
    turn = np.linalg.qr(generator.normal(size=(features, d)))[0]
    return generator.normal(size=(n, d)) @ turn.T


def sphere(d, n, seed):
    """``[n, d + 1]``"""
    x = np.random.default_rng(seed).normal(size=(n, d + 1))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def roll(n, seed):
    """The swiss roll of scikit-learn."""
    from sklearn.datasets import make_swiss_roll

    return make_swiss_roll(n, random_state=seed)[0]
