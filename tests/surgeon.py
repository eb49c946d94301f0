"""The optimal brain surgeon in float64 numpy, by elimination from the whole inverse: no Cholesky factor, no blocks."""

import numpy as np


def layer(seed, K, N, tokens=400):
    """Inputs that hang together, of very different sizes, and a weight."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((K, K)) / np.sqrt(K) + np.eye(K)
    x = rng.standard_normal((tokens, K)) @ mix * rng.lognormal(0, 1, K)
    return x.astype(np.float32), rng.standard_normal((K, N)).astype(np.float32)


def damped(x, damping=0.01):
    gram = x.T @ x
    dead = np.diag(gram) == 0
    gram[dead, dead] = 1.0
    return gram + np.diag(np.where(dead, 0.0, damping * np.diag(gram)[~dead].mean()))


def swept(w, x, order, decide, damping=0.01):
    """w [K, N] with input after input replaced by what decide(k, w[k], w, inverse's diagonal, done) gives it; the
    inputs that are not done yet take the error over by least squares (Hassibi 1993)."""
    w, inverse, done = w.astype(np.float64).copy(), np.linalg.inv(damped(x.astype(np.float64), damping)), []
    for k in order:
        new = decide(k, w, np.diag(inverse), done)
        error = (w[k] - new) / inverse[k, k]
        left = [j for j in range(len(w)) if j not in done and j != k]
        w[left] -= inverse[left, k][:, None] * error[None]
        w[k] = new
        # The inverse of what is left of the matrix once input k is gone.
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[k, k] = np.inf
        done.append(k)
    return w


def loss(w, new, x):
    """The squared error of the outputs."""
    return np.square(x.astype(np.float64) @ (np.asarray(new, np.float64) - w)).sum()
