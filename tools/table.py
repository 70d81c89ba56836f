"""Collect finished runs into a table: python tools/table.py runs=results/runs [by=category] [output=FILE.csv] [latex=FILE]"""

from blemish.cli import tool

if __name__ == "__main__":
    tool("table")
