"""What a run came to: report.json, report.html and the table on the terminal, all from one plain dict.

The dict is the truth: what is shown is computed from it here and nowhere else, so a report can be made again from
report.json.
"""
