"""Write the content of the report as Markdown: the tables of report.md and of W&B, and the README's block."""

from statistics import fmean
from typing import Any

from alexnet_repro.claims.results import Result
from alexnet_repro.page.content import summary
from alexnet_repro.page.study import DIFFERENCES, SCALES, markdown
from alexnet_repro.page.wording import PRECISIONS

README_COLUMNS = ("ten_crop", "training", "overfitting")  # of the study; report/ has them all


def claims_table(page: dict[str, Any]) -> str:
    """Return the claims as a Markdown table, with a row for each recipe and net."""
    lines = [row | answer for row in page["rows"] for answer in row["answers"]]
    lines += [row | _NO_ANSWER | {"verdict": row["status"]} for row in page["rows"] if not row["answers"]]
    return _table(lines, "says", "section", "paper", "here", "interval", "where", "verdict")


_NO_ANSWER = {"here": "", "interval": "", "where": "", "why": "", "log_loss": ""}


def others_table(page: dict[str, Any]) -> str:
    """Return the other measurements as a Markdown table."""
    return _table(page["others"], "says", "section", "where", "why", "paper", "here", "interval", "verdict")


def _table(lines: list[dict[str, Any]], *columns: str) -> str:
    titles = {
        "name": "claim",
        "says": "claim",
        "paper": "the paper",
        "here": "measured",
        "interval": "95% interval",
        "where": "measured on",
        "why": "why it is not decisive",
    }
    head = ["| " + " | ".join(titles.get(column, column) for column in columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *("| " + " | ".join(line[column] or "-" for column in columns) + " |" for line in lines)])


def _mean_errors(results: list[Result]) -> str:
    views = [[r["centre"] for r in results], [r["ten_crop"] for r in results if "ten_crop" in r]]
    means = " / ".join(f"{fmean(view['top1_error'] for view in of_view):.1f}" for of_view in views if of_view)
    seeds = ", ".join(str(r["seed"]) for r in results)
    return f"{means} ({'mean of seeds' if len(results) > 1 else 'seed'} {seeds})"


def readme_blocks(page: dict[str, Any]) -> dict[str, str]:
    """Return the README's blocks about the claims: the findings in sentences, and the tables behind them."""
    return {"findings": "\n".join(f"- {sentence}" for sentence in page["headline"]), "tables": _tables(page)}


def _tables(page: dict[str, Any]) -> str:
    lines: list[str] = []
    for number, study in enumerate(page["studies"]):
        lines += [
            f"**{study['heading']}** ({study['title']}{'; a proxy' if study['proxy'] else ''}). The baseline has a {study['baseline']}.",
            "",
        ]
        lines += ["\n\n".join(study["sentences"]), ""]
        table = [markdown(study["study"], README_COLUMNS), ""]
        lines += (
            ["<details><summary>Its table</summary>", "", *table, "</details>", ""]
            if number
            else [*table, DIFFERENCES, ""]
        )
    lines += [f"**The baseline alone** ({line['title']}) has a {line['baseline']}.\n" for line in page["baselines"]]
    lines += [
        f"Averaging the predictions ({line['what']}) lowers the top-1 error from {line['alone']}% to {line['together']}%: by "
        f"{line['gain']} points, an interval over the test images. The paper, on ImageNet: {line['paper']}.\n"
        for line in page["ensembles"]
    ]
    if several := [
        line for line in page["others"] if not line["in_study"] and not line["verdict"].startswith("proxy: one")
    ]:
        lines += ["<details><summary>Proxies of other claims, with several seeds</summary>", ""]
        lines += [_table(several, "says", "paper", "here", "interval", "where", "verdict"), "", "</details>"]
    counted: dict[str, list[str]] = {}
    for line in page["rows"]:
        if line["kind"] == "count":
            counted.setdefault(line["answers"][0]["verdict"].removeprefix("counted: "), []).append(line["short"])
    properties = "; ".join(f"{', '.join(names)}: {word}" for word, names in counted.items())
    missing, proxies, others = (
        ", ".join(line["short"] for line in page["rows"] if line["status"] == word)
        for word in ("not run", "proxy only", "not comparable")
    )
    lines += [
        "",
        f"<details><summary>Counted on the net, and not run</summary>\n\nCounted: {properties}.\n\nProxies only: {proxies}.\n\n"
        f"Results that cannot be compared with the paper's: {others}.\n\n"
        f"Not run: {missing}.",
        "",
    ]
    for data in ("photos", "imagenette"):
        own = [r for r in page["results"] if r.get("data") == data and r["net"] == "alexnet" and "members" not in r]
        groups: dict[str, list[Result]] = {}
        for r in own:
            if r.get("experiment") != "ablations":
                what = (
                    SCALES.get(r.get("scale", ""), ""),
                    "recipe=" + r["recipe"],
                    r["ablation"],
                    *r.get("options", ()),
                    f"{r['epochs']} epochs",
                    PRECISIONS.get(r["precision"], r["precision"]),
                )
                groups.setdefault(", ".join(part for part in what if part not in ("", "none")), []).append(r)
        if groups:
            errors = "; ".join(f"{what}: {_mean_errors(of_what)}" for what, of_what in groups.items())
            lines.append(f"Top-1 error on `{data}` (ten classes), one view / ten crops, in percent: {errors}.")
    return "\n".join([*lines, "</details>", "", f"{summary(page)}."])
