"""What the page says, in words and numbers: a row for each claim, other measurements, and the figures that results alone make."""

import math
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from alexnet_repro import figures
from alexnet_repro.claims import Finding, deciding, findings, verdict
from alexnet_repro.cli import CONF
from alexnet_repro.net import AlexNet
from alexnet_repro.paper import Claim, expected_errors, read_claims
from alexnet_repro.results import Result
from alexnet_repro.runs import machine

CLASS_OF = {  # of a verdict, for its colour
    "reproduced": "good",
    "proxy: agrees": "good",
    "right way, other size": "half",
    "within noise": "half",
    "proxy: within noise": "half",
    "other way": "bad",
    "other value": "bad",
    "proxy: disagrees": "bad",
}


def content(results: list[Result]) -> dict[str, Any]:
    """What the page says in words and numbers: a row for each claim, what else was measured, and sources."""
    claims = read_claims()
    found = {name: findings(claim, results) for name, claim in claims.items()}
    rows = [row(name, claim, found[name]) for name, claim in claims.items()]
    others = [
        row(name, claims[name], []) | measured(claims[name], finding) | {"verdict": finding.verdict}
        for name, of_claim in found.items()
        for finding in of_claim
        if finding is not deciding(claims[name], of_claim)
    ]
    return {
        "rows": rows,
        "others": others,
        "verdicts": dict(Counter(row["verdict"] for row in rows).most_common()),
        "sources": [source(result) for result in results],
        "results": results,
        "expected": expected_lines(claims),
        "date": date.today().isoformat(),
        "machine": machine(torch.device("cpu")),
    }


def drawings(results: list[Result], runs: list[Path]) -> dict[str, tuple[Figure, str]]:
    """The figures that results alone make, with their captions; curves of these runs, or of all results if there are none."""
    claims = {name: claim for name, claim in read_claims().items() if claim["kind"] in ("difference", "ratio")}
    found = {name: findings(claim, results) for name, claim in claims.items()}
    drawn: dict[str, tuple[Figure, str]] = {}
    if changes := deltas(claims, found):
        drawn["ablations"] = (
            figures.forest(changes, "change of the top-1 error, points"),
            "What each change does to the top-1 error. The paper's values are of its own data and whole protocols, and no measure for others.",
        )
    raced = claims["figure_1"]["run"]["experiment"]  # have a figure of their own
    chosen = [r for r in results if r.get("history")]
    chosen = [r for r in chosen if (Path(r["file"]).parent in runs if runs else r.get("experiment") not in raced)]
    histories = {label(r): r["history"] for r in chosen}
    if histories:
        few = dict(list(histories.items())[: len(figures.COLOURS)])
        more = f" {len(histories) - len(few)} more are not drawn." if len(histories) > len(few) else ""
        drawn["curves"] = (
            figures.training_curves(few),
            "Errors by epoch: in training (solid), as the images were met, and in validation or testing (dashed), one view."
            + more,
        )
    races = [r for finding in found["figure_1"] for r in finding.results if r["data"] == "cifar10"]
    if races:
        drawn["figure-1"] = (
            figures.figure_1(races),
            "Figure 1: training error on CIFAR-10 with ReLUs (solid) and tanh (dashed), a line for each seed; "
            f"25% is marked. Trained on: {races[0].get('source') or 'CIFAR-10'}. Epochs to 25% (updates): {to_25(races)}.",
        )
    drawn["figure-2"] = (
        figures.figure_2(AlexNet()),
        "Figure 2, drawn from the net itself: two towers, the size of each layer's output, and where two devices talk.",
    )
    return drawn


def to_25(races: list[Result]) -> str:
    """Epochs and updates that each of these runs took to 25% training error, by net and activation."""
    lines: dict[str, list[tuple[str, str]]] = {}
    for race in sorted(races, key=lambda race: (race["net"], race["activation"], race["seed"])):
        there = next((epoch for epoch in race["history"] if epoch["train_error"] <= 25), None)
        took = (str(there["epoch"]), str(there.get("steps", "?"))) if there else ("never", "never")
        lines.setdefault(f"{race['net']}, {race['activation']}", []).append(took)
    columns = {name: [", ".join(column) for column in zip(*took, strict=True)] for name, took in lines.items()}
    return "; ".join(f"{name} {epochs} ({updates})" for name, (epochs, updates) in columns.items())


def row(name: str, claim: Claim, found: list[Finding]) -> dict[str, Any]:
    """A line of the claims table."""
    decides = deciding(claim, found)
    word = verdict(claim, found)
    about = {
        "measured on": ", ".join(str(claim[key]) for key in ("data", "split", "protocol") if key in claim),
        "2012 log": claim.get("log"),
        "reproduced if": rule(claim),
        "note": claim.get("note"),
        "command": claim.get("command"),
    }
    return {
        "name": name,
        "kind": claim["kind"],
        "section": claim["section"],
        "says": claim["says"],
        "paper": said(claim),
        "of": " ".join(claim[key] for key in ("data", "split") if claim.get(key, "not said") != "not said"),
        "about": {key: text for key, text in about.items() if text},
        **(measured(claim, decides) if decides else {"here": "", "interval": "", "where": ""}),
        "verdict": word,
        "class": CLASS_OF.get(word, "none"),
    }


def measured(claim: Claim, finding: Finding) -> dict[str, Any]:
    """What a finding shows: numbers, interval, where they come from."""
    keys = list(claim.get("value") or finding.values)
    low_high = finding.intervals.get(keys[0])
    between = [numbers(claim, {keys[0]: end}) for end in low_high] if low_high else []
    facts = finding.alike
    where = [str(facts[key]) for key in ("source", "net", "ablation", "recipe", "options") if facts.get(key)]
    if facts.get("data") and not facts.get("source"):
        where.insert(0, facts["data"])
    if "ratios" in (finding.results or [{}])[0]:
        where.append(finding.results[0].get("machine", ""))
    if facts.get("epochs"):
        where.append(f"{facts['epochs']} epochs")
    if members := (finding.results or [{}])[0].get("members"):
        where.append(f"{members} nets")
    elif finding.seeds and facts.get("data"):
        where.append(f"seed{'s' if len(finding.seeds) > 1 else ''} {', '.join(map(str, finding.seeds))}")
    return {
        "here": numbers(claim, {key: finding.values[key] for key in keys if key in finding.values}),
        "interval": " to ".join(between),
        "where": ", ".join(where),
        "class": CLASS_OF.get(finding.verdict, "none"),
    }


def said(claim: Claim) -> str:
    """The paper's value, or the direction that it names."""
    if not claim.get("value"):
        return claim.get("direction", "")
    if claim["kind"] == "count" and "direction" in claim:
        return f"at most {max(claim['value'].values())} %"
    return numbers(claim, claim["value"])


def numbers(claim: Claim, values: dict[str, float]) -> str:
    """Values as the paper writes them: 40.7 / 18.2, +1.4 / +1.2, 6 times, 60,965,224."""
    kind, measure = claim["kind"], claim.get("measure")
    if measure == "loading":
        return f"{100 * values['share']:.1f}% of the time"
    if kind == "ratio":
        return " / ".join(f"{value:.3g} times" if 0 < value < math.inf else "never" for value in values.values())
    if kind == "difference" or measure in ("fc7_minus_pixels", "codes_minus_pixels"):
        return " / ".join(f"{value:+.1f}" for value in values.values())
    if kind == "count":
        whole = all(value >= 100 or float(value).is_integer() for value in values.values())
        if measure == "share_of_each_convolution":
            return " ".join(f"{value:.3g}" for value in values.values()) + " %"
        return " - ".join(f"{value:,.0f}" if whole else f"{value:.3f}" for value in values.values())
    if measure == "specialisation":
        return f"{values['share']:.2f}"
    if "days" in values:
        return f"{values['days']} days"
    return " / ".join(f"{value:.4g}" if kind == "quoted" else f"{value:.1f}" for value in values.values())


def rule(claim: Claim) -> str | None:
    """The claim's rule in words."""
    kind, within = claim["kind"], claim.get("within")
    way = {"more": "above", "less": "below"}.get(claim.get("direction", ""))
    if kind == "count":
        if way:
            return "none is above it"
        return "equal" if within == 0 else f"within {100 * claim['within']:.0f}%"
    if kind == "number" and "run" in claim:
        return f"top-1 within {within} points"
    if kind in ("difference", "ratio", "picture") and ("run" in claim or "measure" in claim):
        neutral = 1 if kind == "ratio" else claim.get("threshold", 0)
        size = ""
        if within:
            far = {"ratio": f"within a factor of {within}", "difference": f"within {within} points"}[kind]
            size = f", and it is {f'no more than {within} points below' if way else far + ' of'} the paper's value"
        seeds = "the 95% interval over seeds lies" if claim.get("measure") != "loading" else "it is"
        return f"{seeds} {way or 'above'} {neutral}{size}"
    return None


def deltas(claims: dict[str, Claim], found: dict[str, list[Finding]]) -> list[dict[str, Any]]:
    """Lines of the forest plot: every difference of top-1 errors of two experiments that was measured."""
    lines = []
    for name, claim in claims.items():
        if claim["kind"] != "difference" or "measure" in claim:
            continue
        for finding in found[name]:
            parts = (finding.alike.get("ablation") or name, finding.alike["data"], finding.alike["recipe"])
            lines.append(
                {
                    "label": ", ".join(str(part) for part in parts) + f" (n={len(finding.seeds)})",
                    "value": finding.values["top1_error"],
                    "interval": finding.intervals.get("top1_error"),
                    "paper": (claim.get("value") or {}).get("top1_error"),
                }
            )
    return lines


def expected_lines(claims: dict[str, Claim]) -> list[tuple[str, str, float, float]]:
    """Ablation, data, top-1 and top-5 error of ten crops: what the paper measured."""
    lines = []
    for name, claim in claims.items():
        if "run" in claim and (pair := expected_errors(claims, name)):
            where = f"{claim['data']} {claim['split']}"
            what = "five_cnns" if "members" in claim["run"] else claim["run"]["ablation"]
            lines.append((what, where, pair["top1_error"], pair["top5_error"]))
    return lines


def label(result: Result) -> str:
    """A run in a few words."""
    parts = [result["recipe"], result["net"], result["ablation"], result["data"], *result.get("options", ())]
    if result["net"] != "alexnet":
        parts.append(f"rate {result.get('lr')}")
    parts.append(f"mean of {result['members']} nets" if "members" in result else f"seed {result['seed']}")
    return ", ".join(part for part in parts if part not in ("none", "alexnet"))


def source(result: Result) -> dict[str, str]:
    """A line of the list of results."""
    errors = [
        f"{view['top1_error']:.1f} / {view['top5_error']:.1f}" if (view := result.get(key)) else ""
        for key in ("centre", "ten_crop")
    ]
    return {
        "file": result["file"].removeprefix(f"{Path(CONF).parent}/"),
        "what": label(result) if "recipe" in result else "speed",
        "epochs": str(result.get("epochs", "")),
        "one view": errors[0],
        "ten crops": errors[1],
        "hardware": result.get("hardware") or result.get("machine", ""),
        "commit": (result.get("commit") or "")[:10],
        "command": result.get("command", ""),
    }


def summary(page: dict[str, Any]) -> str:
    """How many claims have which verdict."""
    return f"{len(page['rows'])} claims: " + ", ".join(f"{count} {word}" for word, count in page["verdicts"].items())


def claims_table(page: dict[str, Any]) -> str:
    """All rows in Markdown."""
    return _table(page["rows"], "says", "section", "paper", "here", "interval", "where", "verdict")


def others_table(page: dict[str, Any]) -> str:
    """What else was measured, in Markdown."""
    return _table(page["others"], "says", "section", "where", "here", "interval", "verdict")


def _table(lines: list[dict[str, Any]], *columns: str) -> str:
    titles = {
        "name": "claim",
        "says": "claim",
        "paper": "the paper",
        "interval": "95% interval",
        "where": "measured on",
    }
    head = ["| " + " | ".join(titles.get(column, column) for column in columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *("| " + " | ".join(line[column] or "-" for column in columns) + " |" for line in lines)])


def readme_block(page: dict[str, Any]) -> str:
    """The README's part about claims: what was measured on the paper's own data, what was counted, and what was not run."""
    columns = ("name", "paper", "here", "interval", "where", "verdict")
    lines = [_table([line for line in page["rows"] if line["here"] and line["kind"] != "count"], *columns)]
    if several := [line for line in page["others"] if line["interval"]]:
        lines += [
            "",
            "Of several seeds, too: another net, recipe or protocol, and proxies (other data, a shorter protocol):",
            "",
        ]
        lines += [_table(several, *columns)]
    counted: dict[str, list[str]] = {}
    for line in page["rows"]:
        if line["kind"] == "count":
            counted.setdefault(line["verdict"], []).append(line["name"])
    told = "; ".join(f"{', '.join(names)}: {word}" for word, names in counted.items())
    missing = ", ".join(line["name"] for line in page["rows"] if line["verdict"] == "not run")
    lines += ["", f"Counted on the net: {told}. Not run: {missing}.", ""]
    for data in ("photos", "imagenette"):
        of_data = [r for r in page["results"] if r.get("data") == data and r["net"] == "alexnet" and "members" not in r]
        errors = (
            f"{', '.join(w for w in (r['recipe'], r['ablation'], *r.get('options', ())) if w != 'none')}: "
            f"{r['centre']['top1_error']:.1f} / {r['ten_crop']['top1_error']:.1f} ({r['epochs']} epochs, seed {r['seed']})"
            for r in of_data
        )
        if of_data:
            lines.append(f"`{data}`, top-1 error of one view / ten crops, %, ten classes: {'; '.join(errors)}.")
    return "\n".join([f"{summary(page)}.", "", *lines])
