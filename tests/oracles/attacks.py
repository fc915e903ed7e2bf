"""The attacks again, the slow and obvious way: plain Python loops over floats, no code of the package."""

import math

from tests.oracles.formulas import auc_by_pairs, mean, softmax


def normal_log_density(x, mean, var):
    return -0.5 * math.log(2 * math.pi * var) - (x - mean) ** 2 / (2 * var)


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


def rmia(target, shadows, membership, population_target, population_shadows, online, gamma, a, trim=0.0):
    population = population_target, population_shadows
    return rmia_votes([target], [shadows], membership, *population, online, gamma, a, trim)


def rmia_ratio(own, others, inside, online, a, trim):
    """Of one example: its probability under the audited model and under the others, and which were trained on it."""
    from scipy import stats

    if online:
        return own / float(stats.trim_mean(others, trim))
    out = float(stats.trim_mean([p for p, flag in zip(others, inside, strict=True) if not flag], trim))
    return own / (0.5 * ((1 + a) * out + (1 - a)))


def rmia_votes(views, shadow_views, membership, population_target, population_shadows, online, gamma, a, trim):
    """The share of z that more than half of the views of x dominate; views (q, n), shadow views (q, k, n)."""
    k = len(membership)

    def ratio_x(view, i):
        inside = [membership[j][i] for j in range(k)]
        return rmia_ratio(views[view][i], [shadow_views[view][j][i] for j in range(k)], inside, online, a, trim)

    def ratio_z(z):
        others = [population_shadows[j][z] for j in range(k)]
        return rmia_ratio(population_target[z], others, [False] * k, online, a, trim)

    zs = [ratio_z(z) for z in range(len(population_target))]
    scores = []
    for i in range(len(views[0])):
        xs = [ratio_x(view, i) for view in range(len(views))]
        won = [sum(x / z >= gamma for x in xs) > len(views) / 2 if z > 0 else True for z in zs]
        scores.append(sum(won) / len(zs))
    return scores


def base(losses, shadow_losses):
    return [-loss - math.log(mean([math.exp(-row[i]) for row in shadow_losses])) for i, loss in enumerate(losses)]


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


def tuned_rmia(probabilities, membership, online, candidates, trim, models):
    """Every temperature and a in turn, with every one of the first models in turn as the audited one."""
    k, n = len(membership), len(membership[0])
    best = (-1.0, None)
    for temperature, shadows in probabilities.items():
        for a in candidates:
            aucs = []
            for j in range(min(models, k)):
                opposite = [not flag for flag in membership[j]]
                rest = [i for i in range(k) if membership[i] not in (membership[j], opposite)]
                ratios, inside = [], []
                for x in range(n):
                    flags = [membership[i][x] for i in rest]
                    if all(flags) or (online and not any(flags)):
                        continue
                    others = [shadows[i][x] for i in rest]
                    ratios.append(rmia_ratio(shadows[j][x], others, flags, online, a, trim))
                    inside.append(membership[j][x])
                aucs.append(auc_by_pairs(ratios, inside))
            if mean(aucs) > best[0] + 1e-12:
                best = (mean(aucs), (temperature, a))
    return best[1]


def rmia_with_ties_broken(
    target, shadows, membership, population_target, population_shadows, online, gamma, a, trim=0.0
):
    """The share of the population, and the ratio's place within a step."""
    m, scores = len(population_target), []
    shares = rmia(target, shadows, membership, population_target, population_shadows, online, gamma, a, trim)
    for i, share in enumerate(shares):
        inside = [row[i] for row in membership]
        ratio = rmia_ratio(target[i], [row[i] for row in shadows], inside, online, a, trim)
        scores.append((m * share + ratio / (1 + ratio)) / (m + 1))
    return scores


def quantile(values, share):
    """Linear interpolation between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def lt_iqr(losses):
    """One score per column of a list of points in time."""
    columns = [[row[i] for row in losses] for i in range(len(losses[0]))]
    return [quantile(column, 0.75) - quantile(column, 0.25) for column in columns]


def loss_tnr(members, nonmembers, max_fnr):
    """The best true negative rate of all thresholds that at most ``max_fnr`` of the members exceed."""
    best = 0.0
    for threshold in [*members, *nonmembers]:
        if sum(loss > threshold for loss in members) <= max_fnr * len(members):
            best = max(best, sum(loss > threshold for loss in nonmembers) / len(nonmembers))
    return best
