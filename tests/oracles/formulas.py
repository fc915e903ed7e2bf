"""Every formula again, the slow and obvious way: plain Python loops over floats, no code of the package."""

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


def algorithm_1(model, vanilla, members, references, lam, steps, lr):
    """Algorithm 1, lines 1-10, with .backward() and a loop over parameters. Returns φ by parameter name."""
    work, start = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
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


def normal_log_density(x, mean, var):
    return -0.5 * math.log(2 * math.pi * var) - (x - mean) ** 2 / (2 * var)


def mean(values):
    return sum(values) / len(values)


def lira(target, shadows, membership, online, pooled):
    """Per example; the variance is the example's own (unbiased), or pooled within examples."""
    n, k = len(target), len(shadows)

    def side(i, flag):
        return [shadows[j][i] for j in range(k) if membership[j][i] == flag]

    def variance(flag, i):
        examples = range(n) if pooled else [i]
        squares = sum((v - mean(side(e, flag))) ** 2 for e in examples for v in side(e, flag))
        return squares / sum(len(side(e, flag)) - 1 for e in examples)

    scores = []
    for i in range(n):
        out = mean(side(i, False)), variance(False, i)
        if online:
            inside = mean(side(i, True)), variance(True, i)
            scores.append(normal_log_density(target[i], *inside) - normal_log_density(target[i], *out))
        else:
            scores.append(math.log(0.5 * math.erfc(-(target[i] - out[0]) / math.sqrt(2 * out[1]))))
    return scores


def rmia(target, shadows, membership, population_target, population_shadows, online, gamma, a):
    n, m, k = len(target), len(population_target), len(shadows)

    def ratio_x(i):
        if online:
            return target[i] / mean([shadows[j][i] for j in range(k)])
        out = mean([shadows[j][i] for j in range(k) if not membership[j][i]])
        return target[i] / (0.5 * ((1 + a) * out + (1 - a)))

    def ratio_z(i):
        out = mean([population_shadows[j][i] for j in range(k)])
        return population_target[i] / (out if online else 0.5 * ((1 + a) * out + (1 - a)))

    return [sum(ratio_x(i) / ratio_z(z) >= gamma for z in range(m)) / m for i in range(n)]


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


def modified_entropy(row, y):
    p = softmax(row)
    total = -(1 - p[y]) * math.log(p[y])
    return total - sum(p[c] * math.log(1 - p[c]) for c in range(len(p)) if c != y)


def attack_p(losses, population):
    """The share of the population with a loss at least as high, and the loss's place within its step."""
    m = len(population)
    return [(sum(z >= x for z in population) + 1 / (1 + x)) / (m + 1) for x in losses]


def attack_r(losses, shadows, membership):
    scores = []
    for i, x in enumerate(losses):
        out = [shadows[j][i] for j in range(len(shadows)) if not membership[j][i]]
        scores.append((sum(v >= x for v in out) + 1 / (1 + math.exp(x - mean(out)))) / (len(out) + 1))
    return scores


def best_threshold(signals, inside):
    """Half-way below the called member of the best TPR - FPR, trying every signal."""
    best = (0.0, math.inf)
    for t in sorted(set(signals), reverse=True):
        tpr = mean([float(s >= t) for s, i in zip(signals, inside, strict=True) if i])
        fpr = mean([float(s >= t) for s, i in zip(signals, inside, strict=True) if not i])
        if tpr - fpr > best[0] + 1e-12:
            best = (tpr - fpr, t)
    if best[1] == math.inf:
        return max(signals) + 1.0
    below = [s for s in signals if s < best[1]]
    return (best[1] + (max(below) if below else best[1] - 1.0)) / 2


def bavaria(target, shadows, membership, online, predictive, prior_models):
    """The posterior predictive of a normal-inverse-gamma prior, through scipy's densities."""
    from scipy import stats

    n, k = len(target), len(shadows)

    def group(i, flag):
        return [shadows[j][i] for j in range(k) if membership[j][i] == flag]

    def predict(i, flag):
        groups = [group(e, flag) for e in range(n)]
        within = sum((v - mean(g)) ** 2 for g in groups for v in g) / sum(len(g) - 1 for g in groups) + 1e-12
        centre = mean([mean(g) for g in groups])
        scatter = mean([(mean(g) - centre) ** 2 for g in groups])
        between = max(scatter - within * mean([1 / len(g) for g in groups]), 1e-12)
        own, k0, v0 = groups[i], within / between, prior_models
        c, m = len(own), mean(own)
        s = sum((v - m) ** 2 for v in own)
        kappa, nu = k0 + c, v0 + c
        location = (k0 * centre + c * m) / kappa
        variance = (v0 * within + s + k0 * c * (m - centre) ** 2 / kappa) / nu
        scale = math.sqrt(variance * (kappa + 1) / kappa)
        return stats.norm(location, scale) if predictive == "normal" else stats.t(nu, location, scale)

    if not online:
        return [float(predict(i, False).logcdf(target[i])) for i in range(n)]
    return [float(predict(i, True).logpdf(target[i]) - predict(i, False).logpdf(target[i])) for i in range(n)]


def lira_reference_code(target, shadows, membership, online):
    """LiRA of Carlini et al.'s ``privacy/research/mi_lira_2021/plot.py`` (generate_ours, generate_ours_offline).

    Statement by statement, with fix_variance=True and lower = member turned around. Lists ``(q, n)``, ``(q, k, n)``,
    ``(k, n)``; their ``scores`` has the shape (k, n, q).
    """
    import numpy as np
    from scipy import stats

    scores, keep = np.array(shadows).transpose(1, 2, 0), np.array(membership)
    sc = np.array(target).T
    dat_in, dat_out = [], []
    for j in range(scores.shape[1]):
        dat_in.append(scores[keep[:, j], j, :])
        dat_out.append(scores[~keep[:, j], j, :])
    in_size, out_size = min(map(len, dat_in)), min(map(len, dat_out))
    dat_in = np.array([x[:in_size] for x in dat_in])
    dat_out = np.array([x[:out_size] for x in dat_out])
    mean_out = np.median(dat_out, 1)
    if not online:
        std_out = np.std(dat_out)
        score = stats.norm.logpdf(sc, mean_out, std_out + 1e-30)
        return (-score.mean(1)).tolist()
    mean_in = np.median(dat_in, 1)
    std_in = std_out = np.std(dat_in)
    pr_in = -stats.norm.logpdf(sc, mean_in, std_in + 1e-30)
    pr_out = -stats.norm.logpdf(sc, mean_out, std_out + 1e-30)
    score = pr_in - pr_out
    return (-score.mean(1)).tolist()


def augmentation(correct, shadow_correct, membership):
    """The log odds of membership given the number of right views, made to rise with it. Lists (q, n), (q, k, n)."""
    views, k, n = len(correct), len(membership), len(membership[0])
    inside, outside = [0.5] * (views + 1), [0.5] * (views + 1)
    for j in range(k):
        for i in range(n):
            count = sum(shadow_correct[q][j][i] for q in range(views))
            (inside if membership[j][i] else outside)[count] += 1
    odds = [math.log(a / sum(inside)) - math.log(b / sum(outside)) for a, b in zip(inside, outside, strict=True)]
    risen = [max(odds[: c + 1]) for c in range(views + 1)]
    counts = [sum(correct[q][i] for q in range(views)) for i in range(n)]
    return [risen[c] + c / (views + 1) * 1e-6 for c in counts]


def log_t_cdf(t, nu):
    """Hill (1970), algorithm 395: Student's t as a normal deviate."""
    a = nu - 0.5
    b = 48 * a**2
    y = a * math.log(1 + t**2 / nu)
    z = math.sqrt(y)
    u = (((-0.4 * y - 3.3) * y - 24) * y - 85.5) / (0.8 * y**2 + 100 + b)
    deviate = math.copysign(((u + y + 3) / b + 1) * z, t)
    return math.log(math.erfc(-deviate / math.sqrt(2)) / 2)


def tuned_offline_a(shadows, membership, population, gamma, models):
    """Every a in turn, with every one of the first models in turn as the audited one."""
    best = (-1.0, 0.0)
    for a in [i / 10 for i in range(11)]:
        aucs = []
        for j in range(min(models, len(shadows))):
            rest = [i for i in range(len(shadows)) if i != j]
            scores = rmia_with_ties_broken(
                shadows[j],
                [shadows[i] for i in rest],
                [membership[i] for i in rest],
                population[j],
                [population[i] for i in rest],
                gamma,
                a,
            )
            aucs.append(auc_by_pairs(scores, membership[j]))
        if mean(aucs) > best[0] + 1e-12:
            best = (mean(aucs), a)
    return best[1]


def rmia_with_ties_broken(target, shadows, membership, population_target, population_shadows, gamma, a):
    """Offline: the share of the population, and the ratio's place within a step."""
    m = len(population_target)
    shares = rmia(target, shadows, membership, population_target, population_shadows, False, gamma, a)
    scores = []
    for i, share in enumerate(shares):
        out = mean([row[i] for row, inside in zip(shadows, membership, strict=True) if not inside[i]])
        ratio = target[i] / (((1 + a) * out + 1 - a) / 2)
        scores.append((m * share + ratio / (1 + ratio)) / (m + 1))
    return scores
