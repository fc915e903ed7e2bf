"""Formulas again, the slow and obvious way: plain Python loops over floats, no code of the package."""

import copy
import math

import torch


def softmax(row):
    top = max(row)
    e = [math.exp(z - top) for z in row]
    return [x / sum(e) for x in e]


def cross_entropy(row, y):
    return -math.log(softmax(row)[y])


def relaxloss(logits, targets, alpha, epoch, upper):
    """On float64 tensors, built example by example so that autograd gives the oracle's gradient."""
    losses = [-torch.log_softmax(z, 0)[y] for z, y in zip(logits, targets, strict=True)]
    mean = sum(losses) / len(losses)
    if epoch % 2 == 0:
        return abs(mean - alpha)
    if mean > alpha:
        return mean
    total = 0.0
    for z, y, loss in zip(logits, targets, losses, strict=True):
        log_p = torch.log_softmax(z, 0)
        p_y = torch.clamp(torch.softmax(z, 0)[y], max=upper)
        soft_ce = 0.0
        for c in range(len(z)):
            soft = p_y if c == int(y) else (1 - p_y) / (len(z) - 1)
            soft_ce = soft_ce - soft * log_p[c]
        correct = 1.0 if int(z.argmax()) == int(y) else 0.0
        total = total + (1 - correct) * soft_ce - loss
    return total / len(losses)


def algorithm_1(model, vanilla, members, references, lam, steps, lr, train=False):
    """Algorithm 1, lines 1-10, with .backward() and a loop over parameters. Returns φ by parameter name."""
    work, start = copy.deepcopy(model).train(train), copy.deepcopy(model).train(train)
    start.load_state_dict(vanilla)
    phi = {n: torch.zeros_like(p) for n, p in work.named_parameters() if p.requires_grad}
    for i in range(steps):
        (x, y), (x_re, _) = members[i % len(members)], references[i % len(references)]
        work.zero_grad()
        z, z_re = work(x), work(x_re)
        with torch.no_grad():
            p = torch.softmax(start(x_re), 1)
        ce = sum(-torch.log_softmax(z[j], 0)[y[j]] for j in range(len(y))) / len(y)
        q = torch.log_softmax(z_re, 1)
        kl = (p * (p.log() - q)).sum() / len(x_re)
        ((1 - lam) * ce + lam * kl).backward()
        with torch.no_grad():
            for n, w in work.named_parameters():
                if n in phi and w.grad is not None:
                    phi[n] += (w.grad * w).abs()
                    w -= lr * w.grad
    return phi


def mean(values):
    return sum(values) / len(values)


def top_units(scores, k, heads=()):
    """Whole units by their mean score, until the next has no room: names and positions of their weights.

    A unit is an output, or of a module in ``heads`` (their number by its name) a head: row r of queries, of keys or of
    values, of E each, belongs to head (r mod E) // (E / heads).
    """
    units = {}
    for name, score in scores.items():
        group = name
        weight = name.removesuffix("bias") + "weight"
        if name.endswith("bias") and weight in scores and score.shape == scores[weight].shape[:1]:
            group = weight
        module, _, own = name.rpartition(".")
        for row in range(len(score)):
            unit = (group, row)
            if module in heads and "proj_" in own:
                width = len(score) // (3 if own.startswith("in_proj") else 1)
                unit = (module, row % width // (width // heads[module]))
            for index, value in enumerate(score[row].flatten().tolist()):
                units.setdefault(unit, []).append((name, row, index, value))
    order = sorted(units.values(), key=lambda unit: -mean([value for *_, value in unit]))
    chosen = set()
    for unit in order:
        if len(chosen) + len(unit) > k:
            break
        chosen |= {tuple(weight[:3]) for weight in unit}
    return chosen


def top_by_sorting(scores, k):
    """Positions of the k largest, earlier positions first among equals."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return set(order[:k])


def pearson(a, b):
    ma, mb = mean(a), mean(b)
    cov = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return cov / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


def auc_by_pairs(scores, is_member):
    ins = [s for s, m in zip(scores, is_member, strict=True) if m]
    outs = [s for s, m in zip(scores, is_member, strict=True) if not m]
    return sum((i > o) + 0.5 * (i == o) for i in ins for o in outs) / (len(ins) * len(outs))


def best_over_thresholds(scores, is_member, measure):
    """Maximum of measure(tpr, fpr) over every threshold, and over calling nobody a member."""
    ins = [s for s, m in zip(scores, is_member, strict=True) if m]
    outs = [s for s, m in zip(scores, is_member, strict=True) if not m]
    best = measure(0.0, 0.0)
    for t in scores:
        best = max(best, measure(mean([s >= t for s in ins]), mean([s >= t for s in outs])))
    return best


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def hamp_t(k, gamma):
    """The true class's share, where the soft label's entropy crosses the asked one (the authors step down by 0.01)."""
    from scipy.optimize import brentq

    def excess(t):
        return entropy([t] + [(1 - t) / (k - 1)] * (k - 1)) - gamma * math.log(k)

    return brentq(excess, 1 / k, 1.0, xtol=1e-14) if 0 < gamma < 1 else (1 / k if gamma else 1.0)


def hamp(logits, targets, gamma, alpha):
    """KL to the soft label over N·K entries, minus α times the mean entropy."""
    k = logits.shape[1]
    t = hamp_t(k, gamma)
    total = 0.0
    for z, y in zip(logits, targets, strict=True):
        log_p = torch.log_softmax(z, 0)
        for c in range(k):
            soft = t if c == int(y) else (1 - t) / (k - 1)
            if soft > 0:
                total = total + soft * (math.log(soft) - log_p[c]) / (len(targets) * k)
            total = total + alpha * torch.exp(log_p[c]) * log_p[c] / len(targets)
    return total


def ccl(logits, targets, alpha, beta, kind):
    total = 0.0
    for z, y in zip(logits, targets, strict=True):
        loss = -torch.log_softmax(z, 0)[y]
        p = torch.softmax(z, 0)[y]
        concave = torch.exp(p) if kind == "ccel" else p + p * p / 2
        total = total + beta * (alpha * loss - (1 - alpha) * concave) / len(targets)
    return total


def label_smoothing(logits, targets, smoothing):
    """The true class has 1 − s + s/K, every other one s/K."""
    k, total = logits.shape[1], 0.0
    for z, y in zip(logits, targets, strict=True):
        log_p = torch.log_softmax(z, 0)
        for c in range(k):
            share = (1 - smoothing if c == int(y) else 0.0) + smoothing / k
            total = total - share * log_p[c] / len(targets)
    return total


def weight_penalty(weights, l1, l2):
    return sum(l1 * w.abs() + l2 * w * w for p in weights for w in p.flatten())


def mixup(logits, targets, others, weight):
    total = 0.0
    for z, y, other in zip(logits, targets, others, strict=True):
        log_p = torch.log_softmax(z, 0)
        total = total - (weight * log_p[y] + (1 - weight) * log_p[other]) / len(targets)
    return total


def confidence_penalty(logits, targets, beta):
    total = 0.0
    for z, y in zip(logits, targets, strict=True):
        log_p = torch.log_softmax(z, 0)
        total = total + (-log_p[y] + beta * sum(torch.exp(v) * v for v in log_p)) / len(targets)
    return total


def past(model, member, other, lam, alpha, frozen=None):
    """mean ℓ + λ Σ γ^α |θ| as a loss to call .backward() on, with γ from a loop over modules and single weights.

    Frozen weights are left out of a module's size, of its sum and of the penalty.
    """

    def loss(batch):
        return sum(-torch.log_softmax(z, 0)[y] for z, y in zip(model(batch[0]), batch[1], strict=True)) / len(batch[1])

    names = [n for n, _ in model.named_parameters()]
    gap = torch.autograd.grad(abs(loss(member) - loss(other)), list(model.parameters()))
    gap = {n: g.flatten().tolist() for n, g in zip(names, gap, strict=True)}
    held = {n: frozen[n].flatten().tolist() if frozen else [False] * len(gap[n]) for n in names}
    total = loss(member)
    for name, module in model.named_modules():
        own = {f"{name}.{n}" if name else n: p for n, p in module.named_parameters(recurse=False)}
        live = [abs(g) for n in own for g, h in zip(gap[n], held[n], strict=True) if not h]
        for n, p in own.items():
            for g, h, w in zip(gap[n], held[n], p.flatten(), strict=True):
                if not h:
                    total = total + lam * (len(live) * abs(g) / sum(live)) ** alpha * w.abs()
    return total


def adversarial(logits, targets, odds, lam):
    """Mean cross-entropy plus lam times the mean log-probability of membership; on tensors, one example at a time."""
    total = 0.0
    for z, y, h in zip(logits, targets, odds, strict=True):
        total = total - torch.log_softmax(z, 0)[y] + lam * torch.log(1 / (1 + torch.exp(-h)))
    return total / len(targets)


def attack_gain(members, others):
    first = mean([math.log(1 / (1 + math.exp(-h))) for h in members])
    return (first + mean([math.log(1 - 1 / (1 + math.exp(-h))) for h in others])) / 2


def mmd2(a, b, bandwidth):
    """On float64 tensors, one pair of rows at a time."""

    def kernel(x, y):
        pairs = [
            torch.exp(-sum((p - q) ** 2 for p, q in zip(r, s, strict=True)) / (2 * bandwidth**2)) for r in x for s in y
        ]
        return sum(pairs) / len(pairs)

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
