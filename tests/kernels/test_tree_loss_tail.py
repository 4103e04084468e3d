"""What scripts/measure_tail.py measures: errors of top-K targets against exact ones."""

import measure_tail
import torch


def test_the_tail_bucket_is_a_bound_that_grows_tight_with_k():
    z, t = 2 * torch.randn(2, 200, 60, generator=torch.Generator().manual_seed(0))
    result = measure_tail.errors(z, t, torch.arange(60), (1, 4, 16, 60))
    bias = list(result["acceptance_error"].values())
    assert bias == sorted(bias, reverse=True) and bias[0] > 0.1 and abs(bias[-1]) < 1e-5
    for distance in ("forward_kl", "reverse_kl", "tv"):
        kept = list(result["distances"][distance]["kept"].values())
        loss, gradient = (
            [row["loss_error"] for row in kept],
            [row["gradient_error"] for row in kept],
        )
        assert loss == sorted(loss) and loss[0] < -0.1 and abs(loss[-1]) < 1e-4, distance
        assert gradient == sorted(gradient, reverse=True) and gradient[-1] < 1e-3, distance
    assert result["distances"]["greedy"]["kept"][1]["gradient_error"] < 1e-5
