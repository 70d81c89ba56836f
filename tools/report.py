"""Show runs on one page for the browser: python tools/report.py runs=results/runs [output=report.html] [max_mb=16]"""

from blemish.cli import tool

if __name__ == "__main__":
    tool("report")
