"""The pictures that more than one page shows; the only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cvxlib.ground.checks import needs_extra, require
from cvxlib.model.heads import Head
from cvxlib.program.solution import Solution
from cvxlib.solvers.training import Training
from cvxlib.workflow.regularisation import Path

with needs_extra("the figures", "figures"):
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

#: one colour per role, told apart also without colour vision (Okabe and Ito 2008)
COLOURS = {"optimum": "#0072B2", "bound": "#56B4E9", "training": "#D55E00", "gated": "#009E73", "neutral": "#666666"}
#: one colour per head of the transfer experiment, from the same palette
HEAD_COLOURS = {
    "linear": "#000000",
    "MLP": "#E69F00",
    "self-attention": "#0072B2",
    "MLP-Mixer": "#009E73",
    "FNO": "#D55E00",
    "block FNO": "#CC79A7",
}


def use_style() -> None:
    """Set the book's plotting style for the running session."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.titlesize": 11,
            "axes.labelsize": 10,
            "font.size": 10,
            "legend.frameon": False,
            "image.cmap": "RdBu_r",
        }
    )


def training_against_optimum(
    trainings: Mapping[str, Sequence[Training]], solution: Solution, ax: Axes | None = None
) -> Axes:
    """Objective of trained heads epoch by epoch, above the certified interval of the global optimum.

    Args:
        trainings: for each label (a learning rate, say) the runs from several seeds on the solution's program.
        solution: the certified solution.
        ax: where to draw; a new figure by default.
    """
    require(len(trainings) > 0, "trainings", "at least one run", "none")
    ax = ax or plt.subplots(figsize=(6.4, 3.8))[1]
    shades = plt.get_cmap("autumn")(np.linspace(0.0, 0.65, len(trainings)))
    for (label, runs), shade in zip(trainings.items(), shades, strict=True):
        for k, run in enumerate(runs):
            name = f"{label}, {len(runs)} seed{'s' if len(runs) > 1 else ''}" if k == 0 else None
            ax.plot(run.objective, color=shade, lw=1.3, alpha=0.9, label=name)
    certificate = solution.certificate
    ax.axhline(certificate.primal, color=COLOURS["optimum"], lw=2.2, label="certified global optimum")
    ax.axhspan(0, certificate.dual, color=COLOURS["bound"], alpha=0.18, lw=0, label="proved out of reach of any head")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    ax.yaxis.set_minor_formatter(ScalarFormatter())
    longest = max(len(run.objective) for runs in trainings.values() for run in runs)
    ax.set(xlabel="epoch", ylabel="regularised objective", xlim=(0, longest - 1), ylim=(certificate.dual * 0.75, None))
    ax.legend(loc="upper right", fontsize=9)
    return ax


def convergence(solutions: Mapping[str, Solution]) -> Figure:
    """Primal and dual values closing on the optimum, and the certified gap, against evaluations.

    Args:
        solutions: one for each label.
    """
    require(len(solutions) > 0, "solutions", "at least one solution", "none")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4))
    colours = list(COLOURS.values())
    for (label, solution), colour in zip(solutions.items(), [colours[0], colours[2], colours[3]], strict=False):
        evaluations, primal, dual = solution.history.T
        left.plot(evaluations, primal, color=colour, label=f"{label}: primal")
        left.plot(evaluations, dual, color=colour, ls="--", label=f"{label}: dual bound")
        right.semilogy(
            evaluations, (primal - dual) / torch.maximum(primal.abs(), dual.abs()), color=colour, label=label
        )
    first = next(iter(solutions.values()))
    left.set(xlabel="evaluations", ylabel="objective", ylim=(0, 3 * max(s.objective for s in solutions.values())))
    right.set(xlabel="evaluations", ylabel="certified relative gap")
    left.set_title("the optimum lies between the curves")
    right.set_title(f"certified gap, down to {first.certificate.relative_gap:.0e}")
    left.legend(fontsize=8)
    right.legend(fontsize=9)
    return figure


def token_weights(head: Head, tokens: Tensor, images: Tensor, count: int = 4) -> Figure:
    r"""The weight with which each patch's value enters the prediction, for the largest heads of a pooled linear attention head.

    Pooled over queries, head j is :math:`\sum_b w_{j,b}\, x_b^\top V_j` with
    :math:`w_j = \tfrac1s \mathbf 1^\top X U_j X^\top`: one number for each token.

    Args:
        head: a pooled self-attention head.
        tokens: (k, s, d) the samples, with s a square number.
        images: (k, side, side) the same samples as pictures.
        count: how many heads to show, largest first.
    """
    grid = round(tokens.shape[1] ** 0.5)
    require(grid**2 == tokens.shape[1], "tokens", "a square number of tokens", tokens)
    with torch.no_grad():
        size = head.u.flatten(1).norm(dim=1) * head.v.flatten(1).norm(dim=1)
        largest = size.argsort(descending=True)[:count]
        weights = head.mixer.hidden(tokens, head.u[largest]).mean(2)  # (k, heads, s)
    figure, axes = plt.subplots(len(tokens), len(largest) + 1, figsize=(1.35 * (len(largest) + 1), 1.4 * len(tokens)))
    for row, image, weight in zip(axes, images, weights, strict=True):
        row[0].imshow(image, cmap="gray_r")
        for ax, w in zip(row[1:], weight, strict=True):
            limit = float(w.abs().max())
            ax.imshow(image, cmap="gray_r", alpha=0.35, extent=(0, grid, grid, 0))
            ax.imshow(w.reshape(grid, grid), vmin=-limit, vmax=limit, alpha=0.7, extent=(0, grid, grid, 0))
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
    axes[0][0].set_title("image", fontsize=9)
    for j, ax in enumerate(axes[0][1:]):
        ax.set_title(f"head {j + 1}", fontsize=9)
    return figure


def spectrum(solution: Solution, ax: Axes | None = None, label: str | None = None, colour: str | None = None) -> Axes:
    """The sizes of the recovered heads (singular values of the lifted blocks), largest first."""
    ax = ax or plt.subplots(figsize=(4.6, 3.2))[1]
    factors = solution.factors
    sizes = (factors.u.flatten(1).norm(dim=1) * factors.v.flatten(1).norm(dim=1)).cpu()
    ax.semilogy(
        range(1, len(sizes) + 1),
        sizes.sort(descending=True).values,
        "o-",
        ms=4,
        color=colour or COLOURS["optimum"],
        label=label,
    )
    ax.set(xlabel="head", ylabel="singular value")
    return ax


def benchmark_bars(judged: Mapping[str, Mapping], ax: Axes | None = None) -> Axes:
    """How far each measured value lies beyond the bar it is held against, as a factor; to the right of 1 the bar is met.

    Args:
        judged: for each label a measured value, greater than 0, and the end ``at_least`` or ``at_most`` of its interval.
        ax: where to draw; a new figure by default.
    """
    factors = {}
    for label, bar in judged.items():
        above = bar["measured"] / bar["at_least"] if bar["at_least"] else np.inf
        below = bar["at_most"] / bar["measured"] if bar["at_most"] else np.inf
        factors[label] = min(above, below)
    ax = ax or plt.subplots(figsize=(8.6, 0.8 + 0.26 * len(factors)), layout="constrained")[1]
    colours = [COLOURS["optimum"] if factor >= 1 else COLOURS["training"] for factor in factors.values()]
    ax.scatter(factors.values(), range(len(factors)), c=colours, zorder=3)
    ax.axvline(1, color=COLOURS["neutral"], lw=1)
    ax.set(xscale="log", xlabel="times better than the bar", yticks=range(len(factors)))
    ax.set_yticklabels(factors, fontsize=8)
    ax.invert_yaxis()
    return ax


def power_laws(laws: Sequence[Mapping]) -> Figure:
    """Measured values against a size that grows, with fitted power laws, on logarithmic axes: one panel for each quantity.

    Args:
        laws: each with ``axis``, ``quantity``, ``sizes``, ``values``, ``exponent`` and ``factor``.
    """
    quantities = list(dict.fromkeys(law["quantity"] for law in laws))
    require(len(quantities) > 0, "laws", "at least one power law", "none")
    shape = (3.6 * len(quantities), 3.4)
    figure, axes = plt.subplots(1, len(quantities), figsize=shape, squeeze=False, layout="constrained")
    for ax, quantity in zip(axes[0], quantities, strict=True):
        mine = [law for law in laws if law["quantity"] == quantity]
        for law, colour in zip(mine, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(mine))), strict=True):
            sizes = np.array(law["sizes"], dtype=float)
            ax.loglog(sizes, law["values"], "o", ms=4, color=colour)
            fitted = law["factor"] * sizes ** law["exponent"]
            ax.loglog(sizes, fitted, color=colour, lw=1, label=f"{law['axis']}^{law['exponent']:.2f}")
        ax.set(xlabel="size", title=quantity.replace("_", " "))
        ax.legend(fontsize=8)
    return figure


def accuracy_against_distance(rows: Sequence[dict], ax: Axes | None = None) -> Axes:
    """Test accuracy of trained heads against their relative distance above a certified lower bound, and of the optimum at the left end.

    Every dot is one finished training; the diamond is the certified optimum of the same head, at the distance its certificate allows.

    Args:
        rows: of :func:`cvxlib.vision.transfer.run`, with at most one certified optimum for each head; heads without one are left out.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: no certified optimum among the rows, or two for one head.
    """
    optima = [row for row in rows if row["method"] == "optimum"]
    names = [row["head"] for row in optima]
    require(0 < len(names) == len(set(names)), "rows", "one certified optimum for each head", f"those of {names}")
    ax = ax or plt.subplots(figsize=(6.4, 4.2))[1]
    for optimum in optima:
        colour, key = HEAD_COLOURS[optimum["head"]], (optimum["head"], optimum["activation"])
        mine = [row for row in rows if (row["head"], row["activation"]) == key and row["objective"] is not None]
        mine = sorted(mine, key=lambda row: row["objective"])
        # a certificate can be tighter than the axis is long
        x = [max(row["objective"] / optimum["dual"] - 1, 1e-4) for row in mine]
        y = [100 * row["top1"] for row in mine]
        ax.plot(x, y, color=colour, lw=0.8, alpha=0.35)
        ax.plot(x[1:], y[1:], "o", color=colour, ms=4.5, alpha=0.75, mec="white", mew=0.4)
        ax.plot(x[0], y[0], "D", color=colour, ms=8, mec="white", label=optimum["head"])
    ax.set_xscale("log")
    ax.set(xlabel="relative distance above the certified lower bound", ylabel="test accuracy, percent")
    ax.legend(fontsize=8, title="head (diamond: certified optimum)", title_fontsize=8)
    return ax


def transfer_accuracy(table: Sequence[dict], ax: Axes | None = None) -> Axes:
    """Top-1 test accuracy of every head, trained by AdamW (mean and spread over seeds) and at its certified optimum, best at the top.

    Args:
        table: from :func:`cvxlib.vision.summary.summarise`, of one beta.
        ax: where to draw; a new figure by default.
    """
    require(len(table) > 0, "table", "at least one head", "none")
    ax = ax or plt.subplots(figsize=(7.2, 0.6 + 0.3 * len(table)))[1]

    def best(entry: dict) -> float:
        return max(entry["AdamW"]["top1"]["mean"], (entry["optimum"] or {"top1": 0.0})["top1"])

    ordered = sorted(table, key=best)
    labels = [f"{e['head']}, {e['activation']}" if e["activation"] != "none" else e["head"] for e in ordered]
    for k, entry in enumerate(ordered):
        colour, trained = HEAD_COLOURS[entry["head"]], entry["AdamW"]["top1"]
        mean, spread = 100 * trained["mean"], 100 * trained["spread"]
        ax.errorbar(mean, k, xerr=spread, fmt="o", color=colour, mfc="white", ms=6, capsize=3)
        if entry["optimum"]:
            ax.plot(100 * entry["optimum"]["top1"], k, "D", color=colour, ms=7)
    ax.plot([], [], "o", color=COLOURS["neutral"], mfc="white", label="AdamW, mean and spread over seeds")
    ax.plot([], [], "D", color=COLOURS["neutral"], label="certified optimum")
    ax.set_yticks(range(len(labels)), labels)
    ax.set(xlabel="top-1 test accuracy, percent")
    ax.legend(fontsize=8, loc="lower right")
    return ax


def regularisation_path(found: Path, accuracy: Tensor | None = None) -> Figure:
    """Heads, accuracy and certified gap along a regularisation path, from the largest weight decay on the left to the smallest.

    Args:
        found: the path.
        accuracy: (m,) the share of labels that each point predicts; one panel fewer without.
    """
    require(len(found) > 0, "found", "a path with at least one point", "none")
    panels = 2 if accuracy is None else 3
    figure, axes = plt.subplots(1, panels, figsize=(3.2 * panels, 3.2))
    betas = found.betas / found.betas[0]
    axes[0].plot(betas, found.rank, "o-", ms=4, color=COLOURS["optimum"])
    axes[0].set(ylabel="heads", ylim=(0, None))
    if accuracy is not None:
        axes[1].plot(betas, 100 * accuracy, "o-", ms=4, color=COLOURS["gated"])
        axes[1].set(ylabel="accuracy, percent", ylim=(0, 100))
    gaps = found.relative_gap.clamp(min=torch.finfo(torch.float64).eps)
    axes[-1].plot(betas, gaps, "o-", ms=4, color=COLOURS["bound"])
    # the gap at beta_max is rounding, and would flatten all others
    axes[-1].set(ylabel="certified relative gap", yscale="log", ylim=(float(gaps.max()) / 1e3, None))
    for ax in axes:
        ax.set(xscale="log", xlabel=r"$\beta$ / first $\beta$")
        ax.invert_xaxis()
    return figure


def certified_gaps(solutions: Mapping[str, Solution], ax: Axes | None = None) -> Axes:
    """The certified relative gap of several solvers against evaluations, on logarithmic axes.

    Args:
        solutions: one for each label.
        ax: where to draw; a new figure by default.
    """
    require(len(solutions) > 0, "solutions", "at least one solution", "none")
    ax = ax or plt.subplots(figsize=(5.2, 3.4))[1]
    colours = [COLOURS[role] for role in ("optimum", "training", "gated", "neutral")]
    for k, (label, solution) in enumerate(solutions.items()):
        evaluations, primal, dual = solution.history.T
        gap = (primal - dual) / torch.maximum(primal.abs(), dual.abs())
        ax.plot(evaluations, gap, color=colours[k % len(colours)], marker="os^D"[k % 4], ms=4, lw=1.5, label=label)
    ax.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="certified relative gap")
    ax.legend(loc="lower left")
    return ax
