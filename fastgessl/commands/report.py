"""`fastgessl report`: write one HTML page on a run, or on several with a comparison."""

from pathlib import Path

from fastgessl.recipes import Parser


def main(words: list[str]) -> None:
    """Run the command. UsageError for what cannot be done."""
    parser = Parser(program="report", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several are compared"
    )
    parser.add_argument(
        "--out", type=Path, help="file to write (default: report.html in the folder of the first run)"
    )
    given = parser.parse_args(words)
    from fastgessl.report import write_report

    print(write_report(given.runs, given.out))
