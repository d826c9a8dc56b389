"""Three rounds of DiLoCo, written a second time in plain NumPy from the papers' formulas, against `outer_step`.

Nothing of the package is used in the reference: no flat folding order, no torch operation order, fp64 throughout.
"""

import numpy as np
import pytest
import torch
from tiny import a_card, an_answer

from dept_ray.jobfile import parse_job
from dept_ray.rounds.outer import outer_step
from dept_ray.rounds.state import RunState, SiloRecord

SILOS = ("de", "en", "ur")
TOKENS = np.array([[512, 2048, 1024], [512, 512, 2048], [64, 2048, 4096]])
V, L, D, N = 20, 4, 8, 500
OWNED = {"de": [0, 1, 2, 5, 7], "en": [0, 2, 3, 4, 5, 11], "ur": [0, 5, 12, 13]}


def reference(theta, phi, body_deltas, row_deltas, eta, mu, rows_eta, rows_mu):
    """DiLoCo's outer Nesterov on unequal weights; each row's mean over its owners, TRIM's masked aggregation."""
    m, m_rows = np.zeros_like(theta), np.zeros_like(phi)
    for t in range(3):
        w = TOKENS[t].astype(np.float64)
        g = -np.einsum("k,kn->n", w, body_deltas[t]) / w.sum()
        m = mu * m + g
        theta = theta - eta * (g + mu * m)
        for v in range(V + L):
            mine = [k for k, silo in enumerate(SILOS) if v >= V or v in OWNED[silo]]
            if mine:
                g_row = -sum(w[k] * row_deltas[t][k][v] for k in mine) / w[mine].sum()
                m_rows[v] = rows_mu * m_rows[v] + g_row
                phi[v] = phi[v] - rows_eta * (g_row + rows_mu * m_rows[v])
    return theta, phi


@pytest.mark.parametrize(("eta", "mu", "rows_eta", "rows_mu"), [(1, 0, 1, 0), (0.7, 0.9, 1, 0), (0.7, 0.9, 0.8, 0.6)])
def test_three_rounds_are_diloco_with_masked_rows(eta, mu, rows_eta, rows_mu):
    rng = np.random.default_rng(0)
    theta, phi = rng.standard_normal(N), rng.standard_normal((V + L, D))
    body_deltas = 0.1 * rng.standard_normal((3, 3, N))
    row_deltas = 0.1 * rng.standard_normal((3, 3, V + L, D))  # of rows not owned they are never read

    outer = {"lr": eta, "momentum": mu, "rows_lr": rows_eta, "rows_momentum": rows_mu}
    sources = [{"kind": "installed", "collection": "docs", "name": name} for name in SILOS]
    job = parse_job({"name": "golden", "sources": sources, "outer": outer})
    cards = {silo: a_card(silo, OWNED[silo], V) for silo in SILOS}
    silos = {silo: SiloRecord() for silo in SILOS}
    state = RunState(0, silos, torch.tensor(theta, dtype=torch.float32), torch.tensor(phi, dtype=torch.float32))
    for t in range(3):
        answers = {}
        for k, silo in enumerate(SILOS):
            mine = [*OWNED[silo], *range(V, V + L)]
            answers[silo] = an_answer(silo, int(TOKENS[t, k]), body_deltas[t, k], row_deltas[t, k][mine])
        state = outer_step(job, state, answers, cards)

    expected_theta, expected_phi = reference(theta, phi.copy(), body_deltas, row_deltas, eta, mu, rows_eta, rows_mu)
    np.testing.assert_allclose(state.body, expected_theta, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.rows, expected_phi, rtol=1e-5, atol=1e-6)
