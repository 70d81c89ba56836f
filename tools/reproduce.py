"""Run a paper's own protocol and compare it with its tables: python tools/reproduce.py paper=padim [categories=[screw]] [data.root=…]"""

from blemish.cli import tool

if __name__ == "__main__":
    tool("reproduce")
