"""Tell the years of ILSVRC apart by the names of archives and numbered images."""

import re
from pathlib import Path

from alexnet_repro.data.listing import Account, File
from alexnet_repro.errors import UserError

YEAR = re.compile(r"ILSVRC(\d{4})_(?=img|images|train|val|test)")


def of_year(
    path: Path, files: list[File], folders: set[str], year: int | None, account: Account
) -> tuple[list[File], set[str]]:
    """Return the files and folders of a year of ILSVRC, and those whose names have none; leave out others.

    Raises UserError if all years in names are others, or if there are several years and no ``year``.
    """
    years = {int(found) for found in YEAR.findall(path.name)}
    year_of = {file: int(found[0]) for file in files if (found := YEAR.findall(file.name))}
    years |= set(year_of.values())
    if year is None:
        if len(years) > 1:
            raise UserError(
                f"{path} holds ILSVRC of several years: {', '.join(map(str, sorted(years)))}",
                "move one of them to another folder, or name the data set: data=ilsvrc2010 or data=ilsvrc2012",
            )
        return files, folders
    if years and year not in years:
        raise UserError(
            f"{path} holds ILSVRC of {', '.join(map(str, sorted(years)))}, not of {year}",
            f"choose data=ilsvrc{min(years)}, or set source to ILSVRC{year}",
        )
    for file, other in year_of.items():
        if other != year:
            account.leave_out(f"files of ILSVRC {other}", file.name)
    return (
        [file for file in files if year_of.get(file, year) == year],
        {name for name in folders if not (found := YEAR.findall(name)) or int(found[0]) == year},
    )
