"""Collect finished runs into a table: python tools/table.py runs=results/runs [readme=README.md] [by=category] [latex=FILE]"""

from blemish.cli import tool

if __name__ == "__main__":
    tool("table")
