"""The report of a preparation: from merged tallies to REPORT.md, pictures and sheets; agreement of labels (docs/report.md)."""
