"""Summarizes the runs: the page, its numbers and its figures."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from types import MappingProxyType
from typing import Any, NamedTuple

from launch.compare.methods import BAR, METHODS, Config, Setting
from launch.compare.state import share_of_bar
from launch.compare.tune import MORE, SECOND_SEED, TRIALS, TUNING_SEED
from launch.trainer.cli import UsageError
from launch.trainer.files import atomic, write_atomic

Run = Mapping[str, Any]
SEARCHED = (TUNING_SEED, SECOND_SEED)
# Pairs whose difference the page reports: (method, its reference).
PAIRS = (
    ("osd_muon", "adamw"), ("osd_muon_low", "adamw"), ("osd_muon_small", "adamw"),
    ("osd_muon", "muon"), ("osd_muon_low", "muon"), ("osd_muon", "stateless"),
    ("osd_muon_low", "stateless"), ("osd_muon", "osd_muon_fixed"), ("osd_muon", "osd_muon_svd"),
    ("osd", "galore"), ("osd_paper", "galore"),
)  # fmt: skip
FINDINGS = "findings.txt"  # next to the page
SIZES = ("60m", "350m", "1b")
RECOMMENDED = "osd_muon_small"


class Summary(NamedTuple):
    """The results of a method in a setting.

    Attributes:
        config: The confirmed configuration, or the best so far.
        losses: Validation loss by confirming seed; inf if the run failed.
        trials: Validation loss of the search, by configuration.
        curve: Training loss of the first confirming seed.
        others: Validation loss by seed of other configurations that were confirmed.
    """

    config: Config
    losses: dict[int, float]
    trials: dict[Config, float]
    curve: list[float | None]
    others: Mapping[Config, Mapping[int, float]] = MappingProxyType({})

    @property
    def mean(self) -> float:
        """Mean validation loss over the seeds, in nats."""
        return statistics.mean(self.losses.values()) if self.losses else math.inf


class Difference(NamedTuple):
    """A paired difference: its mean and half the width of its 95 % interval, in nats."""

    mean: float
    half: float

    def __str__(self) -> str:
        """For example -0.120 ± 0.011."""
        return f"{self.mean:+.3f} ± {self.half:.3f}"


def config_of(run: Run) -> Config:
    """The tuned values of a run."""
    return Config(run["lr"], run["full_lr"], run["own"])


def loss_of(run: Run) -> float:
    """Validation loss in nats; inf if the run failed."""
    return math.inf if run["loss"] is None else float(run["loss"])


def summary(runs: Iterable[Run], setting: str, method: str) -> Summary | None:
    """The results of a method in a setting; None if it has no runs."""
    own = [run for run in runs if run["setting"] == setting and run["method"] == method]
    if not own:
        return None
    trials = {config_of(run): loss_of(run) for run in own if run["seed"] == TUNING_SEED}
    confirming = [run for run in own if run["seed"] not in SEARCHED]
    seeds = Counter(map(config_of, confirming))
    second = {config_of(run): loss_of(run) for run in own if run["seed"] == SECOND_SEED}
    first_of = lambda config: trials.get(config, math.inf)
    both_of = lambda config: first_of(config) + second.get(config, math.inf)
    config = min(seeds or trials, key=lambda c: (-seeds[c], both_of(c), first_of(c)))
    chosen = sorted(
        (run for run in confirming if config_of(run) == config), key=lambda r: r["seed"]
    )
    losses = {run["seed"]: loss_of(run) for run in chosen}
    others: dict[Config, dict[int, float]] = defaultdict(dict)
    for run in confirming:
        if config_of(run) != config:
            others[config_of(run)][run["seed"]] = loss_of(run)
    return Summary(config, losses, trials, chosen[0]["curve"] if chosen else [], others)


def best_config(runs: Iterable[Run], setting: Setting, method: str) -> Config | None:
    """The best configuration of a method in the longest of the shorter runs of the same model."""
    runs = list(runs)
    names = {run["setting"] for run in runs}
    shorter = {name for name in names if name.rpartition("-")[0] == setting.family}
    tokens = lambda name: float(name.rpartition("-")[2].removesuffix("M")) * 1e6
    for name in sorted((s for s in shorter if tokens(s) < setting.tokens), key=tokens)[::-1]:
        if found := summary(runs, name, method):
            return found.config
    return None


def difference(losses: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """Mean paired difference with its Student's t interval; None with fewer than two pairs."""
    from scipy import stats

    seeds = sorted(losses.keys() & others.keys())
    pairs = [losses[seed] - others[seed] for seed in seeds]
    if len(pairs) < 2 or not all(map(math.isfinite, pairs)):
        return None
    spread = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.mean(pairs), float(stats.t.ppf(0.975, len(pairs) - 1)) * spread)


def write(runs: Sequence[Run], out: Path) -> None:
    """Writes OUT/README.md and its figures from the stored runs."""
    settings = sorted({run["setting"] for run in runs})
    found_in = {
        setting: {m: x for m in METHODS if (x := summary(runs, setting, m))} for setting in settings
    }
    parts = [*_head(runs), *findings(out / FINDINGS, found_in)]
    for setting, found in found_in.items():
        parts += section(setting, found)
        if to_draw(found):
            draw(setting, to_draw(found), out / f"{setting}.png")
    parts += state_section()
    write_atomic(out / "README.md", "\n".join(parts) + "\n")


def headline(runs: Sequence[Run], setting: str, names: Iterable[str]) -> list[str]:
    """The confirmed methods of a setting, lowest loss first, in Markdown."""
    found = {name: one for name in names if (one := summary(runs, setting, name))}
    found = to_draw(found)
    bar = found[BAR]
    lines = [
        "| method | state, % of AdamW's bytes | validation loss, nats | "
        "minus AdamW's, 95 % interval |",
        "|---|---:|---:|---:|",
    ]
    for name, one in sorted(found.items(), key=lambda item: item[1].mean):
        off = "" if name == BAR else difference(one.losses, bar.losses)
        size = share_of_bar(setting.partition("-")[0], name)[1]
        lines.append(f"| {METHODS[name].title} | {size:.0f} | {one.mean:.3f} | {off} |")
    return lines


def _head(runs: Sequence[Run]) -> list[str]:
    machines = sorted({run["machine"] for run in runs})
    return [
        "# How the methods compare",
        "",
        "`python -m launch.compare` trains every method with the same tokens, batch, data order, "
        "initial weights and precision, with linear warmup over 10 % of the updates and a cosine "
        "decay to 10 % of the peak. In every method except `AdamW, one rate`, Adam trains "
        "embedding, head and norms with a separate learning rate; that rate is tuned with AdamW, "
        "in addition to AdamW's trials, and shared by all methods. Each method then has at most "
        f"{TRIALS} trials with one seed. First its learning rate is doubled or halved while that "
        "lowers the loss, for at most half of the trials; then three settings of Adam's betas or "
        "of the momentum are tried, and a fourth beyond them if the best is at the edge. With "
        f"the best setting the learning rate is doubled or halved again, with at most {MORE} "
        "additional trials; a learning rate that is still the smallest or the largest tried with "
        "its flags is marked. The two best configurations are trained with a second seed, and "
        "the better of the two with the seeds below, which pair the methods: the same data and, "
        "for each seed, the same initial weights. The loss is the mean over held-out tokens, in "
        "nats, at the end of a whole schedule.",
        "",
        f"{len(runs)} runs, on {', '.join(machines)}; [runs.jsonl](runs.jsonl) contains all of "
        "them, with their flags. The intervals are not corrected for multiple comparisons; the "
        "error bars of the figures are standard deviations over the seeds. These results do not "
        "show how the methods rank on larger models or with more tokens.",
    ]


def findings(path: Path, found_in: Mapping[str, Mapping[str, Summary]]) -> list[str]:
    """What someone concluded from the runs, with the figures filled in; empty without such a file.

    `$quickstart_5M_osd_muon_adamw` is the paired difference of two methods in a setting, with
    `_other` that of the configuration which the search did not choose.

    Raises:
        UsageError: A figure is unknown.
    """
    if not path.exists():
        return []
    figures = [
        (re.sub(r"\W", "_", f"{setting}_{a}_{b}") + "_other" * bool(other), value)
        for setting, found in found_in.items()
        for a, b, other, value in differences(found)
    ]
    count = Counter(name for name, _ in figures)
    values = {name: value for name, value in figures if count[name] == 1}
    text = Template(path.read_text(encoding="utf-8").strip())
    if not text.is_valid():
        raise UsageError(f"{path}: a $ without a name; write $$ for the character")
    if unknown := set(text.get_identifiers()) - set(values):
        raise UsageError(
            f"{path}: ${min(unknown)} is not a paired difference of these runs; expected one of "
            f"{', '.join(sorted(values)) or 'none'}"
        )
    return ["", text.substitute(values)]


def section(setting: str, found: Mapping[str, Summary]) -> list[str]:
    """The section of the page on one setting."""
    model = setting.partition("-")[0]
    bar = found.get(BAR)
    ranked = sorted(found.items(), key=lambda item: item[1].mean)
    picture = f"![loss against state, and over the run]({setting}.png)"
    lines = [
        "", f"## {setting}", "", *([picture, ""] if to_draw(found) else []),
        "| method | state, % of AdamW's numbers | bytes | learning rate | other flags | "
        "validation loss | minus AdamW's, 95 % interval | each seed |",
        "|---|---:|---:|---:|---|---:|---:|---|",
    ]  # fmt: skip
    for name, one in ranked:
        numbers, size = share_of_bar(model, name)
        off = difference(one.losses, bar.losses) if bar and name != BAR else None
        each = ", ".join(f"{x:.3f}" for x in one.losses.values()) or "being tuned"
        lines.append(
            f"| {METHODS[name].title} | {numbers:.0f} | {size:.0f} | {rate_text(one)} | "
            f"{_plain(one.config.own)} | {_text(one.mean) if one.losses else ''} | {off or ''} | "
            f"{each} |"
        )
    if texts := differences(found):
        lines += ["", "| method | minus | paired difference, 95 % interval |", "|---|---|---:|"]
        lines += [
            f"| {METHODS[a].title}{other} | {METHODS[b].title} | {text} |"
            for a, b, other, text in texts
        ]
    lines += [
        "",
        "Validation loss of every trial, with one seed:",
        "",
        "| method | trials |",
        "|---|---|",
    ]
    for name, one in ranked:
        lines.append(f"| {METHODS[name].title} | {trials_text(one)} |")
    return lines


def differences(found: Mapping[str, Summary]) -> list[tuple[str, str, str, Difference]]:
    """The paired differences of `PAIRS`: (method, reference, a configuration not chosen, value)."""
    return [
        (a, b, name, text)
        for a, b in PAIRS
        if a in found and b in found
        for name, losses in confirmed(found[a])
        if (text := difference(losses, found[b].losses))
    ]


def confirmed(one: Summary) -> list[tuple[str, Mapping[int, float]]]:
    """The losses by seed of the chosen configuration, and of others with the values they have."""
    others = [
        (f"; not chosen by the search: {config.lr:g} {_plain(config.own)}".rstrip(), losses)
        for config, losses in sorted(one.others.items())
    ]
    return [("", one.losses), *others]


def rate_text(one: Summary) -> str:
    """The learning rate, marked if it has no trial with the same flags on one side."""
    rates = [x.lr for x in one.trials if x._replace(lr=one.config.lr) == one.config]
    inside = bool(rates) and min(rates) < one.config.lr < max(rates)
    return f"{one.config.lr:g}" + ("" if inside else ", at the edge of its trials")


def trials_text(one: Summary) -> str:
    """The trials of a search, grouped by the method's own flags."""
    by_own: dict[str, list[str]] = defaultdict(list)
    for config, loss in sorted(one.trials.items()):
        own = _plain(config.own)
        full = "" if config.full_lr == one.config.full_lr else f" ({config.full_lr:g})"
        by_own[own].append(f"{config.lr:g}{full}: {_text(loss)}")
    return "; ".join(f"{own} {', '.join(found)}".strip() for own, found in by_own.items())


def _plain(flags: str) -> str:
    return flags.replace("--", "")


def _text(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "failed"


def state_section() -> list[str]:
    """The section on the state of all methods at larger model sizes."""
    return [
        "", "## State", "",
        "All arrays of the optimizer, including those of embedding and head and the moments of "
        "P, in "
        "percent of AdamW's, by count and by bytes.", "",
        *shares_table(METHODS),
    ]  # fmt: skip


def shares_table(names: Iterable[str]) -> list[str]:
    """The state of methods at larger model sizes, in percent of AdamW's, in Markdown."""
    lines = [
        "| method | " + " | ".join(f"{size.upper()}, numbers | bytes" for size in SIZES) + " |",
        "|---|" + "---:|---:|" * len(SIZES),
    ]
    for name in names:
        shares = (share_of_bar(size, name) for size in SIZES)
        cells = " | ".join(f"{numbers:.1f} | {size:.1f}" for numbers, size in shares)
        lines.append(f"| {METHODS[name].title} | {cells} |")
    return lines


def to_draw(found: Mapping[str, Summary]) -> dict[str, Summary]:
    """The methods confirmed by at least two seeds; empty with fewer than two such methods."""
    done = {name: one for name, one in found.items() if len(one.losses) > 1}
    done = {name: one for name, one in done.items() if math.isfinite(one.mean)}
    return done if len(done) > 1 else {}


def draw(setting: str, found: Mapping[str, Summary], path: Path) -> None:
    """Plots loss against state, and the training loss of one seed over the run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), dpi=110, layout="constrained")
    by_state, over_run = figure.subplots(1, 2)
    model = setting.partition("-")[0]
    for index, (name, one) in enumerate(found.items()):
        color = f"C{index % 10}"
        marker = "*" if name.startswith("osd_muon") else "o"
        bytes_share = share_of_bar(model, name)[1]
        spread = statistics.stdev(one.losses.values())
        by_state.errorbar(
            bytes_share, one.mean, spread, fmt=marker, color=color, capsize=3,
            markersize=11 if marker == "*" else 7,
        )  # fmt: skip
        left = bytes_share > 85  # no space for a label on its right
        by_state.annotate(
            name, (bytes_share, one.mean), xytext=(-6 if left else 6, 5), fontsize=8,
            textcoords="offset points", ha="right" if left else "left",
        )  # fmt: skip
        curve = [math.nan if x is None else x for x in one.curve]
        steps = [(i + 1) / len(curve) * 100 for i in range(len(curve))]
        over_run.plot(steps, curve, color=color, linewidth=1.5, label=f"{name} {one.mean:.3f}")
    by_state.set_xlabel("optimizer state, % of AdamW's bytes")
    by_state.set_ylabel("validation loss, nats")
    by_state.set_xlim(left=0)
    over_run.set_xlabel("% of the run")
    over_run.set_ylabel("training loss, nats")
    tails = [x for one in found.values() for x in one.curve[len(one.curve) // 5 :] if x is not None]
    if tails:
        over_run.set_ylim(min(tails) - 0.05, max(tails) + 0.05)
        over_run.legend(fontsize=8, frameon=False)
    for axis in (by_state, over_run):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    with atomic(path) as temporary:
        figure.savefig(temporary)
