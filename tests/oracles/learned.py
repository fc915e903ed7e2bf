"""The learned attacks again, written out: features one example at a time, AdamW and its schedule by their formulas."""

import math

import torch


def trained(x, y, asked, outputs, loss, hidden, epochs, seed, held_out=None):
    """What the network says of ``asked``, with the weights' update of AdamW (Loshchilov & Hutter 2019) by hand.

    With ``held_out`` it is the network after the epoch with the lowest loss there.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        first, last = torch.nn.Linear(x.shape[1], hidden), torch.nn.Linear(hidden, outputs)
        weights = [*first.parameters(), *last.parameters()]
        answers = []
        means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        size, step = max(256, math.ceil(len(x) / 64)), 0
        for epoch in range(epochs):
            rate = 0.01 * (1 + math.cos(math.pi * epoch / epochs)) / 2
            order = torch.randperm(len(x))
            for begin in range(0, len(x), size):
                rows = order[begin : begin + size]
                gradients = torch.autograd.grad(loss(last(first(x[rows]).relu()), y[rows]), weights)
                step += 1
                with torch.no_grad():
                    for w, g, m, v in zip(weights, gradients, means, squares, strict=True):
                        w *= 1 - rate * 0.01
                        m += 0.1 * (g - m)
                        v += 0.001 * (g * g - v)
                        w -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            with torch.no_grad():
                lost = 0.0 if held_out is None else float(loss(last(first(held_out[0]).relu()), held_out[1]))
                answers.append((lost, last(first(asked).relu()).double()))
        return answers[-1][1] if held_out is None else min(answers, key=lambda each: each[0])[1]


def features(row, y):
    """Log-probabilities, the largest first, and that of the true class; none below −50."""
    log_p = [max(z - math.log(sum(math.exp(v - max(row)) for v in row)) - max(row), -50.0) for z in row]
    return [*sorted(log_p, reverse=True), log_p[y]]


def scaled(known, asked):
    """By what is known; what is asked is brought into its range."""
    mean, deviation = known.mean(0), known.std(0)
    asked = torch.stack(
        [torch.stack([max(min(v, k.max()), k.min()) for v in a]) for k, a in zip(known.T, asked.T, strict=True)]
    ).T
    return (known - mean) / deviation, (asked - mean) / deviation


def neural(logits, targets, shadow_logits, membership, drawn, hidden, epochs, seed):
    """``drawn`` are pairs of a model and an example."""

    def loss(odds, inside):
        p = torch.sigmoid(odds[:, 0])
        return -(inside * p.log() + (1 - inside) * (1 - p).log()).mean()

    known = torch.tensor([features(shadow_logits[j][i], targets[i]) for j, i in drawn])
    own = torch.tensor([features(row, y) for row, y in zip(logits, targets, strict=True)])
    inside = torch.tensor([float(membership[j][i]) for j, i in drawn])
    known, own = scaled(known, own)
    return trained(known, inside, own, 1, loss, hidden, epochs, seed)[:, 0]


def quantile_regression(signal, inputs, population_signal, population_inputs, hidden, epochs, seed):
    """No feature is constant in the part to learn from."""

    def loss(predicted, y):
        total = 0.0
        for (location, log_scale), value in zip(predicted, y, strict=True):
            scale = torch.exp(torch.clamp(log_scale, -5, 5))
            total = total + (((value - location) / scale) ** 2 / 2 + scale.log()) / len(y)
        return total

    m = len(population_signal)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed)).tolist()
    learn, stop = order[: int(0.6 * m)], order[int(0.6 * m) : int(0.75 * m)]
    calibrate = order[int(0.75 * m) :]
    centre, spread = population_signal[learn].mean(), population_signal[learn].std()
    y = (population_signal - centre) / spread
    known, stopping = scaled(population_inputs[learn], population_inputs[stop])
    _, calibrating = scaled(population_inputs[learn], population_inputs[calibrate])
    _, own = scaled(population_inputs[learn], inputs)
    settings = loss, hidden, epochs, seed, (stopping, y[stop].float())
    predicted = trained(known, y[learn].float(), torch.cat([calibrating, own]), 2, *settings)
    given = torch.cat([y[calibrate], (signal - centre) / spread])
    residuals = [
        float((value - location) / math.exp(min(max(log_scale, -5), 5)))
        for value, (location, log_scale) in zip(given, predicted, strict=True)
    ]
    before, c = residuals[: len(calibrate)], len(calibrate)
    return [
        (sum(other < r for other in before) + 0.5 + 0.5 * r / (1 + abs(r))) / (c + 1)
        for r in residuals[len(calibrate) :]
    ]
